"""The difference of means of labelled texts' hidden states, added over strengths: the baseline of AxBench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .method import STRENGTHS, MethodInputs, MethodMaker, PreparedMethods

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling import SaeForCausalLM


@dataclass(frozen=True)
class DiffMean(MethodMaker):
    """Method `diffmean`, at the place where the first latent's SAE writes; the model gets one more SAE for it.

    Args:
        positives, negatives: texts with the concept and texts without.
        strengths: in hidden norms, as a latent's.
        sae: number of the SAE at whose place it stands; by default that of the first latent, or 0.
        positions: of `Steering`.
        max_length: tokens of a text that are read.
        batch_size: texts of a pass.
    """

    positives: Sequence[str]
    negatives: Sequence[str]
    strengths: Sequence[float] = STRENGTHS
    sae: int | None = None
    positions: Any = "all"
    max_length: int | None = 128
    batch_size: int = 16

    @classmethod
    def read(cls, options: Any, inputs: MethodInputs) -> DiffMean | None:
        """Fitted to the labelled texts, where there are any."""
        if inputs.fitting is None:
            return None
        return cls(*inputs.fitting, inputs.strengths, max_length=inputs.max_length)

    def prepare(self, made: PreparedMethods) -> None:
        """Fit the direction, put it into the model, and steer along it."""
        import torch

        from ...latents.context import reading_length
        from ...latents.progress import keep_nothing
        from ..method_ids import baseline_method
        from .directions import diffmean_direction, with_direction
        from .over_strengths import latent_method

        model, first = made.model, made.first
        sae = self.sae if self.sae is not None else first[0] if first else 0
        max_length = reading_length(model, self.max_length, 256)
        texts = [list(self.positives), list(self.negatives)]

        def fit() -> dict[str, Tensor]:
            of = {"sae": sae, "max_length": max_length, "batch_size": self.batch_size}
            return {"direction": diffmean_direction(model, made.tokenizer, *texts, **of)}

        keep = made.keep or keep_nothing
        direction = keep({"diffmean": [texts, sae, max_length, self.batch_size]}, fit)["direction"]
        made.model, number = with_direction(model, direction, sae=sae)
        method = latent_method(0, self.strengths, sae=number, positions=self.positions)
        made.methods["diffmean"] = replace(method, of=baseline_method("diffmean_steering", "diffmean"))
        made.facts["diffmean"] = {
            "texts_with": len(texts[0]),
            "texts_without": len(texts[1]),
            "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            "max_length": max_length,
        }
        if first is not None:
            own = made.model.saes[first[0]].W_dec[first[1]].detach().float().cpu()
            cosine = torch.cosine_similarity(own, direction, dim=0)
            made.facts["diffmean"]["cosine_with_latent"] = round(float(cosine), 6)

    def count(self, model: SaeForCausalLM) -> int:
        """A setting for each strength."""
        return len(self.strengths)
