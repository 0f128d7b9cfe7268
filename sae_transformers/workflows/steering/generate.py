"""Continue prompts under one steering or several, and without, side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...evaluation.generation.continuations import Continuations, chat_prompts, continue_prompts, stream_prompt
from ...modeling import SaeForCausalLM, Steering
from ..results import Count, Progress, Result, save_csv
from ..settings.generate import GenerateSettings

UNSTEERED = "unsteered"


@dataclass(frozen=True)
class GenerateResult(Result):
    """Continuations of prompts; those of one prompt and sample have the same random numbers under every steering.

    Args:
        prompts: what was continued.
        texts: label of a steering -> its texts without the prompts, `samples` of the first prompt, then of the next.
        perplexities: of each text under the unsteered model: much above the unsteered texts', the text is breaking.
        steerings: label -> what it is; `model.steering = result.steerings[label]` keeps it.
        settings: how it was done.
    """

    prompts: list[str]
    texts: dict[str, list[str]]
    perplexities: dict[str, list[float]]
    steerings: dict[str, Steering]
    settings: GenerateSettings = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One per text: prompt, sample, steering, text, perplexity."""
        samples = self.settings.generation.samples_per_prompt
        return [
            {
                "prompt": prompt, "sample": sample, "steering": label,
                "text": self.texts[label][number * samples + sample],
                "perplexity": self.perplexities[label][number * samples + sample],
            }
            for number, prompt in enumerate(self.prompts)
            for sample in range(samples)
            for label in self.texts
        ]  # fmt: skip

    def table(self) -> list[dict[str, str]]:
        """One per prompt and sample: the prompt, and a column for each steering."""
        samples = self.settings.generation.samples_per_prompt
        return [
            {"prompt": prompt, **{label: texts[number * samples + sample] for label, texts in self.texts.items()}}
            for number, prompt in enumerate(self.prompts)
            for sample in range(samples)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        steerings = {label: steering.to_dict() for label, steering in self.steerings.items()}
        return {"continuations": self.rows(), "steerings": steerings, "settings": dataclasses.asdict(self.settings)}

    def save(self, path: str | Path) -> None:
        """Write `rows()` as .csv."""
        save_csv(path, self.rows())


def generate(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    steerings: Steering | Mapping[str, Steering] | None = None,
    settings: GenerateSettings | None = None,
    *,
    progress: Progress | None = None,
    on_text: Callable[[str, str], object] | None = None,
) -> GenerateResult:
    """Continue prompts under one steering or several, and without.

    Args:
        prompts: one or several texts; in the chat template as a user's message, where the tokenizer has one.
        steerings: one, or several by what to call them; by default the model's own.
        progress: called with (texts done, texts).
        on_text: called with (label of the steering, text) as the text grows, one piece at a time; for one prompt and
            one sample, whose texts are then written one after another.

    Raises:
        ValueError: no prompt, a prompt that does not fit the model's context, a steering that the model does not
            have, or several texts to be shown while they grow.
    """
    settings = settings or GenerateSettings()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    named = {label: one.with_tokenizer(tokenizer) for label, one in _named(model, steerings).items()}
    for steering in named.values():
        model.prepare_steering(steering)  # what the model does not have is told before anything is written
    columns: dict[str, Steering | None] = {UNSTEERED: None} if settings.unsteered or not named else {}
    columns |= named
    generation, samples = settings.generation, settings.generation.samples_per_prompt
    asked = chat_prompts(tokenizer, prompts) if generation.chat else prompts
    asked = [prompt for prompt in asked for _ in range(samples)]
    count = Count(progress, len(asked) * len(columns))
    if on_text is None:
        every = continue_prompts(
            model, tokenizer, asked * len(columns), [plan for plan in columns.values() for _ in asked], generation,
            draws=[*range(len(asked))] * len(columns), report=count,
        )  # fmt: skip
        found = {
            label: every.take(range(number * len(asked), (number + 1) * len(asked)))
            for number, label in enumerate(columns)
        }
    else:
        if len(asked) != 1:
            raise ValueError(f"`on_text` is for one prompt and one sample. Received: {len(asked)} texts.")
        found: dict[str, Continuations] = {}
        for label, plan in columns.items():
            take = functools.partial(on_text, label)
            found[label] = stream_prompt(model, tokenizer, asked[0], plan, generation, take=take)
            count(1)
    texts = {label: some.texts for label, some in found.items()}
    perplexities = {label: some.perplexities.tolist() for label, some in found.items()}
    return GenerateResult(prompts, texts, perplexities, named, settings)


def _named(model: SaeForCausalLM, steerings: Steering | Mapping[str, Steering] | None) -> dict[str, Steering]:
    if isinstance(steerings, Mapping):
        if UNSTEERED in steerings:
            raise ValueError(f"{UNSTEERED!r} is what the texts without steering are called; use another name.")
        return dict(steerings)
    if steerings is None:
        steerings = Steering.coerce(getattr(model.generation_config, "sae_steering", None)) or model.steering
    return {"steered": steerings} if steerings else {}
