"""What the fields of settings are: what their docstring says of them, their defaults, their kinds."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple


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


class Field(NamedTuple):
    """A field as an option: its name, what it is there, and the heading that it stands under."""

    name: str
    kind: Any  # a tuple is a list of texts
    default: Any
    help: str
    panel: str | None
    joined: Any  # of a tuple: the kind of its parts, given with commas or repeated


def flat_fields(
    dataclass: Any, leave_out: Collection[str], panel: str | None = None, names: Mapping[str, str | None] | None = None
) -> Iterator[Field]:
    """The options of a dataclass, or of an instance of one, whose values are then the defaults.

    A field with settings may name the options of what is in it, None for no option: `metadata={"options": {...}}`.
    """
    documented = dataclass if isinstance(dataclass, type) else type(dataclass)
    helps, hints = argument_help(documented), typing.get_type_hints(documented)
    for field in dataclasses.fields(documented):
        name = (names or {}).get(field.name, field.name)
        if name is None or name in leave_out:
            continue
        default = default_of(field) if isinstance(dataclass, type) else getattr(dataclass, field.name)
        if dataclasses.is_dataclass(default):
            within = {**(names or {}), **field.metadata.get("options", {})}
            yield from flat_fields(default, leave_out, getattr(default, "PANEL", panel), within)
            continue
        kind, joined = hints[field.name], parts_of_tuple(hints[field.name])
        if joined is not None:
            kind = list[str] if isinstance(default, tuple) else list[str] | None
            default = [str(part) for part in default] if isinstance(default, tuple) else default
        yield Field(name, kind, default, helps[field.name], panel, joined)


def filled(dataclass: Any, values: Mapping[str, Any], names: Mapping[str, str | None] | None = None) -> Any:
    """The dataclass with these values, wherever in it a field of that name is."""
    documented = dataclass if isinstance(dataclass, type) else type(dataclass)
    taken = {}
    for field in dataclasses.fields(documented):
        default = default_of(field) if isinstance(dataclass, type) else getattr(dataclass, field.name)
        if dataclasses.is_dataclass(default):
            taken[field.name] = filled(default, values, {**(names or {}), **field.metadata.get("options", {})})
        elif (name := (names or {}).get(field.name, field.name)) is not None and name in values:
            taken[field.name] = values[name]
        elif default is not inspect.Parameter.empty:
            taken[field.name] = default
    return documented(**taken)


def split_parts(value: Any, field: Field) -> Any:
    """A tuple's parts, each of its kind."""
    if field.joined is None or value is None:
        return value
    texts = [part.strip() for text in value for part in text.split(",") if part.strip()]
    if not texts and field.default is None:
        return None
    try:
        return tuple(field.joined(text) for text in texts)
    except ValueError as error:
        wanted = {int: "whole numbers", float: "numbers"}.get(field.joined, "texts")
        told = ",".join(value)
        raise ValueError(f"`{field.name}` must be {wanted}, comma-separated. Received: {told!r}.") from error
