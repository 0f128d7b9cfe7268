"""DoLa, "Decoding by contrasting layers improves factuality" (https://huggingface.co/papers/2309.03883).

What the last layer says of the next token, against what an earlier one would have said: the output matrix on its
hidden state, without the final norm, as the authors' code and transformers' `custom_generate` repository have it.
transformers from 5.0 on has no DoLa of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ...modeling.hook_points import find_hook_point, hook_tensor

LIKELY = 0.1  # of the likeliest token's probability; less likely ones are out
MOST_LAYERS = 40  # deeper models contrast their last 20 layers alone


class LayerContrast(NamedTuple):
    """weight: a of `contrasted_layers`; None for DoLa's own difference. layers: numbers of the blocks that may be
    contrasted; by default every second one of the upper half, DoLa's for short answers."""

    weight: float | None = None
    layers: tuple[int, ...] | None = None


def contrasted_layers(final: Tensor, early: Tensor, weight: float | None = None) -> Tensor:
    """Scores of the next token from the last layer's logits and those of earlier layers.

        M = argmax_j KL(m_j || q_N) + KL(m_j || q_j),  m_j = (q_N + q_j) / 2
        log q_N - log q_M                         weight None: DoLa, equations 3 to 5
        (1 + a) log q_N - a log q_M               weight a, in the form of context-aware decoding
        -inf where q_N < 0.1 max q_N              in both

    The paper's divergence has its arguments the other way round; this is the order of its code and of transformers.
    Each row takes the layer that differs most from its own; the code takes one for a whole batch.

    Args:
        final: (batch, vocab). early: (n, batch, vocab), of n layers.
        weight: a.

    Returns:
        (batch, vocab) float32.
    """
    log_final, log_early = final.float().log_softmax(-1), early.float().log_softmax(-1)
    mixed = (log_final.exp() + log_early.exp()) / 2
    divergence = (torch.xlogy(mixed, mixed) * 2 - mixed * (log_final + log_early)).sum(-1)  # (n, batch)
    chosen = log_early[divergence.argmax(0), torch.arange(len(final), device=final.device)]
    difference = log_final - chosen
    scores = difference if weight is None else log_final + weight * difference
    out = log_final < log_final.amax(-1, keepdim=True) + math.log(LIKELY)
    return scores.masked_fill(out, -math.inf)


def contrast_layers(n_layers: int) -> tuple[int, ...]:
    """The blocks that are contrasted by default.

    Raises:
        ValueError: the model has a single block.
    """
    first = n_layers - 20 if n_layers > MOST_LAYERS else n_layers // 2
    if not first:
        raise ValueError(f"Layers can be contrasted in models of two or more. Received: {n_layers}.")
    return tuple(number - 1 for number in range(first, n_layers, 2))  # the state after block i is number i + 1


@contextmanager
def contrasting(model: Any, contrast: LayerContrast) -> Iterator[LogitsProcessorList]:
    """What to give `generate` as its `logits_processor`, within the block.

    Args:
        model: a `SaeForCausalLM`, or any causal language model.

    Raises:
        ValueError: a layer is not there.
    """
    base = getattr(model, "lm", model)
    n_layers = base.config.get_text_config().num_hidden_layers
    layers = contrast_layers(n_layers) if contrast.layers is None else contrast.layers
    if not layers or not all(0 <= layer < n_layers - 1 for layer in layers):
        raise ValueError(f"Layers to contrast are below the last, {n_layers - 1}. Received: layers={layers!r}.")
    last: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:
            point = find_hook_point(base, base.config, f"layers.{layer}.resid_post")
            hooks.callback(hook_tensor(point, _keeping_last(last, layer)).remove)
        yield LogitsProcessorList([_Contrasting(base.get_output_embeddings(), layers, last, contrast.weight)])


def _keeping_last(last: dict[int, Tensor], layer: int) -> Any:
    def keep(hidden: Tensor) -> Tensor:
        last[layer] = hidden[:, -1]
        return hidden

    return keep


class _Contrasting(LogitsProcessor):
    def __init__(
        self, head: torch.nn.Module, layers: Sequence[int], last: dict[int, Tensor], weight: float | None
    ) -> None:
        self.head, self.layers, self.last, self.weight = head, layers, last, weight

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor) -> Tensor:
        early = torch.stack([self.head(self.last[layer]) for layer in self.layers])
        return contrasted_layers(scores, early, self.weight).to(scores.dtype)
