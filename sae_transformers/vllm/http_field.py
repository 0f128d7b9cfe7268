"""The top-level field `steering` of vLLM's HTTP interface, as our own server takes it: an object, a list of edits,
false for none, null for the published default. vLLM itself takes texts in `vllm_xargs` and ignores fields that it does
not know, which would be an unsteered answer without a word."""

from __future__ import annotations

from typing import Any

from .asked import STEERING
from .wrapping import found, wrap

REQUESTS = {
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}


def install() -> None:
    """Wrap what makes sampling parameters of a request's body."""
    for module, name in REQUESTS.items():
        wrap(module, f"{name}.to_sampling_params", _to_sampling_params)
        if hasattr(found(module, name), "to_beam_search_params"):
            wrap(module, f"{name}.to_beam_search_params", _to_beam_search_params)


def _to_sampling_params(original: Any, request: Any, *args: Any, **options: Any) -> Any:
    params = original(request, *args, **options)
    given = (request.model_extra or {}).get(STEERING)
    if given is not None:
        if STEERING in (params.extra_args or {}):
            raise _refused("`steering` came twice: as a field and in `vllm_xargs`. Send one of them.")
        params.extra_args = {**(params.extra_args or {}), STEERING: given}
    return params


def _to_beam_search_params(original: Any, request: Any, *args: Any, **options: Any) -> Any:
    # vLLM searches by requests of one token each, to which what was generated before is the prompt.
    if (request.model_extra or {}).get(STEERING) or (getattr(request, "vllm_xargs", None) or {}).get(STEERING):
        raise _refused("`steering` does not go with beam search on vLLM. Use `sae-transformers serve` for it.")
    return original(request, *args, **options)


def _refused(told: str) -> Exception:
    return found("vllm.exceptions", "VLLMValidationError")(told, parameter=STEERING)
