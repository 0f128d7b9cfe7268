"""Loss, gradients and steered outputs of a model that FSDP2 shards over processes; rank 0 saves them.

Arguments: output file, SAE site, and any of `full`, `checkpointing`, `penalties`, `lora`; or `groups`, a classifier.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.invariants.test_distributed import fsdp_model, fsdp_outcome


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(file: str, site: str, *flags: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fsdp_model(site, *flags)
    for module in list(model.modules()):
        if type(module).__name__ in ("LlamaDecoderLayer", "SparseAutoencoder"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    outcome = {name: whole(value) for name, value in fsdp_outcome(model).items()}
    if dist.get_rank() == 0:
        torch.save({"outcome": outcome, "sharded": sharded, "world": dist.get_world_size()}, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
