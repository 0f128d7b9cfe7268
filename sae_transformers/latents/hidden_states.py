"""Read hidden states at any places of a base model; what comes after the last place does not run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.hook_points import HookPoint, find_hook_point, hook_tensor
from ..modeling.modeling_sae import SaePreTrainedModel
from .batches import length_batches
from .image_texts import ImageTexts
from .progress import Count


class HiddenStates(NamedTuple):
    """Hidden states of the tokens of some texts, without padding and without each text's first token.

    hidden: (n_tokens, d_in), the model's dtype, on the CPU.
    text_index: (n_tokens,) int64, the text of each token.
    """

    hidden: Tensor
    text_index: Tensor


class HiddenStateReader:
    """Reads hidden states at places of a model with forward hooks, which are there only while it reads.

    Args:
        model: a base model, with or without a head.
        places: each as `SparseAutoencoderConfig.read_at` gives it.
        config: of the base; the model's own by default.

    Raises:
        ValueError: no places, one given twice, or one that the model does not have.
    """

    def __init__(
        self, model: PreTrainedModel, places: Sequence[str], *, config: PretrainedConfig | None = None
    ) -> None:
        if isinstance(places, str) or not places or len(set(places)) < len(places):
            raise ValueError(f"`places` must be a list of different places. Received: places={places!r}.")
        self.model = model
        config = (model.config if config is None else config).get_text_config()
        self.points: dict[str, HookPoint] = {place: find_hook_point(model, config, place) for place in places}
        self.device: torch.device = next(model.parameters()).device

    @torch.no_grad()
    def widths(self) -> dict[str, int]:
        """Width of each place, from a pass over two tokens."""
        found: dict[str, int] = {}
        with _evaluating(self.model):
            self._run(
                {"input_ids": torch.zeros(1, 2, dtype=torch.long)},
                lambda place, hidden: found.update({place: hidden.shape[-1]}),
            )
        return {place: found[place] for place in self.points}

    @torch.no_grad()  # not inference mode: its tensors cannot be trained on
    def read(
        self,
        sequences: Sequence[Tensor],
        keep: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        tokens_at_once: int = 4096,
        report: Callable[[list[int]], object] | None = None,
        images: ImageTexts | None = None,
    ) -> dict[str, Tensor]:
        """Hidden states of the kept tokens, in the order of the sequences whatever the batches were.

        Sequences are batched by length, so that there is hardly any padding, the longest first: what does not fit
        into memory fails at once.

        Args:
            sequences: (length,) int64 each.
            keep: (n_kept,) int64 each, the positions to keep, ascending. Sequences without any are not run.
            dtype: of the result, which the model's device casts to; the model's own by default.
            tokens_at_once: of a forward pass, padding counted; a longer sequence is a batch of its own.
            report: called with the numbers of the sequences of each batch after it.
            images: the rows that the sequences are, where they hold images.

        Returns:
            {place: (n_tokens, width)}, on the device where the place is.

        Raises:
            ValueError: a value is NaN or infinite, or exceeds what `dtype` can hold.
        """
        counts = [len(positions) for positions in keep]
        firsts = torch.tensor([0, *counts]).cumsum(0)
        lengths = [len(ids) if n else 0 for ids, n in zip(sequences, counts, strict=True)]
        result = _Result(sum(counts), dtype)
        if not result.total:
            return {place: torch.empty(0, n, dtype=dtype or self.model.dtype) for place, n in self.widths().items()}
        with _evaluating(self.model):
            for members in length_batches(lengths, tokens_at_once, images.kinds if images else None):
                inputs = images.inputs(members) if images else _padded([sequences[i] for i in members])
                ids = inputs["input_ids"]
                rows = torch.cat([keep[i] + line * ids.shape[1] for line, i in enumerate(members)])
                goal = torch.cat([torch.arange(counts[i]) + firsts[i] for i in members])
                self._run(inputs, partial(result.take, n_tokens=ids.numel(), rows=rows, goal=goal))
                if report:
                    report(members)
        result.check_range()
        return {place: result.hidden[place] for place in self.points}

    def _run(self, inputs: dict[str, Tensor], take: Callable[[str, Tensor], None]) -> None:
        """One pass up to the last of the places, whichever that is."""
        waiting, thread = set(self.points), threading.get_ident()

        def visit(place: str, hidden: Tensor) -> None:
            if threading.get_ident() != thread or place not in waiting:
                return
            take(place, hidden)
            waiting.discard(place)
            if not waiting:
                raise _AllRead

        handles = [_hook(point, place, visit) for place, point in self.points.items()]
        try:
            self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}, use_cache=False)
        except _AllRead:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise ValueError(f"These places are not reached when the model runs. Received: {', '.join(sorted(waiting))}.")


class _AllRead(Exception):
    """Ends a pass; no model with SAEs takes it for its own `StopForward`."""


class _Result:
    """Hidden states of `total` tokens at each place, filled batch by batch without waiting for the device."""

    def __init__(self, total: int, dtype: torch.dtype | None) -> None:
        self.total, self.dtype = total, dtype
        self.hidden: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}

    def take(self, place: str, hidden: Tensor, *, n_tokens: int, rows: Tensor, goal: Tensor) -> None:
        """Put the given rows of `hidden` (n_tokens, width) where `goal` says, both (n,)."""
        hidden = hidden.reshape(
            -1, hidden.shape[-1]
        )  # OPT's MLP sees (batch * seq, width), the others (batch, seq, ..)
        if len(hidden) != n_tokens:
            raise ValueError(
                f"A place must give a vector for each of {n_tokens} tokens. Received: {len(hidden)} at {place!r}."
            )
        # Copied here and now: some blocks go on to add to the tensor in place (Falcon's MLP output).
        kept = hidden.index_select(0, rows.to(hidden.device))
        peak = torch.linalg.vector_norm(kept, torch.inf)
        if place not in self.hidden:
            self.hidden[place] = kept.new_empty(self.total, kept.shape[-1], dtype=self.dtype)
            self.peaks[place] = peak
        self.hidden[place].index_copy_(0, goal.to(hidden.device), kept.to(self.hidden[place].dtype))
        self.peaks[place] = torch.maximum(self.peaks[place], peak)

    def check_range(self) -> None:
        for place, hidden in self.hidden.items():
            peak, limit = self.peaks[place].item(), torch.finfo(hidden.dtype).max
            if not peak <= limit:  # NaN too
                raise ValueError(
                    f"Hidden states must be finite and at most {limit:.6g} to be {hidden.dtype}. "
                    f"Received: {peak:.6g} at {place!r}; run or store in bfloat16 or float32."
                )


def _hook(point: HookPoint, place: str, visit: Callable[[str, Tensor], None]) -> RemovableHandle:
    def read(hidden: Tensor) -> Tensor:
        visit(place, hidden)
        return hidden

    return hook_tensor(point, read)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, also where the base is part of a model that is being trained."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _padded(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """ids and mask (batch, width), padded on the right; no mask where there is nothing to mask."""
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)  # the value at padding does not matter: masked
    lengths = torch.tensor([len(s) for s in sequences])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def kept_positions(
    ids: Tensor,
    *,
    positions: str = "all",
    prefix_tokens: int = 0,
    skip_first: int = 1,
    dropped_ids: Sequence[int] = (),
) -> Tensor:
    """Positions of a sequence to keep, (n_kept,) int64.

    Args:
        ids: (length,).
        positions: `all`, `last`, or `after_prefix`: from `prefix_tokens` on.
        skip_first: leading positions to leave out. Decoders use position 0 as an attention sink: its norm is about
            a hundred times that of others, nearly the same vector in every text, and it dominates any mean squared
            error.
        dropped_ids: token ids to leave out.
    """
    keep = torch.ones_like(ids, dtype=torch.bool)
    if positions == "after_prefix":
        keep[:prefix_tokens] = False
    elif positions == "last":
        keep[:-1] = False
    keep[:skip_first] = False
    if len(dropped_ids):
        keep &= ~torch.isin(ids, torch.tensor(list(dropped_ids)))
    return keep.nonzero()[:, 0]


def read_hidden_states(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sae: int = 0,
    max_tokens: int = 128,
    tokens_at_once: int = 1024,
    report: Callable[[int, int], None] | None = None,
) -> HiddenStates:
    """Hidden states of texts at the hook point of an SAE, in memory; without each text's first token.

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
    ids = [torch.tensor(row) for row in rows]
    keep = [kept_positions(row) for row in ids]
    place = model.config.sae_configs[sae].read_at
    count, reader = Count(report, len(rows)), HiddenStateReader(model.lm, [place], config=model.config)
    hidden = reader.read(ids, keep, tokens_at_once=tokens_at_once, report=lambda rows: count(len(rows)))[place].cpu()
    text_index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(k) for k in keep]))
    return HiddenStates(hidden, text_index)
