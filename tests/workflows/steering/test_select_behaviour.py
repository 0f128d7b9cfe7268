"""`select_behaviour` on loaded objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers import SelectBehaviourSettings, load, select_behaviour
from sae_transformers.workflows.loading import Loaded
from tests.conflict_questions import write_selection_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_selection_files(tmp_path_factory.mktemp("select"), with_questions=False)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder / "base", str(folder / "sae1"))


def test_prompts_in_memory_and_files_give_the_same(loaded: Loaded, folder: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = loaded
    settings = SelectBehaviourSettings(count=6, strength=3.0, samples=2, max_new_tokens=4, activation="relu")
    reports: list[tuple[int, int]] = []
    a, b = ((folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in "ab")
    result = select_behaviour(
        model, tokenizer, a, b, settings, progress=lambda done, total: reports.append((done, total))
    )
    other = select_behaviour(model, tokenizer, folder / "a.txt", folder / "b.txt", settings)
    assert result.to_dict() == other.to_dict()
    assert reports[-1] == (12, 12)  # two prompts of each behaviour, three times
    assert len(result.steering["a"].edits) == 6 and sum(map(len, result.selected[0])) == 6
    assert result.auroc[0] is not None and result.auroc[0] > 0.8
    assert list(result.to_frame().columns) == ["prompt", "unsteered", "towards A", "towards B"]
    assert "auroc" in result._repr_html_() and "towards B" in result._repr_html_()
    result.save(tmp_path, model="b")
    assert not model.steering
    steered = load(tmp_path / "model").model
    assert steered.steering.to_dict() == result.steering["b"].to_dict()


def test_without_held_out_prompts(loaded: Loaded, folder: Path) -> None:
    model, tokenizer, _ = loaded
    settings = SelectBehaviourSettings(held_out=0.0, activation="relu")
    result = select_behaviour(model, tokenizer, folder / "a.txt", folder / "b.txt", settings)
    assert result.auroc == [None] and not result.prompts and not result.answers
    assert result.model is not model  # its SAEs select nothing


def test_refusals(loaded: Loaded) -> None:
    model, tokenizer, _ = loaded
    with pytest.raises(ValueError, match="four prompts or more. Received: 2 in `prompts_b`"):
        select_behaviour(model, tokenizer, ["w1"] * 4, ["w1", " ", "w2"])
    with pytest.raises(ValueError, match="`positions` must be one of"):
        SelectBehaviourSettings(positions="first")
    with pytest.raises(ValueError, match="`held_out` must be a share below 1"):
        SelectBehaviourSettings(held_out=1.0)
