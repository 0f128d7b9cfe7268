import math

import pytest
import torch

from sae_transformers.evaluation.generation.fluency import continuation_mask, continuation_perplexity, repetition
from tests.tiny import tiny_base


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # rotary and absolute positions
def test_perplexity_equals_one_row_at_a_time_without_padding(architecture: str) -> None:
    base = tiny_base(architecture)
    prompts, new = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])], torch.randint(3, 99, (2, 5))
    kept = [5, 3]  # the second continuation ended early
    total = 0.0
    for prompt, continuation, length in zip(prompts, new, kept, strict=True):
        row = torch.cat([prompt, continuation[:length]])[None]
        logs = base(row).logits.detach().log_softmax(-1)[0]
        total -= sum(float(logs[len(prompt) - 1 + i, continuation[i]]) for i in range(length))
    padding = [torch.zeros(4 - len(p), dtype=torch.long) for p in prompts]
    ids = torch.stack([torch.cat(parts) for parts in zip(padding, prompts, new, strict=True)])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[1, 7:] = 0
    for rows_at_once in (1, 2):
        got = continuation_perplexity(base, ids, mask, 4, rows_at_once=rows_at_once)
        assert got == pytest.approx(math.exp(total / sum(kept)), rel=1e-4)


def test_perplexity_needs_a_prompt_and_a_token() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="prompt_length=0"):
        continuation_perplexity(None, ids, ids, 0)
    with pytest.raises(ValueError, match="no generated token"):
        continuation_perplexity(None, ids, torch.tensor([[1, 1, 0]]), 2)


def test_continuation_mask_keeps_the_first_end_and_nothing_after() -> None:
    new = torch.tensor([[4, 2, 2, 2], [4, 5, 6, 7], [2, 4, 4, 2]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(continuation_mask(new, 2), expected)
    assert torch.equal(continuation_mask(new, [2, 7]), expected)
    assert continuation_mask(new, None).all()


def test_repetition_counts_words_that_came_before() -> None:
    assert repetition(["a b c a b c"]) == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition(["a a a a a", "one two three"]) == pytest.approx((2 / 3 + 0) / 2)
    assert repetition(["short"]) == 0
    with pytest.raises(ValueError, match="0 texts"):
        repetition([])
