"""Every setting of every steering method on every prompt: what is written, how likely it is, how far it departs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..generation.continuations import Continuations, chat_prompts, continue_prompts, prompt_ids
from ..generation.first_divergent_token import first_divergent_token
from ..generation.fluency import repetition
from ..generation.log_likelihood import token_scores
from ..journal import UNWATCHED, Watch
from ..scorers.registry import Scorer, checked_scores
from ..settings import GenerationSettings
from .axbench import SteeringMethod
from .kl_divergence import Reading, divergence_from_unsteered

UNSTEERED = "none"
UNTEMPLATED = GenerationSettings(chat=False)


class Setting(NamedTuple):
    """One row of the sweep: a method at one strength. instructions: what the model reads in place of the prompts."""

    method: str
    name: str
    steering: Any = None
    instructions: Sequence[str] | None = None


class Measures(NamedTuple):
    """One setting on n prompts, float64; NaN where something was not measured.

    score: (n, seeds), of the continuations.
    losses, tokens: (n,), negative log-likelihood of the continuations of all seeds under the unsteered model after
        the plain prompts, and how many tokens that is.
    repetition: (n,), share of word trigrams that repeat earlier ones, mean over seeds.
    divergent: (n,), first divergent token of greedy text.
    kl_prompt, kl_continuation: (n, 2), nats, and the positions they are summed over.
    """

    score: Tensor
    losses: Tensor
    tokens: Tensor
    repetition: Tensor
    divergent: Tensor
    kl_prompt: Tensor
    kl_continuation: Tensor

    def take(self, rows: Sequence[int]) -> Measures:
        """Those of some prompts, in this order."""
        return Measures(*(values[list(rows)] for values in self))


def perplexity(losses: Tensor, tokens: Tensor) -> float:
    """`exp(sum losses / sum tokens)`: tokens of all prompts count alike."""
    return math.exp(min(700.0, float(losses.sum() / tokens.sum())))


def per_position(sums: Tensor) -> float:
    """Mean over positions of (n, 2) sums and counts; NaN where there is none."""
    total, count = sums.sum(0).tolist()
    return total / count if count else math.nan


def settings_of(methods: Mapping[str, SteeringMethod | Sequence[SteeringMethod]], n: int) -> list[Setting]:
    """No steering, then every setting of every method.

    Raises:
        ValueError: a method named `none`, one without settings, names that occur twice in a method, or another number
            of instructions than prompts.
    """
    found = [Setting(UNSTEERED, UNSTEERED)]
    for name, method in methods.items():
        parts = [method] if isinstance(method, SteeringMethod) else list(method)
        rows = [
            Setting(name, setting, steering or None, part.instructions)
            for part in parts
            for setting, steering in zip(part.settings, part.steerings, strict=True)
        ]
        if name == UNSTEERED or not rows or len({row.name for row in rows}) < len(rows):
            raise ValueError(
                f"A method needs another name than {UNSTEERED!r} and settings of different names. "
                f"Received: method {name!r} with the settings {[row.name for row in rows]}."
            )
        for row in rows:
            if row.instructions is not None and len(row.instructions) != n:
                raise ValueError(
                    f"Method {name!r} needs a text for each of {n} prompts. Received: {len(row.instructions)}."
                )
        found += rows
    return found


class Sweep:
    """Runs the settings on the prompts.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        prompts: n texts.
        settings: of `settings_of`; the first is no steering.
        generation: with one continuation of each prompt for each sample, of seeds `seed`, `seed + 1`, ...
        watch: is told of rows that are done; and keeps what was generated and compared.

    Raises:
        ValueError: a feature that the model does not have, or a prompt that does not fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        settings: Sequence[Setting],
        generation: GenerationSettings = UNTEMPLATED,
        watch: Watch = UNWATCHED,
    ) -> None:
        model.prepare_steering([one.steering for one in settings])
        self.model, self.tokenizer, self.settings = model, tokenizer, list(settings)
        self.watched = watch._asdict()
        self.generation = generation
        self.seeds = range(generation.seed, generation.seed + generation.samples_per_prompt)

        def as_read(texts: Sequence[str]) -> list[str]:
            return chat_prompts(tokenizer, texts) if generation.chat else list(texts)

        self.plain = as_read(prompts)
        self.read = [self.plain if one.instructions is None else as_read(one.instructions) for one in settings]
        self.ids = prompt_ids(model, tokenizer, self.plain, generation.max_new_tokens)
        self.made: list[list[Continuations]] = []  # of each seed, of each setting

    def generate(self, temperature: float, seed: int) -> list[Continuations]:
        """Continuations of every setting; rows of one prompt share their random numbers."""
        n = len(self.plain)
        found = continue_prompts(
            self.model, self.tokenizer, [text for texts in self.read for text in texts],
            [one.steering for one in self.settings for _ in range(n)],
            replace(self.generation, temperature=temperature, seed=seed, samples_per_prompt=1),
            draws=list(range(n)) * len(self.settings), **self.watched,
        )  # fmt: skip
        parts = [found.take(range(place * n, (place + 1) * n)) for place in range(len(self.settings))]
        return [part if one.instructions is None else self._after_plain(part)
                for part, one in zip(parts, self.settings, strict=True)]  # fmt: skip

    def _after_plain(self, made: Continuations) -> Continuations:
        """The same tokens, as likely as they are after the plain prompts."""
        rows = [[*before, *after] for before, after in zip(self.ids, made.ids, strict=True)]
        log_p = token_scores(
            self.model, rows, [len(row) for row in self.ids], steering=False, journal=self.watched["journal"]
        ).log_p
        return made._replace(losses=-torch.stack([values.sum() for values in log_p]))

    def measure(self, scorer: Scorer, *, divergence: bool = True, tokens_at_once: int = 512) -> list[Measures]:
        """Generate, score and compare.

        Args:
            scorer: called once, with the continuations of all settings and seeds.
            divergence: measure the first divergent token and KL too.
            tokens_at_once: of `divergence_from_unsteered`.
        """
        n, k = len(self.plain), len(self.settings)
        self.made = [self.generate(self.generation.temperature, seed) for seed in self.seeds]
        texts = [text for one in self.made for part in one for text in part.texts]
        scores = checked_scores(scorer, texts).view(len(self.seeds), k, n)
        nothing = [torch.full(shape, math.nan, dtype=torch.float64) for shape in ((k, n), (k, n, 2), (k, n, 2))]
        first, prompt_kl, continuation_kl = nothing
        if divergence:
            first = self._first_divergent()
            prompt_kl, continuation_kl = self._kl(tokens_at_once)
        return [
            Measures(
                scores[:, place].T,
                torch.stack([one[place].losses for one in self.made]).sum(0),
                torch.stack([one[place].tokens for one in self.made]).sum(0).double(),
                torch.tensor(
                    [[repetition([text]) for text in one[place].texts] for one in self.made], dtype=torch.float64
                ).mean(0),
                first[place],
                prompt_kl[place],
                continuation_kl[place],
            )
            for place in range(k)
        ]

    def _first_divergent(self) -> Tensor:
        """(settings, n), of greedy text."""
        greedy = self.made[0] if self.generation.temperature == 0 else self.generate(0.0, 0)
        return torch.tensor(
            [[first_divergent_token(a, b) for a, b in zip(part.ids, greedy[0].ids, strict=True)] for part in greedy],
            dtype=torch.float64,
        )

    def _kl(self, tokens_at_once: int) -> tuple[Tensor, Tensor]:
        """(settings, n, 2) each, over the unsteered continuations of the first seed."""
        readings = [
            Reading(
                one.steering,
                None if one.instructions is None else prompt_ids(self.model, self.tokenizer, texts, 0),
            )
            for one, texts in zip(self.settings, self.read, strict=True)
        ]
        found = divergence_from_unsteered(
            self.model, self.ids, self.made[0][0].ids, readings, tokens_at_once=tokens_at_once, **self.watched
        )
        nothing = torch.full((len(self.ids), 2), math.nan, dtype=torch.float64)
        return (
            torch.stack([nothing if one.prompt is None else _sums(one.prompt) for one in found]),
            torch.stack([_sums(one.continuation) for one in found]),
        )


def _sums(values: Sequence[Tensor]) -> Tensor:
    """(n, 2), sum and length of each."""
    return torch.tensor([[float(row.sum()), len(row)] for row in values], dtype=torch.float64)
