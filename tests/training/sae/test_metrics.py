"""What is logged, against direct computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.training.sae.arguments import SaeLossArguments
from sae_transformers.training.sae.metrics import Meters
from sae_transformers.training.sae.objective import SaeObjective
from tests.tiny import WIDTH, tiny_sae

PLACE = "layers.1.resid_post"


class OneProcess:
    """What `Meters` asks of accelerate."""

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return value


def batches(offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * n + offset for n in (7, 20, 3)]


def metered(saes: list[SparseAutoencoder], given: list[dict[str, torch.Tensor]], **settings: Any) -> tuple[Any, Any]:
    objective = SaeObjective(saes, SaeLossArguments(**settings)).eval()
    meters = Meters(objective)
    for batch in given:
        objective(**batch)
        meters.add(objective)
    return meters, objective


def test_batches_of_any_size_give_what_all_tokens_together_give():
    sae = tiny_sae(dtype=torch.float64, layer=1, site="resid_post", activation="relu")
    meters, _ = metered([sae], [{PLACE: x} for x in batches()], sparsity_coefficient=0.2)
    found = meters.take(OneProcess())
    x = torch.cat(batches())
    with torch.no_grad():
        latents, error = sae.encode(x), sae(x).reconstruction - x
        terms = sae.losses(x)
    wanted = {
        "loss": terms["reconstruction"] + 0.2 * terms["sparsity"],
        "l0": (latents != 0).sum() / len(x),
        "fvu": error.square().sum() / (x - x.mean(0)).square().sum(),
        "dead_share": torch.tensor(0.0),
        "reconstruction": terms["reconstruction"],
        "sparsity": 0.2 * terms["sparsity"],
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=2e-6)
    assert meters.take(OneProcess()) == {}  # counting starts anew


def test_the_variance_is_right_far_from_zero():
    sae = tiny_sae(dtype=torch.float64, layer=1, site="resid_post")
    found = metered([sae], [{PLACE: x} for x in batches(1e5)])[0].take(OneProcess())
    x = torch.cat(batches(1e5))
    with torch.no_grad():
        wanted = (sae(x).reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(found["fvu"], float(wanted), rtol=1e-6, atol=1e-6)


def test_several_saes_have_their_own_names_and_numbers():
    saes = [tiny_sae(dtype=torch.float64, layer=1, site="resid_post", k=k) for k in (3, 9)]
    meters, objective = metered(saes, [{PLACE: batches()[1]}])
    objective.saes[1].tokens_since_fired[:16] = 10_000_000
    found = meters.take(OneProcess())
    assert found[f"{PLACE}-0/dead_share"] == 0.0 and found[f"{PLACE}-1/dead_share"] == 0.25
    for number, sae in enumerate(saes):
        with torch.no_grad():
            x = batches()[1]
            l0 = float((sae.encode(x) != 0).sum(-1).double().mean())
        assert found[f"{PLACE}-{number}/l0"] == round(l0, 6)
    assert all(name.startswith(PLACE) for name in found)


def test_tokens_left_out_are_not_counted():
    sae, x = tiny_sae(dtype=torch.float64, layer=1, site="resid_post"), batches()[1]
    spoiled = torch.cat([x, torch.full((4, WIDTH), torch.nan, dtype=torch.float64)])
    assert (
        metered([sae], [{PLACE: spoiled}])[0].take(OneProcess())["fvu"]
        == metered([sae], [{PLACE: x}])[0].take(OneProcess())["fvu"]
    )
