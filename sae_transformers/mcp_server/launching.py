"""From names to a server on stdin and stdout: what the verb `mcp` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..latents.optional_packages import needs
from ..workflows.loading import load


def serve_tools(
    model: str,
    saes: Sequence[str] | None = None,
    *,
    name: str | None = None,
    write_to: Path | None = None,
    hook_point: str | None = None,
    model_dtype: str = "auto",
    revision: str | None = None,
) -> None:
    """Load a model and answer an agent on stdin and stdout, until stdin ends.

    Args:
        model, saes, hook_point, model_dtype, revision: as `load` takes them.
        name: what the model is called; by default where it was found.
        write_to: see `tool_server`.

    Raises:
        ImportError: the package mcp is not installed.
        ValueError, OSError: as `load`.
    """
    with needs("mcp", "mcp", "mcp"):
        from .server import run_on_stdio, tool_server
    loaded = load(model, saes, hook_point=hook_point, model_dtype=model_dtype, revision=revision)
    run_on_stdio(tool_server(loaded.model, loaded.tokenizer, name or model, write_to=write_to))
