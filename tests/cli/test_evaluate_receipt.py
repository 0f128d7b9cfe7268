"""`evaluate --suite receipt`: the steering with its receipt beside the record, taken up by models and cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_transformers import FeatureEdit, Gate, Receipt, SaeForCausalLM, Steering, evaluate, load
from sae_transformers.cli import app
from sae_transformers.evaluation.results import read_results
from sae_transformers.evaluation.suites import ReceiptSuite
from sae_transformers.hub_cards.facts import read_model
from sae_transformers.hub_cards.model_card import model_card
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

PUSH = Steering([FeatureEdit(feature=3, op="direction", value=0.3, unit="norm")], when=Gate(feature=9, above=0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("receipt")
    saes = [tiny_sae(layer=1, site="resid_post")]
    model = SaeForCausalLM.from_base(tiny_base(vocab_size=94), saes=saes, weights_scope="full")
    model.save_pretrained(made / "model")
    word_tokenizer().save_pretrained(made / "model")
    for name, seed in (("prompts", 1), ("neutral", 2), ("forbidden", 3)):
        (made / f"{name}.txt").write_text("\n".join(word_texts(6, shortest=4, seed=seed)))
    rows = [f"{text},{i % 2}" for i, text in enumerate(word_texts(20, seed=4))]
    (made / "labelled.csv").write_text("\n".join(["text,label", *rows]))
    (made / "push.json").write_text(PUSH.to_json())
    return made


def run(folder: Path, out: Path, *more: str) -> Result:
    given = ["--receipt-prompts", str(folder / "prompts.txt"), "--max-new-tokens", "4", "--out", str(out)]
    return CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--suite", "receipt", *given, *more])


@pytest.mark.usefixtures("command_line")
def test_the_receipt_is_written_into_the_steerings_file(folder: Path, tmp_path: Path) -> None:
    data = ["--neutral", str(folder / "neutral.txt"), "--forbidden", str(folder / "forbidden.txt")]
    data += ["--labelled", str(folder / "labelled.csv"), "--receipt-goal", "lower"]
    result = run(folder, tmp_path, *data, "--steering", str(folder / "push.json"))
    assert result.exit_code == 0, result.output
    assert "90 % interval" in result.output and "95 %" not in result.output and "false_alarm_rate" in result.output
    record = read_results(tmp_path / "results.json")
    assert record.model["steering"] == PUSH.to_dict()
    steering = Steering.from_json((tmp_path / "steering.json").read_text())
    receipt = Receipt.of(steering)
    assert steering == PUSH and receipt is not None
    assert receipt.about["scorer"] == "words" and receipt.about["goal"] == "lower"
    assert (receipt.about["prompts"], receipt.about["neutral"], receipt.about["forbidden"]) == (6, 6, 6)
    for name, number in receipt.numbers.items():
        assert record.suites["receipt"].value(name, "steered") == pytest.approx(number.value)
    (tmp_path / "steering.json").unlink()
    again = run(folder, tmp_path, *data, "--steering", str(folder / "push.json"))
    assert "already" in again.output and Receipt.of((tmp_path / "steering.json").read_text()) == receipt
    signed = run(folder, tmp_path, *data, "--steering", str(tmp_path / "steering.json"))  # the same steering
    assert signed.exit_code == 0 and "already" in signed.output, signed.output


@pytest.mark.usefixtures("command_line")
def test_it_needs_a_steering_and_prompts(folder: Path, tmp_path: Path) -> None:
    words = ["--labelled", str(folder / "labelled.csv")]
    nothing = run(folder, tmp_path, *words)
    assert nothing.exit_code == 2 and "A receipt is of a steering" in nothing.stderr, nothing.output
    bare = CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--suite", "receipt"])
    assert bare.exit_code == 2 and "needs --receipt-prompts" in bare.stderr


def test_a_saved_model_has_it_and_its_card_shows_it(folder: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load(folder / "model")
    model.steering = PUSH
    suite = ReceiptSuite(word_texts(6, seed=1), word_texts(6, shortest=4, seed=2), lambda t: [len(x) for x in t])
    found = evaluate(model, tokenizer, [suite])
    found.save(tmp_path / "results")
    model.steering = (tmp_path / "results" / "steering.json").read_text()
    receipt = Receipt.of(model.steering)
    assert receipt is not None
    model.save_pretrained(tmp_path / "saved")
    again = SaeForCausalLM.from_pretrained(tmp_path / "saved")
    assert Receipt.of(again.steering) == receipt
    card = model_card(read_model(tmp_path / "saved"))
    assert "### Receipt" in card and "in norms of the hidden state" in card and "90 % of cases" in card
    assert f"| {receipt.numbers['effect'].n} |" in card and "(goal: raise)" in card
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["steering"]["edits"][0]["value"] = 0.9
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    tampered = model_card(read_model(tmp_path / "saved"))
    assert "is not of this steering" in tampered and "in norms of the hidden state |" not in tampered
    assert "### Receipt" not in model_card(read_model(folder / "model"))


def test_other_goals_and_counts_are_told(folder: Path) -> None:
    model, tokenizer, _ = load(folder / "model")
    model.steering = PUSH
    suite = ReceiptSuite(word_texts(6, seed=1), [], lambda texts: [len(text) for text in texts])
    few = suite(model, tokenizer)
    many = replace(suite, settings=replace(suite.settings, fresh_prompts=10_000))(model, tokenizer)
    one, other = (next(m for m in found.measurements if m.metric == "effect") for found in (few, many))
    assert one.value == other.value and one.low is not None and other.low is not None and one.low < other.low
    assert ReceiptSuite.rows(few)[0]["metric"] == "effect" and "90 % interval" in ReceiptSuite.rows(few)[0]
