"""Choices of tokens against transformers' own `generate`, closed forms, and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sae_transformers.serving.sampling import (
    Sampling,
    TokenChoice,
    choose_tokens,
    published_sampling,
    settings_not_applied,
    stop_tokens,
)
from tests.create_training_data.words import word_tokenizer
from tests.tiny import prompt, tiny_base

PLAIN = Sampling(max_tokens=9)


def chosen(choice: TokenChoice, logits: torch.Tensor, written: Sequence[int] = ()) -> int:
    """The next token of one text."""
    before = logits.clone()
    (token,) = choose_tokens(logits[None], [int(logits.argmax())], [choice], [written])
    assert torch.equal(logits, before)
    if isinstance(token, Exception):
        raise token
    return token


def test_a_repetition_penalty_is_that_of_generate() -> None:
    base, ids = tiny_base(), prompt(1, 5)
    base.generation_config.eos_token_id = None
    expected = base.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.7, max_new_tokens=9
    )[0]
    choice, written = TokenChoice(replace(PLAIN, repetition_penalty=1.7), ids[0].tolist()), []
    for _ in range(9):
        row = torch.cat([ids[0], torch.tensor(written, dtype=torch.long)])
        written.append(chosen(choice, base(row[None]).logits[0, -1].detach(), written))
    assert written == expected[5:].tolist() and len(set(written)) > 6


def test_penalties_and_biases_are_added_to_logits() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0, 0.0])
    assert chosen(TokenChoice(PLAIN, [0]), logits, [0, 0]) == 0 and TokenChoice(PLAIN, [0]).keeps_logits
    cases = [
        ({"presence_penalty": 0.2}, [0, 0], 1),
        ({"presence_penalty": 0.2}, [], 0),  # of the answer, not of the prompt
        ({"presence_penalty": 0.2}, [0, 1, 1], 0),
        ({"frequency_penalty": 0.2}, [0, 1, 1], 0),
        ({"frequency_penalty": 0.2}, [0, 0, 1], 1),
        ({"frequency_penalty": -2.0}, [3, 3], 3),
        ({"logit_bias": {0: -100.0, 2: 1.0}}, [], 2),
    ]
    for options, written, expected in cases:
        choice = TokenChoice(replace(PLAIN, **options), [0])
        assert chosen(choice, logits, written) == expected and not choice.keeps_logits, (options, written)
    assert logits.tolist() == pytest.approx([2.0, 1.9, 1.0, 0.0])  # untouched


@pytest.mark.parametrize("options", [
    {"temperature": 1e-6}, {"temperature": 1e-320}, {"temperature": 1e-6, "repetition_penalty": 1e-320},
    {"temperature": 1e-6, "repetition_penalty": 1e-6, "top_p": 1e-320, "top_k": 2, "min_p": 1.0},
])  # fmt: skip
def test_no_setting_leaves_the_range_of_numbers(options: dict[str, float]) -> None:
    for size in (1.0, 1e30, 3e38):
        logits = torch.tensor([0.0, -0.5, 1.0, -1.0, -torch.inf]) * size
        logits[-1] = -torch.inf
        token = chosen(TokenChoice(replace(PLAIN, **options), [0, 3]), logits, [1])
        assert token == 2, (options, size)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, -9.0])
    sampling = replace(PLAIN, temperature=2.0, seed=3)
    choices = [TokenChoice(sampling, [0], number) for number in range(4000)]
    drawn: Any = choose_tokens(logits.expand(4000, -1), [0] * 4000, choices, [[]] * 4000)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert torch.allclose(shares, (logits / 2).softmax(-1), atol=0.03)
    again = [chosen(TokenChoice(sampling, [0], number), logits) for number in range(50)]
    assert again == drawn[:50] and len(set(drawn[:50])) > 1
    one, other = TokenChoice(sampling, [0]), TokenChoice(sampling, [0])
    alone = [chosen(one, logits) for _ in range(20)]
    torch.rand(7)  # nobody else's random numbers matter
    assert [chosen(other, logits) for _ in range(20)] == alone
    free = [[chosen(TokenChoice(replace(sampling, seed=None), [0]), logits) for _ in range(30)] for _ in range(2)]
    assert free[0] != free[1]


@pytest.mark.parametrize(
    ("options", "possible"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0}), ({"min_p": 0.3}, {0, 1}), ({}, {0, 1, 2})]
)
def test_rare_tokens_are_left_out(options: dict, possible: set[int]) -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    choice = TokenChoice(replace(PLAIN, temperature=1.0, seed=0, **options), [0])
    assert {chosen(choice, logits) for _ in range(200)} == possible


def test_what_the_model_publishes() -> None:
    own = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    expected = Sampling(5, 0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert published_sampling(own, 5) == expected
    assert published_sampling(GenerationConfig(temperature=0.7), 5).temperature == 0
    assert published_sampling(GenerationConfig(do_sample=True), 5).temperature == 1
    assert settings_not_applied(own) == [] == settings_not_applied(GenerationConfig())
    odd = GenerationConfig(num_beams=3, no_repeat_ngram_size=2, suppress_tokens=[4])
    assert settings_not_applied(odd) == ["no_repeat_ngram_size", "num_beams", "suppress_tokens"]


def test_tokens_that_end_an_answer() -> None:
    tokenizer = word_tokenizer()
    assert stop_tokens(GenerationConfig(eos_token_id=[5, 7]), tokenizer) == {5, 7}
    assert stop_tokens(GenerationConfig(eos_token_id=5), tokenizer) == {5}
    assert stop_tokens(GenerationConfig(), tokenizer) == {2}
    tokenizer.eos_token = None
    assert stop_tokens(GenerationConfig(), tokenizer) == frozenset()
