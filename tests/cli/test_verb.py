"""Options from settings: their names and defaults, nested settings, lists, old spellings, errors as one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from sae_transformers.cli.errors import remember_options
from sae_transformers.cli.verb import VerbCommand, verb
from sae_transformers.workflows.settings_fields import argument_help


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        seed: of every draw.
        limit: at most so many;
            by default all.
    """

    PANEL: ClassVar[str] = "Part"

    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit == 0:
            raise ValueError(f"`limit` must be 1 or more. Received: limit={self.limit!r}.")


@dataclass(frozen=True)
class Whole:
    """A whole.

    Args:
        ops: what is done.
        strengths: how much; by default the usual ones.
        chat: in the template.
        first: a part.
        second: another.
        seed: of every draw.
    """

    ops: tuple[str, ...] = ("direction", "set")
    strengths: tuple[float, ...] | None = None
    chat: bool = True
    first: Part = field(default_factory=Part)
    second: Part = field(default_factory=lambda: Part(limit=5))
    seed: int = 0


OLD = {"model": "name", "plain": "no_chat", "at_most": "limit", "unlimited": "limit 9", "seed": "seed 1"}


def called(*words: str, leave_out: tuple[str, ...] = ()) -> tuple[list, str, int]:
    """What the verb was called with, what it said, and its exit code."""
    taken: list = []
    app = typer.Typer()

    @app.callback()
    def main(context: typer.Context) -> None:
        remember_options(context)

    @app.command(cls=VerbCommand)
    @verb(Whole, renamed={} if leave_out else OLD, leave_out=leave_out)
    def act(name: Annotated[str, typer.Option()], settings: Whole) -> None:
        """Do it."""
        taken.extend((name, settings))

    result = CliRunner().invoke(app, ["act", *words])
    return taken, result.output, result.exit_code


def test_defaults_are_the_settings_own():
    taken, _, code = called("--name", "a")
    assert code == 0
    name, settings = taken
    assert name == "a"
    # `limit` is one option for both parts, and has the first one's default.
    assert settings == Whole(second=Part())


def test_values_reach_every_part_that_has_the_field():
    taken, _, _ = called("--name", "a", "--seed", "7", "--limit", "3", "--no-chat")
    assert taken[1] == Whole(chat=False, seed=7, first=Part(7, 3), second=Part(7, 3))


def test_lists_are_given_with_commas_or_repeated():
    one, _, _ = called("--name", "a", "--ops", "set,scale", "--strengths", "0.1, 2")
    other, _, _ = called("--name", "a", "--ops", "set", "--ops", "scale", "--strengths", "0.1", "--strengths", "2")
    assert one[1] == other[1]
    assert one[1].ops == ("set", "scale") and one[1].strengths == (0.1, 2.0)
    _, said, code = called("--name", "a", "--strengths", "0.1,strong")
    assert code == 2 and "--strengths must be numbers, comma-separated. Received: '0.1,strong'." in said


def test_old_spellings_are_taken_with_a_note():
    taken, said, _ = called("--model", "a", "--plain", "--at-most", "2")
    assert taken[0] == "a" and not taken[1].chat and taken[1].first.limit == 2
    assert said.splitlines() == ["--model is now --name.", "--plain is now --no-chat.", "--at-most is now --limit."]


def test_an_old_switch_brings_its_value_and_one_that_takes_a_number_now_is_both():
    taken, said, _ = called("--unlimited", "--seed", "--model=a")
    assert taken[0] == "a" and taken[1].first == Part(1, 9)
    assert said.splitlines() == ["--unlimited is now --limit 9.", "--seed is now --seed 1.", "--model is now --name."]
    taken, said, _ = called("--seed", "3", "--name", "a")
    assert taken[1].seed == 3 and not said
    assert called("--name", "a", "--seed=4")[0][1].seed == 4


def test_a_required_option_with_an_old_spelling_is_still_required():
    taken, said, code = called("--seed", "1")
    assert (taken, code) == ([], 2) and "Missing option '--name'" in said


def test_the_errors_of_settings_name_the_option():
    _, said, code = called("--name", "a", "--limit", "0")
    assert code == 2 and said == "Error: --limit must be 1 or more. Received: --limit=0.\n"


def test_fields_that_are_left_out_keep_their_default():
    taken, said, code = called("--name", "a", "--chat", leave_out=("chat",))
    assert code == 2 and not taken and "--chat" in said
    taken, _, _ = called("--name", "a", leave_out=("chat", "limit"))
    assert taken[1] == Whole()


def test_help_comes_from_the_docstring():
    assert argument_help(Part) == {"seed": "Of every draw.", "limit": "At most so many; by default all."}
    _, said, _ = called("--help")
    assert "At most so many" in said and "Part" in said and "--plain" not in said


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), TypeError("no"), ImportError("no")])
def test_errors_of_users_are_one_line(error: Exception):
    app = typer.Typer()

    @app.command()
    @verb()
    def act() -> None:
        raise error

    result = CliRunner().invoke(app, [])
    assert (result.exit_code, result.output) == (2, "Error: no\n")
