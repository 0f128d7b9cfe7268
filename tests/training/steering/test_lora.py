"""A base fine-tuned on a topic's texts, and as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from sae_transformers.training.steering.lora import tune_on_texts
from tests.tiny import prompt, tiny_base


def test_texts_become_likelier_and_the_base_stays() -> None:
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rows = [*prompt(6, 12), torch.tensor([7])]

    def loss(model) -> float:
        with torch.no_grad():
            return float(model(input_ids=prompt(6, 12), labels=prompt(6, 12)).loss)

    first = loss(base)
    tuned = tune_on_texts(base, rows, epochs=20, learning_rate=1e-2, batch_size=4)
    assert not tuned.training and loss(tuned) < 0.8 * first
    # Rows that differ in length are padded, and padding teaches nothing.
    plain = tuned.unload()
    after = plain.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert loss(plain) == first


def test_the_seed_decides() -> None:
    rows = [row[: 5 + i] for i, row in enumerate(prompt(4, 12))]
    found = []
    for seed in (1, 1, 2):
        tuned = tune_on_texts(tiny_base(), rows, epochs=1, seed=seed)
        with torch.no_grad():
            found.append(tuned(input_ids=prompt()).logits)
        tuned.unload()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_bad_input() -> None:
    for rows, options, told in [
        ([torch.tensor([3])], {}, "Received: 0 texts"),
        ([torch.tensor([3, 4])], {"epochs": 0}, "epochs=0"),
        ([torch.tensor([3, 4])], {"rank": 0}, "rank=0"),
    ]:
        with pytest.raises(ValueError, match=told):
            tune_on_texts(None, rows, **options)
