"""Bodies of requests, field by field: nothing is taken for what it is not, and nothing unknown passes unseen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import RequestError

MISSING = object()


class Body:
    """The JSON object of a request. Each `take...` removes a field; what is left at `end` is refused.

    As in OpenAI's interface, null is the same as leaving a field out.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str, default: Any = MISSING) -> Any:
        value = self.take(name, default)
        if value is MISSING or (not isinstance(value, str) and value is not default):
            raise wrong(name, "must be a text", value)
        return checked_text(value, name) if isinstance(value, str) else value

    def truth(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise wrong(name, "must be true or false", value)
        return value

    def whole(self, name: str, default: Any, low: int = 0, high: int = 2**63 - 1) -> Any:
        value = self.take(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"must be a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """In [low, high], or with `above` in (low, high]."""
        value = self.take(name, default)
        if not is_number(value) or not low <= value <= high or (above and value == low):
            raise wrong(name, f"must be a number {'above' if above else 'from'} {low:g} to {high:g}", value)
        return float(value)

    def neutral(self, name: str, values: Iterable[Any], why: str) -> None:
        """Accept a field that is not served only where it asks for nothing."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            raise RequestError(f"`{name}` is not supported: {why}. Received: {name}={shortened(value)}.", name)

    def ignore(self, *names: str) -> None:
        for name in names:
            self.take(name)

    def end(self) -> None:
        if self._left:
            name = sorted(self._left)[0]
            raise RequestError(f"Unknown field: `{name}`.", name, "unknown_parameter")


def wrong(name: str, what: str, value: Any) -> RequestError:
    told = "nothing" if value is MISSING else f"{name}={shortened(value)}"
    return RequestError(f"`{name}` {what}. Received: {told}.", name)


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have no end
        return False


def checked_text(value: str, name: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"`{name}` holds half a character (a lone surrogate).", name) from None
    return value


def read_json(raw: bytes) -> Mapping[str, Any]:
    """The object in a body.

    Raises:
        RequestError: not JSON, not an object, or a number that JSON does not have.
    """

    def constant(name: str) -> Any:
        raise RequestError(f"{name} is no JSON number.")

    try:
        found = json.loads(raw, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {str(error)[:200]}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError(f"The body must be a JSON object. Received: {shortened(found)}.", code="invalid_json")
    return found


def shortened(value: Any) -> str:
    """A value as an error tells it: at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
