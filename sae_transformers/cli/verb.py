"""A verb's options from the fields of its settings: their names, defaults, and what their docstring says of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer


def with_settings(
    settings: type, *, renamed: Mapping[str, str] | None = None, own: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb an option for each field of a dataclass, and hand it their values as `settings`.

    Args:
        settings: the dataclass; its docstring has an entry for each field.
        renamed: old spelling -> the option it is now; accepted, with a note, and not shown.
        own: field -> `typer.Option` in place of the one that is made.
    """
    helps, hints = argument_help(settings), typing.get_type_hints(settings)

    def decorate(action: Callable[..., None]) -> Callable[..., None]:
        given = [p for p in inspect.signature(action, eval_str=True).parameters.values() if p.name != "settings"]
        fields = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[
                    hints[field.name], (own or {}).get(field.name, typer.Option(help=helps[field.name]))
                ],
            )
            for field in dataclasses.fields(settings)
        ]
        known = {p.name: p for p in (*given, *fields)}
        old = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_optional(known[new].annotation), typer.Option(hidden=True)],
            )
            for name, new in (renamed or {}).items()
        ]

        def run(**values: Any) -> None:
            for name, new in (renamed or {}).items():
                value = values.pop(name)
                if value is not None:
                    typer.secho(f"--{name} is now --{new}.".replace("_", "-"), err=True)
                    values[new] = value
            chosen = {field.name: values.pop(field.name) for field in dataclasses.fields(settings)}
            action(**values, settings=chosen)

        run.__name__, run.__doc__ = action.__name__, action.__doc__
        run.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*given, *fields, *old)]
        )
        return run

    return decorate


def argument_help(documented: type) -> dict[str, str]:
    """Field -> what the `Args` of a docstring say of it, as one sentence that begins with a capital."""
    text = inspect.getdoc(documented) or ""
    lines = re.split(r"\n\s*Args:\n", text, maxsplit=1)[-1].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return {name: (help[:1].upper() + help[1:]).replace("`", "") for name, help in found.items()}


def _optional(annotation: Any) -> Any:
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return kind | None
