"""A class and what it uses as one file: order, other names, annotations, and what cannot be joined."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from sae_transformers.evaluation.metrics import script as script_module
from sae_transformers.evaluation.metrics.script import self_contained

FILES = {
    "__init__.py": "",
    "first.py": """
import math
from os.path import (
    join as joined,
)
from typing import Any, NamedTuple

UNUSED = 1
HALF, WHOLE = 0.5, 1.0


def area(radius: float) -> Any:
    # a comment stays
    return HALF * math.pi * radius**2


class Pair(NamedTuple):
    left: float
    right: float = WHOLE


def never() -> str:
    return joined("a", "b")
""",
    "second.py": """
from __future__ import annotations

from typing import TYPE_CHECKING

from .first import Pair
from .first import area as half_circle

if TYPE_CHECKING:
    from .first import never


def area(radius: float, told: never) -> float:
    return 2 * half_circle(radius)


class Circle:
    pair: Pair

    def measure(self, radius):
        return Pair(area(radius, None))
""",
    "both.py": """
from .first import area
from . import second


class Both:
    def one(self):
        return area(1) + second.area(1, None)
""",
    "third.py": """
from .first import area as first_area
from .fourth import other


class Third:
    def measure(self):
        return first_area(1) + other()
""",
    "fourth.py": """
from .second import area


def other():
    return area(1, None)
""",
    "fifth.py": """
from .first import area
from .fourth import other


class Fifth:
    def measure(self):
        return area(1) + other()
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """These files as a package that counts as the library."""
    (tmp_path / "small").mkdir()
    for name, text in FILES.items():
        (tmp_path / "small" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(script_module, "LIBRARY", "small")
    for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
        monkeypatch.delitem(sys.modules, name)
    script_module._read.cache_clear()
    importlib.invalidate_caches()
    return "small"


def kind(name: str) -> type:
    return getattr(importlib.import_module(f"small.{name.lower()}"), name)


def run(source: str) -> dict:
    scope: dict = {"__name__": "made"}
    exec(compile(source, "made", "exec"), scope)
    return scope


def test_a_class_brings_what_it_names_and_nothing_else(package: str) -> None:
    circle = getattr(importlib.import_module("small.second"), "Circle")  # noqa: B009
    found = self_contained(circle, "Circles.", "DONE = True")
    assert found.packages == () and found.source.startswith('"""Circles."""\n\nfrom __future__ import annotations\n')
    assert "UNUSED" not in found.source and "never()" not in found.source and "join" not in found.source
    assert "# a comment stays" in found.source and "half_circle = area" in found.source
    scope = run(found.source)
    assert scope["DONE"] and scope["Circle"]().measure(2.0) == circle().measure(2.0)
    assert tuple(scope["Circle"]().measure(1.0)) == (pytest.approx(3.14159265), 1.0)


def test_two_functions_of_one_name_are_told_apart_or_refused(package: str) -> None:
    third = kind("Third")
    assert run(self_contained(third, "").source)["Third"]().measure() == third().measure()
    with pytest.raises(ValueError, match="'area' of small.first and of small.second cannot be in one file"):
        self_contained(kind("Fifth"), "")


def test_a_module_itself_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match="'second' in small.both, which is small.second"):
        self_contained(kind("Both"), "")
