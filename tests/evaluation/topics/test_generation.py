"""The same prompts continued in several ways: each row measured as by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.topics.generation import TopicComparison
from sae_transformers.evaluation.topics.settings import TopicGenerationSettings
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
PUSH = Steering([FeatureEdit(0, 3, "add", 30.0)])


def embed(texts: Sequence[str]) -> Tensor:
    """The share of each word, of unit length."""
    counts = torch.tensor([[float(text.split().count(word)) for word in WORDS] for text in texts])
    return torch.nn.functional.normalize(counts, dim=-1)


def accepted(texts: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(text.split())) for text in texts])


def comparison(**options) -> TopicComparison:
    model = SaeForCausalLM.from_base(tiny_base(vocab_size=94), saes=[tiny_sae(layer=1)]).eval()
    topic = embed(["w1 w2 w3", "w60 w61"])
    prompts = options.pop("prompts", PROMPTS)
    settings = TopicGenerationSettings(**{"max_new_tokens": 6, "top_k": 3, "batch_size": 3, **options})
    return TopicComparison(model, word_tokenizer(), prompts, topic, embed, accepted, settings)


def test_rows_and_samples() -> None:
    made = comparison()
    first = made.measure("orig")
    again = made.measure("the same", False, preparation_seconds=3.0)
    assert first["similarity_change"] == 0 and again["similarity_change"] == 0 and again["preparation_seconds"] == 3
    assert made.texts["orig"] == made.texts["the same"]  # one seed for all
    assert again["perplexity"] == first["perplexity"]
    pushed = made.measure("pushed", PUSH)
    assert made.texts["pushed"] != made.texts["orig"] and pushed["perplexity"] > first["perplexity"]
    assert pushed["extra_seconds_per_token"] == pushed["seconds_per_token"] - first["seconds_per_token"]
    texts = [text for text in made.texts["orig"] if text]
    cosines = (embed(texts) @ made.topic.T).amax(1)
    assert first["similarity"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert first["acceptability"] == pytest.approx(float(accepted(made.texts["orig"]).mean()))
    samples = made.samples()
    assert [row["prompt"] for row in samples] == PROMPTS and list(samples[0]) == [
        "prompt", "orig", "the same", "pushed"
    ]  # fmt: skip


def test_perplexity_is_that_of_the_unsteered_model_after_the_prompt_alone() -> None:
    made = comparison(top_k=1)
    made.measure("orig")
    with made.model.steered(PUSH):  # whatever is around
        prefixed = made.generate(False, prefix="w20 w21 w22 ")
        row = made.judge("prompting", prefixed)
    total, count = 0.0, 0
    for prompt, ids, mask in zip(PROMPTS, prefixed["ids"], prefixed["mask"], strict=True):
        whole = torch.cat([torch.tensor(made.tokenizer(prompt)["input_ids"]), ids[mask]])
        with torch.no_grad():
            logs = made.model(whole[None], steering=False).logits[0].log_softmax(-1)
        n = int(mask.sum())
        total -= sum(float(logs[len(whole) - n + i - 1, whole[len(whole) - n + i]]) for i in range(n))
        count += n
    assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    alone = comparison(top_k=1, prompts=[f"w20 w21 w22 {prompt}" for prompt in PROMPTS])
    assert alone.generate()["texts"] == prefixed["texts"]


def test_batches_do_not_matter_and_another_model_may_generate() -> None:
    whole, single = comparison(top_k=1, batch_size=4), comparison(top_k=1, batch_size=1)
    assert whole.generate(PUSH)["texts"] == single.generate(PUSH)["texts"]
    other = tiny_base(vocab_size=94, seed=5)
    alone = [
        other.generate(torch.tensor([single.tokenizer(p)["input_ids"]]), max_new_tokens=6, do_sample=False)[0]
        for p in PROMPTS
    ]
    expected = [
        single.tokenizer.decode(row[len(p.split()) :], skip_special_tokens=True)
        for row, p in zip(alone, PROMPTS, strict=True)
    ]
    assert whole.generate(generator=other)["texts"] == expected


def test_bad_input() -> None:
    for options, told in [
        ({"prompts": []}, "0 prompts"),
        ({"prompts": ["w1", " "]}, "2 prompts, one or more empty"),
        ({"max_new_tokens": 0}, "new_tokens=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"prompts": ["w1 " * 125]}, "context of 128. Received: a prompt of 125 tokens and max_new_tokens=6"),
    ]:
        with pytest.raises(ValueError, match=told):
            comparison(**options)
    made = comparison()
    with pytest.raises(ValueError, match="'orig' must be measured first, and once. Received: name='swap'"):
        made.measure("swap", PUSH)
    made.measure("orig")
    with pytest.raises(ValueError, match="name='orig'"):
        made.measure("orig")
    with pytest.raises(ValueError, match="a prompt of 128 tokens"):
        made.measure("prompting", prefix="w1 " * 123)
