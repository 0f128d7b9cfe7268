"""`select_knowledge` on loaded objects: results in memory and on disk, and a run that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sae_transformers import FeatureEdit, SelectKnowledgeSettings, Steering, load, select_knowledge
from sae_transformers.evaluation.generation.short_answers import Contrast
from sae_transformers.workflows.loading import Loaded
from sae_transformers.workflows.settings.select_knowledge import FeatureSelectionSettings, QuestionSplitSettings
from sae_transformers.workflows.steering.knowledge import answers as answers_module
from sae_transformers.workflows.steering.knowledge.answers import work_name
from sae_transformers.workflows.steering.knowledge.choice import best_setting
from tests.conflict_questions import write_selection_files
from tests.figures import drawn

SETTINGS = SelectKnowledgeSettings(
    QuestionSplitSettings(test=4, dev=3, pool=20, shots=1, seeds=(1, 2)),
    FeatureSelectionSettings(proportions=(0.3,), strengths=(1.0, 2.0)),
    baselines=("vectors",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_selection_files(tmp_path_factory.mktemp("select"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder / "base", str(folder / "sae1"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_in_memory_give_steering_and_metrics(
    loaded: Loaded, rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = loaded
    lines: list[str] = []
    reports: list[tuple[int, int]] = []
    result = select_knowledge(
        model,
        tokenizer,
        rows,
        SETTINGS,
        notice=lines.append,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert lines == result.summary() and lines[0].startswith("30 questions, 30 with")
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == reports[-1][1]
    assert set(result.steering) == {"context", "memory"} and result.questions == (30, 30)
    assert len(result.to_frame()) == len(result.methods) * 2
    assert [row["method"] for row in result.table()] == list(result.methods)
    assert "SpARE, to memory" in result._repr_html_()
    figures = drawn(monkeypatch)
    result.plot("a.png")
    (axes,) = figures[0].axes
    means = {
        name: [sum(row[metric] for row in rows) / len(rows) for metric in ("em_memory", "em_context")]
        for name, rows in result.methods.items()
    }
    points = [[float(line.get_xdata()[0]), float(line.get_ydata()[0])] for line, *_ in axes.containers]
    assert points == [pytest.approx(point) for point in means.values()]
    assert [text.get_text() for text in axes.texts] == list(means)
    result.save(tmp_path, model="context")
    assert json.loads((tmp_path / "results.json").read_text())["facts"]["seeds"] == [1, 2]
    steered = Steering.from_json((tmp_path / "towards-context.json").read_text())
    assert steered.to_dict() == result.steering["context"].to_dict()
    assert not model.steering  # the model that was given is as it was
    assert load(tmp_path / "model").model.steering.to_dict() == steered.to_dict()
    with pytest.raises(ValueError, match="`model` must be one of context, memory. Received: model='both'"):
        result.save(tmp_path, model="both")


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(
    loaded: Loaded, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = loaded
    once = replace(SETTINGS, questions=replace(SETTINGS.questions, seeds=(1,)))
    select_knowledge(model, tokenizer, str(folder / "questions.jsonl"), once, out=tmp_path)
    asked = []
    keep = answers_module.short_answers
    monkeypatch.setattr(
        answers_module,
        "short_answers",
        lambda m, t, prompts, **o: asked.append(len(prompts)) or keep(m, t, prompts, **o),
    )
    both = select_knowledge(model, tokenizer, str(folder / "questions.jsonl"), SETTINGS, out=tmp_path)
    assert asked == [4] * 7  # the second seed: unsteered, both sides, and four with vectors
    assert json.loads((tmp_path / "results.json").read_text())["facts"]["seeds"] == [1, 2]
    at_once = select_knowledge(model, tokenizer, str(folder / "questions.jsonl"), SETTINGS)
    assert repr(at_once.methods) == repr(both.methods)  # NaN equals itself there


def test_names_of_finished_work_do_not_change() -> None:
    """Runs that were begun by an earlier version go on by them."""
    options = {"max_new_tokens": 12, "steering": False}
    assert work_name("answers", "0123", ["a", "b"], (), options) == "answers-12f43c319efb41e2286ea6f9.json"
    steering = {"steering": Steering([FeatureEdit(0, 3, "add", 1.0)])}
    pairs = ([["x", "y"]],)
    contrast = {**options, "contrast": Contrast(["c", "d"], -0.8)}
    assert work_name("answers", "0123", ["a", "b"], (), contrast) == "answers-137a6a350ec19c24fcc6e272.json"
    assert work_name("likelihoods", "0123", ["a"], pairs, steering) == "likelihoods-b3ecd7115c56150f73f97050.json"


def test_what_is_not_there_is_said_before_a_question_is_asked(loaded: Loaded, rows: list[dict]) -> None:
    model, tokenizer, _ = loaded
    layers = replace(SETTINGS, selection=replace(SETTINGS.selection, layers=("0+3", "x")))
    asked: list[int] = []
    with pytest.raises(ValueError, match=r"numbers of 1 SAEs. Received: \['3', 'x'\]"):
        select_knowledge(model, tokenizer, rows, layers, progress=lambda done, _: asked.append(done))
    assert not asked
    with pytest.raises(ValueError, match="needs question, .* no sub_answer in row 1"):
        select_knowledge(model, tokenizer, [{**rows[0], "sub_answer": []}], SETTINGS)
    with pytest.raises(TypeError, match="Received: int"):
        select_knowledge(model, tokenizer, 3, SETTINGS)


def setting(memory: float, neither: float, likelier: float = 0.0) -> dict[str, float]:
    return {
        "em_memory": memory,
        "em_context": 1 - memory - neither,
        "neither": neither,
        "prefers_memory": likelier,
    }


def test_the_best_setting_does_not_break_answers() -> None:
    """Found on SmolLM2: no setting made it remember, so the one that broke most answers was taken."""
    broken, harmless, better = setting(0.0, 0.9, 0.8), setting(0.0, 0.5, 0.2), setting(0.2, 0.55, 0.1)
    assert best_setting([harmless, broken], "memory", most=0.6) == 0
    assert best_setting([harmless, broken], "memory", most=1.0) == 1  # the limit is what excludes it
    assert best_setting([harmless, better, broken], "memory", most=0.6) == 1
    assert best_setting([harmless, harmless], "memory", most=0.6) == 0  # the weaker of equals
    assert best_setting([broken, setting(0.05, 0.8)], "memory", most=0.6) == 1  # all break: the fewest
    assert best_setting([setting(0.3, 0.5), setting(0.1, 0.5)], "context", most=0.6) == 1
