import pytest
import torch

from sae_transformers.latents.text_latents import batches_of, encode_text_means, text_ids
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_model, tiny_sae


def test_means_are_those_of_each_text_alone() -> None:
    saes = [tiny_sae(layer=1, site="resid_post"), tiny_sae(seed=2, layer=0, site="mlp_out", activation="jumprelu")]
    model = tiny_model(saes=saes)
    texts = word_texts(9, shortest=3, longest=9)
    rows, kept = text_ids(model, word_tokenizer(), texts, max_length=7)
    assert kept == list(range(9)) and max(map(len, rows)) == 7
    seen: list[int] = []
    found = encode_text_means(model, rows, asked=[[5, 9], []], tokens_at_once=20, report=seen.append)
    assert sum(seen) == 9 and len(seen) > 2
    for i, row in enumerate(rows):
        inputs = model(input_ids=torch.tensor([row]), output_sae_inputs=True).sae_inputs
        for number, (sae, one) in enumerate(zip(saes, found, strict=True)):
            states = inputs[number][0, 1:].detach()
            assert torch.allclose(one.hidden[i], states.mean(0), atol=1e-5)
            latents = sae(states).latents.detach().mean(0)
            assert torch.allclose(one.codes.to_dense()[i].float(), latents, atol=1e-5)
        before = saes[0].encode_pre_acts(inputs[0][0, 1:]).detach().mean(0)[[5, 9]]
        assert torch.allclose(found[0].pre_acts[i], before, atol=1e-4)
    assert found[1].pre_acts.shape == (9, 0)


def test_steering_is_off() -> None:
    model, rows = tiny_model(), [[5, 6, 7], [8, 9, 10]]
    plain = encode_text_means(model, rows)[0].hidden
    with model.steered({"edits": [{"feature": 3, "op": "direction", "value": 9.0}]}):
        assert torch.equal(encode_text_means(model, rows)[0].hidden, plain)


def test_batches_hold_every_text_once() -> None:
    rows = [[1] * n for n in (3, 9, 1, 4, 4, 12)]
    batches = list(batches_of(rows, tokens_at_once=9))
    assert sorted(torch.cat([batch.texts for batch in batches]).tolist()) == list(range(6))
    assert batches[0].texts.tolist() == [5]  # longer than tokens_at_once: alone
    assert all(batch.ids.numel() <= 9 for batch in batches[1:])
    for batch in batches:
        assert batch.mask.sum(1).tolist() == [len(rows[i]) for i in batch.texts]


def test_short_texts_are_left_out_and_bad_input_is_refused() -> None:
    model, tokenizer = tiny_base(), word_tokenizer()
    rows, kept = text_ids(model, tokenizer, ["w1 w2 w3", "w1", "", "w4 w5"], max_length=8)
    assert kept == [0, 3] and rows == [[5, 6, 7], [8, 9]]
    with pytest.raises(ValueError, match="3 texts, 1 of them so long"):
        text_ids(model, tokenizer, ["w1 w2", "w1", "w2"], max_length=8)
    with pytest.raises(ValueError, match="0 texts"):
        text_ids(model, tokenizer, [], max_length=8)
    with pytest.raises(ValueError, match="from 2 to 128 for this model. Received: max_length=129"):
        text_ids(model, tokenizer, ["w1 w2"] * 2, max_length=129)
    with pytest.raises(TypeError, match="one text"):
        text_ids(model, tokenizer, "w1 w2", max_length=8)
