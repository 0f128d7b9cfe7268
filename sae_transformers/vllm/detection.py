"""Fetching what a pass has read: a method on vLLM's workers, called by `collective_rpc`."""

from __future__ import annotations

from typing import Any

from .wrapping import found

METHOD = "sae_collected"


def install() -> None:
    """Give vLLM's workers the method; a worker extension of the user's stays what it is."""
    worker: Any = found("vllm.v1.worker.worker_base", "WorkerBase")
    setattr(worker, METHOD, _collected)


def _collected(worker: Any, key: str) -> list[float] | None:
    """What `Steps.collected` has for a key on this rank."""
    steps = getattr(worker.model_runner.get_model(), "steps", None)
    return None if steps is None else steps.collected(key)
