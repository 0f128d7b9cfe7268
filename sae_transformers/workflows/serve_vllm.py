"""A steered model on vLLM's own server."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..vllm.launching import check_installed, has_tokenizer, run_server, runs_on_cpu
from .loading import base_of, load, read_steering
from .settings.publish import Served, ServeSettings


def serve_on_vllm(
    served: Served,
    settings: ServeSettings,
    options: Sequence[str] = (),
    *,
    notice: Callable[[str], object] | None = None,
) -> None:
    """`vllm serve` for a model with SAEs, until Ctrl-C. Steering in requests, `/v1/detect` and `/v1/features` are as
    with this library's own server.

    Args:
        options: of vLLM's command line; they win over what is made of the settings.
        notice: called with lines on what is served and where.

    Raises:
        ImportError: vLLM is missing.
        ValueError: a setting that this library's own server has and vLLM names in its own words.
    """
    check_installed()
    _check_settings(settings)
    say = notice or (lambda line: None)
    with tempfile.TemporaryDirectory(prefix="sae_transformers_") as folder:
        name, revision = _repository(served, folder)
        arguments = [name, *_arguments(served, settings, name, revision), *options]
        say(f"{served.name or served.model} on vLLM at http://{settings.host}:{settings.port}/v1 - Ctrl-C ends it")
        run_server(arguments, _key(settings))


def _check_settings(settings: ServeSettings) -> None:
    default = ServeSettings()
    for name in ("max_concurrent", "max_answer_tokens", "log_level", "limits"):
        if getattr(settings, name) != getattr(default, name):
            raise ValueError(
                f"`{name}` is of this library's own server. Expected vLLM's own options after --, such as "
                f"--max-num-seqs. Received: engine='vllm', {name}={getattr(settings, name)!r}."
            )


def _key(settings: ServeSettings) -> str | None:
    from ..serving.listening import key_from

    return key_from(settings.api_key_env)


def _repository(served: Served, folder: str) -> tuple[str, str | None]:
    """What vLLM loads: the repository itself or, where SAEs or a default steering were given, one made of them."""
    if not served.saes and served.steering is None:
        return served.model, served.revision
    model, tokenizer, _ = load(
        served.model, served.saes, hook_point=served.hook_point, model_dtype=served.model_dtype,
        revision=served.revision,
    )  # fmt: skip
    if served.steering is not None:
        model.steering = read_steering(served.steering, served.model)
        model.generation_config.sae_steering = None  # pyright: ignore[reportOptionalMemberAccess]
    path = Path(folder) / (Path(served.model).name or "model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path), None


def _arguments(served: Served, settings: ServeSettings, name: str, revision: str | None) -> list[str]:
    arguments = ["--host", settings.host, "--port", str(settings.port)]
    names = dict.fromkeys((served.name or served.model, served.model))
    arguments += ["--served-model-name", *names]
    if revision is not None:
        arguments += ["--revision", revision]
    if not has_tokenizer(name, revision):
        base, at = base_of(name, revision)
        arguments += ["--tokenizer", base, *(["--tokenizer-revision", at] if at else [])]
    dtype = served.model_dtype
    if dtype == "auto" and runs_on_cpu():  # as our own server has it
        dtype = "float32"
    return [*arguments, "--dtype", dtype]
