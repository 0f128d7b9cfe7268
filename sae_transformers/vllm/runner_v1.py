"""Steering of a pass in vLLM's first model runner, which has no hook for it (and is the only one on CPUs)."""

from __future__ import annotations

from typing import Any

from .asked import asked_by
from .steps import Part
from .wrapping import wrap

RUNNER = "vllm.v1.worker.gpu_model_runner"


def install() -> None:
    """Wrap the runner's preparation of a pass, which knows whose tokens it holds, and the pass itself."""
    wrap(RUNNER, "GPUModelRunner._prepare_inputs", _prepare_inputs)
    wrap(RUNNER, "GPUModelRunner.execute_model", _execute_model)


def _prepare_inputs(original: Any, runner: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    steps = getattr(runner.get_model(), "steps", None)
    if steps is not None:
        batch = runner.input_batch
        steps.begin(
            Part(asked_by(state), state.num_prompt_tokens, int(computed), int(scheduled))
            for state, computed, scheduled in zip(
                (runner.requests[name] for name in batch.req_ids),
                batch.num_computed_tokens_cpu[: batch.num_reqs],
                num_scheduled_tokens,
                strict=True,
            )
        )
    return original(runner, scheduler_output, num_scheduled_tokens)


def _execute_model(original: Any, runner: Any, *args: Any, **options: Any) -> Any:
    try:
        return original(runner, *args, **options)
    finally:
        steps = getattr(runner.get_model(), "steps", None)
        if steps is not None:
            steps.end()
