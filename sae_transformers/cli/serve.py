"""The verb `serve`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import guarded
from .options import ModelDtype, Place


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(serve)


def serve(
    model: Annotated[str, typer.Argument(help="A model with SAEs, or a base model: a folder or a Hub id.")],
    sae: Annotated[
        list[str] | None, typer.Option(help="An SAE for a base model, as attach takes it. Repeatable.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, in requests. [default: its folder or id]")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable of a key that requests must bring. [default: none asked]")
    ] = None,
    max_concurrent: Annotated[int, typer.Option(help="Answers that are written together; others wait.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, where a request does not say.")] = 512,
    steering: Annotated[
        str | None, typer.Option(help="Default steering: JSON, or a file of it. [default: the model's own]")
    ] = None,
    place: Place = None,
    dtype: ModelDtype = "auto",
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    log_level: Annotated[str, typer.Option(help="warning, or info for a line a request.")] = "warning",
) -> None:
    """Serve a steered model with OpenAI's interface: chat, completions, responses; steering in each request's body."""
    settings = dict(locals())
    guarded(_serve, settings)


def _serve(s: dict[str, Any], console: Any) -> None:
    try:
        from ..serving.app import build_app
        from ..serving.listening import bind, key_from, listener
    except ModuleNotFoundError as error:
        raise ImportError(
            f"serve needs the package {error.name}, which is not installed: pip install 'sae-transformers[serve]'"
        ) from error
    if s["log_level"] not in ("critical", "error", "warning", "info", "debug"):
        raise ValueError(f"--log-level must be critical, error, warning, info or debug. Received: {s['log_level']!r}.")
    for option in ("max_concurrent", "max_tokens"):
        if s[option] < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1. Received: {s[option]}.")
    key = key_from(s["api_key_env"])
    with bind(s["host"], s["port"]) as socket:  # a taken port is told before the model is loaded
        model, tokenizer = _load(s)
        name = s["name"] or _name_of(s["model"])
        app = build_app(
            model, tokenizer, name, aliases=(s["model"],), max_concurrent=s["max_concurrent"],
            max_tokens=s["max_tokens"], api_key=key,
        )  # fmt: skip
        _tell(s, console, model, tokenizer, name, socket.getsockname()[1])
        server = listener(app, s["log_level"])
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[socket])
    if not server.started:
        raise OSError(f"The server could not start at {s['host']} port {s['port']}; its log says why.")
    console.print("Stopped.")


def _load(s: dict[str, Any]) -> tuple[Any, Any]:
    from ..workflows.loading import load, read_steering

    model, tokenizer, _ = load(
        s["model"], s["sae"] or [], hook_point=s["place"], model_dtype=s["dtype"], revision=s["revision"]
    )
    if s["steering"] is not None:
        model.steering = read_steering(s["steering"])
        model.generation_config.sae_steering = None
    return model.eval(), tokenizer


def _name_of(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _tell(s: dict[str, Any], console: Any, model: Any, tokenizer: Any, name: str, port: int) -> None:
    from ..serving.sampling import settings_not_applied

    if lost := settings_not_applied(model.generation_config):
        console.print(f"Warning: the server does not apply {', '.join(lost)} of generation_config.json.", markup=False)
    if not getattr(tokenizer, "chat_template", None):
        console.print("Warning: the model has no chat template; only /v1/completions writes.", markup=False)
    if s["api_key_env"] is None and s["host"] not in ("127.0.0.1", "::1", "localhost"):
        console.print(f"Warning: anyone who reaches {s['host']} may use the model. See --api-key-env.", markup=False)
    host = f"[{s['host']}]" if ":" in s["host"] else s["host"]
    steered = "steered by default" if model.steering else "unsteered by default"
    what = f"{name} ({len(model.saes)} SAE{'s' if len(model.saes) != 1 else ''}, {steered})"
    console.print(f"{what} at http://{host}:{port}/v1 - Ctrl-C ends it", markup=False)
