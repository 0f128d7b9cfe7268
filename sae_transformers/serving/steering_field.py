"""The `steering` of a request: bounded before it is read, checked against the model before it reaches an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..modeling import Steering
from .bodies import wrong
from .errors import RequestError

# Of a request's steering; its tables are held for every answer of the batch.
MAX_EDITS, MAX_EDITS_OF_A_FEATURE, MAX_RANGES = 32_768, 16, 64
MAX_CONDITIONS = 64  # of all gates
MAX_EXCLUDED = 4096  # tokens that steering leaves alone
MAX_NAMED, LONGEST_NAME = 256, 256  # edits by name, each of which is looked up among all; characters of a name
LONGEST_REASON = 1000  # characters of what is told of a refused steering


def read_steering(
    value: Any, widths: Sequence[int], check: Callable[[Steering], object], tokenizer: Any = None
) -> Steering:
    """The steering of a request that brings one.

    Args:
        value: as the request gives it. False: none.
        widths: latents of each of the model's SAEs.
        check: raises what is wrong with it for the model that is served.
        tokenizer: that knows the tokens which `exclude_tokens` names; without it names are refused by `check`.

    Raises:
        RequestError: too much of it, no steering, or none of this model.
    """
    if value is not False and not isinstance(value, (dict, list)):
        raise wrong("steering", "must be an object as Steering.to_dict() gives, a list of edits, or false", value)
    if isinstance(value, dict):  # what was measured of it is of no use here, and of any size
        value = {name: own for name, own in value.items() if name != "receipt"}
    try:
        check_size(value, widths)
        steering = Steering.coerce(value)
        steering = steering if tokenizer is None else steering.with_tokenizer(tokenizer)
        check(steering)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        told = f"Bad steering. {str(error)[:LONGEST_REASON]}"  # which may repeat what was sent
        raise RequestError(told, "steering", "invalid_steering") from error
    return steering


def check_size(value: Any, widths: Sequence[int]) -> None:
    """Refuse steering that one request has no use for and that would take the memory of all.

    It is counted before it is read: only what is left is worth checking number by number.

    Args:
        value: as the request gives it. False: none.
        widths: latents of each of the model's SAEs.

    Raises:
        ValueError: more edits, edits of one latent or by name, scores, SAEs or ranges of positions than are served.
    """
    given = value if isinstance(value, dict) else {"edits": value or []}
    edits = given.get("edits")
    edits = [edit for edit in edits if isinstance(edit, dict)] if isinstance(edits, list) else []
    features = [(str(edit.get("sae", 0)), edit.get("feature")) for edit in edits if "scores" not in edit]
    names = [feature for _, feature in features if isinstance(feature, str)]
    each = Counter((sae, str(feature)) for sae, feature in features)
    scores = [_length(edit["scores"]) for edit in edits if "scores" in edit]
    for count, limit, what in (
        (len(edits), MAX_EDITS, "edits"),
        (max(each.values(), default=0), MAX_EDITS_OF_A_FEATURE, "edits of one feature"),
        (len(names), MAX_NAMED, "edits by name"),
        (max(map(len, names), default=0), LONGEST_NAME, "characters of a feature's name"),
        (max(scores, default=0), max(widths, default=0), "scores"),
        (_length(given.get("reconstruct")), len(widths), "SAEs to reconstruct"),
        (_length(given.get("positions")), MAX_RANGES, "ranges of positions"),
        (sum(_length(one.get("exclude_tokens")) for one in (given, *edits)), MAX_EXCLUDED, "excluded tokens"),
        (_gates([given.get("when"), *(edit.get("when") for edit in edits)]), MAX_CONDITIONS, "gates"),
        (sum(one.get("strength") is not None for one in (given, *edits)), MAX_CONDITIONS, "strengths"),
    ):
        if count > limit:
            raise ValueError(f"At most {limit} {what} are served. Received: {count}.")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict)) else 0


def _gates(waiting: list[Any]) -> int:
    """How many gates there are, those that others are made of included; counting ends where it is too many."""
    count = 0
    while waiting and count <= MAX_CONDITIONS:
        gate = waiting.pop()
        if isinstance(gate, dict):
            count += 1
            for name in ("every", "some"):
                waiting.extend(gate[name] if isinstance(gate.get(name), list) else ())
        elif gate is not None:
            count += 1
    return count
