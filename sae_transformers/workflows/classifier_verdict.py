"""What the validation of `classify` says: how strong each method is taken, and which is recommended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..training.heads.choice import Choice, choose_on_validation, compare
from ..training.heads.train import TrainedHead
from .classifier_candidates import Way

LEANS = 0.05  # standard deviations of the scores; a swap that moves them less than this moves nothing
WORTH = 0.1  # of the swap's effect: less is not worth a method


class Trial(NamedTuple):
    """Measures of one way, a row a seed, and its best head."""

    rows: list[dict[str, float]]
    head: TrainedHead


@dataclass(frozen=True)
class Verdict:
    """What is chosen on validation.

    Args:
        chosen: method -> the way that the rule takes of it.
        recommended: the way for the task; None without swaps or plain heads to compare with.
        compared: way -> how it compares with plain heads.
        sentence: why; empty where nothing is recommended.
    """

    chosen: Mapping[str, Way]
    recommended: Way | None
    compared: Mapping[Way, Choice]
    sentence: str

    def kept(self, asked: str | None) -> Way:
        """The way whose head becomes the classifier: of the method that was asked for, else the recommended one, else
        SelfReg's or the first."""
        if asked is not None:
            return self.chosen[asked]
        return self.recommended or self.chosen.get("selfreg") or next(iter(self.chosen.values()))

    def facts(self) -> dict[str, Any]:
        """As JSON: what was chosen, and by which numbers."""
        if self.recommended is None:
            return {}
        compared = {str(way): one._asdict() for way, one in self.compared.items()}
        return {"recommended": str(self.recommended), "recommendation": self.sentence, "validation": compared}


def reach_verdict(trials: Mapping[Way, Trial], max_loss: float) -> Verdict:
    """Choose by one rule, on validation: of the ways that lose at most `max_loss` of the validation score, the one
    whose score moves least under the swap. Random features are a control and not recommended."""
    methods = dict.fromkeys(way.method for way in trials)
    first = {name: next(way for way in trials if way.method == name) for name in methods}
    plain = trials.get(Way("plain"))
    if plain is None or "validation_delta" not in plain.rows[0]:
        return Verdict(first, None, {}, "")
    compared = {way: compare(trial.rows, plain.rows) for way, trial in trials.items() if way.method != "plain"}
    chosen = {}
    for name in methods:
        own = {way: trial.rows for way, trial in trials.items() if way.method == name}
        chosen[name] = choose_on_validation(own, plain.rows, max_loss) or first[name]
    if "random" in chosen and "selfreg" in chosen:  # as many
        chosen["random"] = Way("random", chosen["selfreg"].strength)
    serious = {way: trials[way].rows for way in compared if way.method != "random"}
    best = choose_on_validation(serious, plain.rows, max_loss)
    moved = sum(row["validation_delta"] for row in plain.rows) / len(plain.rows)
    said = f"On validation the swap moves plain's score by {moved:.2f} of its standard deviations"
    if moved < LEANS:
        return Verdict(chosen, Way("plain"), compared, f"{said}: there is nothing to take away. Recommended: plain.")
    if best is None or compared[best].delta > -WORTH:
        price = f"for {100 * max_loss:g} point(s) of the validation score"
        return Verdict(
            chosen, Way("plain"), compared,
            f"{said}; nothing that was tried takes a tenth of it away {price}. Recommended: plain.",
        )  # fmt: skip
    one = compared[best]
    means = "with the SAE" if best.method == "selfreg" else "without an SAE"
    price = f"{'costs' if one.score < 0 else 'gains'} {100 * abs(one.score):.1f} points of the validation score"
    sentence = f"{said}; {best}, {means}, takes {-100 * one.delta:.0f} % of it away and {price}. Recommended: {best}."
    return Verdict(chosen, best, compared, sentence)
