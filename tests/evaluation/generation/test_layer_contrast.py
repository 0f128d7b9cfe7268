"""DoLa against its equations written out in numpy, and against a loop that has all hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_transformers.evaluation.generation.layer_contrast import (
    LayerContrast,
    contrast_layers,
    contrasted_layers,
    contrasting,
)
from sae_transformers.evaluation.generation.short_answers import short_answers
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base


def by_hand(final: np.ndarray, early: np.ndarray, weight: float | None) -> np.ndarray:
    """One row (vocab,) against layers (n, vocab), as the authors' code has it at a batch of one."""

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    q_final = softmax(final)
    divergences = []
    for layer in early:
        q = softmax(layer)
        m = (q + q_final) / 2
        divergences.append(float((m * np.log(m / q_final)).sum() + (m * np.log(m / q)).sum()))
    q = softmax(early[int(np.argmax(divergences))])
    difference = np.log(q_final) - np.log(q)
    scores = difference if weight is None else (1 + weight) * np.log(q_final) - weight * np.log(q)
    return np.where(q_final < 0.1 * q_final.max(), -np.inf, scores)


@pytest.mark.parametrize("weight", [None, 6.0, -8.0, 0.0])
def test_equations(weight: float | None) -> None:
    draw = np.random.RandomState(0)
    final, early = draw.randn(5, 11) * 2, draw.randn(3, 5, 11) * 2
    found = contrasted_layers(torch.tensor(final), torch.tensor(early), weight)
    for row in range(5):
        np.testing.assert_allclose(
            found[row].numpy(), by_hand(final[row], early[:, row], weight), rtol=1e-4, atol=1e-5
        )
    assert bool((found == -torch.inf).any())


@pytest.mark.parametrize(("n", "layers"), [(2, (0,)), (4, (1, 3)), (32, tuple(range(15, 31, 2)))])
def test_upper_half(n: int, layers: tuple[int, ...]) -> None:
    """DoLa's `high` of transformers names hidden states n/2, n/2 + 2, ...; that after block i is number i + 1."""
    assert contrast_layers(n) == tuple(layer for layer in layers if layer < n - 1)


def test_deep_models_contrast_their_last_twenty_layers() -> None:
    assert contrast_layers(48) == tuple(range(27, 47, 2))
    with pytest.raises(ValueError, match="two or more. Received: 1"):
        contrast_layers(1)


def test_generation_takes_the_layers_own_states() -> None:
    base, tokenizer = tiny_base(num_hidden_layers=4, eos_token_id=None), word_tokenizer()
    prompts = ["w1 w2 w3 w4", "w5 w6 w7 w8 w9 w1 w2"]
    contrast = LayerContrast(weight=2.0, layers=(0, 2))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                out = base(ids, output_hidden_states=True)
                head = base.get_output_embeddings()
                early = torch.stack([head(out.hidden_states[n + 1][0, -1]) for n in (0, 2)])
            scores = by_hand(out.logits[0, -1].double().numpy(), early.double().numpy(), 2.0)
            ids = torch.cat([ids, torch.tensor([[int(scores.argmax())]])], 1)
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    hooks = [len(module._forward_hooks) for module in base.modules()]
    found = short_answers(base, tokenizer, prompts, contrast=contrast, max_new_tokens=5)
    assert found == expected
    assert found != short_answers(base, tokenizer, prompts, max_new_tokens=5)
    assert [len(module._forward_hooks) for module in base.modules()] == hooks


def test_layers_that_are_not_there() -> None:
    for layers in ((1,), (-1,), ()):
        with (
            pytest.raises(ValueError, match=r"below the last, 1. Received: layers="),
            contrasting(tiny_base(num_hidden_layers=2), LayerContrast(layers=layers)),
        ):
            pass
