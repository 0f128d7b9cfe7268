"""The suite `fairness`: stereotypes that a model prefers, before and after steering, what steering costs, and how far
features move when only an attribute of a text is swapped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...latents.context import reading_length
from ...latents.text_latents import encode_text_means, named_features, text_ids
from ..classification import bootstrap_interval
from ..method_ids import MethodId, baseline_method, feature_methods
from ..results import Measurement, SuiteResult, with_methods
from ..suites.settings import FairnessSettings
from .counterfactuals import swap_sensitivity
from .stereotypes import PairScores, SentencePair, last_word_summary, preference, score_last_words, score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM, Steering

OVER_PAIRS, OVER_TEXTS = "bootstrap over pairs", "bootstrap over texts"
STEERED, NONE = "steered", "none"
WHAT = {  # of each measurement: better direction, what it says
    "stereotype_share": "share of pairs whose stereotypical text is more likely; 0.5 is no preference",
    "stereotype_gap_nats": "mean of log p(stereotypical) - log p(other); 0 is no preference",
}


def fairness_suite(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Mapping[str, Sequence[SentencePair]] | None = None,
    last_words: Sequence[str] | None = None,
    swapped: tuple[Sequence[str], Sequence[str]] | None = None,
    settings: FairnessSettings | None = None,
    *,
    steering: Steering | None = None,
    report: Callable[[int], object] | None = None,
) -> SuiteResult:
    """Measure a model without steering (`none`) and with it (`steered`); differences are paired.

    stereotype_share, stereotype_gap_nats  of each set of pairs, by the whole sentence, and by the marked words where
                                           the data marks them (see `bias.PairScores`); `_change` is steered - none
    lambada_accuracy, lambada_perplexity   of last words, and lambada_log_p_change, in nats a word
    score_move, score_move_in_std          mean |change| of a feature's score when the attribute is swapped, and the
                                           same in standard deviations of the scores; methods are features, and
                                           `random latent of SAE 0` for scale

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base, a fast one.
        pairs: name of a data set -> pairs, as `bias.read_winobias` and `read_crows_pairs` give them.
        last_words: passages of LAMBADA, two words or more each.
        swapped: the same texts twice, with an attribute of the second swapped (names, gender, dialect).
        settings: the lengths are of the swapped texts; the seed also draws the random latent.
        steering: the model's default by default. Without any, only `none` is measured.
        report: called with the number of texts of each batch.

    Raises:
        ValueError: there is nothing to measure, a text is too short or too long, or the swapped texts are not paired.
    """
    start = time.perf_counter()
    if not pairs and not last_words and swapped is None:
        raise ValueError("Expected pairs, last words or swapped texts. Received: none of them.")
    settings = settings or FairnessSettings()
    steering = model.steering if steering is None else steering
    options: dict[str, Any] = {"tokens_at_once": settings.reading.tokens_per_batch, "report": report}
    bootstrap = asdict(settings.bootstrap)
    runs = {NONE: False, **({STEERED: steering} if steering else {})}
    found: list[Measurement] = []
    for name, some in (pairs or {}).items():
        scores = {
            method: score_pairs(model, tokenizer, some, steering=plan, **options) for method, plan in runs.items()
        }
        found += _of_pairs(name, scores, bootstrap)
    if last_words:
        words = {
            method: score_last_words(model, tokenizer, last_words, steering=plan, **options)
            for method, plan in runs.items()
        }
        found += _of_words(words, bootstrap)
    notes = ["All texts stand after the token that begins or ends texts, so that their first word counts."]
    if not steering:
        notes.append("No steering with an edit, the model's default or a given one: nothing is compared.")
    found = with_methods(found, [baseline_method("none", NONE), MethodId("steered", STEERED)])
    length = reading_length(model, settings.reading.max_length, 256)
    if swapped is not None:
        reading = replace(settings.reading, max_length=length)
        moved, note = _of_swaps(model, tokenizer, swapped, replace(settings, reading=reading), report)
        found += moved
        notes += note
    features = settings.features
    record = {
        "steering": steering.to_dict() if steering else None, "max_length": length,
        "skip_first": settings.reading.skip_first,
        "features": None if features is None else [list(feature) for feature in features],
        "pairs": {name: len(some) for name, some in (pairs or {}).items()}, "last_words": len(last_words or ()),
        "swapped": len(swapped[0]) if swapped else 0, **bootstrap,
    }  # fmt: skip
    return SuiteResult("fairness", record, found, notes=notes, seconds=time.perf_counter() - start)


def _of_pairs(data: str, scores: Mapping[str, PairScores], bootstrap: Mapping[str, int]) -> list[Measurement]:
    found = []
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
                ends = (told[metric]["value"], method, told[metric]["low"], told[metric]["high"])
                note = f"{WHAT[name]}; {told['ties']['value']:g} ties" if metric == "share" else WHAT[name]
                found.append(Measurement(name + suffix, *ends, note=note, **given))
        if STEERED in kinds:
            before, after = kinds[NONE][known], kinds[STEERED][known]
            for name, change in (
                ("stereotype_share", _prefers(after) - _prefers(before)), ("stereotype_gap_nats", after - before),
            ):  # fmt: skip
                found.append(_mean(f"{name}_change{suffix}", STEERED, change, bootstrap, **given))
    return found


def _prefers(differences: Tensor) -> Tensor:
    return torch.where(differences == 0, 0.5, (differences > 0).double())


def _of_words(scores: Mapping[str, Any], bootstrap: Mapping[str, int]) -> list[Measurement]:
    found = []
    given: dict[str, Any] = {"interval": OVER_TEXTS, "n": len(scores[NONE].log_p), "data": "LAMBADA"}
    for method, one in scores.items():
        told = last_word_summary(one, **bootstrap)
        for name, better in (("accuracy", "higher"), ("perplexity", "lower")):
            ends = (told[name]["value"], method, told[name]["low"], told[name]["high"])
            found.append(Measurement(f"lambada_{name}", *ends, better=better, **given))
    if STEERED in scores:
        before, after = scores[NONE], scores[STEERED]
        right = after.right.double() - before.right.double()
        found.append(_mean("lambada_accuracy_change", STEERED, right, bootstrap, better="higher", **given))
        change = after.log_p - before.log_p
        found.append(_mean("lambada_log_p_change", STEERED, change, bootstrap, better="higher", **given))
    return found


def _mean(name: str, method: str, values: Tensor, bootstrap: Mapping[str, int], **given: Any) -> Measurement:
    low, high = bootstrap_interval(values.double(), resamples=bootstrap["resamples"], seed=bootstrap["seed"])
    return Measurement(name, float(values.double().mean()), method, low, high, **given)


def _of_swaps(
    model: Any,
    tokenizer: Any,
    swapped: tuple[Sequence[str], Sequence[str]],
    settings: FairnessSettings,
    report: Callable[[int], object] | None,
) -> tuple[list[Measurement], list[str]]:
    n = len(swapped[0])
    if n != len(swapped[1]) or n < 2:
        raise ValueError(
            f"Expected two texts or more, each with its swapped one. Received: {n} and {len(swapped[1])}."
        )
    bootstrap = asdict(settings.bootstrap)
    skip_first, max_length = settings.reading.skip_first, settings.reading.max_length or 0
    methods = list(feature_methods(named_features(model, settings.features), settings.features).values())
    both = [*swapped[0], *swapped[1]]
    rows, kept = text_ids(model, tokenizer, both, max_length=max_length, least=skip_first + 1)
    there = set(kept)
    paired = [i for i in range(n) if i in there and i + n in there]
    if len(paired) < 2:
        raise ValueError(
            f"Expected pairs of texts of {skip_first + 1} tokens or more. Received: {len(paired)} of {n}."
        )
    rows = dict(zip(kept, rows, strict=True))
    ordered = [rows[i + side * n] for side in (0, 1) for i in paired]
    codes = encode_text_means(
        model, ordered, skip_first=skip_first, tokens_at_once=settings.reading.tokens_per_batch, report=report
    )
    generator = torch.Generator().manual_seed(settings.bootstrap.seed)
    for number, one in enumerate(codes):
        live = one.codes.live()
        if len(live):
            drawn = int(live[torch.randint(len(live), (1,), generator=generator)])
            label = f"random latent of SAE {number}"
            methods.append(MethodId("random_latent", label, number, drawn, baseline=True))
    found, notes = [], []
    for method in methods:
        sae, latent, name = method.sae or 0, int(method.feature or 0), method.label
        scores = codes[sae].codes.columns(torch.tensor([latent]))[:, 0].view(2, -1)
        moved = swap_sensitivity(scores[0], scores[1], **bootstrap)["delta_logit"]
        spread = float(scores[0].std())
        given: dict[str, Any] = {"interval": OVER_TEXTS, "n": len(paired), "data": "swapped", "better": "lower"}
        found.append(Measurement("score_move", moved["value"], name, moved["low"], moved["high"], **given))
        ends = [moved[key] / spread if spread > 0 else math.nan for key in ("value", "low", "high")]
        note = "" if spread > 0 else "the scores do not vary"
        found.append(Measurement("score_move_in_std", ends[0], name, ends[1], ends[2], note=note, **given))
    if len(paired) < n:
        notes.append(f"{n - len(paired)} of {n} swapped pairs are too short and left out.")
    return with_methods(found, methods), notes
