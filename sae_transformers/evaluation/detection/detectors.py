"""Detectors of a concept in texts, fitted and chosen on one part of them and measured on another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.text_latents import TextCodes
from ..classification import summary
from ..intervals import measured, weighted_aurocs, weighted_f1
from ..journal import Journal, result_of
from ..method_ids import FEATURE, PRE_ACTIVATION, MethodId, baseline_method
from ..results import Measurement
from ..steering.axbench import word_scorer
from ..suites.settings import DetectionSettings
from .decision_trees import concept_tree
from .metrics import auroc, code_aurocs, fit_linear_probe
from .monosemanticity import monosemanticity
from .sparse_probing import fit_sparse_probe, rank_latents

PARTS = (0.5, 0.2, 0.3)  # of the texts of each label: to fit and choose, to set thresholds, to report
LEAST = 3  # texts of each label in each part
STUDENT = "Student's over splits"
BEFORE = " before activation"
BEST = "best_latent"


class Split(NamedTuple):
    """Numbers of the texts of each part, (.,) int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Detector(NamedTuple):
    """method: what it is. scores: of all texts, (n,). latents: it looks at, the best first."""

    method: MethodId
    scores: Tensor
    latents: list[int]


class Tree(NamedTuple):
    """sizes: metric -> number. predicted: labels of the test part, (.,); None where it was fitted to all texts."""

    method: MethodId
    sizes: dict[str, float]
    predicted: Tensor | None


def split_rows(labels: Tensor, seed: int) -> Split:
    """Numbers of the rows of each part, of each label alike, ascending.

    Raises:
        ValueError: fewer than three rows of a label in a part.
    """
    generator, parts = torch.Generator().manual_seed(seed), ([], [], [])
    for value in (0, 1):
        members = (labels == value).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        ends = [round(PARTS[0] * len(members)), round((PARTS[0] + PARTS[1]) * len(members))]
        some = [members[: ends[0]], members[ends[0] : ends[1]], members[ends[1] :]]
        if min(map(len, some)) < LEAST:
            raise ValueError(
                f"Each label needs {LEAST} texts or more in each part, so 15 in all. "
                f"Received: {len(members)} of label {value}."
            )
        for part, rows in zip(parts, some, strict=True):
            part.append(rows)
    return Split(*(torch.cat(part).sort().values for part in parts))


def best_threshold(scores: Tensor, labels: Tensor, metric: str) -> float:
    """The threshold with the highest `f1` or `accuracy`; texts that score more are predicted to have the concept.

    Halfway between two different scores, below all of them or the highest one; the lowest of equally good ones.
    """
    order = scores.double().sort(descending=True)
    truth = labels[order.indices].double()
    n, positives = len(truth), truth.sum()
    asked = torch.arange(n + 1)  # how many of the first ones are predicted
    hits = torch.cat([torch.zeros(1, dtype=torch.float64), truth.cumsum(0)])
    if metric == "f1":
        value = 2 * hits / (asked + positives).clamp(min=1)
    else:
        value = (hits + (n - positives) - (asked - hits)) / n
    possible = torch.cat([torch.tensor([True]), order.values[1:] < order.values[:-1], torch.tensor([True])])
    best = int(torch.where(possible, value, -1.0).flip(0).argmax())
    if best == n:
        return float(order.values[0])
    if best == 0:
        return float(order.values[-1] - 1)
    return float((order.values[n - best - 1] + order.values[n - best]) / 2)


