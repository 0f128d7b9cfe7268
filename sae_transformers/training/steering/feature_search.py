"""Which latents stand for a concept: by labelled texts, and by what they do to the model's output.

A latent that answers to a concept need not bring it about. "SAEs are good for steering if you select the right
features" (https://huggingface.co/papers/2505.20063) measures both, and finds that hardly any latent scores high on
both; leaving out those with a low output score made steering on AxBench two to three times better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...evaluation.detection.metrics import code_aurocs
from ...latents.sparse_codes import SparseCodes
from ...latents.text_latents import sae_of
from .effect_scores import delta_confidences, output_scores
from .settings import ATTRIBUTION, NEXT_TOKEN, OUTCOME, STATISTICS, OutputScoreSettings, SearchSettings


@dataclass(frozen=True)
class FeatureSearch:
    """Candidates of one SAE, best first.

    features: (m,) int64. input_scores: (m,) float64 by the statistic. output_scores: (m,) float64, None where the
    selection does not need them; so are delta_confidences, correlations and attributions. statistic, selection: how
    they were ranked. sae: number of the SAE.
    """

    features: Tensor
    input_scores: Tensor
    output_scores: Tensor | None
    statistic: str
    selection: str
    sae: int = 0
    delta_confidences: Tensor | None = None
    correlations: Tensor | None = None
    attributions: Tensor | None = None

    def rows(self) -> list[dict[str, float]]:
        """A mapping for each candidate: sae, feature, the statistic's name, and of output_score, delta_confidence,
        correlation and attribution those that were measured."""
        scores = {
            self.statistic: self.input_scores, "output_score": self.output_scores,
            "delta_confidence": self.delta_confidences, "correlation": self.correlations,
            "attribution": self.attributions,
        }  # fmt: skip
        known = {name: values.tolist() for name, values in scores.items() if values is not None}
        return [
            {"sae": self.sae, "feature": feature, **{name: values[place] for name, values in known.items()}}
            for place, feature in enumerate(self.features.tolist())
        ]


def labels_of_scores(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Labels from a judge's scores: 1 where a score is above the threshold, (n,) int64.

    Raises:
        ValueError: a score is not finite, or one class is missing.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"Scores must be finite. Received: {int((~torch.isfinite(scores)).sum())} that are not.")
    return checked_labels((scores > threshold).long(), len(scores))


def checked_labels(labels: Tensor, n_rows: int) -> Tensor:
    """(n,) int64 on the CPU.

    Raises:
        ValueError: another number of labels than rows, one that is neither 0 nor 1, or one class is missing.
    """
    if labels.shape != (n_rows,):
        raise ValueError(f"`labels` must have one entry for each of {n_rows} rows. Received: {tuple(labels.shape)}.")
    labels = labels.detach().cpu()
    counts = [int((labels == value).sum()) for value in (0, 1)]
    if sum(counts) != n_rows or not all(counts):
        raise ValueError(
            f"`labels` must be 0 or 1, and texts with and without the concept are needed. "
            f"Received: {counts[1]} with, {counts[0]} without, {n_rows - sum(counts)} neither."
        )
    return labels.long()


def activity_information(codes: SparseCodes, labels: Tensor) -> Tensor:
    """Mutual information of "the latent is active in the row" and the label, in nats, (d_sae,) float64.

    sum over on/off and 1/0 of p(x, y) log(p(x, y) / (p(x) p(y))), with shares of rows for probabilities.

    Args:
        codes: (n, d_sae).
        labels: (n,), 0 or 1; both must occur.
    """
    labels = checked_labels(labels, codes.n_rows)
    n, positives = codes.n_rows, int(labels.sum())
    on_positive = (codes._replace(values=torch.ones_like(codes.values))).sums(labels)
    on = codes.counts().double()
    joint = torch.stack([on_positive, on - on_positive, positives - on_positive, n - positives - on + on_positive])
    active, present = torch.stack([on, on, n - on, n - on]), torch.tensor([positives, n - positives] * 2)
    expected = active * present[:, None].double() / n
    return (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, expected)).sum(0).clamp(min=0) / n


def mean_differences(codes: SparseCodes, labels: Tensor) -> Tensor:
    """Mean of each latent over rows of label 1 less that over rows of label 0, (d_sae,) float64."""
    labels = checked_labels(labels, codes.n_rows).double()
    return codes.sums(labels / labels.sum()) - codes.sums((1 - labels) / (1 - labels).sum())


def input_scores(codes: SparseCodes, labels: Tensor, statistic: str = "auroc") -> Tensor:
    """How well each latent tells rows with the concept from rows without it, (d_sae,) float64, higher is better.

    Args:
        codes: (n, d_sae), such as `latents.sparse_codes.encode_texts` makes of texts.
        labels: (n,), 0 or 1; both must occur.
        statistic: `auroc` (`evaluation.detection.metrics.code_aurocs`), `mean_difference`, or `mutual_information`.
            The last does not tell for from against, so latents that are active in fewer rows of label 1 than of label
            0, by share, score -information.

    Raises:
        ValueError: an unknown statistic, or labels that do not fit.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}. Received: statistic={statistic!r}.")
    labels = checked_labels(labels, codes.n_rows)
    if statistic == "auroc":
        return code_aurocs(codes, labels)
    if statistic == "mean_difference":
        return mean_differences(codes, labels)
    sign = mean_differences(codes._replace(values=torch.ones_like(codes.values)), labels).sign()
    return sign * activity_information(codes, labels)


