"""Continuations under many steerings at once equal those one by one, and their likelihood is the model's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import TopPLogitsWarper

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.generation.continuations import (
    chat_prompts,
    continue_prompts,
    greatest_of_top_p,
    likelihood,
)
from sae_transformers.evaluation.generation.fluency import continuation_perplexity
from sae_transformers.evaluation.settings import GenerationSettings
from tests.architectures import tiny_bases
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_model, tiny_sae

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]


def steering(value: float) -> Steering:
    return Steering([FeatureEdit(feature=3, op="direction", value=value, unit="norm")])


def test_rows_of_a_batch_are_what_each_is_alone(model: Any, tokenizer: Any) -> None:
    plans = [steering(2.0), None, steering(-3.0)]
    together = continue_prompts(model, tokenizer, PROMPTS, plans, GenerationSettings(6, temperature=0.0))
    alone = [
        continue_prompts(model, tokenizer, [p], [s], GenerationSettings(6, temperature=0.0))
        for p, s in zip(PROMPTS, plans, strict=True)
    ]
    assert together.texts == [one.texts[0] for one in alone]
    assert torch.allclose(together.losses, torch.cat([one.losses for one in alone]), atol=1e-4)
    assert together.tokens.tolist() == [int(one.tokens) for one in alone]
    assert (
        continue_prompts(model, tokenizer, PROMPTS, plans, GenerationSettings(6, temperature=0.0, batch_size=2)).texts
        == together.texts
    )
    assert (
        continue_prompts(model, tokenizer, PROMPTS, settings=GenerationSettings(6, temperature=0.0)).texts[0]
        != together.texts[0]
    )


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "bloom", "falcon", "gpt_oss", "phi"]
)
def test_rows_that_share_a_prompt_share_its_pass(architecture: str, tokenizer: Any) -> None:
    made: Any = tiny_model(architecture).eval()
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    plans = [steering(value) for value in (0.0, 1.0, 2.0, -2.0, 3.0)]
    together = continue_prompts(made, tokenizer, prompts, plans, GenerationSettings(7, temperature=0.0))
    for row, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        ids = tokenizer(prompt, return_tensors="pt")
        found = made.generate(**ids, steering=plan, max_new_tokens=7, do_sample=False, pad_token_id=0)
        length = ids["input_ids"].shape[1]
        logits = made.lm(input_ids=found).logits[0, length - 1 : -1].double().log_softmax(-1)
        expected = -float(logits.gather(1, found[0, length:, None]).sum().detach())
        assert float(together.losses[row]) == pytest.approx(expected, rel=1e-4)
        assert int(together.tokens[row]) == found.shape[1] - length


def test_the_default_of_the_model_does_not_count(model: Any, tokenizer: Any) -> None:
    plain = continue_prompts(model, tokenizer, PROMPTS, settings=GenerationSettings(5, temperature=0.0))
    model.steering = steering(3.0)
    try:
        again = continue_prompts(model, tokenizer, PROMPTS, settings=GenerationSettings(5, temperature=0.0))
    finally:
        model.steering = None
    assert again.texts == plain.texts and torch.equal(again.losses, plain.losses)


def test_perplexity_is_that_of_the_unsteered_model(model: Any, tokenizer: Any) -> None:
    found = continue_prompts(model, tokenizer, ["w1 w2 w3"], [steering(2.0)], GenerationSettings(6, temperature=0.0))
    ids = tokenizer("w1 w2 w3", return_tensors="pt")
    rows = model.generate(**ids, steering=steering(2.0), max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = continuation_perplexity(model, rows, torch.ones_like(rows), 3)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexities.tolist() == pytest.approx([expected], rel=1e-5)
    if int(found.tokens) == 6 and 2 not in rows[0].tolist():
        told = likelihood(model, tokenizer, ["w1 w2 w3"], found.texts)
        assert float(told.losses) == pytest.approx(float(found.losses), rel=1e-5)


def test_likelihood_of_texts_of_several_lengths(model: Any, tokenizer: Any) -> None:
    texts = ["w5", "w6 w7 w8", ""]
    together = likelihood(model, tokenizer, PROMPTS, texts)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        ids = tokenizer(f"{prompt} {text}".strip(), return_tensors="pt")["input_ids"]
        length = len(prompt.split())
        logits = model(input_ids=ids).logits[0, length - 1 : -1].double().log_softmax(-1)
        expected = -float(logits.gather(1, ids[0, length:, None]).sum())
        assert float(together.losses[row]) == pytest.approx(expected, abs=1e-4)
    assert together.tokens.tolist() == [1, 3, 1] and together.losses[2] == 0


def test_noise_belongs_to_the_draw_and_not_to_the_batch(model: Any, tokenizer: Any) -> None:
    options = GenerationSettings(8, temperature=1.0, seed=4)
    four = continue_prompts(model, tokenizer, ["w1 w2"] * 4, settings=options, draws=[0, 1, 0, 2]).texts
    assert four[0] == four[2] and len(set(four)) == 3
    assert continue_prompts(model, tokenizer, ["w1 w2"] * 2, settings=options, draws=[2, 1]).texts == [
        four[3],
        four[1],
    ]
    assert continue_prompts(model, tokenizer, ["w1 w2"], settings=replace(options, seed=5)).texts[0] not in four


def test_sampling_draws_from_the_distribution_of_the_model(model: Any, tokenizer: Any) -> None:
    n, prompt = 600, "w1 w2 w3"
    found = continue_prompts(model, tokenizer, [prompt] * n, settings=GenerationSettings(1, 2.0, 0.5, batch_size=n))
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] / 2.0
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)
    inside = order[: int((probabilities[order].cumsum(0) < 0.5).sum()) + 1]
    wanted = torch.zeros_like(probabilities)
    wanted[inside] = probabilities[inside] / probabilities[inside].sum()
    drawn = [tokenizer(text)["input_ids"][0] for text in found.texts if text]
    shares = torch.bincount(torch.tensor(drawn), minlength=len(wanted)) / n
    known = torch.tensor([token not in tokenizer.all_special_ids for token in range(len(wanted))]) & (
        torch.arange(len(wanted)) < len(tokenizer)
    )
    assert set(drawn) <= set(inside.tolist())
    assert float((shares - wanted)[known].abs().max()) < 4 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999, 1.0])
def test_top_p_without_a_sort_takes_the_token_that_the_sort_leaves(top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = 3 * torch.randn(200, 777, generator=generator)
    scores[1, 5:] = -torch.inf
    noise = -torch.empty_like(scores).exponential_(generator=generator).log()
    no_ids: Any = torch.zeros(0)
    cut = TopPLogitsWarper(top_p)(no_ids, scores) if top_p < 1 else scores
    assert torch.equal(greatest_of_top_p(scores, noise, top_p), (cut + noise).argmax(-1))


def test_equally_likely_tokens_all_stay_or_all_go() -> None:
    scores = torch.tensor([[0.0, 0.0, -1.0, -1.0, -1.0]])
    for token in range(5):
        noise = torch.zeros_like(scores)
        noise[0, token] = 9.0
        kept = int(greatest_of_top_p(scores, noise, 0.5))
        assert (kept == token) is (token < 2)


def test_chat_template_where_there_is_one(tokenizer: Any) -> None:
    assert chat_prompts(tokenizer, ["w1"]) == ["w1"]
    other = word_tokenizer()
    other.chat_template = (
        "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    assert chat_prompts(other, ["w1", "w2"]) == ["<s> w1 w9", "<s> w2 w9"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompts": ["w1", ""]}, "prompt 1"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": ["w1 " * 125]}, "context of 128"),
        ({"steerings": [None]}, "1 steerings"),
        ({"draws": [1]}, "1 draws"),
    ],
)
def test_what_is_refused(model: Any, tokenizer: Any, options: dict, told: str) -> None:
    given = {"prompts": PROMPTS, "settings": GenerationSettings(6, temperature=0.0), **options}
    with pytest.raises(ValueError, match=told):
        continue_prompts(model, tokenizer, given.pop("prompts"), given.pop("steerings", None), **given)


@pytest.mark.parametrize("family", ["jamba", "bamba", "mamba"])
def test_rows_of_one_prompt_on_bases_whose_cache_cannot_be_repeated(family: str, tokenizer: Any) -> None:
    base = tiny_bases.tiny_base(family)
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    together = continue_prompts(
        model, tokenizer, [PROMPTS[2]] * 2, [steering(0.5), None], GenerationSettings(5, temperature=0.0)
    )
    for row in range(2):
        ids = tokenizer(PROMPTS[2] + " " + together.texts[row], return_tensors="pt")["input_ids"]
        length = tokenizer(PROMPTS[2], return_tensors="pt")["input_ids"].shape[1]
        logits = base(input_ids=ids).logits[0, length - 1 : -1].double().log_softmax(-1)
        expected = -float(logits.gather(1, ids[0, length:, None]).sum().detach())
        assert float(together.losses[row]) == pytest.approx(expected, rel=1e-4)
