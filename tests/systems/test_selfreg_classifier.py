"""Facts of SelfReg (https://huggingface.co/papers/2502.14133) that its classifier, its SAE and its data rest on.

Where the others are: the losses of the SAE in test_selfreg_training.py; the annealed k in training/test_arguments.py;
removal, penalty and masks of each label in modeling/test_feature_head.py; the losses of all methods and the published
ones in training/test_head_losses.py; batches, patience and decay in training/test_heads.py; which answers count in
create_training_data/test_answers.py; pairs in evaluation/test_classification.py; its checkpoint in
modeling/conversion.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from sae_transformers import SparseAutoencoder, Steering
from sae_transformers.create_training_data.spans.settings import SpanSettings
from sae_transformers.create_training_data.spans.tokens import span_bounds, text_tokens
from sae_transformers.modeling.base_arguments import cache_of
from tests.create_training_data.words import word_tokenizer
from tests.systems.test_selfreg_training import D, K, N, hidden, selfreg_sae
from tests.tiny import prompt, tiny_model, tiny_sae

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_fact_1_codes_are_positive_sparse_and_tied() -> None:
    sae: SparseAutoencoder = selfreg_sae()
    z = sae.encode(hidden())
    assert bool((z >= 0).all()) and bool(((z > 0).sum(-1) <= K).all()) and bool((z > 0).any())
    h = (hidden() - sae.b_dec) @ sae.W_enc + sae.b_enc
    mask = torch.zeros_like(h).scatter_(-1, h.topk(K).indices, 1.0)
    torch.testing.assert_close(z, torch.relu(h * mask))
    torch.testing.assert_close(sae.decode(torch.zeros(1, N, dtype=z.dtype))[0], sae.b_dec)
    assert torch.equal(sae.W_dec, sae.W_enc.T) and sae.W_dec.shape == (N, D)
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    assert sae.W_dec[0, 0] == sae.W_enc[0, 0]


def test_fact_4_its_layer_16_is_the_state_after_block_15() -> None:
    """The original counts layers from 1: the output of `layers[L - 1]`, which is `hidden_states[L]`."""
    model = tiny_model(saes=[tiny_sae(layer=1)])
    output = model(prompt(2, 6), output_sae_inputs=True, output_hidden_states=True)
    torch.testing.assert_close(output.sae_inputs[0], output.hidden_states[2])


def test_fact_6_generation_replaces_the_last_prompt_token_and_every_new_one() -> None:
    model, ids = tiny_model(saes=[tiny_sae(layer=1)]), prompt(2, 6)
    steering = Steering(reconstruct=(0,), positions="generated")
    plain = model(ids, output_hidden_states=True, output_sae_inputs=True)
    with model.steered(steering):
        replaced = model(ids, output_hidden_states=True, logits_to_keep=1)
        expected = plain.hidden_states[2].clone()
        expected[:, -1] = model.saes[0](plain.sae_inputs[0][:, -1]).reconstruction
        torch.testing.assert_close(replaced.hidden_states[2], expected)
        step = model(ids[:, :1], past_key_values=cache_of(replaced), output_hidden_states=True)
    hidden_there = model(torch.cat([ids, ids[:, :1]], 1), steering=steering, output_hidden_states=True).hidden_states[
        2
    ]
    assert step.hidden_states[2].shape[1] == 1
    assert not torch.allclose(step.hidden_states[2][:, 0], plain.hidden_states[2][:, 0])
    torch.testing.assert_close(step.hidden_states[2][:, 0], hidden_there[:, -1])


@pytest.mark.parametrize("peak", [0, 1, 31, 32, 50])
def test_fact_18_a_span_is_the_32_tokens_before_the_peak(peak: int) -> None:
    words = [f"w{i}" for i in range(60)]
    settings = SpanSettings(window=32, include_peak=False, skip_first=0, outlier_ratio=None)
    (tokens,) = text_tokens(word_tokenizer(), [" ".join(words)], settings)
    start, end = map(int, span_bounds([tokens], torch.tensor([0]), torch.tensor([peak]), settings))
    assert " ".join(words)[start:end] == " ".join(words[max(0, peak - 32) : peak])


def test_fact_20_the_diagnoses() -> None:
    path = DATA / "medical" / "dxy.tsv"
    if not path.exists():
        pytest.skip("the data is not there")
    with path.open(encoding="utf-8", newline="") as file:
        counts = Counter(row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    others = sum(counts.values()) - counts["Pneumonia"] - counts["URTI"]
    assert (counts["Pneumonia"], counts["URTI"], others) == (80, 98, 245)
