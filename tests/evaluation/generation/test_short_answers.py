"""Short answers equal `generate` one prompt at a time; the shared beginning changes nothing."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.generation import short_answers as module
from sae_transformers.evaluation.generation.short_answers import (
    Contrast,
    answer_log_likelihoods,
    short_answers,
    text_losses,
)
from tests.architectures import tiny_bases
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_model, tiny_sae

F64 = torch.float64
BEGIN = "w5 w9 w60 w3 w3 w80 w7"
PROMPTS = [f"{BEGIN} {text}" for text in word_texts(7, seed=1)]
EDITS = [FeatureEdit(0, i, "at_least", 1.5) for i in range(20)] + [
    FeatureEdit(0, i, "shrink", 0.4) for i in range(20, 64)
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(saes=[tiny_sae(layer=1, dtype=F64)], dtype=F64)


def one_by_one(model, steering) -> list[str]:
    tokenizer, answers = word_tokenizer(), []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model.generate(ids, steering=steering, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("positions", ["last_prompt", "generated", "all"])
@pytest.mark.parametrize("tokens_at_once", [16, 1000])
def test_equals_one_by_one(model, positions, tokens_at_once):
    steering = Steering(EDITS, positions=positions)
    found = short_answers(
        model, word_tokenizer(), PROMPTS, steering=steering, max_new_tokens=5, tokens_at_once=tokens_at_once
    )
    assert found == one_by_one(model, steering)
    assert found != one_by_one(model, False)


def test_the_shared_beginning_is_read_once(model, monkeypatch):
    read = []
    monkeypatch.setattr(
        module, "_read_prefix", lambda model, ids, keep=module._read_prefix: read.append(ids) or keep(model, ids)
    )
    expected = one_by_one(model, False)
    assert short_answers(model, word_tokenizer(), PROMPTS, max_new_tokens=5) == expected
    assert read == [word_tokenizer()(BEGIN)["input_ids"]]
    short_answers(model, word_tokenizer(), PROMPTS, steering=Steering(EDITS, positions="prompt"), max_new_tokens=5)
    assert len(read) == 1


def test_a_plain_model(model):
    assert short_answers(model.lm, word_tokenizer(), PROMPTS, max_new_tokens=5) == one_by_one(model, False)


@pytest.mark.parametrize("weight", [0.6, -0.8])
def test_contrast(model, weight):
    """Greedy steps on (1 + a) log p(prompt) - a log p(other), each computed from scratch."""
    tokenizer, others = word_tokenizer(), word_texts(7, seed=2)
    expected = []
    for text, other in zip(PROMPTS, others, strict=True):
        ids, against = (torch.tensor([tokenizer(t)["input_ids"]]) for t in (text, other))
        new: list[int] = []
        while len(new) < 4:
            tail = torch.tensor([new], dtype=torch.long)
            with torch.no_grad():
                p, q = (model.lm(torch.cat([x, tail], 1)).logits[0, -1].log_softmax(-1) for x in (ids, against))
            new.append(int(((1 + weight) * p - weight * q).argmax()))
            if new[-1] == 2:
                break
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    found = short_answers(
        model, tokenizer, PROMPTS, contrast=Contrast(others, weight), max_new_tokens=4, tokens_at_once=40
    )
    assert found == expected
    assert found != short_answers(model, tokenizer, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("positions", ["last_prompt", "generated", "all"])
@pytest.mark.parametrize("tokens_at_once", [30, 1000])
def test_likelihoods_of_answers(model, positions, tokens_at_once):
    """As token by token after the prompt, with steering where it belongs."""
    tokenizer, steering = word_tokenizer(), Steering(EDITS, positions=positions)
    answers = [["w4 w8 w1", "w60"], ["w3", "w2 w2"]] * 3 + [["w7 w1", "w9 w9 w9 w9"]]
    found = answer_log_likelihoods(
        model, tokenizer, PROMPTS, answers, steering=steering, tokens_at_once=tokens_at_once
    )
    ranges = {"last_prompt": lambda n: [(n - 1, n)], "generated": lambda n: [(n - 1, None)], "all": lambda n: "all"}
    for prompt, row, values in zip(PROMPTS, answers, found.tolist(), strict=True):
        for answer, value in zip(row, values, strict=True):
            before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
            here = Steering(EDITS, positions=ranges[positions](len(before)))
            with torch.no_grad():
                logits = model(torch.tensor([before + after]), steering=here).logits[0, len(before) - 1 : -1]
            losses = logits.log_softmax(-1).gather(-1, torch.tensor(after)[:, None])
            assert value == pytest.approx(float(losses.mean()), abs=1e-5)


def test_losses(model):
    tokenizer = word_tokenizer()
    found = text_losses(model, tokenizer, PROMPTS, tokens_at_once=30)
    for text, loss in zip(PROMPTS, found.tolist(), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss == pytest.approx(float(model.lm(ids, labels=ids).loss), abs=1e-5)


def test_bad_input(model):
    with pytest.raises(ValueError, match="each of 7 prompts. Received: 2"):
        short_answers(model, word_tokenizer(), PROMPTS, contrast=Contrast(["w1", "w2"], 0.0))
    with pytest.raises(ValueError, match="Received: ''"):
        short_answers(model, word_tokenizer(), ["w1", ""])
    with pytest.raises(ValueError, match="context of 128. Received: 212"):
        short_answers(model, word_tokenizer(), ["w1 " * 200])
    with pytest.raises(ValueError, match="token to score and one before"):
        text_losses(model, word_tokenizer(), ["w1", "w1 w2"])
    assert short_answers(model, word_tokenizer(), []) == []
    with pytest.raises(ValueError, match=r"Received: \[1, 2\]"):
        answer_log_likelihoods(model, word_tokenizer(), ["w1", "w2"], [["w3"], ["w3", "w4"]])
    with pytest.raises(ValueError, match="Received: an empty one"):
        answer_log_likelihoods(model, word_tokenizer(), ["w1"], [[""]])


def test_line_breaks_end_an_answer():
    """`\\n` as a token ends the generation, and only what stands before it counts."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["\n"])
    ends = module._line_ends(tokenizer)
    assert ends == sorted([2, *tokenizer("\n")["input_ids"]])
    base = tiny_base(vocab_size=len(tokenizer) + 1)
    with torch.no_grad():
        base.lm_head.weight.zero_()
        base.lm_head.weight[ends[-1]] = 1e-3
    assert short_answers(base, tokenizer, ["w1 w2", "w3"], max_new_tokens=3) == ["", ""]


@pytest.mark.parametrize("family", ["jamba", "bamba", "gemma3_text", "qwen3_next"])
def test_bases_whose_cache_cannot_be_continued_read_the_whole_text(family):
    """Jamba forgets its state and Bamba its positions where several tokens follow a cache."""
    base = tiny_bases.tiny_base(family)
    tokenizer, answers = word_tokenizer(), [["w5 w6 w7", "w8"], ["w9 w10", "w11 w12 w13"]]
    found = answer_log_likelihoods(base, tokenizer, PROMPTS[:2], answers)
    expected = torch.empty(2, 2)
    for i, prompt in enumerate(PROMPTS[:2]):
        for j, answer in enumerate(answers[i]):
            before, after = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
            with torch.no_grad():
                logits = base(torch.tensor([before + after])).logits[0].log_softmax(-1)
            told = logits[len(before) - 1 : -1].gather(-1, torch.tensor(after)[:, None])
            expected[i, j] = told.mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
