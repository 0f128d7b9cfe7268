"""Every old spelling of an option is taken, with a note that says how it is written now."""

from __future__ import annotations

import re
import shlex
from typing import Any

import huggingface_hub.constants
import pytest
import typer
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.cli.verb import recorded_command

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
OLD: dict[str, dict[str, str]] = {
    verb: command.callback.renamed for verb, command in VERBS.items() if command.callback.renamed
}
VALUE = "7919"  # a number, a text and a path, and nobody's default


def required(verb: str) -> list[str]:
    """The arguments and options that a verb cannot do without."""
    needed = [parameter for parameter in VERBS[verb].params if parameter.required]
    options = [parameter.opts[0] for parameter in needed if parameter.param_type_name == "option"]
    arguments = [VALUE] * (len(needed) - len(options))
    return [*arguments, *(word for option in options for word in (option, VALUE))]


def is_switch(verb: str, new: str) -> bool:
    """Whether the old spelling stands alone: it brings its value, or is of a switch."""
    options = [one for one in VERBS[verb].params if new in [*one.opts, *one.secondary_opts]]
    return " " in new or any(option.is_flag for option in options)


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("verb", OLD)
def test_old_spellings_of(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the verb ends where it looks for a model
    old = OLD[verb]
    given = [word for name, new in old.items() for word in ([name] if is_switch(verb, new) else [name, VALUE])]
    result = CliRunner().invoke(app, [verb, *required(verb), *given])
    notes = dict(re.findall(r"^(--\S+) is now (.+)\.$", result.stderr, flags=re.MULTILINE))
    assert notes == {name: new or "the first argument" for name, new in old.items()}, result.output
    taken = shlex.split(recorded_command())
    assert taken[1].replace("_", "-") == verb
    for name, new in notes.items():
        if new in taken and not is_switch(verb, new):
            assert taken[taken.index(new) + 1] in (VALUE, f"{VALUE}.0")
        else:  # a switch, or an argument now
            assert is_switch(verb, new) or not new.startswith("--"), name


def test_most_verbs_have_old_spellings() -> None:
    assert len(OLD) > 15 and sum(map(len, OLD.values())) > 50