@dataclass(frozen=True)
class Detectors:
    """Fits and chooses detectors on the training part of a split; each scores all texts.

    Args:
        model: a `SaeForCausalLM`.
        codes: of each SAE, of n texts.
        texts: n. labels: (n,).
        methods: the features that are looked at, of `feature_methods`.
        asked: of each SAE the latents whose pre-activations `codes` has.
        settings: how they are fitted.
    """

    model: Any
    codes: Sequence[TextCodes]
    texts: Sequence[str]
    labels: Tensor
    methods: Sequence[MethodId]
    asked: Sequence[Sequence[int]]
    settings: DetectionSettings

    def fit(self, split: Split, seed: int) -> Iterator[Detector]:
        """Every detector, in the order of the record."""
        yield from self._features()
        truth = self.labels[split.train]
        for number, one in enumerate(self.codes):
            part = one.codes.take_rows(split.train)
            best = int(code_aurocs(part, truth).argmax())
            method = MethodId(BEST, f"best latent of SAE {number}", number)
            yield Detector(method, one.codes.columns(torch.tensor([best]))[:, 0], [best])
            live = part.live()
            if not len(live):
                continue
            drawn = live[torch.randint(len(live), (1,), generator=torch.Generator().manual_seed(seed))]
            method = MethodId("random_latent", f"random latent of SAE {number}", number, baseline=True)
            yield Detector(method, one.codes.columns(drawn)[:, 0], drawn.tolist())
            ranked = rank_latents(part, truth, self.settings.choose_by)
            for k in (k for k in self.settings.ks if k <= len(ranked)):
                probe = fit_sparse_probe(part, truth, ranked[:k])
                method = MethodId("sparse_probe", f"{k} latent{'s' * (k > 1)} of SAE {number}", number)
                yield Detector(method, probe.score(one.codes), probe.latents.tolist())
        for place, hidden in _places(self.model, self.codes).items():
            mean = [hidden[split.train][truth == value].double().mean(0) for value in (0, 1)]
            yield Detector(diffmean_at(place), hidden.double() @ (mean[1] - mean[0]), [])
            probe = fit_linear_probe(hidden[split.train], truth, seed=seed)
            yield Detector(baseline_method("linear_probe", f"linear probe at {place}"), probe.score(hidden), [])
        rows: list[int] = split.train.tolist()
        positives, negatives = ([self.texts[i] for i in rows if self.labels[i] == value] for value in (1, 0))
        scores = word_scorer(positives, negatives, seed=seed)(self.texts)
        yield Detector(baseline_method("words", "bag of words"), scores, [])

    def _features(self) -> Iterator[Detector]:
        for method in self.methods:
            sae, latent = method.sae or 0, int(method.feature or 0)
            scores = self.codes[sae].codes.columns(torch.tensor([latent]))[:, 0]
            yield Detector(method, scores, [latent])
            before = replace(method, kind=PRE_ACTIVATION, label=method.label + BEFORE)
            yield Detector(before, self.codes[sae].pre_acts[:, self.asked[sae].index(latent)], [latent])


class FittedSplit(NamedTuple):
    """What was fitted to one split, in the order of the record; trees where they were asked for."""

    detectors: list[Detector]
    trees: list[Tree]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "detectors": [[asdict(one.method), _told(one.scores), one.latents] for one in self.detectors],
            "trees": [[asdict(one.method), one.sizes, _told(one.predicted)] for one in self.trees],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> FittedSplit:
        """Of `to_dict`."""
        return cls(
            [Detector(MethodId(**of), _tensor(scores), latents) for of, scores, latents in told["detectors"]],
            [
                Tree(MethodId(**of), sizes, None if said is None else _tensor(said))
                for of, sizes, said in told["trees"]
            ],
        )


def fit_split(detectors: Detectors, split: Split, seed: int, journal: Journal | None = None) -> FittedSplit:
    """Every detector and, where the settings have them, every tree.

    Args:
        journal: has the splits that were fitted, and gets the others.
    """

    def fit() -> dict[str, Any]:
        found, trees = list(detectors.fit(split, seed)), []
        if detectors.settings.trees:
            looked_for = [one for one in found if one.method.kind in (FEATURE, BEST)]
            trees = list(fit_trees(detectors.model, detectors.codes, detectors.labels, split, looked_for, seed))
        return FittedSplit(found, trees).to_dict()

    told = {"settings": asdict(detectors.settings), "seed": seed, "split": [rows.tolist() for rows in split]}
    asked = [asdict(method) for method in detectors.methods]
    return FittedSplit.from_dict(result_of(journal, lambda: {"fitted": asked, **told}, fit))


def _told(values: Tensor | None) -> Any:
    return None if values is None else [str(values.dtype).removeprefix("torch."), values.tolist()]


def _tensor(told: Sequence[Any]) -> Tensor:
    kind, values = told
    return torch.tensor(values, dtype=getattr(torch, kind))


def diffmean_at(place: str) -> MethodId:
    """The difference of means of the hidden states that an SAE reads."""
    return baseline_method("diffmean", f"DiffMean at {place}")


def _places(model: Any, codes: Sequence[TextCodes]) -> dict[str, Tensor]:
    """Each place that an SAE reads, once -> hidden states (n, d)."""
    configs = model.config.sae_configs
    return {config.read_at: one.hidden for config, one in zip(configs, codes, strict=True)}


