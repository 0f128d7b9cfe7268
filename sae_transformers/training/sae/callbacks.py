"""What happens around an optimiser step of SAEs: decoder norms, thresholds, dead latents, the stream's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .encoding import encode
from .initialization import rows_in_cache, scale_decoder_to_unit_norm


class SaeUpkeep(TrainerCallback):
    """Keeps constraints that a gradient step would break, and what a checkpoint must hold of the data."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.decoder_norm == "unit":
            for part in self.trainer.model.saes:
                W_dec, size = part.sae.W_dec, rows_in_cache(part.sae.W_dec)
                for rows, grad in zip(W_dec.split(size), W_dec.grad.split(size), strict=True):
                    along = torch.linalg.vecdot(rows, grad).unsqueeze(-1)  # rows have norm 1
                    grad.addcmul_(rows, along, value=-1.0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.trainer.model.saes:
            if args.decoder_norm == "unit":
                scale_decoder_to_unit_norm(part.sae)
            if part.sae.config.activation == "jumprelu":
                part.sae.threshold.clamp_(min=0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.train_batches is not None:
            # Not left to Trainer: release 5.12 forgets it where it resumes inside an epoch.
            self.trainer.train_batches.set_epoch(int(state.epoch or 0))
        if args.finetune_dead and (state.epoch or 0.0) % 1 == 0:  # else resumed inside an epoch: the set was saved
            self.find_dead()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_data_state(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    @torch.no_grad()
    def find_dead(self) -> None:
        """Mark the latents that no token of the training data activates: SelfReg's dead set
        (https://huggingface.co/papers/2502.14133), of its code with `finetune_legacy`."""
        trainer = self.trainer
        if isinstance(trainer.train_dataset, IterableDataset):
            raise ValueError("`finetune_dead` reads the data twice: harvest it to a folder first.")
        alive = [torch.zeros_like(part.dead) for part in trainer.model.saes]
        for batch in trainer.get_eval_dataloader(trainer.train_dataset):
            for part, seen in zip(trainer.model.saes, alive, strict=True):
                sae = part.sae
                x = sae.normalize(batch[sae.config.read_at].to(sae.W_dec)).x
                if trainer.args.finetune_legacy:
                    if sae.config.apply_b_dec_to_input:
                        x = x - sae.b_dec
                    seen |= (x @ sae.W_enc + sae.b_enc > 0).any(0)
                else:
                    code = encode(sae, x, part.k, False, trainer.args.jumprelu_bandwidth)
                    seen[code.selection.latents[code.latents > 0]] = True
        for part, seen in zip(trainer.model.saes, alive, strict=True):
            counts = seen.int()
            if trainer.args.world_size > 1:
                torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
            part.dead.copy_(counts == 0)


class ProgressCallback(TrainerCallback):
    """Report every step to a function `(step, total_steps)`."""

    def __init__(self, report: Callable[[int, int], object]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps)
