"""The stretches of text on which each latent of an SAE is strongest, over any number of texts.

One pass of the model: a block of rows at a time, of which only the `top_n` best texts of each latent are kept (see
`SpanHeap`). Then the winning texts alone are tokenised again, and their spans cut out by the tokenizer's own account
of characters. In the folder:

work/index.json             what is collected; written before the first part
work/part-00000.safetensors of a process: its best texts and largest activations so far, and the blocks in them
work/feature_max.safetensors the largest activation of each latent
spans.parquet, spans.tsv, features.tsv, spans.json      the result, when all blocks are done; spans.json last
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from ...latents.context import reading_length
from ...latents.hidden_states import HiddenStateReader
from ...latents.texts import TextSource
from ..harvest.blocks import weights_digest
from ..harvest.store import Store, rank_and_world
from .files import WRITERS, Spans, read_table
from .settings import MAX_LENGTH, SpanSettings
from .tokens import TextTokens, span_bounds, text_tokens
from .top_examples import EMPTY, SpanHeap, add_hidden

MAXIMA = "feature_max.safetensors"
FORMAT = "sae_transformers text spans"
VERSION = 1


class SpanCollector:
    """Finds the `top_n` strongest spans of every latent, each of another text.

        spans = SpanCollector(model, tokenizer, 0, open_text("texts.jsonl"), out="spans").run()

    With a folder, killed at any moment, the same call continues; with several processes, rank r of w does the blocks
    r, r + w, ... and shares nothing but the folder.

    Args:
        model: a base model, or one with SAEs, whose base is read.
        tokenizer: of the base, a fast one.
        sae: a `SparseAutoencoder`, or the number of one in `model`.
        source: rows of text.
        settings: see `SpanSettings`.
        out: a folder or any fsspec URL.

    Raises:
        ValueError: the SAE is not made for the width of its place, the folder has spans of something else, or several
            processes have no folder in common.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sae: Any,
        source: TextSource,
        settings: SpanSettings | None = None,
        *,
        out: str | Path | None = None,
    ) -> None:
        settings = settings or SpanSettings()
        if settings.max_length is None:
            settings = replace(settings, max_length=reading_length(model, None, MAX_LENGTH))
        self.settings = settings
        self.sae = model.saes[sae] if isinstance(sae, int) else sae
        base = getattr(model, "lm", model)
        self.place: str = self.sae.config.read_at
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and (settings.max_length or 0) > limit:
            raise ValueError(
                f"`max_length` must be at most {limit} for this model. Received: "
                f"max_length={self.settings.max_length!r}."
            )
        self.reader = HiddenStateReader(base, [self.place], config=model.config)
        width = self.reader.widths()[self.place]
        if width != self.sae.config.d_in:
            raise ValueError(
                f"The SAE must read {width} numbers, the width of {self.place!r} in this model. Received: "
                f"d_in={self.sae.config.d_in!r}; give the model that the SAE was trained on."
            )
        self.tokenizer, self.source = tokenizer, source
        self.rank, self.world = rank_and_world()
        if out is None and self.world > 1:
            raise ValueError(f"{self.world} processes meet in a folder. Received: out=None.")
        self.out, self.work = (None, None) if out is None else (Store(out), Store(f"{str(out).rstrip('/')}/work"))
        self.heap, self.done = self._new_heap(), torch.empty(0, 3, dtype=torch.int64)
        # The block that was read last: its number, texts and tokens.
        self._last: tuple[int, list[str], list[TextTokens]] = -1, [], []
        # None once it is not known: a part of an earlier release does not say it.
        self.maxima: Tensor | None = torch.zeros(self.sae.config.d_sae, device=self.sae.device)

    def run(self, *, progress: Callable[[int, int], object] | None = None) -> Spans:
        """Do the blocks of this process that no process has done; if then all are done, write the result.

        Args:
            progress: called with (rows done, rows) after each batch; 0 where their number is not known.

        Raises:
            ValueError: the text has changed since the folder was begun.
        """
        there: set[int] = set()
        if self.work is not None:
            if (finished := self._open()) is not None:
                return finished
            for rank, part in self._parts().items():
                there.update(part["done"][:, 0].tolist())
                if rank == self.rank:
                    self._add_part(self.heap, part)
                    self.done, maxima = part["done"], part.get("feature_max")
                    self.maxima = None if maxima is None else maxima.to(self.sae.device)
        absent = (number for number in itertools.count(self.rank, self.world) if number not in there)
        new: list[tuple[int, int, int]] = []  # block, texts, tokens
        for number, rows in self.source.blocks(self.settings.rows_per_block, absent):
            before = number * self.settings.rows_per_block

            def report(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, self.source.n_rows or 0)

            new.append((number, *self.add_block(number, rows.texts, report)))
            report(len(rows.texts))
            if len(new) == self.settings.blocks_per_save:
                self._save(new)
                new = []
        self._save(new)
        return self._finish()

    def add_block(
        self, number: int, texts: Sequence[str], report: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """Put block `number` into the heap; how many texts and tokens of it count. `report` is called with the number
        of texts done."""
        tokens = text_tokens(self.tokenizer, texts, self.settings)
        self._last = number, list(texts), tokens
        keep = [one.counted for one in tokens]
        counts = torch.tensor([len(places) for places in keep])
        n_texts, n_tokens, done = int((counts > 0).sum()), int(counts.sum()), 0

        def count(members: list[int]) -> None:
            nonlocal done
            done += len(members)
            if report is not None:
                report(done)

        if n_tokens:
            hidden = self.reader.read(
                [one.ids for one in tokens],
                keep,
                tokens_at_once=self.settings.tokens_per_batch,
                report=count,
            )[self.place]
            text = torch.arange(len(texts)).repeat_interleave(counts)
            position = torch.cat([one.counted - one.first for one in tokens]).int()
            if self.settings.outlier_ratio is not None:
                norms = hidden.float().norm(dim=-1)
                inside = norms <= self.settings.outlier_ratio * norms.median()
                hidden, text, position = hidden[inside], text[inside.cpu()], position[inside.cpu()]
                n_texts, n_tokens = len(text.unique()), len(text)
            add_hidden(
                self.heap,
                self.sae,
                hidden,
                text + number * self.settings.rows_per_block,
                position,
                activation=self.settings.activation,
                pre_acts_at_once=self.settings.pre_acts_at_once,
                maxima=self.maxima,
            )
        return n_texts, n_tokens

    # -- the folder --------------------------------------------------------------------------------------------------

    def index(self) -> dict[str, Any]:
        """What is collected, as JSON values."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "place": self.place,
            "d_sae": self.sae.config.d_sae,
            "settings": self.settings.identity(),
            "source": dict(self.source.facts),
            "compute_dtype": str(self.reader.model.dtype).removeprefix("torch."),
            "weights": weights_digest(self.reader.model),
            "sae": weights_digest(self.sae),
        }
        return json.loads(json.dumps(facts))

    def _open(self, *, begin: bool = False) -> Spans | None:
        """Check what is collected here, or write it, to `begin`; the result where it is already there."""
        index = self.index()
        work, out = self._stores()
        different = work.differences("index.json", index)
        if different is None:
            if begin:  # not before there is something to write: a run that failed takes other settings
                work.write_json("index.json", index)
            return None
        if different:
            raise ValueError(
                f"Spans go on with what they began with. Received: out={out.url!r}, where {different}. Use the same "
                f"or another folder."
            )
        finished = out.read_json("spans.json")
        if finished is None:
            return None
        return Spans(
            **read_table(f"{out.url.rstrip('/')}/spans.parquet"),
            d_sae=finished["d_sae"],
            n_texts=finished["n_texts"],
            n_tokens=finished["n_tokens"],
            feature_max=read_maxima(work),
        )

    def _stores(self) -> tuple[Store, Store]:
        if self.work is None or self.out is None:
            raise ValueError("There is no folder. Received: out=None.")
        return self.work, self.out

    def _parts(self) -> dict[int, dict[str, Tensor]]:
        """What each process has saved, by rank."""
        work, _ = self._stores()
        work.fs.invalidate_cache()  # other processes write too
        try:
            entries = work.fs.ls(work.root, detail=False)
        except FileNotFoundError:
            return {}
        names = sorted(name for entry in entries if (name := entry.rpartition("/")[2]).startswith("part-"))
        return {int(name[5:10]): load(work.fs.cat_file(work.path(name))) for name in names}

    def _save(self, new: Sequence[tuple[int, int, int]]) -> None:
        """Write the state of this process, whole, with the numbers of the blocks that are in it."""
        if not new:
            return
        self.done = torch.cat([self.done, torch.tensor(new, dtype=torch.int64)])
        if self.work is None:
            return
        self._open(begin=True)
        self.heap.settle()
        name = f"part-{self.rank:05d}.safetensors"
        if self.work.local:
            for leftover in Path(self.work.root).glob(f".{name}.*"):  # of a process of this rank that was killed
                leftover.unlink(missing_ok=True)
        state = {name: getattr(self.heap, name).cpu() for name in ("score", "text", "position")}
        if self.maxima is not None:
            state["feature_max"] = self.maxima.cpu()
        self.work.put(name, lambda path: save_file({**state, "done": self.done}, path))

    def _new_heap(self) -> SpanHeap:
        return SpanHeap(
            self.sae.config.d_sae, self.settings.top_n, min_score=self.settings.min_score, device=self.sae.device
        )

    def _add_part(self, heap: SpanHeap, part: dict[str, Tensor]) -> None:
        latent, place = (part["text"] != EMPTY).nonzero(as_tuple=True)
        entries = (latent, *(part[name][latent, place] for name in ("text", "position", "score")))
        heap.add(*(values.to(heap.score.device) for values in entries))

    # -- the result --------------------------------------------------------------------------------------------------

    def _finish(self) -> Spans:
        """Merge what all processes have, if they are done; cut out the spans; write them."""
        heap, done, known = self.heap, self.done, [self.maxima]
        if self.work is not None:
            heap, parts = self._new_heap(), self._parts()
            for part in parts.values():
                self._add_part(heap, part)
            done = torch.cat([part["done"] for part in parts.values()] or [done])
            known = [part.get("feature_max") for part in parts.values()] or known
        done = torch.unique(done, dim=0)
        n_blocks = -(-(self.source.n_rows or 0) // self.settings.rows_per_block)  # known: all have read to the end
        complete = done[:, 0].tolist() == list(range(n_blocks))
        entries = heap.entries() if complete else SpanHeap(heap.d_sae, 1).entries()
        latent, text, position, score = (values.cpu() for values in entries)
        start, end, span = self._cut(text, position)
        n_texts, n_tokens = done[:, 1:].sum(0).tolist()
        maxima = [one.cpu() for one in known if one is not None]
        largest = torch.stack(maxima).amax(0) if complete and len(maxima) == len(known) else None
        columns = latent, text, score, position, start, end, span
        spans = Spans(*columns, heap.d_sae, n_texts, n_tokens, complete, largest)
        if self.out is not None and complete:
            self._open(begin=True)  # where there was no block at all
            write_spans(spans, self.out)
        return spans

    def _cut(self, text: Tensor, position: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """The characters of each entry's span and the span, from the winning texts alone; no model needed."""
        order = text.argsort(stable=True)
        wanted, counts = torch.unique_consecutive(text[order], return_counts=True)
        after = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])  # entries before each wanted text
        size = self.settings.rows_per_block
        start, end = torch.zeros_like(text), torch.zeros_like(text)
        cut: list[str] = []  # in the order of `order`
        for number, rows in self.source.blocks(size, torch.unique(wanted // size).tolist()):
            ends = torch.tensor([number * size, number * size + len(rows.texts)])
            low, high = torch.searchsorted(wanted, ends).tolist()
            if low == high:
                continue
            places = (wanted[low:high] - number * size).tolist()
            chosen = [rows.texts[i] for i in places]
            entries = order[after[low] : after[high]]
            of_text, peak = torch.arange(high - low).repeat_interleave(counts[low:high]), position[entries].long()
            last, known, tokens = self._last
            if last == number and known == list(rows.texts):
                tokens = [tokens[i] for i in places]
            else:
                tokens = text_tokens(self.tokenizer, chosen, self.settings)
            beyond = peak >= torch.tensor([len(one.start) for one in tokens])[of_text]
            if bool(beyond.any()):
                raise ValueError(f"The text has changed since. Received: row {int(text[entries][beyond][0])}.")
            begin, stop = span_bounds(tokens, of_text, peak, self.settings)
            start[entries], end[entries] = begin, stop
            spans = zip(of_text.tolist(), begin.tolist(), stop.tolist(), strict=True)
            cut += [chosen[i][a:b] for i, a, b in spans]
        if len(cut) < len(text):
            raise ValueError(
                f"The text has changed since. Received: {len(text) - len(cut)} spans of rows that are gone."
            )
        return start, end, [cut[i] for i in order.argsort().tolist()]


def write_spans(spans: Spans, out: Store, index: Mapping[str, Any] | None = None) -> None:
    """Write the files of a result, `spans.json` last.

    Args:
        index: what was collected, where the folder does not say it yet.
    """
    work = Store(f"{out.url.rstrip('/')}/work")
    if index is not None:
        work.write_json("index.json", dict(index))
    maxima = spans.feature_max
    if maxima is not None:
        work.put(MAXIMA, lambda path: save_file({"feature_max": maxima}, path))
    for name, write in WRITERS.items():
        out.put(name, lambda path, write=write: write(spans, path))
    out.write_json("spans.json", {"d_sae": spans.d_sae, "n_texts": spans.n_texts, "n_tokens": spans.n_tokens})


def read_maxima(work: Store) -> Tensor | None:
    """The largest activation of each latent, as the folder `work` of a result has it; None where it does not."""
    if not work.fs.exists(work.path(MAXIMA)):
        return None
    return load(work.fs.cat_file(work.path(MAXIMA)))["feature_max"]
