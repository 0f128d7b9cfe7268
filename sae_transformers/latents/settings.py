"""How texts are read, and how settings are checked. No torch is imported here: the command line uses it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_integers(settings: DataclassInstance, **least: int) -> None:
    """Refuse fields that are not integers of a least value; None passes where it is the field's default.

    Raises:
        ValueError: one is not; it names the field.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is None and settings.__dataclass_fields__[name].default is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"`{name}` must be an integer of {bound} or more. Received: {name}={value!r}.")


def check_numbers(
    settings: DataclassInstance, *names: str, above: float | None = None, least: float | None = None
) -> None:
    """Refuse fields that are not numbers above, or of at least, a bound; None passes where it is the default.

    Raises:
        ValueError: one is not; it names the field.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None and settings.__dataclass_fields__[name].default is None:
            continue
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
        if not (number > above if above is not None else number >= (least or 0)):
            bound = f"a number above {above:g}" if above is not None else f"a number of {least or 0:g} or more"
            raise ValueError(f"`{name}` must be {bound}. Received: {name}={value!r}.")


def check_choice(settings: DataclassInstance, name: str, choices: Sequence[str]) -> None:
    """Refuse a field that is not one of some words.

    Raises:
        ValueError: it is not; it names the field and the words.
    """
    value = getattr(settings, name)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}.")


@dataclass(frozen=True)
class ReadingSettings:
    """How texts become hidden states.

    Args:
        max_length: tokens; longer texts are cut. By default 256, or what the model reads if that is less.
        skip_first: leading tokens of a text that do not count.
        tokens_per_batch: of a forward pass, padding counted. It changes results by rounding only.
    """

    PANEL: ClassVar[str] = "Reading"

    max_length: int | None = None
    skip_first: int = 1
    tokens_per_batch: int = 2048

    def __post_init__(self) -> None:
        check_integers(self, max_length=1, skip_first=0, tokens_per_batch=1)
