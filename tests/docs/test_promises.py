"""Every promise of the five systems is kept as the page says, with the output that it shows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.docs.promises import PAGE, alike, page_folder, promises, run

TEXTS = ("generate", "steer-feature", "align-topic")  # they print what a random model writes


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set",  # no GPU here
    "ignore:No steering was chosen",  # of a random model
)
def test_every_promise_is_kept(command_line: None) -> None:
    namespace: dict[str, Any] = {"__name__": "promises"}
    with page_folder():
        for one in promises():
            printed = run(one, namespace)
            if one.is_command and one.code.split()[1] in TEXTS:
                assert printed, one.code
            else:
                assert alike(printed, one.shown), f"{one.code}\n{printed}\n{one.shown}"


def test_every_promise_shows_what_it_prints() -> None:
    found = promises()
    assert len(found) > 30 and all(one.shown for one in found)


def test_what_is_kept_in_part_has_a_reason() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections] == [
        "SelfReg", "SCAR", "SpARE", "Topic alignment", "Feature tables"
    ]  # fmt: skip
    for section in sections:
        rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
        assert rows and all(len(row) == 2 and row[1].strip() for row in rows)
