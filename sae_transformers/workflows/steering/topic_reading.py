"""What `align_topic` knows of the reference's texts and the topic's, read now or by a run that was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...evaluation.journal import Watch
from ...evaluation.topics.alignment import TextEvidence, reconstruction_sums
from ...latents.hidden_states import HiddenStateReader
from ...latents.sparse_codes import SparseCodes
from ...latents.text_latents import sae_of
from ...latents.text_states import read_text_states
from ...modeling.modeling_sae import SaePreTrainedModel
from ...training.steering.topic_scores import prompt_summaries
from ..settings.align_topic import TopicSettings


class TopicPart(NamedTuple):
    """texts: those with a token that counts. ids: (length,) int64 of each. tokens: how many count. left_out: texts
    without one. cut: texts that were cut. max_norm: longer states are left out. centre: (d_in,) float64, the
    reference's mean state. summaries: share of each latent in each text. error, energy: (n,), see
    `reconstruction_sums`."""

    texts: list[str]
    ids: Sequence[Tensor]
    tokens: int
    left_out: int
    cut: int
    max_norm: float
    centre: Tensor
    summaries: SparseCodes
    error: Tensor
    energy: Tensor

    def evidence(self, embeddings: Tensor) -> TextEvidence:
        """With the texts' embeddings (n, d)."""
        return TextEvidence(self.summaries, embeddings, self.error, self.energy)


class TopicReading:
    """Reads texts through an SAE; `seconds` is what that took, in whichever run.

    Args:
        number: of the SAE.
        watch: is told the number of texts of each batch; keeps what was read.
    """

    def __init__(
        self,
        model: SaePreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TopicSettings,
        number: int,
        watch: Watch,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.watch = model, tokenizer, settings, watch
        self.sae, self.seconds = sae_of(model, number), 0.0

    def read(self, part: str, texts: Sequence[str], reference: TopicPart | None = None) -> TopicPart:
        """The texts of a part; those of the topic are compared with the `reference`.

        Raises:
            ValueError: no text has a token that counts.
        """
        known = True

        def make() -> dict[str, Tensor]:
            nonlocal known
            known = False
            return self._read(texts, reference)

        found = self.kept({"read": part}, make)
        if known:
            self.watch.done(len(texts))
        latents, rows, values = (found[name] for name in ("latents", "rows", "values"))
        places: list[int] = found["places"].tolist()
        tokens, left_out, cut = found["counts"].tolist()
        return TopicPart(
            texts=[texts[i] for i in places],
            ids=found["ids"].split(found["lengths"].tolist()),
            tokens=tokens,
            left_out=left_out,
            cut=cut,
            max_norm=float(found["max_norm"]),
            centre=found["centre"],
            summaries=SparseCodes(latents, rows, values, len(places), self.sae.config.d_sae),
            error=found["error"],
            energy=found["energy"],
        )

    def kept(self, what: object, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `make` gives, or gave before; its seconds count."""

        def timed() -> dict[str, Tensor]:
            begin = time.perf_counter()
            made = dict(make())
            return {**made, "seconds": torch.tensor(time.perf_counter() - begin, dtype=torch.float64)}

        found = self.watch.keep(what, timed)
        self.seconds += float(found["seconds"])
        return found

    def _read(self, texts: Sequence[str], reference: TopicPart | None) -> dict[str, Tensor]:
        reader = HiddenStateReader(self.model.lm, [self.sae.config.read_at], config=self.model.config)
        states = read_text_states(
            reader,
            self.tokenizer,
            texts,
            max_tokens=self.settings.reading.max_length or 0,
            max_norm=None if reference is None else reference.max_norm,
            skip_first=self.settings.reading.skip_first,
            tokens_at_once=self.settings.reading.tokens_per_batch,
            report=self.watch.report,
        )
        centre = states.hidden.double().mean(0) if reference is None else reference.centre
        of_texts = (states.hidden, states.text_index, len(states.texts))
        error, energy = reconstruction_sums(self.sae, *of_texts, centre)
        summaries = prompt_summaries(self.sae, *of_texts, summary=self.settings.scoring.summary)
        return {
            "places": torch.tensor(_places(texts, states.texts)),
            "ids": torch.cat(list(states.ids)),
            "lengths": torch.tensor([len(row) for row in states.ids]),
            "counts": torch.tensor([len(states.hidden), states.left_out, states.cut]),
            "max_norm": torch.tensor(states.max_norm, dtype=torch.float64),
            "centre": centre,
            "latents": summaries.latents,
            "rows": summaries.rows,
            "values": summaries.values,
            "error": error,
            "energy": energy,
        }


def _places(texts: Sequence[str], some: Sequence[str]) -> list[int]:
    """Numbers of some of the texts, which are in the same order; equal texts are as good as each other."""
    numbered = iter(enumerate(texts))
    return [next(number for number, text in numbered if text == one) for one in some]
