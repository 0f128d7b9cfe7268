"""Log-probabilities in padded batches are those of each row alone."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.generation.log_likelihood import encode_after_start, start_token, token_scores
from tests.create_training_data.words import word_tokenizer
from tests.tiny import VOCAB, tiny_base, tiny_model

F64 = torch.float64


def rows(count: int = 9, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("tokens_at_once", [1, 30, 1000])
def test_equals_each_row_alone(architecture: str, tokens_at_once: int) -> None:
    base, texts = tiny_base(architecture, dtype=F64), rows()
    first = [1 + i % (len(row) - 1) for i, row in enumerate(texts)]
    seen: list[int] = []
    found = token_scores(base, texts, first, tokens_at_once=tokens_at_once, report=seen.append)
    assert sum(seen) == len(texts)
    for row, start, log_p, greedy in zip(texts, first, found.log_p, found.greedy, strict=True):
        with torch.no_grad():
            logits = base(torch.tensor([row])).logits[0, start - 1 : -1].log_softmax(-1)
        goal = torch.tensor(row[start:])
        torch.testing.assert_close(log_p, logits.gather(-1, goal[:, None])[:, 0], rtol=1e-5, atol=1e-6)
        assert greedy.tolist() == (logits.argmax(-1) == goal).tolist()


def test_steered_rows_are_steered_from_their_own_first_token() -> None:
    model, texts = tiny_model(dtype=F64), rows()
    first = [1] * len(texts)
    steering = Steering([FeatureEdit(0, 5, "add", 3.0)], positions=[(1, None)])
    found = token_scores(model, texts, first, steering=steering)
    plain = token_scores(model, texts, first, steering=False)
    for row, log_p, other in zip(texts, found.log_p, plain.log_p, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row]), steering=steering).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(
            log_p, logits.gather(-1, torch.tensor(row[1:])[:, None])[:, 0], rtol=1e-5, atol=1e-6
        )
        assert float(log_p[0]) == pytest.approx(float(other[0]))  # its logits come from the first token
    assert any(not torch.allclose(a, b) for a, b in zip(found.log_p, plain.log_p, strict=True))
    with model.steered(steering):
        inside = token_scores(model, texts, first)
    assert all(torch.equal(a, b) for a, b in zip(inside.log_p, found.log_p, strict=True))


def test_bad_rows() -> None:
    base = tiny_base()
    with pytest.raises(ValueError, match="context of 128 tokens. Received: 1 longer ones, up to 129"):
        token_scores(base, [[3] * 129, [3, 4]], [1, 1])
    for first in (0, 2):
        with pytest.raises(ValueError, match=rf"first={first} of 2 tokens in row 0, and 0 more"):
            token_scores(base, [[3, 4]], [first])


def test_texts_stand_after_a_token() -> None:
    ids, places = encode_after_start(word_tokenizer(begins=True), ["w0 w1", ""])
    assert ids == [[1, 4, 5], [1]] and places == [[(0, 0), (0, 2), (3, 5)], [(0, 0)]]
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    assert start_token(tokenizer) == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither"):
        start_token(tokenizer)