def search_features(
    codes: SparseCodes,
    labels: Tensor,
    model: Any = None,
    tokenizer: Any = None,
    settings: SearchSettings | None = None,
    *,
    sae: int = 0,
    effect: OutputScoreSettings | None = None,
    correlations: Tensor | None = None,
) -> FeatureSearch:
    """Rank latents for a concept.

    Args:
        codes: (n, d_sae) of texts.
        labels: (n,), 0 or 1; both must occur.
        model, tokenizer: for output scores and delta confidences; needed unless `selection` is `input` or
            `correlation` or `attribution`.
        settings: its `selection` orders the `pool` best by the statistic: `input` by the statistic; `output` by output
            score; `combined` by the sum of both; `confidence` by the magnitude of delta confidence; `correlation` by
            the correlation with an outcome; `effect` by the sum of the last two; `attribution` by that to labelled
            texts. What is summed is in standard deviations of the pool, so that a latent far above all others in one
            score is not put below those that are a little better than most in the other. `top` does not count:
            `best_of` takes the first.
        sae: number of the SAE in the model.
        effect: how output scores and delta confidences are measured.
        correlations: (d_sae,) of this SAE, as `outcome_correlations` gives them, or for `attribution`
            `text_attributions`; needed where the selection is by them.

    Returns:
        At most `pool` latents, of those that are active in a text and whose statistic speaks for the concept.

    Raises:
        ValueError: one class only, a model that is missing or has another SAE, correlations that are missing or of
            another SAE, or no latent is left.
    """
    settings, effect = settings or SearchSettings(), effect or OutputScoreSettings()
    statistic, selection = settings.statistic, settings.selection
    scores = input_scores(codes, labels, statistic)
    live = codes.live()
    live = live[scores[live] > (0.5 if statistic == "auroc" else 0.0)]
    if not len(live):
        raise ValueError(f"No latent is more active where the concept is. Received: {codes.d_sae} latents.")
    features = live[scores[live].argsort(descending=True, stable=True)][: settings.pool]
    found: dict[str, Tensor] = {"input_scores": scores[features]}
    if selection in NEXT_TOKEN:
        if model is None or tokenizer is None:
            raise ValueError(f"This selection needs `model` and `tokenizer`. Received: selection={selection!r}.")
        if (d_sae := sae_of(model, sae).config.d_sae) != codes.d_sae:
            raise ValueError(
                f"The codes must be of SAE {sae}, which has {d_sae} latents. Received: codes of {codes.d_sae}."
            )
    if selection in ("output", "combined"):
        found["output_scores"] = output_scores(model, tokenizer, features, effect, sae=sae)
    if selection in ("confidence", "effect"):
        found["delta_confidences"] = delta_confidences(model, tokenizer, features, effect, sae=sae)
    if selection in (*OUTCOME, ATTRIBUTION):
        if correlations is None or correlations.shape != (codes.d_sae,):
            raise ValueError(
                f"This selection needs `correlations` of {codes.d_sae} latents, of `outcome_correlations` or "
                f"`text_attributions`. Received: "
                f"selection={selection!r}, correlations={None if correlations is None else tuple(correlations.shape)}."
            )
        name = "attributions" if selection == ATTRIBUTION else "correlations"
        found[name] = correlations.double().cpu()[features]
    order = _merits(found, selection).argsort(descending=True, stable=True)
    by_name: dict[str, Any] = {name: values[order] for name, values in found.items()}
    by_name = {"output_scores": None, **by_name}
    return FeatureSearch(features[order], **by_name, statistic=statistic, selection=selection, sae=sae)


