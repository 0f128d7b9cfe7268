"""Sums over a data set from which errors of an SAE's output, and sparsity and use of its latents, are told."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modeling import SparseFeatures
from ...modeling.sae_losses import normalized_mse as relative_errors

SUMS = ("tokens", "squared_error", "relative_error", "cosine", "active", "squares")


class ReconstructionMeter:
    """The figures of `metrics` over a data set, batch by batch.

    What is kept are sums over each text's tokens, (n_texts, 6) as `SUMS` names them and (n_texts, d) of the hidden
    states less `origin`; and on how many tokens each latent was active, (d_sae,).

    Args:
        d_sae: number of latents; 0 where they are not measured.
        n_texts: whose sums are kept apart.
        origin: (d,) float64; by default the mean of the first hidden states.
    """

    NAMES = ("active_tokens", "sums", "states", "origin")

    def __init__(self, d_sae: int = 0, n_texts: int = 1, origin: Tensor | None = None) -> None:
        self.active_tokens = torch.zeros(d_sae, dtype=torch.long)
        self.sums = torch.zeros(n_texts, len(SUMS), dtype=torch.float64)
        self.states = torch.zeros(n_texts, 1 if origin is None else len(origin), dtype=torch.float64)
        self.origin = origin

    def update(
        self,
        target: Tensor,
        reconstruction: Tensor,
        latents: Tensor | SparseFeatures | None = None,
        texts: Tensor | None = None,
    ) -> None:
        """Count a batch.

        Args:
            target, reconstruction: (n_tokens, d).
            latents: (n_tokens, d_sae), or sparse.
            texts: (n_tokens,) int64, the text of each token, where there are several.
        """
        if target.ndim != 2 or target.shape != reconstruction.shape:
            raise ValueError(
                f"`target` and `reconstruction` must be of one shape (n_tokens, d). "
                f"Received: {tuple(target.shape)} and {tuple(reconstruction.shape)}."
            )
        if not len(target):
            return
        target, reconstruction = target.double(), reconstruction.double()
        if self.origin is None:  # variances are taken from here: a large mean would cancel their digits
            self.origin = target.mean(0)
            self.states = self.states.repeat(1, target.shape[1])
        moved = target - self.origin.to(target.device)
        active = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        if latents is not None:
            on = latents != 0 if isinstance(latents, Tensor) else latents.values != 0
            indices = on.nonzero()[:, -1] if isinstance(latents, Tensor) else latents.indices[on]
            self.active_tokens += torch.bincount(indices.cpu(), minlength=len(self.active_tokens))
            active = on.sum(-1).double()
        columns = [
            torch.ones_like(active), (reconstruction - target).square().sum(-1),
            relative_errors(target, reconstruction), F.cosine_similarity(target, reconstruction, dim=-1), active,
            moved.square().sum(-1),
        ]  # fmt: skip
        for kept, values in ((self.sums, torch.stack(columns, 1)), (self.states, moved)):
            if texts is None:
                kept += values.sum(0).cpu()
            else:
                kept.index_add_(0, texts, values.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """What was counted, as `add` takes it."""
        origin = torch.empty(0, dtype=torch.float64) if self.origin is None else self.origin
        return dict(zip(self.NAMES, (self.active_tokens.int(), self.sums, self.states, origin), strict=True))

    def add(self, counted: Mapping[str, Tensor], texts: Tensor) -> None:
        """Count what another meter, from the same origin, has counted of texts that this one has nothing of.

        Args:
            counted: of its `tensors`.
            texts: (n,) int64, numbers of these texts.
        """
        if len(origin := counted["origin"]) and self.origin is None:
            self.origin, self.states = origin, self.states.repeat(1, len(origin))
        self.active_tokens += counted["active_tokens"]
        self.sums[texts] = counted["sums"]
        self.states[texts] = counted["states"]

    def mean(self) -> Tensor:
        """The mean hidden state, (d,) float64, of one token or more."""
        moved = self.states.sum(0) / self.sums[:, 0].sum()
        return moved if self.origin is None else self.origin.cpu() + moved

    def figures(self, counts: Tensor) -> dict[str, Tensor]:
        """`fvu`, `explained_variance`, `normalized_mse`, `cosine_similarity`, `l0`, each (resamples,).

        Args:
            counts: (resamples, n_texts), how often each text counts.
        """
        tokens, error, relative, cosine, active, squares = (counts @ self.sums).unbind(1)
        variance = squares - (counts @ self.states).square().sum(1) / tokens
        fvu = torch.where(variance > 0, error / variance, torch.nan)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "normalized_mse": relative / tokens,
            "cosine_similarity": cosine / tokens,
            "l0": active / tokens,
        }

    def result(self) -> dict[str, float]:
        """`fvu`, `normalized_mse`, `cosine_similarity`, `tokens`; with latents also `l0` and `dead_share`, the share
        of latents that were active on no token.

        Raises:
            ValueError: the targets do not vary, or there are none.
        """
        figures = self.figures(torch.ones(1, len(self.sums), dtype=torch.float64))
        tokens = int(self.sums[:, 0].sum())
        if bool(figures["fvu"].isnan()):
            raise ValueError(f"The targets must vary: expected two different tokens. Received: {tokens} tokens.")
        found = {name: float(figures[name]) for name in ("fvu", "normalized_mse", "cosine_similarity")}
        found["tokens"] = tokens
        if len(self.active_tokens):
            found |= {"l0": float(figures["l0"]), "dead_share": self.dead_share()}
        return found

    def dead_share(self) -> float:
        """The share of latents that were active on no token."""
        return float((self.active_tokens == 0).double().mean())
