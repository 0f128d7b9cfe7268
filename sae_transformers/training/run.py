"""Run a recipe: data, SAEs and arguments into a trained, saved result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..modeling.repository_files import write_whole
from .recipe import Recipe
from .shards import HiddenStateShards
from .trainer import SaeTrainer


def run_recipe(recipe: Recipe, *, train_dataset: Any = None, resume: bool = False) -> dict[str, Any]:
    """Train and save; returns the last metrics of the run, with what it took.

    The result is in `output_dir`: the SAEs, as `SparseAutoencoder.from_pretrained` reads them, and `metrics.json`.

    Args:
        train_dataset: in place of the harvest that `recipe.data` names, e.g. a stream.
        resume: go on from the last checkpoint in `output_dir`.

    Raises:
        ValueError: recipe and data do not fit.
    """
    args = recipe.make_arguments()
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
    trainer = SaeTrainer(saes, args, train_dataset, evaluation)
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=resume or None)
    seconds = time.perf_counter() - start
    metrics: dict[str, Any] = {"loss": result.training_loss, "steps": trainer.state.global_step, "seconds": seconds}
    for entry in trainer.state.log_history:
        metrics.update(
            {name: value for name, value in entry.items() if "l0" in name or "fvu" in name or "dead" in name}
        )
    if evaluation is not None:
        metrics.update(trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_whole(Path(str(args.output_dir)) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
