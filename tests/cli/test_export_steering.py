"""The verb `export-steering`: a control vector and a plain checkpoint, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.workflows.steering.export.gguf_files import read_control_vector
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")
STEERING = '{"edits": [{"feature": 5, "op": "direction", "value": 2.0}]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, k=4).save_pretrained(folder / "sae")
    (folder / "steering.json").write_text(STEERING, encoding="utf-8")
    return folder


def export(folder: Path, out: Path, *options: object) -> Result:
    asked = ["export-steering", folder / "base", out, "--sae", folder / "sae", *options]
    return CliRunner().invoke(app, [str(one) for one in asked])


def test_both_are_written(folder: Path, tmp_path: Path) -> None:
    result = export(folder, tmp_path / "v.gguf", "--steering", folder / "steering.json")
    assert result.exit_code == 0, result.output
    assert "--control-vector" in result.stdout
    assert torch.equal(read_control_vector(tmp_path / "v.gguf").directions[1], 2 * tiny_sae(layer=1).W_dec[5].detach())
    result = export(folder, tmp_path / "baked", "--steering", STEERING, "--to", "baked_bias")
    assert result.exit_code == 0 and "AutoModelForCausalLM.from_pretrained" in result.stdout, result.output
    bias = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").model.layers[1].mlp.down_proj.bias
    assert torch.equal(bias.detach(), 2 * tiny_sae(layer=1).W_dec[5].detach())
    assert AutoTokenizer.from_pretrained(tmp_path / "baked")("w7").input_ids == [11]


def test_what_cannot_be_said_is_a_line(folder: Path, tmp_path: Path) -> None:
    relative = STEERING.replace('"value"', '"unit": "norm", "value"')
    result = export(folder, tmp_path / "v.gguf", "--steering", relative)
    assert result.exit_code == 2 and "edits[0].unit='norm'" in " ".join(result.stderr.split())
    result = export(folder, tmp_path / "v.gguf", "--steering", STEERING, "--to", "onnx")
    assert result.exit_code == 2 and "--to must be one of gguf, baked_bias" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
