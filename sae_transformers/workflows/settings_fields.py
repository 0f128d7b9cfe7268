"""What the fields of settings are: what their docstring says of them, their defaults, their kinds."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any


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


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; `inspect.Parameter.empty` where it has none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()


def parts_of_tuple(kind: Any) -> Any:
    """What the parts of a tuple are, which may be one of several kinds; None where there is no tuple."""
    for one in (kind, *(typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ())):
        if typing.get_origin(one) is tuple:
            return typing.get_args(one)[0]
    return None
