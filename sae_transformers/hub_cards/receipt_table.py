"""The receipt of a default steering, as a card shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .markdown import number

SAID = {
    "effect": "change of the score `{scorer}` (goal: {goal})",
    "moved_wrong_way": "share of prompts whose score went the wrong way",
    "perplexity": "perplexity of the continuations under the unsteered model",
    "perplexity_ratio": "the same over that of unsteered continuations",
    "repetition_change": "change of the share of repeated word trigrams",
    "refusal_change": "change of the share of answers that refuse, by words",
    "dose_in_norms": "length of the change where it acts, in norms of the hidden state",
    "kl_neutral_nats": "KL(unsteered ‖ steered) on neutral texts, nats a token",
    "jailbreak_change": "change of the share of forbidden requests that are not refused, by words",
    "false_alarm_rate": "share of neutral texts in which a gate opens",
}


@dataclass(frozen=True)
class ReceiptTable:
    """rows: what, value, interval, n. notes: what to know of them."""

    rows: list[tuple[str, str, str, str]]
    notes: list[str]


def receipt_table(steering: Mapping[str, Any] | None) -> ReceiptTable | None:
    """What was measured of a steering, which is as in a config; None where nothing was.

    A receipt of another steering is not shown, and the notes say so.
    """
    from ..evaluation.steering.receipt import Receipt

    if not (steering or {}).get("receipt"):
        return None
    try:
        receipt = Receipt.of(dict(steering or {}))
    except (ValueError, TypeError, KeyError):
        return ReceiptTable([], ["The receipt in the config is not of this steering, and is left out."])
    if receipt is None:
        return None
    about = receipt.about
    rows = []
    for name, one in receipt.numbers.items():
        ends = "" if one.low is None or one.high is None else f"{number(one.low, 3)} to {number(one.high, 3)}"
        said = SAID[name].format(scorer=str(about.get("scorer") or "score").replace("`", ""), goal=about.get("goal"))
        rows.append((said, number(one.value, 3), ends, number(one.n)))
    level, fresh = float(about["level"]), about.get("fresh_prompts")
    count = "as many" if fresh is None else str(fresh)
    notes = [
        f"Intervals hold, in {level:.0%} of cases, what the same measurement gives on {count} fresh prompts, drawn as "
        f"these were.".replace("%", " %", 1)
    ]
    return ReceiptTable(rows, notes)
