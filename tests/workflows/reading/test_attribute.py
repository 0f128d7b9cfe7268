"""Attribution of a text's outcome to features, from Python and from the command line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sae_transformers
from sae_transformers import AttributionSettings, attribute, load
from sae_transformers.cli import app
from sae_transformers.workflows.settings.detect import METHODS
from tests.create_training_data.words import word_tokenizer
from tests.evaluation.attribution.worlds import (
    FIRST,
    IDS,
    PLANTED,
    SECOND,
    classifier,
    planted_effects,
    planted_model,
    random_model,
)
from tests.figures import drawn
from tests.tiny import tiny_base, tiny_sae

TOKENIZER = word_tokenizer()
TEXT = TOKENIZER.decode(IDS)
PAIR = (FIRST, SECOND)
QUICK = AttributionSettings(check=6, draws=1, tokens_per_batch=200)


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def found(planted) -> Any:
    planted.saes[0].config.feature_names = {str(PLANTED[0]): "rivers"}
    return attribute(planted, TOKENIZER, TEXT, PAIR, settings=QUICK)


def test_the_planted_features_are_found(planted, found):
    expected = planted_effects(planted)
    expected[0] = 0
    first = found.rows()[0]
    assert first["feature"] in PLANTED
    assert first["effect"] == pytest.approx(float(expected[first["position"], first["feature"]]))
    assert first["token"] == TOKENIZER.decode([IDS[first["position"]]])
    strongest = found.strongest(2)
    assert {row["feature"] for row in strongest} == set(PLANTED)
    for row in strongest:
        assert row["effect"] == pytest.approx(float(expected[:, row["feature"]].sum()))
        assert row["name"] == ("rivers" if row["feature"] == PLANTED[0] else "")
    assert found.per_token() == pytest.approx(expected.sum(1).tolist())
    assert found.target == f"{TOKENIZER.decode([FIRST])!r} - {TOKENIZER.decode([SECOND])!r}"


def test_the_check_agrees_with_itself_where_all_is_linear(found):
    assert (found.agreement.against, found.agreement.pairs) == ("ablation", 6)
    assert found.agreement.pearson == pytest.approx(1)
    assert any("same sign" in line for line in found.summary())
    assert found.curve.n[-1] == len(found.effects.effect)


@pytest.mark.parametrize("method", ["integrated gradients", "ablation"])
def test_every_method_finds_the_same_where_all_is_linear(planted, found, method):
    other: Any = attribute(planted, TOKENIZER, TEXT, PAIR, method, settings=QUICK)
    ours, theirs = ({(r["position"], r["feature"]): r["effect"] for r in one.rows()} for one in (found, other))
    assert ours == pytest.approx(theirs, abs=1e-10)
    assert other.agreement.against == ("ablation" if method != "ablation" else "gradient x latent")
    assert other.method == method


def test_ablation_takes_the_strongest_pairs(planted):
    some: Any = attribute(planted, TOKENIZER, TEXT, PAIR, "ablation", settings=replace(QUICK, max_pairs=4))
    assert len(some.rows()) == 4
    assert some.agreement.pairs == 4
    assert some.curve.n == [0, 1, 2, 4]
    assert "4 strongest" in some.summary()[0]


def test_what_it_is_in_json_tables_and_notebooks(found, tmp_path):
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["agreement"]["against"] == "ablation"
    assert facts["pairs"] == found.rows()
    assert facts["curve"]["whole"] == pytest.approx(facts["value"])
    frame = found.to_frame()
    assert list(frame.columns) == ["position", "token", "sae", "feature", "name", "activation", "effect"]
    found.save(tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open() as file:
        assert [int(row["feature"]) for row in csv.DictReader(file)] == frame.feature.tolist()
    page = found._repr_html_()
    assert page.count("<span") == len(IDS)
    assert "rgba(0,150,136,1.00)" in page or "rgba(211,47,47,1.00)" in page
    assert "rivers" in page and "rank correlation" in page


def test_the_curve_is_drawn(found, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    found.plot(tmp_path / "curve.png")
    lines = {line.get_label(): line.get_ydata().tolist() for line in figures[0].axes[0].get_lines()}
    assert lines["strongest kept"] == found.curve.shares("keep")
    assert lines["random removed"] == found.curve.shares("remove_random")


def test_a_token_of_the_text_is_html_and_no_markup(found):
    page = replace(found, tokens=["<b>&", *found.tokens[1:]])._repr_html_()
    assert "&lt;b&gt;&amp;</span>" in page and "<b>" not in page


def test_two_saes_and_a_transcoder():
    model = random_model("transcoder")
    both = attribute(model, TOKENIZER, TEXT, PAIR, settings=QUICK)
    assert {row["sae"] for row in both.rows()} == {0, 1}
    one = attribute(model, TOKENIZER, TEXT, PAIR, settings=replace(QUICK, sae_numbers=(1,), curve=False, check=0))
    assert (one.agreement, one.curve) == (None, None)
    mine = {(row["position"], row["feature"]): row["effect"] for row in both.rows() if row["sae"] == 1}
    assert mine == pytest.approx({(r["position"], r["feature"]): r["effect"] for r in one.rows()}, rel=1e-9)
    assert len(one.summary()) == 1
    with pytest.raises(ValueError, match="was not measured"):
        one.plot("curve.png")


def test_a_classifiers_label():
    model = classifier()
    seen = []
    found = attribute(
        model, TOKENIZER, TEXT, ("good", "bad"), "ablation", settings=replace(QUICK, max_pairs=8),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert found.target == "good - bad"
    with torch.no_grad():
        ids = torch.tensor([IDS])
        whole = model(ids).logits[0]
        row = found.rows()[0]

        def without(features):
            gone = features.indices == row["feature"]
            gone &= torch.arange(len(IDS))[None, :, None] == row["position"]
            return features.values.masked_fill(gone, 0.0)

        cut = model(ids, edit_features=without).logits[0]
    assert row["effect"] == pytest.approx(float((whole - cut)[2] - (whole - cut)[0]), rel=1e-9)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_feature_heads_effects_are_its_weights(pooling):
    """A linear head reads the state with a feature's share in it: its effect is `z * W_dec @ w`, by every method."""
    model: Any = classifier(feature_head={"sae": 0, "pooling": pooling})
    ids = torch.tensor([IDS])
    with torch.no_grad():
        latents = model(ids, output_features=True).sae_features[0].to_dense()[0]
        weights = model.feature_head.linear.weight
        expected = latents * (model.saes[0].W_dec @ (weights[2] - weights[0]))
    if pooling == "last":
        expected[:-1] = 0
    else:
        expected /= len(IDS)
    expected[0] = 0
    for method in METHODS:
        found: Any = attribute(model, TOKENIZER, TEXT, ("good", "bad"), method, settings=QUICK)
        for row in found.rows():
            effect = float(expected[row["position"], row["feature"]])
            assert row["effect"] == pytest.approx(effect, rel=1e-9, abs=1e-12)
        assert found.curve.whole - found.curve.none == pytest.approx(float(expected.sum()))
        assert max(abs(row["effect"]) for row in found.rows()) > 1e-3


