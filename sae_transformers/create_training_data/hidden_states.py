"""Harvest hidden states where an SAE stands; layers after it do not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HiddenStates(NamedTuple):
    """Hidden states of the tokens of some texts, without padding and without each text's first token.

    hidden: (n_tokens, d_in), the model's dtype, on the CPU.
    text_index: (n_tokens,) int64, the text of each token.
    """

    hidden: Tensor
    text_index: Tensor


@torch.no_grad()  # not inference mode: its tensors cannot be trained on
def harvest(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    sae: int = 0,
    max_tokens: int = 128,
    tokens_at_once: int = 1024,
    report: Callable[[int, int], None] | None = None,
) -> HiddenStates:
    """Hidden states at the hook point of an SAE.

    Texts are sorted by length, so that a batch holds hardly any padding. The first token of a text is left out: it
    is an outlier in norm and, in a causal model, knows nothing of the text.

    Args:
        model: a model with SAEs (`SaeForCausalLM` or another head).
        tokenizer: of the base.
        sae: number of the SAE.
        max_tokens: longer texts are cut.
        tokens_at_once: of a forward pass, padding counted.
        report: called with (texts done, texts) after each batch.

    Raises:
        ValueError: a text has fewer than two tokens.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    if short := [text for text, ids in zip(texts, rows, strict=True) if len(ids) < 2]:
        raise ValueError(f"Every text needs two tokens or more. Received: {len(short)} shorter ones, {short[0]!r}.")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    hidden, text_index, start = [], [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(rows[order[stop]]) * (stop + 1 - start) <= tokens_at_once:
            stop += 1
        members = order[start:stop]
        width = len(rows[members[-1]])
        ids = torch.zeros(len(members), width, dtype=torch.long)  # the value at padding does not matter: masked
        mask = torch.zeros_like(ids)
        for line, member in enumerate(members):
            ids[line, : len(rows[member])] = torch.tensor(rows[member])
            mask[line, : len(rows[member])] = 1
        states = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            steering=False,
            output_sae_inputs=True,
            stop_at_last_sae=True,
        ).sae_inputs[sae]  # (batch, seq, d_in)
        keep = mask.bool()
        keep[:, 0] = False
        hidden.append(states.cpu()[keep])
        text_index.append(torch.tensor(members)[:, None].expand_as(keep)[keep])
        start = stop
        if report:
            report(start, len(order))
    return HiddenStates(torch.cat(hidden), torch.cat(text_index))
