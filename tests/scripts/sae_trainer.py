"""Train SAEs for a few steps with `SaeTrainer`, then evaluate. Started by torchrun, or alone.

Arguments: output folder, tokens per process and step, the case of `CASES`, and perhaps the step of a checkpoint to
resume from.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.runs import new_sae, tokens, trainer_for
from tests.training.test_trainer_distributed import CASES, EVALUATION_TOKENS, StreamOfRank


def main(folder: Path, batch_size: int, case: str, resume_at: int = 0) -> None:
    saes, settings = CASES[case]
    data: Any = StreamOfRank() if case == "stream" else tokens(1280, labels="concepts" in case)
    if settings.get("window_tokens"):
        data.sizes = [1280]
    trainer = trainer_for(
        [new_sae(i, torch.float64, **sae) for i, sae in enumerate(saes)], folder, data,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=50, max_grad_norm=0.0,
        eval_dataset=None if case == "stream" else tokens(EVALUATION_TOKENS, seed=3, labels="concepts" in case),
        save_strategy="steps", save_steps=4, logging_strategy="steps", logging_steps=4, max_steps=10,
        ddp_backend="gloo" if dist.is_torchelastic_launched() else None, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume_at}") if resume_at else None)
    metrics = {} if case == "stream" else trainer.evaluate()
    rank = dist.get_rank() if dist.is_initialized() else 0
    outcome = {
        "state": trainer.model.state_dict(),
        "scales": [sae.config.input_scale for sae in trainer.saes],
        "logs": [entry for entry in trainer.state.log_history if "fvu" in str(entry.keys()) and "loss" in entry],
        "metrics": {name: value for name, value in metrics.items() if "fvu" in name or "l0" in name or "loss" in name},
        "world": dist.get_world_size() if dist.is_initialized() else 1,
    }
    torch.save(outcome, folder / f"rank{rank}{'-resumed' if resume_at else ''}.pt")
    if dist.is_initialized():
        trainer.accelerator.free_memory(trainer.model_wrapped)
        del trainer
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