@pytest.mark.parametrize("head", [None, {"sae": 0}])
def test_adapters_of_peft_count(head):
    """Around the model with SAEs, or in its base before: the effects are those of the adapted model."""
    from peft import LoraConfig, get_peft_model

    given: Any = {} if head is None else {"feature_head": head}
    model: Any = classifier(**given)
    plain: Any = attribute(model, TOKENIZER, TEXT, ("good", "bad"), settings=QUICK)
    saved = ["score"] if head is None else ["feature_head"]
    lora = LoraConfig(
        task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=saved,
        init_lora_weights=False,
    )  # fmt: skip
    wrapped: Any = get_peft_model(model, lora).eval()
    found: Any = attribute(wrapped, TOKENIZER, TEXT, ("good", "bad"), "ablation", settings=QUICK)
    with torch.no_grad():
        logits = wrapped(torch.tensor([IDS])).logits[0]
    assert found.effects.value == pytest.approx(float(logits[2] - logits[0]), rel=1e-9)
    assert found.effects.value != pytest.approx(plain.effects.value, rel=1e-3)
    row = found.rows()[0]
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        cut = whole(torch.tensor([IDS]), edit_features=lambda f: _without(f, row)).logits[0]
    assert row["effect"] == pytest.approx(float((logits - cut)[2] - (logits - cut)[0]), rel=1e-9)


def _without(features: Any, row: Any) -> torch.Tensor:
    gone = (features.indices == row["feature"]) & (torch.arange(len(IDS))[None, :, None] == row["position"])
    return features.values.masked_fill(gone, 0.0)


