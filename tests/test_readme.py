"""The README's Python code runs as it stands, on a tiny model in the folder it names; its pictures show its words."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig, attach
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base

README = Path(__file__).parents[1] / "README.md"


def test_code(tmp_path, monkeypatch, capsys):
    """The first block, with a tiny model under the folder that it names."""
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[:2]
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    names = {str(number): f"f{number}" for number in range(1, 64)}
    settings = {"concepts": {"positive sentiment": 0}, "feature_names": names}
    config = SparseAutoencoderConfig(d_in=32, d_sae=64, activation="topk", k=8, layer=1, **settings)
    attach(str(tmp_path / "base"), [SparseAutoencoder(config)], tmp_path / "outputs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102 (our own README)
    frame, *texts = capsys.readouterr().out.splitlines()
    assert frame.split() == output.split("\n")[0].split() == ["position", "token", "feature", "name", "value"]
    assert len([line for line in texts if "<unk>" in line]) >= 3  # the continuations


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_commands():
    """What `make` would run, and the extra that the first command installs."""
    text = README.read_text(encoding="utf-8")
    ends = {"demo": "sae-transformers quickstart", "test": "-m pytest"}
    assert re.findall(r"^make (\w+)", text, flags=re.MULTILINE) == list(ends)
    for target, end in ends.items():
        shown = subprocess.run(
            ["make", "--no-print-directory", "-n", target],
            cwd=README.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert end in shown.stdout.splitlines()[-1], shown.stdout
    extra, *verb = re.findall(r"^(?:pip install '\.\[(\w+)\]'|sae-transformers) *(\w*)", text, flags=re.MULTILINE)
    assert extra[0] in extras() and [name for _, name in verb] == ["quickstart"]


def extras():
    pyproject = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
    return re.findall(r"^(\w+) = ", section, flags=re.MULTILINE)


def test_the_picture_and_the_badges_show_what_the_text_says():
    spec = importlib.util.spec_from_file_location("draw_readme", README.parent / "docs" / "draw_readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.drawn().items():
        assert (README.parent / "docs" / "images" / name).read_text(encoding="utf-8") == text, name


def test_links_and_tree():
    text = README.read_text(encoding="utf-8")
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (root / target).exists(), target
    told = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = told.split("sae_transformers/\n", 1)[1].split("```", 1)[0]
    for folder in re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE):
        assert (root / "sae_transformers" / folder).is_dir(), folder
