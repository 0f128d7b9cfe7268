"""Train a tiny model for two steps with `Trainer` and save its parameters. Started by torchrun, or alone.

Arguments: output folder, batch size per process, and any of `checkpointing`, `accumulate`, `full`, `penalties`;
or `groups`, a classifier through a LoRA.
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.invariants.test_group_penalties import SEVERAL, adapted, rows_of_two_labels
from tests.invariants.test_penalties import DISTRIBUTED as PENALTIES
from tests.invariants.test_trainer import CHECKPOINTING, Texts, parameters_of, trainable, trainer_for
from tests.tiny import tiny_base


def main(folder: Path, batch_size: int, *flags: str) -> None:
    accumulate = 2 if "accumulate" in flags else 1
    groups, scope = "groups" in flags, "full" if "full" in flags else "sae"
    model = adapted(SEVERAL, None) if groups else trainable(tiny_base(), scope, site="mlp_out")
    if "penalties" in flags:
        model.feature_penalties = PENALTIES
    trainer = trainer_for(
        model,
        folder,
        rows_of_two_labels() if groups else Texts(16, per_token=True),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        max_grad_norm=0.0,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        **{CHECKPOINTING: "checkpointing" in flags},
    )
    trainer.train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.save({"parameters": parameters_of(model), "losses": losses, "world": world}, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        # DDP goes before its group, and no process before the others: one of them hung at exit otherwise.
        trainer.accelerator.free_memory(trainer.model_wrapped)
        del trainer
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
