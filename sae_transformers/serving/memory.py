"""How much memory the keys and values of a batch may take, and what running out of it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .errors import RequestError
from .running_batch import RunningBatch

SHARE = 0.8  # of what is free when the server starts; the rest is for the passes themselves
HEADROOM = 16  # columns that a batch must have left when a row joins, so that it does not leave at the next token


@dataclass
class CacheBudget:
    """Bytes that keys and values may take together, and what a token of theirs takes.

    limit: bytes, None where nothing is known. per_token: bytes of a column of a row in the batch of the last pass, 0
    before; layers with a sliding window make it less for long texts.
    """

    limit: int | None
    per_token: float = 0.0

    def measure(self, batch: RunningBatch) -> None:
        """Learn from a batch what a token takes, padding included."""
        self.per_token = batch.cache_bytes / max(1, len(batch) * batch.columns)

    def holds(self, rows: int, columns: int) -> bool:
        """Whether so many rows of so many columns are within the limit."""
        return self.limit is None or rows * columns * self.per_token <= self.limit


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be asked."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return _free_of_the_machine() if device.type == "cpu" else None


def _free_of_the_machine() -> int | None:
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none, or another version of control groups
        return free
    return min(free, max(0, limit - used))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed for want of memory, and one of fewer rows may not."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def no_memory(what: str) -> RequestError:
    """What a client is told."""
    told = f"There is not enough memory for this request now: {what}."
    return RequestError(told, code="out_of_memory", status=503)


def give_back(device: torch.device) -> None:
    """Return what the allocator keeps for later, which is of the wrong size after a failure."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()
