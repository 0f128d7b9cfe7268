"""What a dashboard shows, as plain data: from files' contents to the compact JSON that the page reads.

The page holds one index, small columns of all features that it searches and sorts by, and details in chunks that it
opens one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..create_training_data.annotation.tables import FeatureAnnotation
from ..evaluation.features.histograms import ActivationHistograms
from ..evaluation.features.table import FeatureTable
from ..evaluation.method_ids import FEATURE, PRE_ACTIVATION, MethodId, names_a_latent, old_steered_latent
from ..evaluation.results import Results, method_of

OWN_ACTIVATION = "the SAE's own activation"  # of spans that are scored as histograms count
INDEX_TOKENS = 8  # of each end: what a feature is searched by and shown with in the list


class SpanShown(NamedTuple):
    """A stretch of text. score: of its strongest token. tokens: their characters, or the whole span as one.
    activations: one a token, None or nan where a token does not count; empty where they are not known.
    peak: place of the strongest token, -1 where that is not known. text: number of the row."""

    score: float
    tokens: Sequence[str]
    activations: Sequence[float | None] = ()
    peak: int = -1
    text: int | None = None


class SteeringSample(NamedTuple):
    """A continuation. setting: how it was steered, such as "direction +8"; empty for the unsteered one. strength: by
    which settings are ordered, 0 for the unsteered one."""

    prompt: str
    text: str
    setting: str = ""
    strength: float = 0.0
    perplexity: float | None = None


class Raised(NamedTuple):
    """What a feature did to an output in one text: the effect, summed over its tokens, on a target such as
    "' Paris' - ' London'"; the token of the largest effect, and the text up to there."""

    target: str
    effect: float
    token: str
    text: str


@dataclass(frozen=True)
class DashboardData:
    """All that is known of the features of an SAE; what is not known stays empty and is left out of the page.

    title: of the page. facts: name -> value, such as the base model. activation: of the spans, for their caption.
    features: which are shown, in this order; by default all of `table`, or those that anything is known of.
    measures: further columns by name, a number for some features each, such as AUROC on a data set.
    neighbours: latents with cosines of decoder rows, nearest first. raised: effects, the largest first.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    table: FeatureTable | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    spans: Mapping[int, Sequence[SpanShown]] = field(default_factory=dict)
    annotations: Mapping[int, FeatureAnnotation] = field(default_factory=dict)
    samples: Mapping[int, Sequence[SteeringSample]] = field(default_factory=dict)
    neighbours: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    raised: Mapping[int, Sequence[Raised]] = field(default_factory=dict)
    measures: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    histograms: ActivationHistograms | None = None
    results: Results | None = None
    features: Sequence[int] | None = None
    activation: str = ""

    def shown(self) -> list[int]:
        """The features of the page.

        Raises:
            ValueError: there are none, one is given twice, or the table has no such feature.
        """
        known: set[int] = set() if self.table is None else set(range(len(self.table)))
        parts = (self.names, self.spans, self.annotations, self.samples, self.raised, *self.measures.values())
        for by_feature in parts:
            known |= set(by_feature)
        size = None if self.table is None else len(self.table)
        chosen = sorted(known) if self.features is None else list(self.features)
        if (
            not chosen
            or len(set(chosen)) < len(chosen)
            or min(chosen) < 0
            or (size and max(known | set(chosen)) >= size)
        ):
            raise ValueError(
                f"Expected features, each once, in [0, {size if size else 'd_sae'}). Received: {len(chosen)} of them, "
                f"the largest number in any file {max(known | set(chosen), default=None)}."
            )
        return chosen


def measures_of(
    results: Results, metric: str = "auroc", *, sae: int = 0, names: Mapping[int, str] | None = None
) -> dict[str, dict[int, float]]:
    """Columns from an evaluation: the measurements of `metric` whose method is one latent.

    Args:
        sae: number of the SAE whose latents are meant; a method that tells none means it too.
        names: latent -> name, by which records of before name it in methods such as `toxicity of SAE 0`.
    """
    known = {name: latent for latent, name in (names or {}).items()}
    found: dict[str, dict[int, float]] = {}
    for suite in results.suites.values():
        for one in suite.measurements:
            of = method_of(one)
            latent = known.get(of.feature) if isinstance(of.feature, str) else of.feature
            if one.metric != metric or one.value is None or latent is None or of.sae not in (None, sae):
                continue
            if of.kind in (FEATURE, PRE_ACTIVATION):
                how = "before activation" if of.kind == PRE_ACTIVATION else ""
                column = ", ".join(filter(None, (metric.upper(), how, one.data)))
                found.setdefault(column, {})[latent] = one.value
    return found


