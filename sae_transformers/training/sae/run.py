"""Run a recipe: data, SAEs and arguments into a trained, saved result."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainerCallback

from ...latents.output_files import locked_folder
from ...modeling import SparseAutoencoder
from ...modeling.output_files import write_whole
from .arguments import SaeTrainingArguments
from .callbacks import ProgressCallback
from .dataset import HiddenStateShards
from .recipe import Recipe
from .trainer import SaeTrainer

MAXIMA_TOKENS, MAXIMA_BATCHES = 100_000, 8  # of the training data, for the typical maximum of each latent


def run_recipe(
    recipe: Recipe,
    *,
    train_dataset: Any = None,
    resume: bool = False,
    report: Callable[[int, int], object] | None = None,
    quiet: bool = False,
) -> tuple[list[SparseAutoencoder], dict[str, Any]]:
    """Train and save; returns the SAEs, and the last metrics of the run with what it took.

    The result is in `output_dir`: the SAEs, as `SparseAutoencoder.from_pretrained` reads them, and `metrics.json`.

    Args:
        train_dataset: in place of the harvest that `recipe.data` names, e.g. a stream.
        resume: go on from the last checkpoint in `output_dir`.
        report: called with (step, steps) after each.
        quiet: print nothing.

    Raises:
        ValueError: recipe and data do not fit.
        BlockingIOError: another run writes to `output_dir`.
    """
    args = recipe.make_arguments()
    with locked_folder(str(args.output_dir) if args.process_index == 0 else None):
        return _run(recipe, args, train_dataset, resume, report, quiet)


def _run(
    recipe: Recipe,
    args: SaeTrainingArguments,
    train_dataset: Any,
    resume: bool,
    report: Callable[[int, int], object] | None,
    quiet: bool,
) -> tuple[list[SparseAutoencoder], dict[str, Any]]:
    if train_dataset is None:
        if recipe.data is None:
            raise ValueError("The recipe names no `data`: a folder or URL of harvested hidden states.")
        train_dataset = HiddenStateShards(recipe.data)
    if recipe.method == "condition" and not train_dataset.label_names:
        raise ValueError(
            "`method: condition` needs labels; harvest with a label column. Received: data without labels."
        )
    saes = recipe.make_saes(train_dataset.widths)
    evaluation = HiddenStateShards(recipe.eval_data) if recipe.eval_data else None
    callbacks: list[TrainerCallback] = [ProgressCallback(report)] if report else []
    trainer = SaeTrainer(saes, args, train_dataset, evaluation, callbacks=callbacks)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=resume or None)
    seconds = time.perf_counter() - start
    metrics: dict[str, Any] = {"loss": result.training_loss, "steps": trainer.state.global_step, "seconds": seconds}
    if math.isnan(result.training_loss):  # a run that had ended was resumed, and had logged none
        del metrics["loss"]
    for entry in trainer.state.log_history:
        metrics.update(
            {name: value for name, value in entry.items() if "l0" in name or "fvu" in name or "dead" in name}
        )
    if evaluation is not None:
        metrics.update(trainer.evaluate())
    _measure_maxima(trainer.saes, train_dataset)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_whole(Path(str(args.output_dir)) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return trainer.saes, metrics


def _measure_maxima(saes: Sequence[SparseAutoencoder], dataset: Any) -> None:
    """Fill `feature_max` of each SAE from the first tokens of its training data; of a stream, its next batches."""
    if isinstance(dataset, IterableDataset):
        parts = list(itertools.islice(iter(dataset), MAXIMA_BATCHES))
    else:
        parts = [dataset.__getitems__(torch.arange(min(len(dataset), MAXIMA_TOKENS)))]
    for sae in saes:
        states = [part[sae.config.read_at] for part in parts]
        if states:
            sae.measure_feature_max(states)
