"""The door: what a request asks of the SAEs is checked where requests come in, so that a bad one is refused with our
text and none can end the engine for all; what passes carries its resolved steering, the published default included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modeling import Steering
from ..modeling.plain_files import opened_tensors
from ..modeling.repository_files import weight_files
from ..modeling.steering_plan import SteeringPlan
from ..modeling.steering_state import check_maxima
from ..serving.errors import RequestError
from ..serving.steering_field import read_steering
from .asked import READ, STEERING, Reading
from .config import ARCHITECTURE, repository_options, sae_config
from .wrapping import found, wrap


def install() -> None:
    """Wrap what every request comes in through, online and offline, and its start: a bad default is told there."""
    found("vllm.exceptions", "VLLMValidationError")
    wrap("vllm.v1.engine.input_processor", "InputProcessor.__init__", _init)
    wrap("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", _process_inputs)


def _init(original: Any, processor: Any, *args: Any, **options: Any) -> None:
    original(processor, *args, **options)
    ours = ARCHITECTURE in (getattr(processor.model_config.hf_config, "architectures", None) or ())
    processor.sae_admission = Admission.of(processor.model_config) if ours else None


def _process_inputs(
    original: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
):
    admission: Admission | None = processor.sae_admission
    if admission is not None and hasattr(params, "extra_args"):
        refused = found("vllm.exceptions", "VLLMValidationError")
        try:
            resolved = admission.resolve(params.extra_args)
        except RequestError as error:
            raise refused(error.message, parameter=error.param) from None
        params = params.clone()
        params.extra_args = resolved
    return original(processor, request_id, prompt, params, *args, **options)


class Admission:
    """Checks requests for one model.

    Args:
        configs: of its SAEs.
        maxima: (d_sae,) typical maximum of each latent, for each SAE that has them.
        default: steering of requests that bring none.
    """

    def __init__(self, configs: Any, maxima: Mapping[int, Tensor], default: Steering) -> None:
        self.configs, self.maxima, self.default = configs, maxima, default
        self.widths = [config.d_sae for config in configs]
        self.check(default)

    @classmethod
    def of(cls, model_config: Any) -> Admission:
        """For the model that vLLM serves: its config, the maxima in its files, its published default."""
        config = sae_config(model_config)
        name, options = repository_options(model_config)
        saved = (model_config.try_get_generation_config() or {}).get("sae_steering")
        return cls(
            config.sae_configs, _maxima(name, options), Steering.coerce(config.steering if saved is None else saved)
        )

    def check(self, steering: Steering) -> None:
        """Raises ValueError for an SAE, latent, concept or combination that this model does not have."""
        if steering and not self.configs:
            raise ValueError("This model has no SAE to steer.")
        if steering.is_gated:
            raise ValueError("Gates (`when`) are not supported on vLLM: use `sae-transformers serve` without it.")
        if steering.strengths:
            raise ValueError("`strength` is not supported on vLLM: use `sae-transformers serve` without it.")
        if steering.exclude_tokens or any(edit.exclude_tokens for edit in steering.feature_edits):
            raise ValueError("`exclude_tokens` is not supported on vLLM: use `sae-transformers serve` without it.")
        SteeringPlan([steering], self.configs, [torch.empty(0)] * max(1, len(self.configs)))
        check_maxima([steering], self.configs, self.maxima)

    def resolve(self, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a request carries on: `steering` as a dict where it is steered, and nothing where not.

        Raises:
            RequestError: steering that this model cannot do.
        """
        carried = dict(extra_args or {})
        given = carried.pop(STEERING, None)
        reading = carried.get(READ)
        if reading is not None:
            self._check_reading(reading)
        steering = self.default if given is None else read_steering(_plain(given), self.widths, self.check)
        if steering:
            carried[STEERING] = steering.to_dict()
        return carried

    def _check_reading(self, reading: Any) -> None:
        try:
            asked = Reading(**reading)
            index = self.configs[asked.sae].resolve_feature(asked.feature)
        except (TypeError, ValueError, IndexError) as error:
            raise RequestError(f"`{READ}` is not for requests from outside; use /v1/detect.", READ) from error
        if index != asked.feature or not isinstance(asked.key, str):
            raise RequestError(f"`{READ}` is not for requests from outside; use /v1/detect.", READ)


def _plain(given: Any) -> Any:
    """Steering as our server reads it: of JSON text, which `vllm_xargs` carries, and of a `Steering`."""
    if getattr(given, "is_steering", False):
        return given.to_dict()
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"`steering` as a text must be JSON: {str(error)[:200]}.", STEERING) from None
    return given


def _maxima(name: str, options: dict[str, Any]) -> dict[int, Tensor]:
    found_maxima = {}
    for file in weight_files(name, options):
        with opened_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.startswith("saes.") and key.endswith(".feature_max"):
                    found_maxima[int(key.split(".")[1])] = tensors.get_tensor(key)
    return found_maxima