def samples_of(rows: Sequence[Mapping[str, Any]], *, sae: int = 0) -> dict[int, list[SteeringSample]]:
    """Steering samples by feature, from rows of JSON.

    Args:
        rows: `feature`, `prompt`, `text`, `strength` (0: unsteered), and `op`, `unit`, `perplexity` where known. An
            unsteered row without a feature counts for every feature that has its prompt. Rows of an evaluation's
            suite `steering` count too: `setting`, `prompt`, `steered`, `unsteered`, and `of`, the method as data, or
            in records of before a `method` that names a latent.
        sae: as for `measures_of`.

    Raises:
        ValueError: a row lacks something.
    """
    found: dict[int, list[SteeringSample]] = {}
    shared: list[SteeringSample] = []
    for number, row in enumerate(rows):
        try:
            if "steered" in row:
                of = MethodId(**row["of"]) if row.get("of") else old_steered_latent(row["method"])
                if of is not None and isinstance(of.feature, int) and of.sae in (None, sae):
                    made = found.setdefault(of.feature, [])
                    made.append(
                        SteeringSample(row["prompt"], row["steered"], row.get("setting") or row["method"], 1.0)
                    )
                    shared.append(SteeringSample(row["prompt"], row["unsteered"]))
                continue
            strength = float(row["strength"])
            setting = f"{row.get('op', '')} {signed(strength)} {row.get('unit', '')}".strip() if strength else ""
            likely = row.get("perplexity")
            sample = SteeringSample(
                str(row["prompt"]), str(row["text"]), setting, strength, None if likely is None else float(likely)
            )
            if row.get("feature") is None and not strength:
                shared.append(sample)
            else:
                found.setdefault(int(row["feature"]), []).append(sample)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"A steering sample has feature, prompt, text and strength. Received: row {number} with "
                f"{sorted(row)}, {type(error).__name__}: {error}."
            ) from error
    for made in found.values():
        prompts = {one.prompt for one in made}
        plain = {one.prompt for one in made if not one.setting}
        made += list(dict.fromkeys(one for one in shared if one.prompt in prompts - plain))
    return found


def signed(value: float) -> str:
    """+8 or −8, with a minus sign and not a hyphen."""
    return f"{value:+g}".replace("-", "−")


def page_index(data: DashboardData, features: Sequence[int]) -> dict[str, Any]:
    """The small columns: what the page lists, searches and sorts."""
    notes = [data.annotations.get(f) or FeatureAnnotation() for f in features]
    labels = [{None: "", True: "intended", False: "unintended"}[one.intended] for one in notes]
    numbers = _number_columns(data, features)
    dead = _dead(data)
    return {
        "title": data.title,
        "facts": [[name, str(value)] for name, value in data.facts.items()],
        "activation": data.activation,
        "feature": list(features),
        "name": _sparse([data.names.get(f, "") for f in features]),
        "explanation": _sparse([one.explanation for one in notes]),
        "label": _sparse(labels),
        "tokens": [] if data.table is None else [_tokens(data.table, f) for f in features],
        "dead": [] if dead is None else [int(dead[f]) for f in features],
        "samples": [int(f in data.samples) for f in features] if data.samples else [],
        "columns": [
            {"key": key, "name": name, "kind": kind, "help": told, "values": [_short(v) for v in values]}
            for key, name, kind, told, values in numbers
        ],
        "results": _result_rows(data.results),
        "logits": None if data.table is None else str(data.table.facts.get("unit", "")),
    }


