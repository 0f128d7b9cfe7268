"""The notebooks' code runs, cell after cell, with tiny models under the names it uses; what they show was run once."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig, attach
from tests.create_training_data.words import word_tokenizer
from tests.docs.world import tiny_world
from tests.tiny import tiny_base

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STAND_INS = {
    f'load("{BASE}"': 'load("base"',
    "layers.14": "layers.1",
    "steps=300": "steps=3",
    "max_new_tokens=16": "max_new_tokens=3",
}


def cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """outputs/quickstart, reviews.csv, and a base."""
    path = tmp_path_factory.mktemp("notebooks")
    base, tokenizer = tiny_base(), word_tokenizer()
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    config = SparseAutoencoderConfig(
        d_in=base.config.hidden_size, d_sae=64, activation="topk", k=8, layer=1, concepts={"positive sentiment": 0}
    )
    attach(str(path / "base"), [SparseAutoencoder(config)], path / "outputs" / "quickstart")
    draw = random.Random(0)
    with (path / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(40):
            words = ["good", "warm"] if number % 2 else ["bad", "dull"]
            rows.writerow([" ".join(draw.choices([*words, "the", "film"], k=8)), number % 2])
    return path


@pytest.fixture
def place(notebook: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a notebook runs: `find` beside a Hub that has the SAE it names."""
    if notebook.stem != "find":
        yield request.getfixturevalue("folder")
        return
    with tiny_world(tmp_path) as world:
        yield world.folder


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of(notebook: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict = {}
    for number, cell in enumerate(cells(notebook, "code")):
        source = "".join(cell["source"])
        for written, tiny in STAND_INS.items():
            source = source.replace(written, tiny)
        for line in source.splitlines():
            assert "sae_transformers" not in line or line.startswith("from sae_transformers import "), line
        exec(compile(source, f"{notebook.name}: cell {number}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_were_kept_and_hold_nothing_of_a_machine(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert all(cell["execution_count"] == number for number, cell in enumerate(code, 1))
    shown = json.dumps([cell["outputs"] for cell in code])
    assert "Error" not in shown and "Traceback" not in shown
    for place in ("/root", "/home", "/tmp", "/work", "site-packages"):  # noqa: S108
        assert place not in shown


def test_there_is_one_to_find_to_read_to_steer_and_to_train() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["find", "read", "steer", "train_and_publish"]
