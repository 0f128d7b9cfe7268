"""A verb of the command line: its options from the fields of its settings, its errors as one line."""

from __future__ import annotations

import inspect
import os
import shlex
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from ..workflows.settings.llm import ServiceRefused, without_logins
from ..workflows.settings.texts import locked_file, locked_folder
from ..workflows.settings_fields import Field, filled, flat_fields, split_parts
from .errors import fail

# Old spellings of options that several verbs have; each is taken where its option is.
OLD = {
    "place": "hook_point", "column": "text_column", "tokens_at_once": "tokens_per_batch",
    "new_tokens": "max_new_tokens", "judge_model": "llm", "judge_url": "llm_url", "base_url": "llm_url",
    "max_tokens_total": "max_total_tokens", "perplexity_limit": "perplexity_ratio",
    "repetition_limit": "added_repetition", "model": "llm", "max_tokens": "max_answer_tokens",
    "samples": "samples_per_prompt",
}  # fmt: skip
# The verb that runs: its name, and of each option what it is and its value.
_RUNNING: ContextVar[tuple[str, dict[str, tuple[inspect.Parameter, Any]]]] = ContextVar("running")


def _option(field: Field, own: Any) -> inspect.Parameter:
    """The option of a field, or `own` in its place."""
    flags = (f"--{field.name.replace('_', '-')}",) if field.kind is bool and field.default is False else ()
    made = own or typer.Option(*flags, help=field.help, rich_help_panel=field.panel)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=field.default, annotation=Annotated[field.kind, made])


class VerbCommand(TyperCommand):
    """A command that takes the old spellings of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _renamed(args, getattr(self.callback, "renamed", {})))


def verb(
    settings: type | None = None,
    *,
    renamed: Mapping[str, str] | None = None,
    own: Mapping[str, Any] | None = None,
    leave_out: Collection[str] = (),
    writes: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: an option for each field of its settings, and errors told as one line.

    The function gets the settings as `settings`. Fields that are settings themselves give their fields, under a
    heading of their own; fields of one name are one option, with the first one's default. A tuple is given with commas
    or by repeating the option; a switch that is off by default has no `--no-`.

    Args:
        settings: a dataclass whose docstring has an entry for each field; None for a verb without.
        renamed: old spelling, beside those of `OLD` -> the option it is now, which may bring its value
            (`skip_first 0`), or nothing where that is an argument now. Accepted with a note, by a `VerbCommand`. An
            option that is renamed to itself with a value was a switch, which it is where no number follows.
        own: field -> `typer.Option` in place of the one that is made.
        leave_out: fields that are no options.
        writes: `folder` or `file`: what `out` is, which one run at a time writes to.
    """
    locked = locked_folder if writes == "folder" else locked_file

    def decorate(action: Callable[..., None]) -> Callable[..., None]:
        given = [p for p in inspect.signature(action, eval_str=True).parameters.values() if p.name != "settings"]
        fields: dict[str, Field] = {}
        for field in flat_fields(settings, leave_out) if settings else ():
            fields.setdefault(field.name, field)
        options = [_option(field, (own or {}).get(field.name)) for field in fields.values()]
        known = {p.name: p for p in (*given, *options)}

        def run(**values: Any) -> None:
            # Read when torch is first imported. Threads that sleep while they wait, where the default is to spin, keep
            # their speed on a machine that does other work too; spinning ones fall to a fraction of it.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            _RUNNING.set((action.__name__, {name: (known[name], value) for name, value in values.items()}))
            try:
                if settings is not None:
                    chosen = {name: split_parts(values.pop(name), field) for name, field in fields.items()}
                    values["settings"] = filled(settings, chosen)
                with locked(values.get("out") if writes else None):
                    action(**values)
            except ServiceRefused as error:
                fail(f"{error}. What was answered is kept: the same command goes on from there.", code=1)
            except (ValueError, OSError, TypeError, ImportError) as error:
                fail(error, code=2)
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported for this
                    raise
                smaller = [name for name in ("tokens_per_batch", "batch_size") if name in known]
                fail(f"{error} Try a smaller --{smaller[0].replace('_', '-')}." if smaller else error, code=1)

        run.__name__, run.__doc__ = action.__name__, action.__doc__
        run.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in known.values()]
        )
        old_names = {old: new for old, new in OLD.items() if new in known and old not in known} | dict(renamed or {})
        spelt = ((old.replace("_", "-"), new.replace("_", "-")) for old, new in old_names.items())
        run.renamed = {f"--{old}": f"--{new}" if new else "" for old, new in spelt}  # pyright: ignore[reportFunctionMemberAccess]
        return run

    return decorate


def recorded_command(quiet: Collection[str] = ()) -> str:
    """The command that runs, with every option that differs from its default.

    Args:
        quiet: options that are left out. Addresses lose their logins.
    """
    verb, values = _RUNNING.get()
    words = ["sae-transformers", verb]
    for name, (option, value) in values.items():
        if any(isinstance(one, ArgumentInfo) for one in typing.get_args(option.annotation)):
            words.append(str(value))
        elif name not in quiet and value not in (None, [], ()) and _shown(value) != _shown(option.default):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [word for one in _shown(value) for word in (f"--{flag}", one)]
    return without_logins(shlex.join(words))


def _shown(value: Any) -> list[str]:
    """An option's value, a word each time that the option is given."""
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _renamed(words: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Options as they are spelt now, with a note on each that is not."""
    found: list[str] = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        new = renamed.get(flag)
        has_number = equals or "".join(words[place + 1 : place + 2]).isdecimal()
        if new is None or (new.split(" ")[0] == flag and has_number):
            found.append(word)
            continue
        typer.secho(f"{flag} is now {new or 'the first argument'}.", err=True)
        name, *rest = new.split(" ")
        found += [part for part in (f"{name}{equals if name else ''}{value}", *rest) if part]
    return found
