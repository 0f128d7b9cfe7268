"""Steering of a pass in vLLM's second model runner, by the `ModelState` that a model may bring."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .asked import Asked, asked_by
from .steps import Part, Steps


class SaeModelState(DefaultModelState):
    """What the runner keeps for a model with SAEs: each request's steering and the length of its prompt."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.steps: Steps = model.steps
        self.requests: dict[str, tuple[Asked, int]] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        # Of a request that was preempted, `prefill_token_ids` holds generated tokens too.
        length = len(new_req_data.prompt_token_ids or ())
        self.requests[new_req_data.req_id] = asked_by(new_req_data), length

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.requests.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        self.steps.begin(
            Part(*self.requests[name], int(computed), int(scheduled))
            for name, computed, scheduled in zip(
                input_batch.req_ids[: input_batch.num_reqs],
                input_batch.num_computed_tokens_np[: input_batch.num_reqs],
                input_batch.num_scheduled_tokens[: input_batch.num_reqs],
                strict=True,
            )
        )
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.steps.end()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)
