"""Small training runs for the tests of `SaeTrainer`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.training.sae.arguments import SaeTrainingArguments
from sae_transformers.training.sae.dataset import TensorTokens
from sae_transformers.training.sae.trainer import SaeTrainer

D, D_SAE, K = 12, 40, 4
PLACES = ("layers.0.resid_post", "layers.1.mlp_out")
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}

gc.freeze()  # accelerate collects garbage at every `train`: a third of a second over all that was imported


def new_sae(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> SparseAutoencoder:
    torch.manual_seed(seed)
    k = {"k": K} if settings.get("activation", "topk") in ("topk", "batch_topk") else {}
    place = {} if {"hook", "layer"} & set(settings) else {"layer": 0, "site": "resid_post"}
    given = {"d_in": D, "d_sae": D_SAE, "activation": "topk", **k, **place, **settings}
    return SparseAutoencoder(SparseAutoencoderConfig(**given), dtype=dtype)


def tokens(n: int = 520, seed: int = 0, labels: bool = False) -> TensorTokens:
    """Sparse mixtures of 24 directions, at two places, in shards of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, D, generator=torch.Generator().manual_seed(7))
    weights = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.15)
    x = weights @ directions + 0.05 * torch.randn(n, D, generator=generator) + 0.5
    tensors = {PLACES[0]: x, PLACES[1]: x.flip(-1) * 3}
    if labels:
        present = (weights[:, :2] > 0).float()
        tensors["labels"] = torch.where(torch.rand(n, 2, generator=generator) < 0.2, -100.0, present)
    data = TensorTokens(tensors, ["first", "second"] if labels else ())
    if n > 200:
        data.sizes = [100, 0, 60, n - 160]
    return data


def trainer_for(saes: Any, folder: Path, data: Any = None, **settings: Any) -> SaeTrainer:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 64, "max_steps": 12, "learning_rate": 3e-3, "init_tokens": 256,
        "window_tokens": 200, "save_strategy": "no", "logging_strategy": "no", **settings,
    }  # fmt: skip
    others = {name: given.pop(name) for name in ("eval_dataset", "callbacks") if name in given}
    args = SaeTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given
    )  # fmt: skip
    trainer = SaeTrainer(saes, args, tokens() if data is None else data, **others)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(saes: Any, folder: Path, data: Any = None, **settings: Any) -> SaeTrainer:
    trainer = trainer_for(saes, folder, data, **settings)
    trainer.train()
    return trainer


def state_of(trainer: SaeTrainer) -> dict[str, torch.Tensor]:
    """Everything that training changes: weights, buffers, the memory of dead latents, the optimiser."""
    state = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    for number, part in enumerate(trainer.model.saes):
        state[f"{number}.input_scale"] = torch.tensor(part.sae.config.input_scale)
    optimizer: Any = trainer.optimizer
    for number, entries in optimizer.state_dict()["state"].items():
        state |= {f"optimizer {number} {name}": value for name, value in entries.items()}
    return state


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}")
