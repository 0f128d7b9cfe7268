"""What every head's `forward` takes besides the inputs of its base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .configuration_sparse_autoencoder import SparseAutoencoderConfig


@dataclass(frozen=True, eq=False)
class SaeCallOptions:
    """Keyword arguments of every head's `forward`.

    Args:
        steering: a `Steering`, a list with one (or None) for each row, or a plan of `prepare_steering`. False: none,
            whatever the default.
        steering_rows: (batch, 3), set by `generate`; see `steering_rows_for`.
        steering_mask: (batch, length) bool, absolute columns that may be steered; those beyond its length are not.
        steering_past: set by `generate` where the cache does not say how many tokens it holds.
        output_features: report the active latents of every SAE, as `SparseFeatures`.
        features: report only these latents: indices or concept names of SAE 0, or a dict by SAE number, in which None
            stands for all active ones, as `SparseFeatures`.
        features_require_grad: the reported features are in the graph of the outputs: `torch.autograd.grad(logit,
            out.sae_features[0].values)`. True: what the SAEs do not reconstruct is detached; "with_error": it is not,
            and gradients are derivatives of the base's own outputs. These stay the same in both; see
            `features_in_graph`. Places of value 0 have gradient 0.
        edit_features: a function from the `SparseFeatures` of SAE 0 to new values (batch, seq, width) of the same
            latents, which take the place of theirs; what the SAE does not reconstruct stays. Or a dict by SAE number.
            Reported features are those before.
        pre_activations: report pre-activations.
        output_sae_inputs: report the hidden states that the SAEs read.
        stop_at_last_sae: end the pass after the last SAE that is needed; `logits` is None.
    """

    steering: Any = None
    steering_rows: Tensor | None = None
    steering_mask: Tensor | None = None
    steering_past: int | None = None
    output_features: bool | None = None
    features: Any = None
    features_require_grad: bool | str = False
    edit_features: Any = None
    pre_activations: bool = False
    output_sae_inputs: bool | None = None
    stop_at_last_sae: bool = False

    @classmethod
    def take(cls, kwargs: Mapping[str, Any]) -> tuple[SaeCallOptions, dict[str, Any]]:
        """The options among a call's keyword arguments, and the base's.

        `kwargs` stays as it is: dynamo gives up on a base that reads a signature (LLaVA) once a caller's dict changed.
        """
        options = {name: value for name, value in kwargs.items() if name in NAMES}
        return cls(**options), {name: value for name, value in kwargs.items() if name not in NAMES}

    @property
    def reports(self) -> bool:
        """Whether anything is reported or the pass ended, whatever is steered."""
        given = self.features is not None or self.edit_features is not None
        asked = self.output_features or self.features_require_grad or self.output_sae_inputs or self.stop_at_last_sae
        return bool(given or asked)

    def last_needed(self, reported: Collection[int], every: Collection[int], *, with_losses: bool) -> frozenset[int]:
        """Numbers of the SAEs after which the pass ends; none where it does not."""
        if not self.stop_at_last_sae:
            return frozenset()
        some = self.features is not None and not self.output_sae_inputs and not with_losses
        return frozenset((reported if some else every) or every)


NAMES = tuple(one.name for one in fields(SaeCallOptions))
# What a misspelt argument may have meant, besides the base's own.
CALL_OPTIONS = (
    *(name for name in NAMES if name not in ("steering_rows", "steering_past")),
    "concept_targets",
    "labels",
    "penalty_mask",
)


def source_of(inputs: Mapping[str, Any]) -> Tensor:
    """The input ids (batch, seq) or embeddings (batch, seq, d) of a call."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def feature_columns(
    features: Any, configs: Sequence[SparseAutoencoderConfig], device: torch.device
) -> dict[int, Tensor | None]:
    """SAE number -> (m,) latents, or None for all, of the option `features`."""
    by_sae = features if isinstance(features, Mapping) else {0: features}
    columns: dict[int, Tensor | None] = {}
    for number, wanted in by_sae.items():
        if not isinstance(number, int) or not 0 <= number < len(configs):
            raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={number!r}.")
        columns[number] = None
        if wanted is not None:
            wanted = [wanted] if isinstance(wanted, (int, str)) else list(wanted)
            columns[number] = torch.tensor([configs[number].resolve_feature(f) for f in wanted], device=device)
    return columns
