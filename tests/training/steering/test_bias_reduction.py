"""Features planted to go with an attribute are found, and taking them out does what it says."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import Steering
from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.training.steering.bias_reduction import rank_by_swaps, rank_by_tokens, reducing, sweep
from tests.tiny import WIDTH, prompt, tiny_model, tiny_sae

F64 = torch.float64
PLANTED = 9


def planted(n: int = 60) -> tuple:
    """States of n texts of 4 tokens and their counterparts: the swap adds feature 9's direction to the third token."""
    sae = tiny_sae(layer=1, activation="relu", dtype=F64)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-1.0)
    states = torch.randn(n * 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=F64)
    third = torch.arange(n * 4) % 4 == 2
    swapped = states + third[:, None] * 6.0 * sae.W_dec[PLANTED].detach()
    texts = torch.arange(n).repeat_interleave(4)
    return sae, states, swapped, texts, third


@pytest.mark.parametrize("statistic", ["relative", "paired_t"])
def test_swaps_find_the_planted_feature(statistic: str) -> None:
    sae, states, swapped, texts, _ = planted()
    found = rank_by_swaps(sae, states, swapped, (texts, texts), statistic=statistic)
    assert int(found.features[0]) == PLANTED and found.scores.shape == (64,)
    assert found.scores[found.features].diff().le(0).all()
    with pytest.raises(ValueError, match="No feature goes with.*largest score"):
        rank_by_swaps(sae, states, states, (texts, texts), statistic=statistic)


def test_tokens_find_the_planted_feature() -> None:
    sae, _, swapped, _, third = planted()
    found = rank_by_tokens(sae, swapped, third.long())
    assert int(found.features[0]) == PLANTED
    expected = auroc(sae.encode(swapped)[:, PLANTED].detach(), third.long()) - 0.5
    assert float(found.scores[PLANTED]) == pytest.approx(expected)
    other = rank_by_tokens(sae, swapped, 1 - third.long())
    assert int(other.features[0]) == PLANTED
    one_way = rank_by_tokens(sae, swapped, 1 - third.long(), both_ways=False, threshold=0.0)
    assert PLANTED not in one_way.features.tolist()
    with pytest.raises(ValueError, match="No feature goes with"):
        rank_by_tokens(sae, swapped, third.long(), threshold=0.5)
    with pytest.raises(ValueError, match=r"\(240, 32\) and \(3,\)"):
        rank_by_tokens(sae, swapped, third[:3].long())


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_features_are_out_of_the_hidden_state(activation: str) -> None:
    """Ablated: h' = h - sum z_i W_dec[i]; clamped: + sum (v_i - z_i) W_dec[i]; the first token is left alone."""
    model = tiny_model(dtype=F64, activation=activation)
    features, ids, sae = [3, 9, 20], prompt(), model.saes[0]
    with torch.no_grad():
        plain = model(ids, steering=False, output_sae_inputs=True, output_hidden_states=True)
        latents = sae.encode(plain.sae_inputs[0])[..., features]
        for options, target in (
            ({}, torch.zeros(3)),
            ({"op": "clamp", "value": [0.5, 0.0, 2.0]}, torch.tensor([0.5, 0, 2])),
        ):
            steered = model(ids, steering=reducing(features, **options), output_hidden_states=True)
            moved = steered.hidden_states[2] - plain.hidden_states[2]
            expected = (target.double() - latents) @ sae.W_dec[features]
            torch.testing.assert_close(moved[:, 1:], expected[:, 1:])
            assert float(moved[:, 0].abs().max()) == 0


def test_a_sweep_takes_the_first_features_out() -> None:
    seen: list[Steering] = []

    def measure(steering: Steering) -> int:
        seen.append(steering)
        return len(steering.edits)

    assert sweep(torch.tensor([5, 3, 8]), (0, 2, 3), measure) == {0: 0, 2: 2, 3: 3}
    assert [[edit.feature for edit in one.feature_edits] for one in seen] == [[], [5, 3], [5, 3, 8]]
    assert not seen[0] and seen[1] == reducing([5, 3]) and seen[1].positions == ((1, None),)
    sweep(torch.tensor([5, 3]), (1,), measure, op="clamp", values=torch.tensor([0.25, 4.0]), positions="all")
    assert seen[-1] == reducing([5], op="clamp", value=0.25, positions="all")
    with pytest.raises(ValueError, match=r"in \[0, 2\].*\[3\]"):
        sweep(torch.tensor([5, 3]), (1, 3), measure)


def test_it_is_saved_as_steering() -> None:
    steering = reducing(torch.tensor([1, 2]), op="clamp", value=0.5)
    assert Steering.from_json(steering.to_json()) == steering
    with pytest.raises(ValueError, match="op='remove'"):
        reducing([1], op="remove")
    with pytest.raises(ValueError, match="each of 2 features. Received: 3"):
        reducing([1, 2], op="clamp", value=[1.0, 2.0, 3.0])
