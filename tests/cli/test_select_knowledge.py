"""The verb `select-knowledge`, on a tiny model whose answers become the accepted ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM, SparseAutoencoder, Steering, attach
from sae_transformers.cli import app
from sae_transformers.training.steering.functional_features import read_functional_features
from sae_transformers.workflows.steering.knowledge import answers as answers_module
from tests.conflict_questions import write_selection_files
from tests.create_training_data.words import word_tokenizer
from tests.training.steering.test_published_features import write_cache

pytestmark = pytest.mark.usefixtures("command_line")

SIZES = {"pool": 20, "dev": 3, "test": 4, "shots": 1, "split-seed": 42, "seeds": "1,2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_selection_files(tmp_path_factory.mktemp("select"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def knowledge(folder: Path, out: Path, *options: object, **sizes: object) -> Result:
    given = [part for name, value in {**SIZES, **sizes}.items() for part in (f"--{name}", value)]
    start = ["select-knowledge", folder / "base", folder / "questions.jsonl", "--sae", folder / "sae1", "--out", out]
    return run(*start, *given, *options)


def test_knowledge(folder: Path, tmp_path: Path) -> None:
    result = knowledge(folder, tmp_path, "--proportions", "0.2,0.5", "--strengths", 2, "--save-model", "memory")
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
    result = knowledge(folder, tmp_path, *more, "--baselines", "", "--proportions", 0.3, "--strengths", 1, seeds=3)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["methods"]) == ["none", "SpARE, to context", "SpARE, to memory"]
    assert sum(found["facts"]["learnt from"].values()) == 48
    assert {tuple(row["saes"]) for row in found["tried"]} == {(0, 1), (1,)}
    assert all((tmp_path / f"features-{n}.safetensors").exists() for n in (0, 1))


def test_when_all_settings_break_answers_that_is_said(folder: Path, tmp_path: Path) -> None:
    options = ["--baselines", "", "--proportions", 0.9, "--strengths", "50,60", "--max-broken", 0]
    result = knowledge(folder, tmp_path, *options, seeds=1)
    assert result.exit_code == 0, result.output
    tried = json.loads((tmp_path / "results.json").read_text())["tried"]
    assert min(row["neither"] for row in tried if row["towards"] == "memory") > 0
    assert "to memory: every setting leaves more dev questions without either answer than max_broken (0) allows" in (
        result.output
    )


@pytest.mark.slow
def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before is not asked again, and what was not is; the results are those of one run."""
    options = ["--baselines", "", "--proportions", 0.3, "--strengths", 2]
    assert knowledge(folder, tmp_path, *options, seeds=1).exit_code == 0
    asked = []
    keep = answers_module.short_answers
    monkeypatch.setattr(
        answers_module,
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
        (["--baselines", "sky"], "Received: ['sky']"),
        (["--pool", 40], "at most 30"),
        (["--test", 20], "Outside the pool there are 10 questions. Received: --dev=3, --test=20."),
        (["--max-context", 1], "n_groups=20"),
        (["--proportions", "much"], "--proportions must be numbers, comma-separated. Received: 'much'"),
        (["--layers", "0+3,x"], "numbers of 1 SAEs. Received: ['3', 'x']"),
        (["--scoring", "f1"], "scoring='f1'"),
        (["--grouping", "none"], "grouping='none'"),
        (["--weighting", "none"], "weighting='none'"),
        (["--activation", "gelu"], "activation='gelu'"),
        (["--save-model", "both"], "Received: --save-model='both'"),
        (["--dev", 0, "--strengths", "1,2"], "--dev needs questions to choose between 10 settings on"),
        (["--max-broken", 2], "--max-broken must be a share, 0 to 1. Received: --max-broken=2.0"),
        (["--proportions", "0.2,1"], "--proportions must be in (0, 1). Received: --proportions=(0.2, 1.0)"),
    ],
)
def test_knowledge_refuses(folder: Path, tmp_path: Path, options: list[object], message: str) -> None:
    result = knowledge(folder, tmp_path, "--baselines", "", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_saved_model_and_old_spellings(folder: Path, tmp_path: Path) -> None:
    """A folder that `attach` wrote needs no --sae; the options' former names are taken with a note."""
    attach(str(folder / "base"), [folder / "sae1"], tmp_path / "model")
    plain = ["--baselines", "", "--dev", 0, "--seeds", 1]
    assert knowledge(folder, tmp_path / "new", *plain, "--proportions", 0.3, "--strengths", 2).exit_code == 0
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", value)]
    old = ["--proportion", 0.3, "--degree", 2, "--tokens-at-once", 4096]
    start = ["select-knowledge", tmp_path / "model", folder / "questions.jsonl", "--out", tmp_path / "old"]
    result = run(*start, *sizes, *plain, *old)
    assert result.exit_code == 0, result.output
    assert "--degree is now --strengths." in result.stderr
    new, found = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("new", "old"))
    assert found["methods"] == new["methods"] and found["chosen"] == new["chosen"]
    assert new["facts"]["model"] == str(folder / "base") and new["facts"]["sae"] == [str(folder / "sae1")]
    assert found["facts"]["model"] == str(tmp_path / "model") and found["facts"]["sae"] == []


def test_a_config_gives_defaults_and_needs_no_model(tmp_path: Path) -> None:
    """Its values hold where no option is given, also those of the model's argument."""
    cache = write_cache(tmp_path / "cache", (12, 13, 14, 15))
    out = tmp_path / "out"
    result = run("select-knowledge", "--config", "spare-llama-2-7b", "--features", cache, "--out", out)
    assert result.exit_code == 0, result.output
    assert "to memory: proportion 0.07, strength 2; 4 edits" in result.stdout
    assert json.loads((out / "results.json").read_text())["chosen"]["context"]["saes"] == [0, 1, 2, 3]
    options = ["--strengths", 3, "--towards", "memory", "--proportions", 0.85, "--feature-layers", "12,14"]
    result = run(
        "select-knowledge",
        "any",
        "--config",
        "spare-llama-2-7b",
        "--features",
        cache,
        "--out",
        tmp_path / "b",
        *options,
    )
    assert result.exit_code == 0, result.output
    assert "to memory: proportion 0.85, strength 3" in result.stdout and "layer 14: " in result.stdout
    assert sorted(file.name for file in (tmp_path / "b").glob("towards-*")) == ["towards-memory.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "spare-llama"], "own configs are spare-gemma-2-9b-context"),
        ([], "Expected questions, or --features, the folder of a published cache"),
        (["--features", "nowhere"], "Received: 'nowhere'"),
        (["--feature-layers", "3"], "Received: --feature-layers=(3,) and no features"),
        (["--towards", "both"], "Received: --towards=('both',)"),
        (["--save-model", "memory"], "--save-model needs questions"),
    ],
)
def test_a_selection_alone_refuses(tmp_path: Path, options: list[object], message: str) -> None:
    result = run("select-knowledge", "model", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