def feature_details(data: DashboardData, feature: int) -> dict[str, Any]:
    """All the rest of one feature; keys that have nothing to say are left out."""
    found: dict[str, Any] = {}
    if data.table is not None and feature < len(data.table):
        weights = data.table.weights
        for key, tokens, values in (
            ("top", data.table.top_tokens, weights.top_weights),
            ("bottom", data.table.bottom_tokens, weights.bottom_weights),
        ):
            pairs = zip(tokens[feature], values[feature].tolist(), strict=True)
            found[key] = [[token, _short(weight)] for token, weight in pairs]
    if data.histograms is not None:
        edges, counts = data.histograms.of(feature)
        if counts:
            found["histogram"] = [[_short(edge) for edge in edges], counts, data.histograms.n_tokens]
    spans = data.spans.get(feature, ())
    if not spans and data.table is not None and data.table.contexts is not None:
        scores = data.table.context_scores or []
        spans = [SpanShown(s, [t]) for s, t in zip(scores[feature], data.table.contexts[feature], strict=True)]
    if spans:
        found["spans"] = [
            [_short(one.score), one.text, list(one.tokens), [_short(v, 3) for v in one.activations], one.peak]
            for one in spans
        ]
    if note := data.annotations.get(feature):
        found |= {"verified": note.verified} if note.verified else {}
        found |= {"judgements": [list(pair) for pair in note.judgements]} if note.judgements else {}
    if samples := data.samples.get(feature):
        rows = sorted(samples, key=lambda one: one.strength)
        found["samples"] = [[s.prompt, s.text, s.setting, _short(s.perplexity)] for s in rows]
    if near := data.neighbours.get(feature):
        found["neighbours"] = [[latent, round(cosine, 3)] for latent, cosine in near]
    if raised := data.raised.get(feature):
        found["raised"] = [[one.target, _short(one.effect, 3), one.token, one.text] for one in raised]
    return found


def _number_columns(data: DashboardData, features: Sequence[int]) -> list[tuple[str, str, str, str, list[Any]]]:
    """key, name, kind, meaning and values of each column that has any."""
    chosen: list[tuple[str, str, str, str, list[Any]]] = []
    table, counted = data.table, data.histograms
    if table is not None and table.log10_frequency is not None:
        shares = (10**table.log10_frequency - 1e-10).clamp(min=0).tolist()
        chosen.append(
            ("frequency", "Firing frequency", "share", "tokens where it is active", [shares[f] for f in features])
        )
    elif counted is not None and counted.n_tokens:
        active = (counted.active().double() / counted.n_tokens).tolist()
        chosen.append(
            ("frequency", "Firing frequency", "share", "tokens where it is active", [active[f] for f in features])
        )
    largest: list[Any] = [None] * len(features)
    if counted is not None:
        largest = counted.maxima[torch.tensor(features)].tolist()
    if counted is None or data.activation == OWN_ACTIVATION:  # spans are of more text than histograms, or alone
        scores = [max((one.score for one in data.spans.get(f, ())), default=None) for f in features]
        largest = [max((v for v in pair if v is not None), default=None) for pair in zip(largest, scores, strict=True)]
    if any(value is not None for value in largest):
        chosen.append(("maximum", "Largest activation", "number", "on the text that was read", largest))
    for number, (name, values) in enumerate(data.measures.items()):
        chosen.append(
            (f"measure{number}", name, "number", "measured by `evaluate`", [values.get(f) for f in features])
        )
    if table is not None:
        for key, name, told, column in (
            ("kurtosis", "Kurtosis", "of its logit weights; 3 is a normal distribution", table.weights.kurtosis),
            ("skewness", "Skewness", "of its logit weights", table.weights.skewness),
            ("coherence", "Coherence", "how alike its top tokens are", table.coherence),
        ):
            if column is not None:
                values = column.tolist()
                chosen.append((key, name, "number", told, [values[f] for f in features]))
    return chosen


def _dead(data: DashboardData) -> list[bool] | None:
    if data.table is not None and data.table.dead is not None:
        return data.table.dead.tolist()
    return None if data.histograms is None else (data.histograms.active() == 0).tolist()


def _tokens(table: FeatureTable, feature: int) -> list[str]:
    return table.top_tokens[feature][:INDEX_TOKENS]


def _sparse(values: list[str]) -> list[str]:
    """Nothing where all are empty."""
    return values if any(values) else []


def _result_rows(results: Results | None) -> list[list[Any]]:
    """Suite, metric, method, value, low, high, n of what was measured, but not of single latents."""
    if results is None:
        return []
    return [
        [name, one.metric, one.method, _short(one.value), _short(one.low), _short(one.high), one.n]
        for name, suite in results.suites.items()
        for one in suite.measurements
        if not names_a_latent(method_of(one), one.of is not None)
    ]


def _short(value: float | None, digits: int = 4) -> float | None:
    """A number with so many significant digits; None where it is not finite, as JSON has it."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
