"""The threshold of a gate, from texts with a concept and neutral ones, at a false-alarm rate that is asked for.

    fitted = fit_gate(model, tokenizer, texts, labels, "toxicity", over="prompt", false_alarm_rate=0.01)
    model.steering = Steering([FeatureEdit(feature="toxicity", op="set", value=0.0)], when=fitted.gate)

Split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005): the threshold
is the ceil((1 - rate) (n + 1))-th smallest value of n neutral texts, so that a further neutral text, drawn as these
were, opens the gate with a probability of at most the rate, whatever the distribution of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...evaluation.detection.metrics import auroc
from ...latents.context import reading_length
from ...latents.progress import Count, Progress
from ...latents.settings import ReadingSettings
from ...latents.text_input import tokenized
from ...latents.text_latents import TextBatch, batches_of, sae_of
from ...modeling import Gate
from ...modeling.gate_run import pooled_so_far
from ...modeling.modeling_sae import SaePreTrainedModel
from ...modeling.sae_steering import read_latents
from .feature_search import checked_labels

GATE_READING = ReadingSettings(skip_first=0)
LEVEL_90 = 1.6449  # standard deviations that hold 90 % of a normal distribution


@dataclass(frozen=True)
class FittedGate:
    """A gate and what it does to the texts that it was fitted on.

    gate: to be put at `when=` of an edit or a steering.
    false_alarm_rate: probability that a further neutral text opens it, on average over samples of neutral texts.
    detection_rate: share of the texts with the concept that open it, and its Wilson interval of 90 %.
    auroc: of the compared value, concept against neutral.
    n_neutral, n_concept: texts. n_cut: those of them that were cut.
    """

    gate: Gate
    false_alarm_rate: float
    detection_rate: float
    detection_interval: tuple[float, float]
    auroc: float
    n_neutral: int
    n_concept: int
    n_cut: int

    def to_dict(self) -> dict[str, Any]:
        values = {**vars(self), "gate": self.gate.to_dict()}
        return {**values, "detection_interval": list(self.detection_interval)}


def fit_gate(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    labels: Sequence[int] | Tensor,
    gate: Gate | int | str,
    *,
    false_alarm_rate: float = 0.01,
    reading: ReadingSettings = GATE_READING,
    progress: Progress | None = None,
) -> FittedGate:
    """Set a gate's threshold so that at most a share of neutral texts opens it.

    A text opens the gate when it is open at any of its tokens. Texts are what `generate` will get: format chats with
    the tokenizer's template first.

    Args:
        texts: a list of strings or whatever else holds texts, or token ids.
        labels: of each text 1 with the concept, 0 without, (n,).
        gate: what is compared, `Gate(feature=..., sae=..., over=..., pool=...)`; a feature alone stands for
            `Gate(feature, over="prompt", skip_first=1)`. Its `above` is replaced, and `until` moved along with it.
        false_alarm_rate: over 0 and below 1; needs `1 / rate - 1` neutral texts or more.
        reading: how long texts may be, and tokens of a forward pass. Which tokens count is the gate's `skip_first`.

    Raises:
        TypeError: `gate` or `texts` is something else.
        ValueError: a gate that combines others or is negated, labels that do not fit, or too few neutral texts.
    """
    wanted = Gate(feature=gate, over="prompt", skip_first=1) if isinstance(gate, (int, str)) else gate
    _check(wanted, false_alarm_rate)
    if reading.skip_first:
        raise ValueError(f"Which tokens count is said by the gate: Gate(..., skip_first=...). Received: {reading}.")
    sae_of(model, wanted.sae)
    ids, n_cut = tokenized(tokenizer, texts, max_length=reading_length(model, reading.max_length, 256))[1:]
    truth = checked_labels(torch.as_tensor(labels), len(ids))
    if short := [number for number, row in enumerate(ids) if len(row) <= wanted.skip_first]:
        raise ValueError(
            f"A gate that skips {wanted.skip_first} tokens needs texts of {wanted.skip_first + 1} tokens or more. "
            f"Received: {len(ids[short[0]])} in text {short[0]}."
        )
    n_neutral = int((truth == 0).sum())
    rank = math.ceil(round((1 - false_alarm_rate) * (n_neutral + 1), 9))  # 0.99 * 100 is 99.00000000000001
    if rank > n_neutral:
        least = math.ceil(round(1 / false_alarm_rate, 9)) - 1
        raise ValueError(
            f"A false-alarm rate of {false_alarm_rate:g} needs {least} neutral texts or more. Received: {n_neutral}."
        )
    values = _values(model, wanted, ids, reading.tokens_per_batch, Count(progress, len(ids)))
    if values.isnan().any():
        number = int(values.isnan().nonzero()[0])
        raise ValueError(f"Expected a number from every text. Received: NaN hidden states in text {number}.")
    above = float(values[truth == 0].sort().values[rank - 1])
    until = None if wanted.until is None else wanted.until + above - wanted.above
    found = Gate(**{**vars(wanted), "above": above, "until": until})
    opens = values[truth == 1] > above
    return FittedGate(
        found,
        (n_neutral + 1 - rank) / (n_neutral + 1),
        float(opens.double().mean()),
        _wilson(int(opens.sum()), len(opens)),
        auroc(values, truth),
        n_neutral,
        len(opens),
        n_cut,
    )


def _check(gate: Any, rate: float) -> None:
    if not getattr(gate, "is_gate", False):
        raise TypeError(f"`gate` must be a Gate, or the index or name of a latent. Received: {type(gate).__name__}.")
    if gate.feature is None or gate.negate:
        raise ValueError(
            f"A threshold is fitted for a gate on one latent, open above it; combine gates afterwards. "
            f"Received: {gate}."
        )
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"`false_alarm_rate` must lie between 0 and 1. Received: false_alarm_rate={rate!r}.")


@torch.no_grad()
def _values(
    model: SaePreTrainedModel, gate: Gate, ids: Sequence[Sequence[int]], tokens_at_once: int, count: Count
) -> Tensor:
    """The largest number that a text compares with the threshold, (n,) float64."""
    feature = model.config.sae_configs[gate.sae].resolve_feature(gate.feature)  # pyright: ignore[reportArgumentType]
    found = torch.empty(len(ids), dtype=torch.float64)
    for batch in batches_of(ids, tokens_at_once=tokens_at_once):
        found[batch.texts] = _pooled(_at_tokens(model, gate, feature, batch), batch.mask.bool(), gate)
        count(len(batch.texts))
    return found


def _at_tokens(model: SaePreTrainedModel, gate: Gate, feature: int, batch: TextBatch) -> Tensor:
    """The latent at each token, (batch, width) float64 on the CPU."""
    hidden = model(
        input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
        output_sae_inputs=True, stop_at_last_sae=True,
    ).sae_inputs[gate.sae]  # fmt: skip
    sae = sae_of(model, gate.sae)
    latents = torch.tensor([feature], device=sae.device)
    return read_latents(sae, hidden.to(sae.dtype), latents, gate.pre_activations)[..., 0].double().cpu()


def _pooled(values: Tensor, real: Tensor, gate: Gate) -> Tensor:
    """(batch,) of values (batch, width), padded on the right."""
    read = real & (real.cumsum(-1) > gate.skip_first)
    if gate.over in ("prompt", "so_far"):
        values = pooled_so_far(values, read, gate.pool)
    if gate.over in ("prompt", "last"):
        return values.gather(1, real.sum(1, keepdim=True) - 1)[:, 0]
    return values.masked_fill(~read, -torch.inf).amax(1)


def _wilson(hits: int, n: int) -> tuple[float, float]:
    """Interval of 90 % of a share: Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953."""
    share, z = hits / n, LEVEL_90
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
