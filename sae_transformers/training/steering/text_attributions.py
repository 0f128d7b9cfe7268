"""What latents do to labelled texts: how much each one makes the model write them.

A latent may answer to a concept without bringing it about; raising latents one by one and generating is slow. The
gradient of a text's own likelihood asks all latents at once: those that raise the texts with the concept, and not
those without, are what to steer with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...evaluation.attribution.effects import gradients_of
from ...latents.text_latents import batches_of
from ...modeling import SaeForCausalLM
from .feature_search import checked_labels


def text_attributions(
    model: SaeForCausalLM,
    rows: Sequence[Sequence[int]],
    labels: Tensor,
    *,
    skip_first: int = 1,
    tokens_at_once: int = 512,
    report: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """How much more each latent raises the texts of label 1 than those of label 0, by one backward pass a batch.

        score_i = mean over label 1 of A_i - mean over label 0 of A_i,
        A_i = sum over tokens of z_i * d L / d z_i,  L the mean log-likelihood of the text's tokens but the first

    Gradient x latent of the text's own likelihood, what SAEs do not reconstruct left as it is; see
    `evaluation.attribution.effects`.

    Args:
        model: runs unsteered.
        rows: token ids of n texts, two or more each.
        labels: (n,), 0 or 1; both must occur.
        skip_first: tokens at the beginning whose latents do not count.
        tokens_at_once: of a batch, padding counted; their logits are held three times.
        report: called with the number of texts of each batch.

    Returns:
        (d_sae,) float64 of each SAE, in nats a token, on the CPU.

    Raises:
        ValueError: labels that do not fit, or a text of fewer than two tokens.
    """
    labels = checked_labels(labels, len(rows))
    if short := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(f"Expected texts of two tokens or more. Received: {len(rows[short[0]])} in text {short[0]}.")
    present = labels.double()
    shares = present / present.sum() - (1 - present) / (1 - present).sum()
    found = [torch.zeros(sae.config.d_sae, dtype=torch.float64) for sae in model.saes]
    for batch in batches_of(rows, tokens_at_once=tokens_at_once):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        with torch.enable_grad():
            out = model(
                input_ids=ids, attention_mask=mask, steering=False, output_features=True,
                features_require_grad="with_error", use_cache=False,
            )  # fmt: skip
            likely = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            counted = mask[:, 1:].to(likely)
            gradients = gradients_of(((likely * counted).sum(1) / counted.sum(1)).sum(), out.sae_features)
        kept = mask.bool() & (mask.cumsum(-1) > skip_first)
        for scores, features, gradient in zip(found, out.sae_features, gradients, strict=True):
            values = features.values.detach()
            weights = (kept * shares[batch.texts].to(kept.device)[:, None]).to(values.device)  # (batch, seq)
            effect = values.double() * gradient.double() * weights[..., None]
            scores.index_add_(0, features.indices.flatten().cpu(), effect.flatten().cpu())
        if report is not None:
            report(len(batch.texts))
    return found