def _merits(scores: dict[str, Tensor], selection: str) -> Tensor:
    """By what the candidates are ordered, (m,) float64."""
    by = {"input": ["input_scores"], "output": ["output_scores"], "combined": ["input_scores", "output_scores"]}
    by |= {"confidence": ["delta_confidences"], "correlation": ["correlations"]}
    by["attribution"] = ["attributions"]
    by["effect"] = ["delta_confidences", "correlations"]
    wanted = [scores[name].abs() if name == "delta_confidences" else scores[name] for name in by[selection]]
    return wanted[0] if len(wanted) == 1 else torch.stack([_standard(values) for values in wanted]).sum(0)


def _standard(values: Tensor) -> Tensor:
    """Values less their mean, over their standard deviation; zeros where all are the same."""
    apart = values - values.mean()
    spread = apart.square().mean().sqrt()
    return apart / spread if float(spread) > 1e-12 * float(values.abs().max()) else torch.zeros_like(apart)


class HeldOutF1(NamedTuple):
    """f1: on one half of the rows. threshold: scores above it count as 1; the best on the other half.
    always_yes: F1, on the first of these halves, of calling every row 1."""

    f1: float
    threshold: float
    always_yes: float


def held_out_f1(scores: Tensor, labels: Tensor, *, seed: int = 0) -> HeldOutF1:
    """F1 of a score at a threshold that was chosen on other rows; nan where one half lacks a class.

    Args:
        scores: (n,), finite.
        labels: (n,), 0 or 1; both must occur.
        seed: of the halves.
    """
    labels = checked_labels(labels, len(scores)).bool()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    fitted, held = order[: len(order) // 2], order[len(order) // 2 :]
    if not all(0 < int(labels[half].sum()) < len(half) for half in (fitted, held)):
        return HeldOutF1(*3 * [float("nan")])
    values, places = scores[fitted].double().sort(descending=True)
    hits = labels[fitted][places].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(values) + 1) + hits[-1])
    last = torch.cat([values[:-1] > values[1:], torch.tensor([True])])  # of rows with equal scores
    best = int(torch.where(last, f1, -1.0).argmax())
    below = values[best + 1] if best + 1 < len(values) else values[best] - 1
    threshold = float((values[best] + below) / 2)
    predicted, truth = scores[held].double() > threshold, labels[held]
    found = 2 * int((predicted & truth).sum()) / (int(predicted.sum()) + int(truth.sum()))
    return HeldOutF1(found, threshold, 2 * int(truth.sum()) / (len(truth) + int(truth.sum())))


def best_of(searches: Sequence[FeatureSearch], count: int) -> list[tuple[int, int]]:
    """(SAE, feature) of the best candidates of several SAEs, `count` of each, SAE by SAE in turn."""
    if count < 1 or not searches:
        raise ValueError(f"Expected searches and a count of 1 or more. Received: {len(searches)}, count={count!r}.")
    longest = min(count, max(len(search.features) for search in searches))
    return [
        (search.sae, int(search.features[place]))
        for place in range(longest)
        for search in searches
        if place < len(search.features)
    ]
