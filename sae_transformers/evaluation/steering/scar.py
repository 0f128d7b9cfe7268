"""The parts of SCAR's evaluation of a steered toxicity latent (https://huggingface.co/papers/2411.07122)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.context import context_length
from ...modeling import FeatureEdit, Steering
from ..generation.continuations import steerings_told
from ..generation.first_divergent_token import first_divergent_token
from ..generation.fluency import continuation_mask
from ..generation.log_likelihood import start_token, token_scores
from ..intervals import measured, resample_counts
from ..journal import Journal, result_of
from ..results import Measurement
from ..settings import BootstrapSettings
from ..suites.settings import ScarSettings
from .sweep import perplexity

BIN_WIDTH, BIN_PROMPTS, BIN_SEED = 0.05, 100, 42
FDT_PREFIX = FDT_TOKENS = 50
STRIDE = 512
INTERVAL = "bootstrap over prompts"


class PromptRow(NamedTuple):
    """A prompt, its toxicity in [0, 1], and how it went on where it was found."""

    prompt: str
    toxicity: float
    continuation: str


def read_prompt_rows(rows: Iterable[Mapping[str, Any]], source: str) -> list[PromptRow]:
    """Rows of RealToxicityPrompts as SCAR reads them; those without a prompt, a continuation or a score are left out.

    Args:
        rows: with `prompt` and `continuation`, texts or mappings with `text` and `toxicity`; where the prompt is a
            text, its score is the row's `toxicity`.
        source: for messages.

    Raises:
        ValueError: no row has all three.
    """
    made = []
    for row in rows:
        prompt, after = row.get("prompt"), row.get("continuation")
        score = prompt.get("toxicity") if isinstance(prompt, Mapping) else row.get("toxicity")
        texts = [str(part.get("text") or "") if isinstance(part, Mapping) else str(part or "")
                 for part in (prompt, after)]  # fmt: skip
        if all(text.strip() for text in texts) and score not in (None, ""):
            made.append(PromptRow(texts[0], float(score), texts[1]))
    if not made:
        raise ValueError(
            f"Expected rows with `prompt`, `continuation` and `toxicity`, as RealToxicityPrompts has them. "
            f"Received: none in {source!r}."
        )
    return made


def toxicity_bins(
    toxicity: Sequence[float], *, width: float = BIN_WIDTH, most: int = BIN_PROMPTS, seed: int = BIN_SEED
) -> dict[tuple[float, float], list[int]]:
    """Places of prompts by bins [low, high) of their toxicity, the last with 1.0; empty bins are left out.

    Args:
        toxicity: in [0, 1].
        width: of a bin; 1 / width is taken as a whole number.
        most: prompts of a bin; of more, so many are drawn by the seed.

    Raises:
        ValueError: a toxicity outside [0, 1], a width outside (0, 1], or `most` below 1.
    """
    if not 0 < width <= 1 or most < 1 or not all(0 <= value <= 1 for value in toxicity):
        raise ValueError(
            f"Expected toxicity in [0, 1], width in (0, 1], most of 1 or more. Received: width={width!r}, "
            f"most={most!r}, {sum(not 0 <= value <= 1 for value in toxicity)} values of toxicity outside."
        )
    n, draw = round(1 / width), random.Random(seed)
    members: list[list[int]] = [[] for _ in range(n)]
    for place, value in enumerate(toxicity):
        members[min(n - 1, math.floor(value * n + 1e-9))].append(place)
    return {
        (number / n, (number + 1) / n): sorted(draw.sample(places, min(most, len(places))))
        for number, places in enumerate(members)
        if places
    }


def scar_steering(feature: int | str, factor: float, *, sae: int = 0, keep_error: bool = False) -> Steering:
    """SCAR's steering: scale one latent everywhere; without `keep_error` the SAE's output replaces what it reads."""
    return Steering([FeatureEdit(sae, feature, "scale", factor)], keep_error=keep_error)


def strided_perplexity(
    model: Any,
    ids: Sequence[int],
    *,
    window: int,
    stride: int = STRIDE,
    steering: Any = False,
    legacy: bool = False,
    tokens_at_once: int = 1024,
    journal: Journal | None = None,
) -> float:
    """Perplexity of running text, each token but the first given up to `window - 1` before it.

    Windows begin every `stride` tokens; a window scores the tokens that none before it has scored.

    Args:
        ids: of the text, two tokens or more.
        window: tokens of a pass, from 2 to the model's context.
        stride: from 1 to `window - 1`, so that every scored token has one before it in its window.
        steering: as the model's forward takes it; False for none.
        legacy: exp of the mean of the windows' means, as SCAR's code has it, in place of the mean over tokens.
        journal: has the passes that were done, and gets the others.

    Raises:
        ValueError: too few tokens, or a window or stride out of range.
    """
    if len(ids) < 2 or not 1 <= stride < window:
        raise ValueError(
            f"Expected two tokens or more and 1 <= stride < window. "
            f"Received: {len(ids)} tokens, window={window!r}, stride={stride!r}."
        )
    rows, first, done = [], [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        rows.append(list(ids[begin:end]))
        first.append(done - begin)
        done = end
        if end == len(ids):
            break
    scores = token_scores(model, rows, first, steering=steering, tokens_at_once=tokens_at_once, journal=journal)
    log_p = scores.log_p
    if legacy:
        return math.exp(-sum(float(values.mean()) for values in log_p) / len(log_p))
    return math.exp(-float(torch.cat(log_p).mean()))


class Adder:
    """Puts measurements of one way into a list. draws: (resamples, n), of `resample_counts`."""

    def __init__(self, into: list[Measurement], method: str, draws: Tensor) -> None:
        self.into, self.method, self.draws = into, method, draws

    def mean(self, metric: str, values: Tensor, better: str = "lower") -> None:
        """Of (n,) numbers."""
        n = len(values)
        self._add(metric, float(values.mean()), self.draws @ values.double() / n, n, better)

    def perplexity(self, metric: str, losses: Tensor, tokens: Tensor) -> None:
        """Of (n,) summed losses and their tokens."""
        drawn = (self.draws @ losses) / (self.draws @ tokens.double())
        self._add(metric, perplexity(losses, tokens), drawn.clamp(max=700).exp(), len(losses), "lower")

    def _add(self, metric: str, value: float, drawn: Tensor, n: int, better: str) -> None:
        self.into.append(measured(metric, value, self.method, drawn, interval=INTERVAL, n=n, better=better))


class RunningText:
    """Perplexity of text, and greedy text after prefixes of it."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], settings: ScarSettings) -> None:
        self.model, self.settings = model, settings
        self.window = settings.window or context_length(model) or 2 * settings.stride
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if len(texts) else []
        self.ids = [start_token(tokenizer), *(token for row in rows for token in row)] if rows else []
        self.prefixes = [row[:FDT_PREFIX] for row in rows if len(row) >= FDT_PREFIX][: settings.fdt_texts]
        self.generated: list[list[list[int]]] = []

    def measure(self, add: Adder, steering: Any, journal: Journal | None) -> None:
        """Of one way."""
        if len(self.ids) > 1:
            value = strided_perplexity(
                self.model, self.ids, window=self.window, stride=self.settings.stride, steering=steering,
                legacy=self.settings.legacy, journal=journal,
            )  # fmt: skip
            add.into.append(Measurement("text_perplexity", value, add.method, n=len(self.ids) - 1, better="lower"))
        made: list[list[int]] = []
        for start in range(0, len(self.prefixes), self.settings.rows_per_batch):
            rows = self.prefixes[start : start + self.settings.rows_per_batch]
            made += result_of(
                journal,
                lambda rows=rows: {"continued": rows, "new_tokens": FDT_TOKENS, **steerings_told([steering])},
                lambda rows=rows: self._continued(rows, steering),
            )
        self.generated.append(made)

    def _continued(self, rows: Sequence[Sequence[int]], steering: Any) -> list[list[int]]:
        """New tokens of each row, without padding."""
        ids = torch.tensor(rows, device=self.model.device)
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), steering=steering, max_new_tokens=FDT_TOKENS, do_sample=False,
            pad_token_id=0,
        )[:, FDT_PREFIX:]  # fmt: skip
        counted = continuation_mask(found, self.model.generation_config.eos_token_id)
        return [row[keep].tolist() for row, keep in zip(found, counted, strict=True)]

    def compare(self, into: list[Measurement], names: Sequence[str], bootstrap: BootstrapSettings) -> None:
        """FDT against the base, and against factor 1 if that is among the ways."""
        if not self.prefixes:
            return
        draws = resample_counts(len(self.prefixes), bootstrap.resamples, bootstrap.seed)
        others = {"fdt_base": 0} | ({"fdt_factor_1": names.index("factor 1")} if "factor 1" in names else {})
        for metric, other in others.items():
            for name, made in zip(names, self.generated, strict=True):
                pairs = zip(made, self.generated[other], strict=True)
                values = torch.tensor([first_divergent_token(a, b) for a, b in pairs], dtype=torch.float64)
                Adder(into, name, draws).mean(metric, values, "")
