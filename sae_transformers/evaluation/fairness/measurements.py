"""Measurements of the suite `fairness`, with intervals and differences on the same pairs and texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...latents.text_latents import encode_text_means, named_features, text_ids
from ..classification import mean_interval
from ..journal import Watch
from ..method_ids import MethodId, feature_methods
from ..results import Measurement, with_methods
from ..settings import BootstrapSettings
from ..suites.settings import FairnessSettings
from .counterfactuals import swap_sensitivity
from .stereotypes import LastWords, PairScores, last_word_summary, preference

OVER_PAIRS, OVER_TEXTS = "bootstrap over pairs", "bootstrap over texts"
STEERED, NONE = "steered", "none"
WHAT = {  # of each measurement: better direction, what it says
    "stereotype_share": "share of pairs whose stereotypical text is more likely; 0.5 is no preference",
    "stereotype_gap_nats": "mean of log p(stereotypical) - log p(other); 0 is no preference",
}


def pair_measurements(data: str, scores: Mapping[str, PairScores], settings: BootstrapSettings) -> list[Measurement]:
    """Of one set of pairs. scores: method -> scores, of `none` and perhaps `steered`."""
    bootstrap, found = asdict(settings), []
    for by in ("sentence", "marked"):
        kinds = {method: getattr(one, by) for method, one in scores.items()}
        known = ~kinds[NONE].isnan()
        if not bool(known.any()):
            continue
        suffix = "" if by == "sentence" else f"_by_{by}"
        given: dict[str, Any] = {"interval": OVER_PAIRS, "n": int(known.sum()), "data": data}
        for method, differences in kinds.items():
            told = preference(differences, **bootstrap)
            for metric, name in (("share", "stereotype_share"), ("gap", "stereotype_gap_nats")):
                note = f"{WHAT[name]}; {told['ties']['value']:g} ties" if metric == "share" else WHAT[name]
                found.append(_measured(name + suffix, method, told[metric], note=note, **given))
        if STEERED in kinds:
            before, after = kinds[NONE][known], kinds[STEERED][known]
            for name, change in (
                ("stereotype_share", _prefers(after) - _prefers(before)), ("stereotype_gap_nats", after - before),
            ):  # fmt: skip
                moved = mean_interval(change.double(), **bootstrap)
                found.append(_measured(f"{name}_change{suffix}", STEERED, moved, **given))
    return found


def _prefers(differences: Tensor) -> Tensor:
    return torch.where(differences == 0, 0.5, (differences > 0).double())


def word_measurements(scores: Mapping[str, LastWords], settings: BootstrapSettings) -> list[Measurement]:
    """Of last words. scores: as of `pair_measurements`."""
    bootstrap, found = asdict(settings), []
    given: dict[str, Any] = {"interval": OVER_TEXTS, "n": len(scores[NONE].log_p), "data": "LAMBADA"}
    for method, one in scores.items():
        told = last_word_summary(one, **bootstrap)
        for name, better in (("accuracy", "higher"), ("perplexity", "lower")):
            found.append(_measured(f"lambada_{name}", method, told[name], better=better, **given))
    if STEERED in scores:
        before, after = scores[NONE], scores[STEERED]
        changes = {"accuracy": after.right.double() - before.right.double(), "log_p": after.log_p - before.log_p}
        for name, change in changes.items():
            moved = mean_interval(change.double(), **bootstrap)
            found.append(_measured(f"lambada_{name}_change", STEERED, moved, better="higher", **given))
    return found


def _measured(name: str, method: str, told: Mapping[str, float], **given: Any) -> Measurement:
    """told: of `mean_interval`."""
    return Measurement(name, told["value"], method, told["low"], told["high"], **given)


def swap_measurements(
    model: Any,
    tokenizer: Any,
    swapped: tuple[Sequence[str], Sequence[str]],
    settings: FairnessSettings,
    max_length: int,
    watch: Watch,
) -> tuple[list[Measurement], int]:
    """Of texts and their swapped ones; and how many pairs are long enough."""
    n, skip_first = len(swapped[0]), settings.reading.skip_first
    if n != len(swapped[1]) or n < 2:
        raise ValueError(
            f"Expected two texts or more, each with its swapped one. Received: {n} and {len(swapped[1])}."
        )
    methods = list(feature_methods(named_features(model, settings.features), settings.features).values())
    both = [*swapped[0], *swapped[1]]
    ids, kept = text_ids(model, tokenizer, both, max_length=max_length, least=skip_first + 1)
    rows = dict(zip(kept, ids, strict=True))
    paired = [i for i in range(n) if i in rows and i + n in rows]
    if len(paired) < 2:
        raise ValueError(
            f"Expected pairs of texts of {skip_first + 1} tokens or more. Received: {len(paired)} of {n}."
        )
    ordered = [rows[i + side * n] for side in (0, 1) for i in paired]
    codes = encode_text_means(
        model, ordered, skip_first=skip_first, tokens_at_once=settings.reading.tokens_per_batch, report=watch.report,
        keep=watch.keep,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(settings.bootstrap.seed)
    for number, one in enumerate(codes):
        live = one.codes.live()
        if len(live):
            drawn = int(live[torch.randint(len(live), (1,), generator=generator)])
            label = f"random latent of SAE {number}"
            methods.append(MethodId("random_latent", label, number, drawn, baseline=True))
    found = []
    for method in methods:
        sae, latent, name = method.sae or 0, int(method.feature or 0), method.label
        scores = codes[sae].codes.columns(torch.tensor([latent]))[:, 0].view(2, -1)
        moved = swap_sensitivity(scores[0], scores[1], **asdict(settings.bootstrap))["delta_logit"]
        spread = float(scores[0].std())
        given: dict[str, Any] = {"interval": OVER_TEXTS, "n": len(paired), "data": "swapped", "better": "lower"}
        in_std = {key: number / spread if spread > 0 else math.nan for key, number in moved.items()}
        note = "" if spread > 0 else "the scores do not vary"
        found += [
            _measured("score_move", name, moved, **given),
            _measured("score_move_in_std", name, in_std, note=note, **given),
        ]
    return with_methods(found, methods), len(paired)
