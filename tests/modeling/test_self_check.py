"""`model.check()`, the verb, and the warning for releases that nobody tested."""

from __future__ import annotations

import pytest
import transformers
from typer.testing import CliRunner

from sae_transformers import SaeForCausalLM
from sae_transformers.cli import app
from sae_transformers.modeling import tested_releases
from tests.tiny import tiny_base, tiny_model, tiny_sae


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_sound_model_passes(architecture):
    model = tiny_model(architecture).train()
    before = model.generation_config.eos_token_id
    report = model.check()
    assert report and len(report.results) == 10, str(report)
    assert all(result.passed for result in report.results), str(report)
    assert model.training and model.generation_config.eos_token_id == before


def test_a_forward_pass_that_loses_the_cache_is_found(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("sae_transformers.modeling.steered_tokens._past_of", lambda *_: 0)
    failed = [result.name for result in model.check().failed]
    assert {"cached = uncached, positions='prompt'", "cached = uncached, positions=[(1, 3), (-2, None)]"} <= set(
        failed
    )
    assert "NO" in str(model.check())


def test_the_verb(tmp_path, command_line):
    tiny_base().save_pretrained(tmp_path / "base")
    SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)]).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "saved and loaded" in result.output and "NO" not in result.output
    assert CliRunner().invoke(app, ["check", str(tmp_path / "nothing")]).exit_code == 2


def test_a_newer_release_warns_once(monkeypatch):
    monkeypatch.setattr(tested_releases, "NEWEST", "5.11.0")
    tested_releases.warn_if_untested.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"5.11.0; this is {transformers.__version__}.*model.check"):
            tiny_model()
        tiny_model()
    finally:
        tested_releases.warn_if_untested.cache_clear()


@pytest.mark.parametrize(
    ("release", "expected"),
    [("5.12.0", False), ("5.24.3", False), ("5.25.0.dev0", True), ("5.11.2", True), ("6.0.0", True)],
)
def test_which_releases_are_untested(release, expected):
    assert tested_releases.untested(release) == expected
