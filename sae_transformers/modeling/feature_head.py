"""A classification head on an SAE's hidden state that can be kept off features a person calls unintended.

    H = hidden states of a text at the place that the SAE reads
    X = H - relu(pre_U) @ W_dec[U]                     removal, optional; U: the unintended latents
    logits = pool(X) @ w.T + b
    penalty = sum over labels of mean_{j in U} |S_j|,  S = (w - b_dec) @ W_enc + b_enc  (see `ALIGNMENTS`)

"SelfReg" (https://huggingface.co/papers/2502.14133), section 3 and its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLINGS = ("last", "mean")
REMOVALS = ("none", "relu", "own")
REDUCTIONS = ("mean", "sum")
ALIGNMENTS = ("affine", "encoder", "decoder")  # of a head's weights with features: `SparseAutoencoder.alignment`


@dataclass
class FeatureHeadConfig:
    """A head on an SAE's hidden state.

    Args:
        sae: number of the SAE.
        pooling: `last` (the last token that is no padding: with a template, its last token) or `mean`.
        max_norm: tokens whose hidden state is longer do not count for the mean. The first token and a few others have
            states a hundred times as long as the rest, and would be all that is left of a short text.
        removal: whether unintended features are taken out of the tokens that count: `none`; `relu`, by their
            rectified pre-activations; `own`, by the SAE's activation.
        subtract_b_dec: whether the removal takes `b_dec` out too, as SelfReg's code does.
        penalty_reduction: `mean` or `sum` over unintended features.
        alignment: what the penalty keeps small: `affine`, as SelfReg's code; `encoder`; or `decoder`, what an
            unintended feature adds to the logit.
        per_label: each label has unintended features of its own; what is removed is unintended for all that have any.
        hidden_size: width of a hidden layer; None for a linear head.
        dropout: share of the state dropped in training.
        pairwise: a batch is pairs, chosen then rejected in turn, and the loss -log sigmoid(chosen - rejected)
            (Bradley-Terry) in place of the one on labels.
    """

    sae: int = 0
    pooling: str = "last"
    max_norm: float | None = None
    removal: str = "none"
    subtract_b_dec: bool = False
    penalty_reduction: str = "mean"
    alignment: str = "affine"
    per_label: bool = False
    hidden_size: int | None = None
    dropout: float = 0.0
    pairwise: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("pooling", POOLINGS),
            ("removal", REMOVALS),
            ("penalty_reduction", REDUCTIONS),
            ("alignment", ALIGNMENTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, choices))}. "
                    f"Received: {name}={getattr(self, name)!r}."
                )
        for name in ("sae", "hidden_size"):
            value, least = getattr(self, name), 0 if name == "sae" else 1
            if value is None and name == "hidden_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}.")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"`max_norm` must be above 0. Received: max_norm={self.max_norm!r}.")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1. Received: dropout={self.dropout!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureHeadConfig:
        known = {f.name for f in fields(cls)}
        if not isinstance(values, Mapping) or set(values) - known:
            raise ValueError(f"`feature_head` has the fields {', '.join(sorted(known))}. Received: {values!r}.")
        return cls(**values)


class FeatureHead(nn.Module):
    """Scores labels from pooled hidden states.

    unintended: (n_rows, d_sae) bool buffer, one row for all labels or one for each.

    Input shape: pooled (batch, d_in), as `read` gives them. Output shape: logits (batch, num_labels).
    """

    unintended: Tensor

    def __init__(self, config: FeatureHeadConfig, width: int, d_sae: int, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(width, config.hidden_size) if config.hidden_size else None
        self.linear = nn.Linear(config.hidden_size or width, num_labels)
        rows = num_labels if config.per_label else 1
        self.register_buffer("unintended", torch.zeros(rows, d_sae, dtype=torch.bool))

    @property
    def removed(self) -> Tensor:
        """(m,) int64: latents that are unintended for every label that has any."""
        rows = self.unintended[self.unintended.any(-1)]
        return rows.all(0).nonzero()[:, 0] if len(rows) else rows.new_zeros(0, dtype=torch.long)

    def read(self, hidden: Tensor, attention_mask: Tensor | None, sae: Any) -> Tensor:
        """Hidden states (batch, seq, d_in) of texts to what is scored, (batch, d_in): unintended features taken out of
        each token where asked, then pooled."""
        counted = self._counted(hidden, attention_mask)
        if self.config.pooling == "last":
            return self._without_unintended(pool(hidden, counted, "last"), sae)
        return pool(self._without_unintended(hidden, sae), counted, "mean")

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (batch, num_labels) of pooled hidden states (batch, d_in)."""
        x = self.dropout(pooled.to(self.linear.weight.dtype))
        if self.hidden is not None:
            x = torch.relu(self.hidden(x))
        return self.linear(x)

    def _without_unintended(self, hidden: Tensor, sae: Any) -> Tensor:
        if self.config.removal == "none":
            return hidden
        return sae.remove(hidden, self.removed, self.config.removal, self.config.subtract_b_dec)

    def _counted(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """(batch, seq) mask of the tokens that count; of a text whose tokens are all too long, all."""
        if self.config.max_norm is None or self.config.pooling == "last":
            return attention_mask
        real = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask.to(hidden.device)
        short = real.bool() & (hidden.norm(dim=-1) <= self.config.max_norm)
        return torch.where(short.any(-1, keepdim=True), short, real.bool())

    def penalty(self, sae: Any) -> Tensor:
        """Alignment of the weights that read the state with unintended features, (); 0 where there are none."""
        weights = (self.hidden or self.linear).weight  # (rows, d_in)
        masks = self.unintended
        if self.hidden is not None or len(masks) == 1:
            masks = masks.any(0, keepdim=True).expand(len(weights), -1)
        total = weights.new_zeros(())
        used = masks.any(0).nonzero()[:, 0]
        if not len(used):
            return total
        aligned = sae.alignment(weights, used, self.config.alignment).to(weights.dtype).abs()  # (rows, m)
        inside = masks[:, used].to(aligned.dtype)
        sums = (aligned * inside).sum(-1)
        if self.config.penalty_reduction == "mean":
            sums = sums / inside.sum(-1).clamp(min=1)
        return sums.sum()

    def activity(self, hidden: Tensor, attention_mask: Tensor | None, sae: Any) -> Tensor:
        """Mean rectified pre-activation of unintended features in the tokens that count, (); a trained base can lower
        it."""
        used = self.unintended.any(0).nonzero()[:, 0]
        if not len(used):
            return hidden.new_zeros(())
        counted = self._counted(hidden, attention_mask)
        if self.config.pooling == "last":
            return torch.relu(sae.encode_pre_acts(pool(hidden, counted, "last"), used)).mean()
        return pool(torch.relu(sae.encode_pre_acts(hidden, used)), counted, "mean").mean()


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Hidden states (batch, seq, d) to one a text, (batch, d); padding on either side does not count."""
    if attention_mask is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(1)
    mask = attention_mask.to(hidden.device).bool()
    if pooling == "mean":
        return hidden.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(-1, keepdim=True).clamp(min=1)
    last = mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def task_loss(logits: Tensor, labels: Tensor, problem_type: str | None, *, pairwise: bool) -> Tensor:
    """The head's own loss, (): cross-entropy for one label of several, binary cross-entropy for yes-or-no labels.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) class indices, or (batch, num_labels) 0 to 1. With `pairwise` their values do not count.
    """
    if pairwise:
        if len(logits) % 2 or logits.shape[1] != 1:
            raise ValueError(
                f"`pairwise` needs one logit and pairs of texts, chosen and rejected in turn. "
                f"Received: logits of shape {tuple(logits.shape)}."
            )
        return -F.logsigmoid(logits[0::2] - logits[1::2]).mean()
    if problem_type == "regression":
        return F.mse_loss(logits, labels.to(logits).reshape(logits.shape))
    if problem_type == "multi_label_classification" or logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits).reshape(logits.shape))
    return F.cross_entropy(logits, labels.long().reshape(-1))
