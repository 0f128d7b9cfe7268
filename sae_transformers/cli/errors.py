"""How a verb ends that cannot go on."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

import typer

OPTIONS = {"saes": "sae", "base_model": "base"}  # of a function -> of the command line


def fail(message: str, *, code: int) -> NoReturn:
    """End with one line on stderr."""
    typer.secho(f"Error: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def guarded(action: Any, settings: dict[str, Any], width: int | None = None) -> None:
    """Do what a verb does; errors of the user's become one line and exit code 2, a service's refusal 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    from rich.console import Console

    from ..create_training_data.llm_client import ServiceRefused

    try:
        action(settings, Console(soft_wrap=True, highlight=False, width=width))
    except ServiceRefused as error:
        fail(f"{error}. What was answered is kept: the same command goes on from there.", code=1)
    except (ValueError, OSError, TypeError, ImportError) as error:
        fail(as_options(str(error)), code=2)


def as_options(message: str) -> str:
    """A message of a function's in the words of the command line: `saes=` is --sae."""
    return re.sub(r"`(\w+)=`", lambda match: "--" + OPTIONS.get(match[1], match[1]).replace("_", "-"), message)
