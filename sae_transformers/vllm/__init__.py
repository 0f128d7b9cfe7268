"""Models with SAEs on vLLM: the same repositories, the same steering in each request, in a running batch.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). What it has no hook for is
wrapped, and each wrapped name is looked up at start: a release that moved one says so, and nothing goes on unsteered.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations


def register() -> None:
    """Teach vLLM the architecture of our repositories. May be called any number of times.

    Where this release of vLLM lacks a name that steering stands on, our models are refused when one is to be served,
    and all others run as before.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    from ..modeling import SaeConfig  # noqa: F401  importing it registers the config with transformers
    from . import admission, cache_key, config, detection, http_field, runner_v1

    ModelRegistry.register_model(config.ARCHITECTURE, f"{__name__}.model:{config.ARCHITECTURE}")
    try:
        for part in (config, admission, http_field, cache_key, runner_v1, detection):
            part.install()
    except ImportError as error:
        config.refuse_all(error)
