"""The effect of each active latent at each token on a target, by gradients or by taking latents out.

Notation: `m(w)` the target where each latent's value `z_p` at its token is `w_p * z_p`, what SAEs do not reconstruct
left as it is (`edit_features`), later SAEs reading what comes of it; P pairs of latent and token.

    gradient x latent       dm/dw_p at w = 1, which is z_p * dm/dz_p
    integrated gradients    the mean of dm/dw_p along w = a, 0 < a < 1, for the pairs of one SAE
    ablation                m(1) - m(w_p = 0)

The first is attribution patching towards zero (https://arxiv.org/abs/2310.10348), the second that of
https://arxiv.org/abs/1703.01365 on latents, as sparse feature circuits use it (https://arxiv.org/abs/2403.19647,
section 3): its effects of one SAE add up to the target less its value without the SAE's latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...modeling import SparseFeatures
from ...modeling.modeling_sae import SaePreTrainedModel
from .targets import Target, scores_of

GRADIENT, INTEGRATED, ABLATION = "gradient x latent", "integrated gradients", "ablation"
METHODS = (GRADIENT, INTEGRATED, ABLATION)


class Pairs(NamedTuple):
    """P active latents at tokens of one text, by SAE, then token: sae, feature, position (P,) int64, and activation
    (P,) in the SAE's dtype, all on the CPU."""

    sae: Tensor
    feature: Tensor
    position: Tensor
    activation: Tensor

    def take(self, which: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(*(one[which] for one in self))


class Effects(NamedTuple):
    """pairs: the active latents. effect: (P,) float64. value: of the target, as the model is."""

    pairs: Pairs
    effect: Tensor
    value: float


def gradient_effects(
    model: SaePreTrainedModel, target: Target, saes: Sequence[int], *, skip_first: int = 1
) -> Effects:
    """Gradient x latent of every active latent at every token, from one forward and one backward pass.

    Args:
        saes: numbers of the SAEs whose latents are attributed.
        skip_first: leading tokens whose latents are not.

    Raises:
        ValueError: the target function gave something else than a number, or nothing that depends on the latents.
    """
    with torch.enable_grad():
        output = model(
            _inputs(model, target, 1), steering=False, features=dict.fromkeys(saes),
            features_require_grad="with_error", **_options(model, target),
        )  # fmt: skip
        value = scores_of(target, output, 1)
        features: list[SparseFeatures] = [output.sae_features[number] for number in saes]
        gradients = gradients_of(value.sum(), features)
    parts, effects = [], []
    for number, found, gradient in zip(saes, features, gradients, strict=True):
        values = found.values[0].detach()
        active = values != 0
        active[:skip_first] = False
        position, place = active.nonzero(as_tuple=True)
        kept = values[position, place]
        of_sae = torch.full_like(position, number)
        parts.append(Pairs(of_sae, found.indices[0][position, place], position, kept))
        effects.append(kept.double() * gradient[0][position, place].double())
    pairs = Pairs(*(torch.cat([one.cpu() for one in column]) for column in zip(*parts, strict=True)))
    return Effects(pairs, torch.cat([one.cpu() for one in effects]), float(value.detach()))


def gradients_of(total: Tensor, features: Sequence[SparseFeatures]) -> list[Tensor]:
    """The gradient of a number by the values of features, 0 where it does not depend on them.

    Raises:
        ValueError: it depends on none of them.
    """
    values = [one.values for one in features]
    found = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else [None] * len(values)
    if all(one is None for one in found):
        raise ValueError(
            "The target does not depend on the latents. Expected a function of the output's tensors, without "
            "`.item()`, `.detach()` or `argmax`. Received: a number without a gradient."
        )
    pairs = zip(found, values, strict=True)
    return [torch.zeros_like(value) if one is None else one for one, value in pairs]


class ScaledLatents:
    """`m(w)`: the target where the values of some pairs are scaled, for many `w` at once.

    Args:
        pairs: P pairs of the SAEs `numbers`.
        skip_first: leading tokens whose latents stay as they are, whatever is done to the others.
    """

    def __init__(self, model: SaePreTrainedModel, target: Target, pairs: Pairs, *, skip_first: int) -> None:
        self.model, self.target, self.pairs, self.skip_first = model, target, pairs, skip_first
        self.numbers = sorted(set(pairs.sae.tolist()))
        self.rows_of: dict[int, Tensor] = {n: (pairs.sae == n).nonzero()[:, 0] for n in self.numbers}
        self._keys = {}
        for number, own in self.rows_of.items():
            keys = self._key(pairs.position[own], pairs.feature[own], number)
            order = keys.argsort()
            self._keys[number] = (keys[order], own[order])

    def _key(self, position: Tensor, feature: Tensor, number: int) -> Tensor:
        return position * self.model.config.sae_configs[number].d_sae + feature

    def scores(self, factors: Tensor, others: float = 1.0, saes: Sequence[int] | None = None) -> Tensor:
        """The target of each row, (rows,).

        Args:
            factors: (rows, P), what each pair's value is multiplied by.
            others: likewise for latents that are none of the pairs, such as those that become active.
            saes: numbers of those whose latents are scaled; the others run as they are.
        """
        device, rows = self.model.device, len(factors)
        ends = factors.new_tensor([others, 1.0]).expand(rows, 2)
        table = torch.cat([factors, ends], 1).to(device)  # the last two: other latents, tokens that are left alone
        functions = {n: self._function(n, table) for n in (self.numbers if saes is None else saes)}
        output = self.model(
            _inputs(self.model, self.target, rows), steering=False, edit_features=functions,
            **_options(self.model, self.target),
        )  # fmt: skip
        return scores_of(self.target, output, rows)

    def _function(self, number: int, table: Tensor) -> Callable[[SparseFeatures], Tensor]:
        keys, columns = self._keys[number]
        n_pairs = table.shape[1] - 2

        def scaled(features: SparseFeatures) -> Tensor:
            indices = features.indices
            position = torch.arange(indices.shape[1], device=indices.device)[None, :, None]
            wanted = self._key(position, indices, number)
            known, of = keys.to(indices.device), columns.to(indices.device)
            place = torch.searchsorted(known, wanted).clamp(max=max(len(known) - 1, 0))
            column = torch.full_like(wanted, n_pairs)
            if len(known):
                column = torch.where(known[place] == wanted, of[place], column)
            column = torch.where(position < self.skip_first, n_pairs + 1, column)
            factors = table.to(indices.device).gather(1, column.flatten(1)).view_as(features.values)
            return features.values * factors.to(features.values)

        return scaled

    def in_batches(self, rows: int, tokens_per_batch: int) -> Iterator[slice]:
        """Slices of `rows` rows, each of a forward pass."""
        size = max(1, tokens_per_batch // len(self.target.ids))
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def integrated_gradients(
    scaled: ScaledLatents, *, steps: int, tokens_per_batch: int, report: Callable[[int], object] | None = None
) -> Tensor:
    """Integrated gradients of every pair, (P,) float64: for each SAE by itself, along the straight line from no
    latents to the text's own, by the midpoint rule.

    Args:
        steps: points of the line; each is a row of a batch.
        report: called with the rows of each batch.
    """
    n_pairs = len(scaled.pairs.sae)
    found = torch.zeros(n_pairs, dtype=torch.float64)
    for number in scaled.numbers:
        own = scaled.rows_of[number]
        for part in scaled.in_batches(steps, tokens_per_batch):
            along = (torch.arange(part.start, part.stop, dtype=torch.float64) + 0.5) / steps
            factors = torch.ones(len(along), n_pairs, dtype=scaled.pairs.activation.dtype)
            factors[:, own] = along[:, None].to(factors)
            with torch.enable_grad():
                factors.requires_grad_()
                total = scaled.scores(factors, saes=[number]).sum()
                (gradient,) = torch.autograd.grad(total, factors)
            found[own] += gradient[:, own].double().sum(0) / steps
            if report is not None:
                report(len(along))
    return found


@torch.no_grad()
def ablation_effects(
    scaled: ScaledLatents, which: Tensor, *, tokens_per_batch: int, report: Callable[[int], object] | None = None
) -> Tensor:
    """What the target loses when one pair's latent is set to 0 at its token, (n,) float64.

    Args:
        which: (n,) int64, numbers of the pairs.
        report: called with the pairs of each batch.
    """
    found = torch.zeros(len(which), dtype=torch.float64)
    saes = scaled.pairs.sae[which]
    for number in saes.unique().tolist():
        places = (saes == number).nonzero()[:, 0]
        for part in scaled.in_batches(len(places), tokens_per_batch):
            some = places[part]
            factors = torch.ones(len(some) + 1, len(scaled.pairs.sae), dtype=scaled.pairs.activation.dtype)
            factors[torch.arange(len(some)), which[some]] = 0
            scores = scaled.scores(factors, saes=[number]).double().cpu()
            found[some] = scores[-1] - scores[:-1]  # the last row is the text as it is, rounded as the others are
            if report is not None:
                report(len(some))
    return found


def _inputs(model: SaePreTrainedModel, target: Target, rows: int) -> Tensor:
    return torch.tensor([target.ids], device=model.device).expand(rows, -1)


def _options(model: SaePreTrainedModel, target: Target) -> dict[str, Any]:
    cached = "use_cache" in model.base_arguments.named
    return {**target.options, **({"use_cache": False} if cached else {})}
