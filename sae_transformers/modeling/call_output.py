"""What a forward pass hands back: all that the base returned, what its record holds, and the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .call_options import SaeCallOptions
from .call_record import CallRecord
from .configuration_sparse_autoencoder import LossWeights
from .outputs import output_class
from .sae_losses import check_trainable, weighted_loss


def call_output(
    model: Any,
    kind: type,
    out: Any,
    record: CallRecord | None,
    options: SaeCallOptions,
    *,
    terms: Mapping[str, Tensor] | None = None,
    lm_loss: Tensor | None = None,
    return_dict: bool | None = None,
) -> Any:
    """A head's output.

    Args:
        kind: the class where the base returned nothing, for the pass was stopped.
        out: the base's output, fields by name, or None.
        terms: the SAEs' losses, by name.
        lm_loss: the base's loss, if it is another than its output says.
    """
    values = {} if out is None else dict(out.items())
    kind = output_class(type(out), kind)
    lm_loss = values.pop("loss", None) if lm_loss is None else lm_loss
    if lm_loss is not None or terms:
        weights = LossWeights(**model.config.loss_weights)
        weights_of_terms = {**model.config.loss_weights, **model._penalty_weights}
        loss = weighted_loss(weights_of_terms, lm_loss, terms or {})
        if loss is not None:
            values["loss"] = loss
            if model.training and not loss.requires_grad and torch.is_grad_enabled():
                check_trainable(model, weights, terms or {})
    every = range(len(model.config.saes))
    if record is not None and record.request.features:
        values["sae_features"] = tuple(record.features.get(n) for n in every)
    if record is not None and options.output_sae_inputs:
        values["sae_inputs"] = tuple(record.inputs.get(n) for n in every)
    output = kind(**values, sae_losses=terms or None, lm_loss=lm_loss)
    wants_dict = model.config.return_dict is not False if return_dict is None else return_dict
    return output if wants_dict else output.to_tuple()
