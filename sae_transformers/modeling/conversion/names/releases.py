"""Well-known releases by short names: `gemma-scope-2-270m-pt/resid_post/12/16k/medium`. Works offline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILE = Path(__file__).with_name("releases.yaml")


class NamedSae(NamedTuple):
    """Where a named SAE lies: `sae_id` in `repository`, made for `base`."""

    repository: str
    sae_id: str
    base: str
    licence: str


@dataclass(frozen=True)
class Release:
    """One release.

    Args:
        name: its short name.
        repository: Hub id.
        path: of an SAE inside it, with placeholders.
        base: Hub id of the model.
        licence: as published; `unknown` where we do not know.
        values: placeholder -> what it takes.
        tree: value of the first placeholder -> of the second -> those of the third, where combinations are irregular.
    """

    name: str
    repository: str
    path: str
    base: str
    licence: str
    values: Mapping[str, list[str]] = field(default_factory=dict)
    tree: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)

    @property
    def placeholders(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def pattern(self) -> str:
        """How its SAEs are named: `release/{layer}/{width}/{l0}`."""
        return "/".join([self.name, *(f"{{{name}}}" for name in self.placeholders)])

    def choices(self, chosen: list[str]) -> list[str]:
        """What the placeholder after those that are chosen takes."""
        if not self.tree:
            return list(self.values[self.placeholders[len(chosen)]])
        branch: Any = self.tree
        for value in chosen:
            branch = branch[value]
        return list(branch)

    def summary(self) -> str:
        """What its placeholders take, for people."""
        if self.tree:
            first, second, _ = self.placeholders
            widths = sorted({width for branch in self.tree.values() for width in branch}, key=_size)
            return f"{first} {_short(self.tree)}; {second} {_short(widths)}"
        return "; ".join(f"{name} {_short(values)}" for name, values in self.values.items())


@cache
def releases() -> dict[str, Release]:
    """All releases by name."""
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: _read(name, entry) for name, entry in entries.items()}


def find_sae(name: str) -> NamedSae | None:
    """The SAE that a short name means; None where its first part names no release.

    Raises:
        ValueError: the release has no such SAE; says what it has.
    """
    first, *rest = name.strip("/").split("/")
    release = releases().get(first)
    if release is None:
        return None
    chosen: list[str] = []
    for number, placeholder in enumerate(release.placeholders):
        choices = release.choices(chosen)
        last = number == len(release.placeholders) - 1
        if number < len(rest):
            value = rest[number]
        elif last and number and all(choice.isdigit() for choice in choices):
            value = min(choices, key=lambda choice: abs(int(choice) - 100))
        else:
            raise ValueError(
                f"SAEs of this release are named {release.pattern}, and {placeholder} is one of {_short(choices)}. "
                f"Received: {name!r}."
            )
        if value not in choices:
            raise ValueError(
                f"{'/'.join([first, *chosen])} has no {placeholder} {value!r}; it has {_short(choices)}. "
                f"Received: {name!r}."
            )
        chosen.append(value)
    if len(rest) > len(chosen):
        raise ValueError(f"SAEs of this release are named {release.pattern}. Received: {name!r}.")
    path = release.path.format(**dict(zip(release.placeholders, chosen, strict=True)))
    return NamedSae(release.repository, path, release.base, release.licence)


def close_names(name: str) -> list[str]:
    """Releases of a similar name."""
    return difflib.get_close_matches(name.split("/")[0], releases(), n=3, cutoff=0.5)


def _read(name: str, entry: Mapping[str, Any]) -> Release:
    tree = {
        str(layer): {str(width): [str(value) for value in values] for width, values in branch.items()}
        for layer, branch in entry.get("tree", {}).items()
    }
    values = {
        key: [one for item in items for one in _counted(str(item))] for key, items in entry.get("values", {}).items()
    }
    return Release(name, entry["repository"], entry["path"], entry["base"], entry["licence"], values, tree)


def _counted(item: str) -> list[str]:
    """`0-25` as 26 numbers, `layers.0-31` as 32 names; anything else as it is."""
    match = re.fullmatch(r"(\D*\.)?(\d+)-(\d+)", item)
    if match is None:
        return [item]
    return [f"{match[1] or ''}{n}" for n in range(int(match[2]), int(match[3]) + 1)]


def _size(width: str) -> float:
    number = float(re.sub(r"\D", "", width) or 0)
    return number * {"k": 1e3, "m": 1e6}.get(width[-1:], 1.0)


def _short(values: Any) -> str:
    """A list for people, runs of numbers as a range."""
    items = list(values)
    if len(items) > 4 and all(item.isdigit() for item in items) and len(items) == int(items[-1]) - int(items[0]) + 1:
        return f"{items[0]}-{items[-1]}"
    shown = ", ".join(items[:12])
    return f"{shown}, ... ({len(items)})" if len(items) > 12 else shown