def test_a_learnt_prompt_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    wrapped: Any = get_peft_model(
        random_model().float(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    with pytest.raises(ValueError, match="stands before the text, .* Received: PROMPT_TUNING"):
        attribute(wrapped, TOKENIZER, TEXT, PAIR)


def test_why_a_token_of_the_text_is_said(planted):
    word = str(TOKENIZER.decode([IDS[5]]))
    found = attribute(planted, TOKENIZER, TEXT, position=word, settings=replace(QUICK, curve=False))
    assert (found.target, found.tokens) == (repr(word), [TOKENIZER.decode([token]) for token in IDS[:5]])


def test_refused(planted):
    base = tiny_base()
    for options, message in (
        ({"model": base}, "Received: a model without SAEs"),
        ({"method": "shapley"}, "method='shapley'"),
        ({"settings": AttributionSettings(sae_numbers=(1,))}, "Received: SAE 1"),
        ({"settings": AttributionSettings(skip_first=8)}, "No feature is active after the first 8 of 8 tokens"),
        ({"settings": AttributionSettings(max_length=4)}, "longer than `max_length`"),
        ({"text": [TEXT, TEXT]}, "Expected one text. Received: 2"),
        ({"target": "w30 w31"}, "which is 2"),
    ):
        given: Any = {"model": planted, "tokenizer": TOKENIZER, "text": TEXT, "target": PAIR, **options}
        with pytest.raises(ValueError, match=message):
            attribute(**given)
    planted.train()
    with pytest.raises(ValueError, match="Dropout would make the effects random"):
        attribute(planted, TOKENIZER, TEXT, PAIR)
    planted.eval()
    for wrong in ({"steps": 0}, {"max_pairs": 0}):
        settings: Any = wrong
        with pytest.raises(ValueError, match="must be an integer of 1 or more"):
            AttributionSettings(**settings)


def test_it_is_at_the_root():
    assert sae_transformers.attribute is attribute


def test_the_verb_says_what_the_function_does(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    tiny_sae(layer=1).save_pretrained(tmp_path / "sae")
    table = tmp_path / "pairs.csv"
    command = ["attribute", str(tmp_path / "base"), TEXT, "--sae", str(tmp_path / "sae"), "--out", str(table)]
    options = ["--target", "w30", "--target", "w31", "--position", "-3", "--check", "4", "--draws", "1"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    model, tokenizer, _ = load(tmp_path / "base", str(tmp_path / "sae"))
    settings = AttributionSettings(check=4, draws=1)
    expected = attribute(model, tokenizer, TEXT, ("w30", "w31"), position=-3, settings=settings)
    for line in expected.summary():
        assert line in result.output
    with table.open() as file:
        effects = [float(row["effect"]) for row in csv.DictReader(file)]
    assert effects == pytest.approx([row["effect"] for row in expected.rows()], rel=1e-4)
    wrong = CliRunner().invoke(app, [*command, "--position", "w77"])
    assert wrong.exit_code == 2
    assert "'w77' is not a token of the text" in " ".join(wrong.output.split())


@pytest.mark.parametrize("kind", ["feature head", "the base's head", "base and SAE"])
def test_the_verb_takes_classifiers(kind, tmp_path):
    head: Any = {"feature_head": {"sae": 0}} if kind == "feature head" else {}
    model: Any = classifier(weights_scope="full", **head)
    given: list[str] = []
    if kind == "base and SAE":
        model.lm.save_pretrained(tmp_path / "model")
        model.saes[0].save_pretrained(tmp_path / "sae")
        given = ["--sae", str(tmp_path / "sae")]
    else:
        model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    out = tmp_path / "found.json"
    command = ["attribute", str(tmp_path / "model"), TEXT, *given]
    wanted = ["--target", "good", "--target", "0", "--check", "4", "--draws", "1", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *wanted])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    expected: Any = attribute(model, TOKENIZER, TEXT, ("good", "bad"), settings=AttributionSettings(check=4, draws=1))
    assert found["target"] == "good - bad" and f"effects on {found['target']}" in result.output
    assert found["value"] == pytest.approx(expected.effects.value, rel=1e-4)
    assert [row["effect"] for row in found["pairs"]] == pytest.approx(
        [row["effect"] for row in expected.rows()], rel=1e-3, abs=1e-6
    )
    assert found["agreement"]["against"] == "ablation" and found["curve"]["n"] == expected.curve.n
    wrong = CliRunner().invoke(app, [*command, "--target", "great"])
    assert wrong.exit_code == 2
    assert "Labels are bad, fine, good (0 to 2). Received: --target='great'" in " ".join(wrong.output.split())