def fit_trees(
    model: Any,
    codes: Sequence[TextCodes],
    labels: Tensor,
    split: Split,
    looked_for: Sequence[Detector],
    seed: int,
) -> Iterator[Tree]:
    """Every tree; looked_for: detectors of a single latent, which the tree on all latents may look at."""
    truth, held = labels[split.train], labels[split.test]
    for number, one in enumerate(codes):
        parts = [one.codes.take_rows(rows) for rows in (split.train, split.test)]
        whole = concept_tree(parts[0], truth, parts[1], held, seed=seed)
        label = f"tree on all latents of SAE {number}"
        yield Tree(MethodId("tree", label, number), _sizes(whole), whole.predicted)
        everything = concept_tree(one.codes, labels, seed=seed)  # what SCAR's code reports
        scores = {f"tree_fms_{p}": value for p, value in monosemanticity(one.codes, labels, seed=seed).score.items()}
        of_all = MethodId("tree_of_all", f"{label}, fitted to all texts", number)
        yield Tree(of_all, {**_sizes(everything), **scores}, None)
        for detector in (detector for detector in looked_for if detector.method.sae == number):
            latent = detector.latents[0]
            shares = {"tree_top_share": whole.top_share(latent), "tree_root": float(whole.root == latent)}
            columns = [part.columns(torch.tensor([latent])) for part in parts]
            alone = concept_tree(columns[0], truth, columns[1], held, seed=seed)
            method = replace(detector.method, kind="latent_tree", label=f"tree on {detector.method.label}")
            yield Tree(method, {**_sizes(alone), **shares}, alone.predicted)
    for place, hidden in _places(model, codes).items():
        tree = concept_tree(hidden[split.train], truth, hidden[split.test], held, seed=seed)
        yield Tree(baseline_method("hidden_tree", f"tree on hidden states at {place}"), _sizes(tree), tree.predicted)


def _sizes(tree: Any) -> dict[str, float]:
    return {"tree_depth": float(tree.depth), "tree_nodes": float(tree.nodes)}


def measure_detectors(
    model: Any, found: Mapping[MethodId, Sequence[Detector]], labels: Tensor, splits: Sequence[Split], counts: Tensor
) -> list[Measurement]:
    values: dict[tuple[str, MethodId], tuple[float, Tensor]] = {}
    # A detector that a split does not have (fewer latents than k) is not reported.
    found = {method: many for method, many in found.items() if len(many) == len(splits)}
    for method, many in found.items():
        told: dict[str, list[tuple[float, Tensor]]] = {"auroc": [], "f1": [], "accuracy": []}
        for detector, split in zip(many, splits, strict=True):
            scores, truth, drawn = detector.scores[split.test], labels[split.test], counts[:, split.test]
            told["auroc"].append((auroc(scores, truth), weighted_aurocs(scores, truth, drawn)))
            seen, known = detector.scores[split.validation], labels[split.validation]
            said = (scores > best_threshold(seen, known, "f1")).long()
            once = torch.ones(1, len(truth), dtype=torch.float64)
            told["f1"].append((float(weighted_f1(said, truth, once)), weighted_f1(said, truth, drawn)))
            said = (scores > best_threshold(seen, known, "accuracy")).long()
            told["accuracy"].append(_accuracy(said == truth, drawn))
        for metric, pairs in told.items():
            values[metric, method] = _mean(pairs)
    places = [config.read_at for config in model.config.sae_configs]
    for method in [method for method in found if method.sae is not None]:
        mine, other = values["auroc", method], values["auroc", diffmean_at(places[method.sae or 0])]
        values["auroc_minus_diffmean", method] = (mine[0] - other[0], mine[1] - other[1])
    facts = _facts(splits)
    return [
        measured(metric, value, of.label, drawn, baseline=of.baseline, of=of, **facts)
        for (metric, of), (value, drawn) in values.items()
    ]


def _facts(splits: Sequence[Split]) -> dict[str, Any]:
    """What is said of every number of the test parts."""
    n = len(torch.cat([split.test for split in splits]).unique())
    return {"n": n, "seeds": len(splits), "better": "higher"}


def measure_trees(
    trees: Mapping[MethodId, Sequence[Tree]], labels: Tensor, splits: Sequence[Split], counts: Tensor
) -> list[Measurement]:
    found, facts = [], _facts(splits)
    for method, many in trees.items():
        rows = [tree.sizes for tree in many]
        guesses = [tree.predicted for tree in many if tree.predicted is not None]
        if guesses:
            pairs = [
                _accuracy(guess == labels[split.test], counts[:, split.test])
                for guess, split in zip(guesses, splits, strict=True)
            ]
            value, drawn = _mean(pairs)
            of = {"baseline": method.baseline, "of": method}
            found.append(measured("tree_accuracy", value, method.label, drawn, **facts, **of))
        better = {"tree_depth": "lower", "tree_nodes": "lower"}
        for metric, over in summary(rows).items():
            sized = over.n > 1 and metric in better
            ends = {"low": over.low, "high": over.high, "interval": STUDENT} if sized else {}
            told = {"n": over.n, "seeds": over.n, "better": better.get(metric, "higher"), **ends}
            found.append(Measurement(metric, over.mean, method.label, **told, baseline=method.baseline, of=method))
    return found


def _accuracy(right: Tensor, counts: Tensor) -> tuple[float, Tensor]:
    return float(right.double().mean()), (counts @ right.double()) / counts.sum(1).clamp(min=1)


def _mean(pairs: Sequence[tuple[float, Tensor]]) -> tuple[float, Tensor]:
    return sum(value for value, _ in pairs) / len(pairs), torch.stack([drawn for _, drawn in pairs]).nanmean(0)
