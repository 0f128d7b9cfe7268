"""The verbs `select-knowledge` and `select-behaviour`, on a tiny model whose answers become the accepted ones."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.cli import app
from sae_transformers.cli.select_knowledge import best_setting
from sae_transformers.create_training_data.knowledge_conflict import (
    STYLES,
    ConflictQuestion,
    conflict_prompt,
    demonstrations,
    split_pool,
)
from sae_transformers.evaluation import short_answers as short_answers_module
from sae_transformers.evaluation.short_answers import short_answers
from sae_transformers.training.functional_features import read_functional_features
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")

SIZES = {"pool": 20, "dev": 3, "test": 4, "shots": 1, "split-seed": 42, "seeds": "1,2"}


def words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(WORDS, k=n))


def answered(base: Any, questions: list[ConflictQuestion]) -> list[ConflictQuestion]:
    """The questions with what the model answers as the context's answer, or as the remembered one, in turn.

    The demonstrations are of other questions, so that no prompt changes by this.
    """
    pool, rest = split_pool(questions, n_groups=20, seed=42)
    shown = pool[:4]
    result = list(questions)
    asked = [*enumerate(pool[4:]), *((4 * number, row) for number, row in enumerate(rest))]
    for number, row in asked:
        told = []
        for style in STYLES:
            first = demonstrations(questions, shown, 1, seed=42 + number % 4)
            prompt = conflict_prompt(questions[row], [questions[i] for i in first], style)
            told += short_answers(base, word_tokenizer(), [prompt])
        accepted = tuple(text or "none" for text in told)
        name = "sub_answer" if number % 2 else "org_answer"
        result[row] = questions[row]._replace(**{name: accepted})
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("select"), random.Random(0)
    word_tokenizer().save_pretrained(folder / "base")
    base = tiny_base(max_position_embeddings=256)
    base.save_pretrained(folder / "base")
    for layer in (0, 1):
        tiny_sae(seed=layer + 1, layer=layer, site="resid_post").save_pretrained(folder / f"sae{layer}")
    questions = [
        ConflictQuestion(f"{words(draw, 4)} {i}", words(draw, 6), (words(draw, 1),), words(draw, 6), (words(draw, 2),))
        for i in range(30)
    ]
    rows = [one._asdict() for one in answered(base, questions)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, word in (("a", "w3"), ("b", "w70")):
        lines = [f"{words(draw, 5)} {word} {word}" for _ in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def knowledge(folder: Path, out: Path, *options: object, **sizes: object) -> Result:
    given = [part for name, value in {**SIZES, **sizes}.items() for part in (f"--{name}", value)]
    start = ["select-knowledge", folder / "base", folder / "questions.jsonl", "--sae", folder / "sae1", "--out", out]
    return run(*start, *given, *options)


def test_knowledge(folder: Path, tmp_path: Path) -> None:
    result = knowledge(folder, tmp_path, "--proportion", "0.2,0.5", "--degree", 2, "--save-model", "memory")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    sides = ("context", "memory")
    methods = [f"{name}, to {side}" for side in sides for name in ("demonstrations", "instruction", "CAD")]
    methods += [f"{name}, to {side}" for side in sides for name in ("activation addition", "task vector")]
    assert list(found["methods"]) == ["none", "SpARE, to context", "SpARE, to memory", *methods]
    assert all(len(rows) == 2 for rows in found["methods"].values())
    assert min(found["facts"]["answered"].values()) >= 20  # of 24; an empty answer is nobody's
    assert found["facts"]["learnt from"] == found["facts"]["answered"]
    assert {(row["towards"], row["proportion"]) for row in found["tried"]} == {
        (s, k) for s in sides for k in (0.2, 0.5)
    }
    features = read_functional_features(tmp_path / "features-0.safetensors")
    steering = {
        side: Steering.from_dict(json.loads((tmp_path / f"towards-{side}.json").read_text())) for side in sides
    }
    for side, values in (("context", features.values_a), ("memory", features.values_b)):
        raised = [edit for edit in steering[side].feature_edits if edit.op == "at_least"]
        for edit in raised:
            assert edit.value == pytest.approx(2 * float(values[int(edit.feature or 0)]))
        assert steering[side].positions == "last_prompt"
    ids = torch.tensor([word_tokenizer()("w1 w2 w3 w9")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    fresh = SaeForCausalLM.from_base(base, saes=[SparseAutoencoder.from_pretrained(folder / "sae1")])
    with torch.no_grad():
        expected = fresh(ids, steering=steering["memory"]).logits
        torch.testing.assert_close(model(ids).logits, expected)
        assert not torch.equal(expected, fresh(ids, steering=False).logits)


def test_knowledge_from_likelihood_and_losses_at_two_layers(folder: Path, tmp_path: Path) -> None:
    more = [
        "--sae",
        folder / "sae0",
        "--layers",
        "0+1,1",
        "--grouping",
        "likelihood",
        "--weighting",
        "loss",
        "--legacy",
    ]
    result = knowledge(folder, tmp_path, *more, "--baselines", "", "--proportion", 0.3, "--degree", 1, seeds=3)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["methods"]) == ["none", "SpARE, to context", "SpARE, to memory"]
    assert sum(found["facts"]["learnt from"].values()) == 48
    assert {tuple(row["saes"]) for row in found["tried"]} == {(0, 1), (1,)}
    assert all((tmp_path / f"features-{n}.safetensors").exists() for n in (0, 1))


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


def test_when_all_settings_break_answers_that_is_said(folder: Path, tmp_path: Path) -> None:
    options = ["--baselines", "", "--proportion", 0.9, "--degree", "50,60", "--max-broken", 0]
    result = knowledge(folder, tmp_path, *options, seeds=1)
    assert result.exit_code == 0, result.output
    tried = json.loads((tmp_path / "results.json").read_text())["tried"]
    assert min(row["neither"] for row in tried if row["towards"] == "memory") > 0
    assert "to memory: every setting leaves more dev questions without either answer than --max-broken 0" in (
        result.output
    )


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before is not asked again, and what was not is; the results are those of one run."""
    options = ["--baselines", "", "--proportion", 0.3, "--degree", 2]
    assert knowledge(folder, tmp_path, *options, seeds=1).exit_code == 0
    asked = []
    keep = short_answers_module.short_answers
    monkeypatch.setattr(
        short_answers_module,
        "short_answers",
        lambda m, t, prompts, **o: asked.append(len(prompts)) or keep(m, t, prompts, **o),
    )
    assert knowledge(folder, tmp_path, *options, seeds="1,2").exit_code == 0
    assert asked == [4, 4, 4]  # unsteered and both ways with the second seed's demonstrations
    assert knowledge(folder, tmp_path / "at once", *options, seeds="1,2").exit_code == 0
    first, second = (json.loads((path / "results.json").read_text()) for path in (tmp_path, tmp_path / "at once"))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baselines", "sea"], "Received: ['sea']"),
        (["--pool", 40], "at most 30"),
        (["--test", 20], "Outside the pool there are 10 questions. Received: --dev=3, --test=20."),
        (["--max-context", 1], "n_groups=20"),
        (["--proportion", "much"], "proportion='much'"),
        (["--layers", "0+3,x"], "numbers of 1 SAEs. Received: ['3', 'x']"),
        (["--scoring", "f1"], "scoring='f1'"),
        (["--grouping", "none"], "grouping='none'"),
        (["--weighting", "none"], "weighting='none'"),
        (["--activation", "gelu"], "activation='gelu'"),
        (["--save-model", "both"], "Received: 'both'"),
    ],
)
def test_knowledge_refuses(folder: Path, tmp_path: Path, options: list[object], message: str) -> None:
    result = knowledge(folder, tmp_path, "--baselines", "", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def behaviour(folder: Path, out: Path, *options: object) -> Result:
    start = ["select-behaviour", folder / "base", folder / "a.txt", folder / "b.txt", "--sae", folder / "sae1"]
    return run(*start, "--out", out, *options)


def test_behaviour(folder: Path, tmp_path: Path) -> None:
    result = behaviour(folder, tmp_path, "--count", 6, "--degree", 3, "--save-model", "b", "--activation", "relu")
    assert result.exit_code == 0, result.output
    told = re.search(r"what tells A from B.*?(\d\.\d{3})", result.output, re.DOTALL)
    assert told and float(told[1]) > 0.8  # the last word tells the groups apart, so features do
    steering = {s: Steering.from_dict(json.loads((tmp_path / f"towards-{s}.json").read_text())) for s in "ab"}
    assert {edit.feature for edit in steering["a"].feature_edits} == {e.feature for e in steering["b"].feature_edits}
    assert len(steering["a"].edits) == 6
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert len(model.steering.edits) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 0], "count=0"),
        (["--proportion", 2], "proportion=2.0"),
        (["--positions", "first"], "positions='first'"),
        (["--place", "layers.1.mlp_up"], "mlp_up"),
    ],
)
def test_behaviour_refuses(folder: Path, tmp_path: Path, options: list[object], message: str) -> None:
    result = behaviour(folder, tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_behaviour_needs_two_groups(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("w1\n\n", encoding="utf-8")
    result = run(
        "select-behaviour", folder / "base", folder / "a.txt", tmp_path / "empty.txt", "--sae", folder / "sae1"
    )
    assert result.exit_code == 2
    assert "Received: 1 in" in " ".join(result.output.split())
    long = "\n".join(["w1 " * 400] * 6)
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    result = run(
        "select-behaviour", folder / "base", folder / "a.txt", tmp_path / "long.txt", "--sae", folder / "sae1"
    )
    assert result.exit_code == 2
    assert "at most 256 tokens" in " ".join(result.output.split())
