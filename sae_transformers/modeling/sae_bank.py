"""The SAEs of a model, by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .call_record import CallRequest, SiteResult
from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .sae_steering import serve
from .sparse_autoencoder import SparseAutoencoder


def new_saes(entries: Sequence[SparseAutoencoderConfig]) -> list[SparseAutoencoder]:
    """Random SAEs: in single precision at least, whatever dtype the base is loaded in."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return [SparseAutoencoder(entry, dtype=dtype) for entry in entries]


class SaeBank(nn.Module):
    """The SAEs of a model under numbered names. Hooks call it by number, so that whatever replaces a child (PEFT's
    `modules_to_save`) is what runs. Not a ModuleList: PEFT refuses those."""

    def __init__(self, saes: Sequence[SparseAutoencoder]) -> None:
        super().__init__()
        for number, sae in enumerate(saes):
            self.add_module(str(number), sae)

    def forward(self, index: int, *args: Any, **options: Any) -> Any:
        return getattr(self, str(index))(*args, **options)

    def serve(self, number: int, hidden: Tensor, request: CallRequest, target: Tensor | None) -> SiteResult:
        """`serve` of SAE `number`, inside the forward passes of this module and of the SAE."""
        return self(number, hidden, request, number, target, task=serve)

    def __getitem__(self, number: int) -> SparseAutoencoder:
        return getattr(self, str(range(len(self))[number]))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())
