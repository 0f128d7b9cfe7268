"""requirements-dev.txt and requirements-demo.txt: constraints.txt with hashes, made by `make lock`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# It comes from its own index, in builds of its own, and brings what runs on GPUs.
WITHOUT = ("torch", "triton")


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pinned(path: Path) -> dict[str, set[str]]:
    """Package -> the versions that a file pins."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+!-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(name_of(name), set()).add(version)
    return found


CONSTRAINTS = pinned(ROOT / "constraints.txt")


@pytest.mark.parametrize("name", ["dev", "demo"])
def test_each_package_has_a_version_of_the_constraints_and_hashes(name: str) -> None:
    path = ROOT / f"requirements-{name}.txt"
    entries = re.findall(r"^[\w.-]+==.*(?:\n +--hash.*)*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) > 40
    for entry in entries:
        assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)) == entry.count("\n") > 0, entry[:200]
    lock = pinned(path)
    assert not {one: lock[one] for one in lock.keys() & CONSTRAINTS.keys() if not CONSTRAINTS[one] <= lock[one]}
    assert not lock.keys() & set(WITHOUT)


def test_all_constraints_are_in_the_lock() -> None:
    assert CONSTRAINTS.keys() - pinned(ROOT / "requirements-dev.txt").keys() == {"torch"}
    assert pinned(ROOT / "requirements-demo.txt").keys() < pinned(ROOT / "requirements-dev.txt").keys()
