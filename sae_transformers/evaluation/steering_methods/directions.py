"""DiffMean where an SAE of a model stands: the direction, and the model with it as one more SAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...latents.batches import right_padded
from ...latents.diffmean import fit_diffmean
from ...latents.vector_saes import direction_sae


@torch.no_grad()
def diffmean_direction(
    model: Any,
    tokenizer: Any,
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    sae: int = 0,
    max_length: int = 128,
    batch_size: int = 16,
) -> Tensor:
    """Difference of the mean hidden states of texts with and without a concept, where an SAE of the model stands.

    A text counts by the mean over its tokens but the first, so that long texts weigh as much as short ones. See
    `fit_diffmean`.

    Returns:
        (d,) float32 on the CPU, not normalised.

    Raises:
        ValueError: no text of one kind, one of a single token, or an SAE that writes elsewhere than it reads.
    """
    means, n = text_means(model, tokenizer, [positives, negatives], sae, max_length, batch_size), len(positives)
    labels = (torch.arange(len(means)) < n).long()
    return fit_diffmean(means, labels)


@torch.no_grad()
def text_means(
    model: Any, tokenizer: Any, sides: Sequence[Sequence[str]], sae: int, max_length: int, batch_size: int
) -> Tensor:
    """Mean hidden state of each text where an SAE stands, over its tokens but the first, (n, d) float32 on the CPU.

    Args:
        sides: texts with the concept, and texts without.

    Raises:
        ValueError: as `diffmean_direction`.
    """
    config = model.config.sae_configs[sae]
    if not config.reconstructs:
        raise ValueError(
            f"DiffMean is fitted where the SAE reads and added where it writes. "
            f"Received: an SAE that reads {config.read_at} and writes {config.write_at}."
        )
    positives, negatives = sides
    texts = [*positives, *negatives]
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    if not len(positives) or not len(negatives) or any(len(row) < 2 for row in rows):
        raise ValueError(
            f"Expected texts with and without the concept, of two tokens or more. Received: {len(positives)} with, "
            f"{len(negatives)} without, {sum(len(row) < 2 for row in rows)} shorter ones."
        )
    means = torch.empty(len(rows), config.d_in)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        ids, mask = right_padded([rows[i] for i in members], model.device)
        out = model(ids, attention_mask=mask, steering=False, output_sae_inputs=True, stop_at_last_sae=True)
        mask[:, 0] = 0  # the first token does not count
        kept = mask.float()[..., None]  # (batch, width, 1)
        means[members] = ((out.sae_inputs[sae].float() * kept).sum(1) / kept.sum(1)).cpu()
    return means


def with_direction(model: Any, direction: Tensor, *, sae: int = 0) -> tuple[Any, int]:
    """The model with a direction as one more SAE, to be steered along with op `direction`; and the number of that.

    Args:
        model: a `SaeForCausalLM`; it must not be used afterwards, since the new one holds its base and its SAEs.
        direction: (d_out,), brought to norm 1.
        sae: number of the SAE at whose place it is added.
    """
    saes = [*model.saes]
    added = direction_sae(direction[None], model.config.sae_configs[sae]).to(model.saes[sae].W_dec.device)
    default = model.steering
    made = type(model).from_base(model.unwrap(), saes=[*saes, added], steering=default or None, force=True)
    return made.eval(), len(saes)
