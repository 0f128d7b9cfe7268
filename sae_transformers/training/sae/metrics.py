"""How training goes, summed on the device and read only when it is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .initialization import rows_in_cache


class Meters:
    """Loss and its terms, L0, share of variance unexplained and dead share of each SAE since the last log."""

    def __init__(self, objective: Any) -> None:
        self.parts = list(objective.saes)
        self.sums: list[dict[str, Tensor]] = [{} for _ in self.parts]

    @torch.no_grad()
    def add(self, objective: Any) -> None:
        """Add the step that `objective` has just done."""
        for part, sums, step in zip(self.parts, self.sums, objective.last_steps, strict=True):
            new = {
                "tokens": torch.tensor(float(len(step.target)), dtype=torch.float64, device=step.target.device),
                "active": (step.code.latents != 0).sum().double(),
                "squared_error": _in_parts(step.error, lambda error: error.square().sum()),
                "squares": _in_parts(step.target, lambda target: target.square().sum()),
                "sum": _in_parts(step.target, lambda target: target.sum(0)),
                **{f"term {name}": term.detach().double().sum() for name, term in step.terms.items()},
            }
            if part.certified is not None and part.training:
                new["uncertified"] = new["tokens"].new_tensor(float(part.certified.n_uncertified))
                part.certified.n_uncertified = 0
            for name, value in new.items():
                sums[name] = sums[name] + value if name in sums else value

    def take(self, accelerator: Any) -> dict[str, float]:
        """The metrics over all processes; counting starts anew."""
        metrics: dict[str, float] = {}
        for number, (part, own) in enumerate(zip(self.parts, self.sums, strict=True)):
            if not own:
                continue
            sums = {name: accelerator.reduce(value, "sum") for name, value in own.items()}
            n = sums["tokens"]
            variance = sums["squares"] - sums["sum"].square().sum() / n
            terms = {name.removeprefix("term "): v / n for name, v in sums.items() if name.startswith("term ")}
            found = {
                "loss": sum(terms.values()),
                "l0": sums["active"] / n,
                "fvu": sums["squared_error"] / variance,
                "dead_share": (part.tokens_since_fired >= part.args.dead_after_tokens).float().mean(),
                **terms,
            }
            if "uncertified" in sums:
                found["certified_share"] = 1 - sums["uncertified"] / n
            prefix = f"{part.sae.config.read_at}-{number}/" if len(self.parts) > 1 else ""
            metrics.update({prefix + name: round(float(value), 6) for name, value in found.items()})
        self.sums = [{} for _ in self.parts]
        return metrics


def _in_parts(rows: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum over rows in float64, which few of them at a time are converted to."""
    parts = rows.split(rows_in_cache(rows))
    return torch.stack([statistic(part.double()) for part in parts]).sum(0)
