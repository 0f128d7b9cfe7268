"""How a verb ends that cannot go on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import typer

ARGUMENTS = {"saes": "--sae", "base_model": "--base"}  # of functions, which no option is named as
# Of the verb that runs: how its options are written, with their Python names. The library's messages have the latter.
_FLAGS: ContextVar[Mapping[str, str] | None] = ContextVar("flags", default=None)


def remember_options(context: typer.Context) -> None:
    """Note the options of the verb that is called, for messages."""
    commands: Mapping[str, Any] = getattr(context.command, "commands", {})
    verb = commands.get(context.invoked_subcommand or "")
    found = {}
    for option in verb.params if verb else ():
        if flags := [flag for flag in option.opts if flag.startswith("--")]:
            found[option.name] = flags[0]
    _FLAGS.set(found)


def fail(error: str | BaseException, *, code: int) -> NoReturn:
    """End with one line on stderr."""
    from ..workflows.settings.llm import visible, without_logins

    message = error if isinstance(error, str) else sentence(error)
    typer.secho(f"Error: {visible(without_logins(' '.join(message.split())))}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def sentence(error: BaseException) -> str:
    """What an error says, for the command line: a system's error as a sentence, options as they are typed."""
    if isinstance(error, OSError) and error.filename is not None and str(error).startswith("[Errno"):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
        if isinstance(error, FileNotFoundError):
            return f"There is no file or folder {name!r}."
        if isinstance(error, IsADirectoryError):
            return f"Expected a file. Received: {name!r}, which is a folder."
        if isinstance(error, NotADirectoryError):
            return f"Expected a folder. Received: {name!r}, where a part of the path is a file."
        return f"{name!r} could not be read or written: {error.strerror}."
    message = re.sub(r"`(\w+)=`", lambda found: ARGUMENTS.get(found[1], f"`{found[1]}`"), str(error))
    for name, flag in (_FLAGS.get() or {}).items():
        message = message.replace(f"`{name}`", flag)
        message = re.sub(rf"(?<![\w.`'\"-]){name}=None\b", f"no {flag}", message)
        message = re.sub(rf"(?<![\w.`'\"-]){name}=(?=[\w'\"\[({{-])", f"{flag}=", message)
    return message
