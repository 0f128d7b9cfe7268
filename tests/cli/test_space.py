"""The verb `space`, from a published model to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.workflows.space import named_feature
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("command_line")


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["space", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_named_features() -> None:
    assert named_feature("joy = of = life=1:17") == ("joy = of = life", (1, 17)) and named_feature("a=3") == (
        "a",
        (0, 3),
    )
    for wrong in ("a", "=3", "a=", "a=x:3", "a=-1"):
        with pytest.raises(ValueError, match="Received"):
            named_feature(wrong)


def test_space(tmp_path: Path) -> None:
    model = tiny_model(concepts={"sea": 9})
    model.config.base_model_name_or_path = "tester/base"
    model.save_pretrained(tmp_path / "model")
    result = invoke(tmp_path / "model", "--out", tmp_path / "space", "--feature", "joy=17")
    assert "app.py" in result.stdout
    text = (tmp_path / "space" / "app.py").read_text()
    assert "'sea': (0, 9)" in text and "'joy': (0, 17)" in text
    wrong = invoke(tmp_path / "model", "--out", tmp_path / "other", "--feature", "joy=99", code=2)
    assert "'joy' at 0:99" in wrong.stderr and not (tmp_path / "other").exists()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "'gpt2'" in invoke(tmp_path / "model", "--out", tmp_path / "other", code=2).stderr
