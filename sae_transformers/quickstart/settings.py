"""What the quickstart is asked for, its two sizes, and the checks before anything long begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from ..create_training_data.base_model import BaseModel, find_base_model
from ..create_training_data.labelled_text import LabelledTexts, load_labelled_text, split_texts
from ..evaluation.scorers.sentiment import vader_scorer
from ..modeling.output_files import check_writable

CONCEPT = "positive sentiment"
# Neutral openings. The strength is chosen on the first list; everything reported comes from the second.
SEARCH_PROMPTS = (
    "The movie was",
    "The acting in this film",
    "My review of the film:",
    "The director has made",
    "In the end, the film",
    "After two hours in the cinema, I",
    "The soundtrack of the film",
    "People who watch this will",
)
REPORT_PROMPTS = (
    "I watched this film last night and",
    "The plot of the movie",
    "When I left the cinema, I felt",
    "The story of this movie is",
    "The main character",
    "The last scene of the film",
    "My friends and I thought that",
    "The book it is based on",
)


@dataclass(frozen=True)
class Size:
    """How much the quickstart does.

    Args:
        train_texts, test_texts: sentences to fit to, and held out for detection.
        latents_per_dimension: `d_sae` over the hidden size.
        steps: of training, 1,024 tokens each.
        search_samples, report_samples: continuations of each prompt.
        new_tokens: of each continuation.
        strengths: tried in this order on each side, in hidden norms, until the text gets too unlikely.
    """

    train_texts: int = 3000
    test_texts: int = 1000
    latents_per_dimension: int = 4
    steps: int = 600
    search_samples: int = 3
    report_samples: int = 6
    new_tokens: int = 40
    strengths: tuple[float, ...] = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)


SMALL = Size(
    train_texts=800,
    test_texts=300,
    latents_per_dimension=2,
    steps=120,
    search_samples=1,
    report_samples=2,
    new_tokens=24,
    strengths=(0.05, 0.1, 0.2),
)


@dataclass(frozen=True)
class Settings:
    """What a user can set; everything else is `Size` or follows from the data.

    Args:
        model: folder or Hub id of the base; None for the default small model.
        dataset: file or Hub id; None for Rotten Tomatoes.
        layer: block whose output the SAE reads; None for just under the middle.
        out: folder for the model.
        small: the short form.
        seed: of every random choice.
        perplexity_limit: steered text may be at most so many times as surprising to the unsteered model as its own.
        temperature, top_p: of sampling.
    """

    model: str | None = None
    dataset: str | None = None
    layer: int | None = None
    out: Path = Path("outputs/quickstart")
    small: bool = False
    seed: int = 0
    perplexity_limit: float = 1.6
    temperature: float = 0.7
    top_p: float = 0.95

    @property
    def size(self) -> Size:
        return SMALL if self.small else Size()


@dataclass(frozen=True)
class Prepared:
    """Settings that were checked, with what the check found."""

    settings: Settings
    base: BaseModel
    config: Any
    layer: int
    train: LabelledTexts
    test: LabelledTexts
    score: Callable[[str], float] = field(repr=False)


def prepare(settings: Settings, *, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Check everything a user can get wrong, and find the model and the text. From here on transformers keeps quiet.

    Raises:
        ValueError, OSError, ImportError: with one line that says what to change.
    """
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"`seed` must be an integer in [0, 2**32). Received: seed={settings.seed!r}.")
    if settings.layer is not None and settings.layer < 0:
        raise ValueError(f"`layer` must not be negative. Received: layer={settings.layer!r}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_writable(settings.out)
    score = vader_scorer()
    data = load_labelled_text(settings.dataset, say=say)
    size = settings.size
    train, test = split_texts(data, (size.train_texts, size.test_texts), seed=settings.seed)
    base = find_base_model(settings.model, say=say)
    try:
        config = AutoConfig.from_pretrained(base.name)
    except (OSError, ValueError) as error:
        raise OSError(f"{base.name!r} could not be read as a model: {str(error).strip().splitlines()[0]}") from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        raise ValueError(f"The config of {base.name!r} does not say how many layers it has (num_hidden_layers).")
    layer = (layers - 1) * 14 // 29 if settings.layer is None else settings.layer
    if layer >= layers:
        raise ValueError(f"`layer` must be in [0, {layers}) for {base.name}. Received: layer={layer!r}.")
    return Prepared(settings, base, config, layer, train, test, score)


def use_all_cores() -> int:
    """Let torch use every core of this process, whatever OMP_NUM_THREADS says; returns their number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    return cores
