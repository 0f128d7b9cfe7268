"""A classifier that SelfReg's own code trained, as a model of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from transformers.modeling_utils import PreTrainedModel

from ..modeling import SaeForSequenceClassification, SparseAutoencoder
from ..modeling.conversion.selfreg import ClassifierWeights, read_classifier

SAME_SAE = 1e-6  # of a parameter's largest value: the file has a copy of its SAE


@torch.no_grad()
def selfreg_classifier(
    model: PreTrainedModel,
    file: str | os.PathLike[str],
    sae: SparseAutoencoder | str | os.PathLike[str],
    unintended: Sequence[int] | Mapping[str | int, Sequence[int]] = (),
) -> SaeForSequenceClassification:
    """A model that scores as a classifier of SelfReg's code does: features U taken out of a text's last token, then a
    linear layer.

        X = H - b_dec - relu(pre_U) @ W_enc[:, U].T;  logits = X @ w.T + bias

    SelfReg (https://huggingface.co/papers/2502.14133), repository at 60f3c07. Its code takes the softmax of several
    labels, where these are logits. A baseline's file, which has no copy of an SAE, scores H itself.

    Args:
        model: the base with a head for as many labels as the file has, which the file's layer replaces.
        file: such as `SelfReg/seed0.pt`.
        sae: the SAE that it was trained with, `TopK7_l16_h65k_FT_epoch5_TD.pth`, or its name as
            `SparseAutoencoder.from_pretrained` takes it: the file does not say where it reads.
        unintended: U, which is not in the file either: `read_unintended` has it from the annotations. With several
            labels label -> U; what is removed is unintended for every label that has any.

    Raises:
        ValueError: it is no such file, the model has other labels, or the SAE is not the one that the file has.
        OSError: something is not there.
    """
    found = read_classifier(file)
    one = sae if isinstance(sae, SparseAutoencoder) else SparseAutoencoder.from_pretrained(sae)
    n_labels, d_in = found.weight.shape
    if (model.config.num_labels, one.config.d_in) != (n_labels, d_in):
        raise ValueError(
            f"The classifier has {n_labels} label(s) and reads states of width {d_in}. Received: a model of "
            f"num_labels={model.config.num_labels!r} and an SAE of d_in={one.config.d_in!r}."
        )
    _check_same(found, one, os.fspath(file))
    head = {"pooling": "last", "per_label": isinstance(unintended, Mapping)}
    if found.sae:
        head |= {"removal": "relu", "subtract_b_dec": True}
    made: SaeForSequenceClassification = SaeForSequenceClassification.from_base(model, saes=[one], feature_head=head)
    made.set_unintended(unintended)
    own = made.feature_head
    if own is not None:
        own.linear.weight.copy_(found.weight)
        own.linear.bias.copy_(found.bias)
    return made


def _check_same(found: ClassifierWeights, sae: SparseAutoencoder, where: str) -> None:
    """The file's copy of its SAE is the SAE; a baseline has none."""
    own = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    for name, value in own.items():
        copied = found.sae.get(name, value)
        if copied is None or value is None or copied.shape != value.shape:
            far = float("inf")
        else:
            far = float((copied.to(value) - value).abs().max() / value.abs().max().clamp(min=1e-12))
        if far > SAME_SAE:
            raise ValueError(
                f"{where} was trained with another SAE: give the one that its folder names. Received: an SAE whose "
                f"{name} differs by {far:.2g} of its largest value."
            )
