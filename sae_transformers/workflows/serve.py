"""A steered model as a server with OpenAI's interface: chat, completions, responses; steering in each request."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..modeling import SaeForCausalLM, Steering
from .loading import load, read_steering
from .settings.publish import Served, ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str | os.PathLike[str] | Sequence[str] = "model",
    settings: ServeSettings | None = None,
    *,
    steering: Steering | None = None,
    listening: socket.socket | None = None,
    run: bool = True,
    notice: Callable[[str], object] | None = None,
) -> FastAPI:
    """Serve a model until Ctrl-C; or give the application, to run it in a server of one's own.

    Args:
        model: with SAEs or without, as `load` gives it.
        name: what requests call the model; of a folder its last part, and the whole path too. The first of several
            is shown, and all are taken.
        steering: of requests that bring none; by default the model's own. It becomes the model's.
        listening: what `open_port` gave, to have the port before the model is loaded.
        run: listen and answer; else the application is all.
        notice: called with lines on what is served and where, before the first request.

    Returns:
        The application; its engine runs while the application does.

    Raises:
        ImportError: the packages of `sae-transformers[serve]` are missing.
        ValueError: the environment variable holds no key, or the steering names what the model does not have.
        OSError: the port is taken, or the server could not start.
    """
    settings, say = settings or ServeSettings(), notice or (lambda line: None)
    check_packages()
    from ..serving.app import build_app
    from ..serving.listening import key_from, listener

    if steering is not None:
        model.steering = steering.with_tokenizer(tokenizer)
        defaults: Any = model.generation_config
        defaults.sae_steering = None
    names = [os.fspath(name)] if isinstance(name, (str, os.PathLike)) else list(name)
    shown = Path(names[0]).resolve().name if Path(names[0]).is_dir() else names[0]
    app = build_app(
        model.eval(), tokenizer, shown, aliases=tuple(names), max_concurrent=settings.max_concurrent,
        max_tokens=settings.max_answer_tokens, api_key=key_from(settings.api_key_env),
        limits=settings.limits,
    )  # fmt: skip
    if not run:
        return app
    with open_port(settings) if listening is None else contextlib.nullcontext(listening) as bound:
        for line in _facts(model, tokenizer, shown, settings, bound.getsockname()[1]):
            say(line)
        server = listener(app, settings.log_level)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    if not server.started:
        raise OSError(f"The server could not start at {settings.host} port {settings.port}; its log says why.")
    return app


def serve_named(
    served: Served,
    settings: ServeSettings,
    engine_options: Sequence[str] = (),
    *,
    notice: Callable[[str], object] | None = None,
) -> None:
    """Load what is served and serve it until Ctrl-C, with the engine of the settings.

    Args:
        engine_options: of vLLM, as on its command line.
        notice: as in `serve`.

    Raises:
        ImportError, ValueError, OSError: as `serve`; options for an engine that takes none.
    """
    if settings.engine == "vllm":
        from .serve_vllm import serve_on_vllm

        serve_on_vllm(served, settings, engine_options, notice=notice)
        return
    if engine_options:
        raise ValueError(f"Options after -- are those of --engine vllm. Received: {' '.join(engine_options)!r}.")
    with open_port(settings) as port:  # a taken one is told before the model is loaded
        steering = None if served.steering is None else read_steering(served.steering, served.model)
        model, tokenizer, _ = load(
            served.model, served.saes, hook_point=served.hook_point, model_dtype=served.model_dtype,
            revision=served.revision,
        )  # fmt: skip
        names = (served.name or served.model, served.model)
        serve(model, tokenizer, names, settings, steering=steering, listening=port, notice=notice)


def open_port(settings: ServeSettings) -> socket.socket:
    """A socket at the settings' address, and the key looked up: what can fail is told before a model is loaded.

    Raises:
        ImportError, ValueError, OSError: as `serve`.
    """
    check_packages()
    from ..serving.listening import bind, key_from

    key_from(settings.api_key_env)
    return bind(settings.host, settings.port)


def check_packages() -> None:
    """Raises an ImportError that names the extra, if a package of the server is missing."""
    try:
        from ..serving.app import build_app  # noqa: F401
        from ..serving.listening import bind  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"serve needs the package {error.name}, which is not installed: pip install 'sae-transformers[serve]'"
        ) from error


def _facts(
    model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, settings: ServeSettings, port: int
) -> list[str]:
    """What is served and where, after warnings."""
    from ..serving.sampling import settings_not_applied

    lines = []
    if lost := settings_not_applied(model.generation_config):
        lines.append(f"Warning: the server does not apply {', '.join(lost)} of generation_config.json.")
    if not getattr(tokenizer, "chat_template", None):
        lines.append("Warning: the model has no chat template; only /v1/completions writes.")
    if settings.api_key_env is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        lines.append(f"Warning: anyone who reaches {settings.host} may use the model; `api_key_env` asks for a key.")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    steered = "steered by default" if model.steering else "unsteered by default"
    what = f"{name} ({len(model.saes)} SAE{'s' if len(model.saes) != 1 else ''}, {steered})"
    return [*lines, f"{what} at http://{host}:{port}/v1 - Ctrl-C ends it"]
