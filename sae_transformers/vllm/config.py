"""What vLLM is told of our models before it plans memory and graphs, and what is refused by name."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from ..modeling import SaeConfig
from .ops import STEER
from .wrapping import found

ARCHITECTURE = "SaeForCausalLM"
# Sites whose tensor is cut among the ranks of tensor parallelism.
SHARDED = ("mlp_act", "attn_heads")
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\..*)?")


def install() -> None:
    """Put `SaeModelConfig` where vLLM looks for an architecture's config hook."""
    configs: Any = found("vllm.model_executor.models.config", "MODELS_CONFIG_MAP")
    found("vllm.config.compilation", "CompilationConfig._attention_ops")
    configs[ARCHITECTURE] = SaeModelConfig


def refuse_all(reason: ImportError) -> None:
    """Refuse every model of our architecture, for a reason that is told when one is to be served."""

    def refused(model_config: Any) -> None:
        raise ImportError(str(reason)) from reason

    hook = type("Refused", (SaeModelConfig,), {"verify_and_update_model_config": staticmethod(refused)})
    configs: Any = found("vllm.model_executor.models.config", "MODELS_CONFIG_MAP")
    configs[ARCHITECTURE] = hook


class SaeModelConfig:
    """vLLM's config hook for our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Before anything is loaded: what kind of base it is."""
        base = sae_config(model_config).text_config
        if base is None:
            raise _refused("a model without a base", "no text_config", "save it with this library")
        if several := [entry for entry in sae_config(model_config).sae_configs if entry.hooks_out]:
            told = f"an SAE that writes {several[0].write_at}"
            raise _refused(
                "layers of a cross-layer transcoder or crosscoder", told, "`sae-transformers serve` without it"
            )
        if getattr(base, "is_encoder_decoder", False):
            raise _refused("an encoder-decoder base", repr(base.model_type), "`sae-transformers serve` without it")
        if base.get_text_config() is not base:
            raise _refused("a base that reads images", repr(base.model_type), "`sae-transformers serve` without it")
        kinds = set(getattr(base, "layer_types", None) or getattr(base, "layers_block_type", None) or ())
        recurrent = {kind for kind in kinds if "attention" not in kind or "linear" in kind}
        if recurrent or hasattr(base, "ssm_cfg") or hasattr(base, "state_size") or hasattr(base, "mamba_d_state"):
            told = ", ".join(sorted(recurrent)) or repr(base.model_type)
            raise _refused("a base with recurrent layers", told, "`sae-transformers serve` without it")

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Where graphs are cut, and the options that would steer wrongly."""
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        config = sae_config(vllm_config.model_config)
        if vllm_config.speculative_config is not None:
            raise _refused("speculative decoding", "a speculative config", "leave it out")
        if vllm_config.lora_config is not None:
            raise _refused("LoRA beside SAEs", "enable_lora", "merge the LoRA into the base first")
        if parallel.enable_dbo or parallel.ubatch_size > 1:
            raise _refused("micro-batches", f"ubatch_size={parallel.ubatch_size}", "leave enable_dbo out")
        for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise _refused("context parallel", f"{name}={getattr(parallel, name)}", "use tensor parallel")
        if parallel.tensor_parallel_size > 1:
            for place in (place for entry in config.sae_configs for place in (entry.read_at, entry.write_at)):
                if place.rpartition(".")[2] in SHARDED:
                    raise _refused(
                        "an SAE at a site that tensor parallelism cuts",
                        f"{place}, tensor_parallel_size={parallel.tensor_parallel_size}",
                        "use one rank, or pipeline parallel",
                    )
        mode = compilation.cudagraph_mode
        if mode is not None and mode.has_full_cudagraphs():
            raise _refused("a graph of the whole pass", f"cudagraph_mode={mode.name}", "PIECEWISE, the default here")
        if mode is None:
            compilation.cudagraph_mode = found("vllm.config.compilation", "CUDAGraphMode").PIECEWISE
        if compilation.splitting_ops is None:
            compilation.splitting_ops = [
                *compilation._attention_ops, "vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update",
            ]  # fmt: skip
        if STEER not in compilation.splitting_ops:
            compilation.splitting_ops = [*compilation.splitting_ops, STEER]
        # In the key of compiled graphs: one that was made without our operator is not taken.
        own = {"sae_transformers": importlib.metadata.version("sae-transformers")}
        vllm_config.additional_config = {**(vllm_config.additional_config or {}), **own}


def sae_config(model_config: Any) -> SaeConfig:
    """Our config of the model that is served.

    Raises:
        TypeError: it is a copy of it from remote code.
    """
    config = model_config.hf_config
    if not isinstance(config, SaeConfig):
        raise TypeError(
            f"Expected this library's own SaeConfig. Received: {type(config).__module__}.{type(config).__name__}. "
            f"Leave --trust-remote-code out: the installed library has the code."
        )
    return config


def layer_of(place: str) -> int | None:
    """The block that a place is in, from 0; None where its path does not say."""
    match = LAYER.fullmatch(place)
    return int(match[1]) if match else None


def repository_options(model_config: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of the repository that is served, to read its files."""
    name = str(model_config.model)
    options = {} if Path(name).is_dir() else {"revision": model_config.revision}
    return name, {option: value for option, value in options.items() if value is not None}


def _refused(what: str, received: str, instead: str) -> ValueError:
    return ValueError(f"Models with SAEs on vLLM do not support {what}. Received: {received}. Instead: {instead}.")
