"""`reduce_bias`, stopped anywhere, goes on to the files of an undisturbed run and does no part twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import BiasSettings, SaeForCausalLM, reduce_bias
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.latents.settings import ReadingSettings
from sae_transformers.workflows.steering.reduce_bias import BiasResult
from tests.cli.test_reduce_bias import WORDS, tokenizer
from tests.tiny import tiny_base, tiny_sae
from tests.workflows.steering.test_reduce_bias import DATA, texts

SETTINGS = BiasSettings(
    counts=(0, 1, 3), random_counts=(2,), op="clamp", max_loss=99, reading=ReadingSettings(8, tokens_per_batch=60),
    bootstrap=BootstrapSettings(resamples=10),
)  # fmt: skip


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


def run(
    out: Path | None, stop_at: int | None = None, settings: BiasSettings = SETTINGS
) -> tuple[BiasResult | None, int]:
    """The result, None where it was stopped, and how many passes of the base were done; of a model as a new process
    loads it."""
    saes, passes = [tiny_sae(layer=0, seed=2), tiny_sae(layer=1)], 0
    model = SaeForCausalLM.from_base(tiny_base(vocab_size=len(WORDS)), saes=saes).eval()

    def note(*_: Any) -> None:
        nonlocal passes
        if passes == stop_at:
            raise Stop
        passes += 1

    model.lm.register_forward_pre_hook(note)
    try:
        return reduce_bias(model, tokenizer(), texts(), DATA, settings, sae=1, out=out), passes
    except Stop:
        return None, passes


def saved(found: BiasResult | None, folder: Path) -> dict[str, Any]:
    """All that was saved, but for the seconds."""
    assert found is not None
    found.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["results.json", "steering.json"]
    results = json.loads((folder / "results.json").read_text())
    assert results["facts"].pop("seconds") > 0
    return {"results": json.dumps(results), "steering": (folder / "steering.json").read_bytes()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    found, most = run(None)
    _, passes = run(tmp_path_factory.mktemp("whole"))  # the parts that choose and report have the same pairs here
    assert 20 < passes < most
    return saved(found, tmp_path_factory.mktemp("undisturbed")), passes


SLOW = [pytest.param(i / 30, marks=pytest.mark.slow) for i in range(31)]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.98, *SLOW])
def test_a_stopped_run_goes_on(undisturbed: Any, share: float, tmp_path: Path) -> None:
    expected, whole = undisturbed
    nothing, first = run(tmp_path, stop_at=round(share * (whole - 1)))
    assert nothing is None and first < whole
    found, second = run(tmp_path)
    again, third = run(tmp_path)
    # A pass is a part, but for the first ones, which find the features together.
    assert third == 0 and (first + second == whole or (second == whole and first < 8))
    assert found is not None and found.summary()[0].startswith("Went on after ") == (second < whole)
    assert saved(again, tmp_path) == expected


def test_results_of_a_stopped_run_can_be_read(tmp_path: Path, undisturbed: Any) -> None:
    run(tmp_path, stop_at=undisturbed[1] - 1)
    assert json.loads((tmp_path / "results.json").read_text())["facts"] == {"complete": False}
    other, passes = run(tmp_path, settings=replace(SETTINGS, op="ablate"))  # begins anew
    assert other is not None and passes == undisturbed[1] and "Went on" not in other.summary()[0]
