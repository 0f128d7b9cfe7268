"""The verbs `detect` and `steer`, from files to a model that steers by itself."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM, Steering
from sae_transformers.cli import app
from sae_transformers.create_training_data.concept_sets import ConceptSet, Example, write_concept_sets
from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.workflows.loading import read_steering
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae


def words(draw: random.Random, concept: bool) -> str:
    return " ".join([*draw.choices(WORDS[:4] if concept else WORDS[4:8], k=4), *draw.choices(WORDS[20:], k=4)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("steer"), random.Random(0)
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(folder / "base")
    for number, layer in enumerate((1, 2)):
        tiny_sae(seed=number + 1, layer=layer, site="resid_post", concepts={"sea": 9}).save_pretrained(
            folder / f"sae{number}"
        )
    rows = [{"text": words(draw, i % 2 == 1), "label": i % 2} for i in range(40)]
    for name, found in (("texts", rows), ("plain", [{"text": row["text"]} for row in rows]), ("ones", rows[1::2])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)
    (folder / "prompts.txt").write_text("".join(f"{words(draw, False)}\n" for _ in range(6)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def asking(command_line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def detect(folder: Path, *options: object, texts: str = "texts.csv", feature: object = 9) -> Result:
    given = ("detect", folder / "base", folder / texts, "--sae", folder / "sae0", "--feature", feature)
    return run(*given, "--max-length", 32, *options)


def test_detect_scores_texts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "scores.csv"
    result = detect(folder, "--out", out, "--tokens-per-batch", 56, "--pre-activations")
    assert result.exit_code == 0, result.output
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == list(range(40)) and list(rows[0]) == ["row", "score", "label"]
    model: Any = SaeForCausalLM.from_base(tiny_base(vocab_size=94), saes=[tiny_sae(layer=1, site="resid_post")]).eval()
    with (folder / "texts.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    for place in (0, 17):
        ids = word_tokenizer()(texts[place], return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids, output_sae_inputs=True).sae_inputs[0]
        expected = float(model.saes[0].encode_pre_acts(hidden)[0, 1:, 9].detach().mean())
        assert float(rows[place]["score"]) == pytest.approx(expected, rel=1e-3)
    scores = torch.tensor([float(row["score"]) for row in rows])
    told = auroc(scores, torch.tensor([int(row["label"]) for row in rows]))
    assert f"20 of 40 labelled texts have label 1: AUROC {told:.3f}" in result.stdout and "F1 0." in result.stdout
    assert (
        detect(folder, "--pre-activations", feature="sea").stdout.splitlines()[-2:] == result.stdout.splitlines()[-2:]
    )
    assert WORDS[0] + " " not in result.output  # numbers, no texts


def test_detect_without_two_labels_tells_no_auroc(folder: Path) -> None:
    plain = detect(folder, texts="plain.csv")
    assert plain.exit_code == 0 and "40 texts" in plain.stdout and "AUROC" not in plain.stdout
    ones = detect(folder, texts="ones.csv")
    assert ones.exit_code == 0 and "the 20 labels are all 1" in ones.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--feature", "64"], "64"),
        (["--feature", "joy"], "joy"),
        (["--text-column", "no"], "column 'no'"),
        (["--max-length", "129"], "from 2 to 128"),
        (["--pooling", "sum"], "pooling='sum'"),
        (["--skip-first", "8"], "after the first 8"),
    ],
)
def test_mistakes_of_detect(folder: Path, options: list, told: str) -> None:
    result = detect(folder, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]


def steer(folder: Path, out: Path, *options: object, labelled: object = "texts.csv") -> Result:
    given = ("steer", folder / "base", folder / str(labelled), "--sae", folder / "sae0", "--sae", folder / "sae1")
    usual = ("--prompts", folder / "prompts.txt", "--out", out, "--max-new-tokens", 6, "--max-length", 32)
    return run(*given, *usual, "--top", 2, "--pool", 6, *options)


def test_steer_searches_calibrates_and_saves(folder: Path, tmp_path: Path) -> None:
    loose = ["--perplexity-ratio", "1e9", "--strengths", "0.5,2,8", "--ops", "direction,set"]
    result = steer(folder, tmp_path, *loose)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {row["sae"] for row in record["candidates"]} == {0, 1} and len(record["candidates"]) == 4
    assert all(row["auroc"] > 0.5 and 0 <= row["output_score"] <= 1 for row in record["candidates"])
    assert len(record["curve"]) == 4 * 2 * 3 and record["prompts"] == 6
    chosen = max(record["curve"], key=lambda point: (point["score"], -point["perplexity"]))
    assert chosen["score"] > record["unsteered"]["score"] and record["steering"] == chosen["steering"]
    assert len(record["report"]) == 2 and "(chosen)" in result.stdout
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    written = Steering.from_json((tmp_path / "steering.json").read_text(encoding="utf-8"))
    assert model.steering == written == Steering.from_dict(record["steering"])
    for file in ("steering.json", "report.json"):
        assert read_steering(tmp_path / file) == read_steering((tmp_path / file).read_text()) == written
    assert len(model.saes) == 2
    ids = torch.tensor([[5, 6, 7]])
    plain = tiny_base(vocab_size=94)(input_ids=ids).logits
    assert not torch.allclose(model(input_ids=ids).logits, plain)
    assert torch.allclose(model(input_ids=ids, steering=False).logits, plain, atol=1e-5)
    again = steer(folder, tmp_path / "again", *loose)
    assert json.loads((tmp_path / "again" / "report.json").read_text(encoding="utf-8")) == record, again.output
    assert WORDS[0] + " " not in result.output and WORDS[0] + " " not in (tmp_path / "report.json").read_text()


def test_steer_selects_by_effect(folder: Path, tmp_path: Path) -> None:
    loose = ("--perplexity-ratio", "1e9", "--strengths", "2", "--ops", "direction")
    result = steer(folder, tmp_path, *loose, "--selection", "effect", "--outcome-samples", 4)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record["selection"] == "effect" and {row["sae"] for row in record["candidates"]} == {0, 1}
    for row in record["candidates"]:
        assert set(row) == {"sae", "feature", "auroc", "delta_confidence", "correlation"}
        assert -1 <= row["correlation"] <= 1
    wrong = steer(folder, tmp_path, "--selection", "effects")
    assert wrong.exit_code == 2 and "selection='effects'" in wrong.output


def test_a_stopped_search_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--perplexity-ratio", "1e9", "--strengths", "0.5,2", "--ops", "direction", "--batch-size", "6"]
    original, calls = SaeForCausalLM.generate, []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("in place of a kill")
        return original(*given, **more)

    monkeypatch.setattr(SaeForCausalLM, "generate", counted)
    stop = 0
    assert steer(folder, tmp_path / "whole", *options).exit_code == 0
    whole, stop = len(calls), len(calls) + 4
    assert steer(folder, tmp_path / "out", *options).exit_code != 0
    stop = 0
    result = steer(folder, tmp_path / "out", *options)
    assert result.exit_code == 0 and "Went on after 3 parts of" in result.stdout, result.output
    assert len(calls) == 2 * whole + 1
    told = [(tmp_path / name / "report.json").read_text(encoding="utf-8") for name in ("whole", "out")]
    assert told[0] == told[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "report.json", "steering.json"]


def test_steer_without_a_strength_within_the_budget_saves_no_steering(folder: Path, tmp_path: Path) -> None:
    result = steer(
        folder, tmp_path, "--perplexity-ratio", "1e-9", "--lower", "--ops", "scale,ablate", "--selection", "input"
    )
    assert result.exit_code == 0, result.output
    assert "Warning: No steering was chosen" in result.stdout
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record["steering"]["edits"] == [] and record["lower"] and len(record["curve"]) == 8
    assert {point["steering"]["edits"][0]["value"] for point in record["curve"]} == {0.0, None}
    assert not read_steering(tmp_path / "steering.json") and not (tmp_path / "model").exists()
    assert "from_pretrained" not in result.stdout
    assert "no model was saved. What may help: more features (--top 4), another --selection" in result.stdout
    assert "a --perplexity-ratio above 1e-09" in result.stdout
    (tmp_path / "model").mkdir()
    again = steer(folder, tmp_path, "--perplexity-ratio", "1e-9", "--lower", "--ops", "scale", "--selection", "input")
    assert "no model was saved; the one there is of an earlier run. What may help" in again.stdout


def test_steer_asks_a_judge(folder: Path, tmp_path: Path) -> None:
    def rate(body: dict[str, Any]) -> str:
        return f"Rating: [[{min(2, len(set(last_user_text(body).split())) % 3)}]]"

    with FakeOpenAI(rate) as server:
        options = ["--scorer", "judge", "--llm", "m", "--llm-url", server.url, "--cache", tmp_path / "cache"]
        result = steer(
            folder, tmp_path, *options, "--judge-concept", "ships", "--strengths", "1", "--ops", "direction"
        )
        assert result.exit_code == 0, result.output
        assert server.sent and all("Concept: ships" in last_user_text(body) for body in server.sent)


def test_old_spellings_of_steer_are_taken_with_a_note(folder: Path, tmp_path: Path) -> None:
    old = ["--perplexity-limit", "1e9", "--rows-at-once", 4, "--plain", "--samples", 1, "--repetition-limit", 0.5]
    result = steer(folder, tmp_path, *old, "--strengths", "2", "--ops", "direction", "--selection", "input")
    assert result.exit_code == 0, result.output
    notes = ["--perplexity-ratio", "--batch-size", "--no-chat", "--samples-per-prompt", "--added-repetition"]
    assert all(f"is now {note}." in result.stderr for note in notes)
    new = ["--perplexity-ratio", "1e9", "--batch-size", 4, "--no-chat", "--added-repetition", 0.5]
    again = steer(folder, tmp_path / "new", *new, "--strengths", "2", "--ops", "direction", "--selection", "input")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "report.json").read_text() == (tmp_path / "new" / "report.json").read_text()


def test_a_saved_model_is_searched_too(folder: Path, tmp_path: Path) -> None:
    options = ["--strengths", "2", "--ops", "direction", "--perplexity-ratio", "1e9", "--max-new-tokens", 6]
    usual = ["--prompts", folder / "prompts.txt", *options, "--top", 2, "--pool", 6]
    first = run("steer", folder / "base", folder / "texts.csv", "--sae", folder / "sae0", "--out", tmp_path, *usual)
    assert first.exit_code == 0, first.output
    again = run("steer", tmp_path / "model", folder / "texts.csv", "--out", tmp_path / "again", *usual)
    assert again.exit_code == 0, again.output
    reports = [(tmp_path / name / "report.json").read_text() for name in (".", "again")]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--scorer", "gpt"], "'gpt'"),
        (["--scorer", "judge"], "--llm"),
        (["--ops", "shrink"], "'shrink'"),
        (["--selection", "best"], "selection='best'"),
        (["--statistic", "f"], "statistic='f'"),
        (["--top", "0"], "--top=0"),
        (["--concept", "1"], "[0, 1). Received: 1"),
        (["--max-new-tokens", "125"], "context of 128"),
        (["--max-length", "999"], "from 2 to 128"),
        (["--hook-point", "layers.7.resid_post"], "7"),
        (["--strengths", "a,b"], "'a,b'"),
        (["--prompts", "nothing.txt"], "nothing.txt"),
    ],
)
def test_mistakes_of_steer(folder: Path, tmp_path: Path, options: list, told: str) -> None:
    result = steer(folder, tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_label_only_is_refused(folder: Path, tmp_path: Path) -> None:
    result = steer(folder, tmp_path / "out", labelled="ones.csv")
    assert result.exit_code == 2 and "Both labels must occur" in result.stderr


def test_a_folder_of_concept_sets_is_searched(folder: Path, tmp_path: Path) -> None:
    examples = {"positive": [Example("", f"w1 w2 w{n} with") for n in range(4)]}
    shared = {"negative": [Example("", f"w5 w6 w{n} without") for n in range(5)]}
    sets = [ConceptSet(name, {**examples, **shared}) for name in ("the sea", "loops")]
    write_concept_sets(sets, tmp_path / "sets")
    options = ["--concept", 1, "--strengths", "2", "--ops", "direction"]
    found = steer(folder, tmp_path / "out", *options, labelled=tmp_path / "sets")  # an absolute path replaces
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["concept"] == "loops"
