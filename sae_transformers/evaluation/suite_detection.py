"""The suite `detection`: how well latents tell texts with a concept from texts without, beside simpler detectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..latents.text_latents import TextCodes, encode_text_means, named_features, text_ids
from .classification import summary
from .concept_steering import word_scorer
from .detection import auroc, code_aurocs, fit_linear_probe
from .intervals import BOOTSTRAP, percentiles, resample_counts, weighted_aurocs, weighted_f1
from .k_sparse_probing import CHOICES, fit_sparse_probe, rank_latents
from .monosemanticity import concept_tree
from .results import Measurement, SuiteResult, with_baselines

PARTS = (0.5, 0.2, 0.3)  # of the texts of each label: to fit and choose, to set thresholds, to report
LEAST = 3  # texts of each label in each part
STUDENT = "Student's over splits"
BEFORE = " before activation"
TREE_BASELINE = "tree on hidden states at {}"


class Split(NamedTuple):
    """Numbers of the texts of each part, (.,) int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


class _Detector(NamedTuple):
    """scores: of all texts, (n,). latents: it looks at, the best first. sae: whose they are, if any. baseline: of
    `Measurement`."""

    scores: Tensor
    latents: list[int]
    sae: int | None = None
    baseline: bool = False


def detection_suite(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    features: Sequence[tuple[int, int | str]] | None = None,
    ks: Sequence[int] = (1, 2, 5, 16),
    choose_by: str = "mean_difference",
    trees: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    max_length: int = 256,
    skip_first: int = 1,
    tokens_at_once: int = 2048,
    resamples: int = 1000,
    seed: int = 0,
    report: Callable[[int], object] | None = None,
) -> SuiteResult:
    """Measure detectors on several splits of labelled texts into training, validation and test parts.

    Every text is scored by the mean over its tokens. Detectors, whose names are the methods of the result:

    - `toxicity of SAE 0`, `latent 17 of SAE 0`: the features that are given, by activation and `before activation`
    - `best latent of SAE 0`: the one with the highest AUROC on the training part
    - `random latent of SAE 0`: any that is active there, for scale
    - `5 latents of SAE 0`: k-sparse probing
    - `DiffMean at layers.14.resid_post`, `linear probe at ...`: on the hidden states; `bag of words`

    Metrics are `auroc`; `f1` and `accuracy`, each at the threshold that is best for it on the validation part;
    `auroc_minus_diffmean`, paired; and of decision trees (SCAR's monosemanticity, see `monosemanticity`) `tree_depth`,
    `tree_nodes`, `tree_accuracy` on the test part, `tree_top_share`, the share of the splits in the first three
    levels that look at a latent, and `tree_root`, the share of trees that look at it first. All are means over the
    splits. Intervals resample texts and keep the splits and what was fitted; those of a tree's size are Student's.

    Args:
        model: a `SaeForCausalLM`; it runs without steering.
        tokenizer: of the base.
        texts: 3 or more of each label for each part; those without a token after the first ones are left out.
        labels: 0 or 1.
        features: (SAE, latent or name of a concept); the concepts of the SAEs by default, and may be empty.
        ks: numbers of latents of the sparse probes; larger ones than are active are left out.
        choose_by: how a sparse probe's latents are chosen, see `rank_latents`.
        trees: whether to fit trees.
        seeds: of the splits, of what is fitted and of the random latent.
        max_length: tokens; longer texts are cut.
        skip_first: tokens at the beginning that do not count.
        tokens_at_once: of a forward pass.
        resamples, seed: of the bootstrap.
        report: called with the number of texts read, then with 1 after each split.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: too few texts of a label, a label that is neither 0 nor 1, or a feature the model does not have.
    """
    start = time.perf_counter()
    if choose_by not in CHOICES or not seeds or any(k < 1 for k in ks):
        raise ValueError(
            f"Expected choose_by of {', '.join(CHOICES)}, one seed or more and ks of 1 or more. "
            f"Received: choose_by={choose_by!r}, seeds={list(seeds)!r}, ks={list(ks)!r}."
        )
    named = named_features(model, features)
    if len(labels) != len(texts) or not set(labels) <= {0, 1}:
        raise ValueError(
            f"Expected a label, 0 or 1, for each of {len(texts)} texts. "
            f"Received: {len(labels)} labels, {sorted(set(labels))[:5]}."
        )
    rows, kept = text_ids(model, tokenizer, texts, max_length=max_length, least=skip_first + 1)
    truth, words = torch.tensor(labels)[kept], [texts[i] for i in kept]
    splits = [split_rows(truth, one) for one in seeds]
    asked = [[latent for sae, latent in named.values() if sae == number] for number in range(len(model.saes))]
    codes = encode_text_means(
        model, rows, asked=asked, skip_first=skip_first, tokens_at_once=tokens_at_once, report=report
    )
    found: dict[str, list[_Detector]] = {}
    sizes: dict[str, list[dict[str, float]]] = {}
    predicted: dict[str, list[Tensor]] = {}
    chosen: list[dict[str, Any]] = []
    for split, one in zip(splits, seeds, strict=True):
        for name, detector in _detectors(model, codes, words, truth, split, named, asked, ks, choose_by, one):
            found.setdefault(name, []).append(detector)
            if detector.latents and name.removesuffix(BEFORE) not in named:
                chosen.append({"seed": one, "method": name, "latents": detector.latents})
        if trees:
            best = {f"best latent of SAE {number}" for number in range(len(codes))}
            told = {name: many[-1] for name, many in found.items() if name in named or name in best}
            for name, size, guess in _trees(model, codes, truth, split, told, one):
                sizes.setdefault(name, []).append(size)
                if guess is not None:
                    predicted.setdefault(name, []).append(guess)
        if report is not None:
            report(1)
    counts = resample_counts(len(truth), resamples, seed)
    measurements = _measure(model, found, truth, splits, counts)
    measurements += _measure_trees(sizes, predicted, truth, splits, counts)
    baselines = {name for name, many in found.items() if many[0].baseline}
    baselines |= {TREE_BASELINE.format(place) for place in _places(model, codes)}
    measurements = with_baselines(measurements, baselines)
    notes = [
        "Each split: half of the texts of each label to fit and choose, a fifth to set thresholds, the rest to "
        "report. Splits overlap; intervals resample texts and keep splits and fits.",
        f"The first tokens of each text ({skip_first}) do not count.",
    ]
    if len(kept) < len(texts):
        notes.append(f"{len(texts) - len(kept)} of {len(texts)} texts are too short and left out.")
    settings = {
        "features": [list(pair) for pair in named.values()], "ks": list(ks), "choose_by": choose_by, "trees": trees,
        "seeds": list(seeds), "parts": list(PARTS), "max_length": max_length, "skip_first": skip_first,
        "resamples": resamples, "seed": seed, "texts": len(truth), "positives": int(truth.sum()),
    }  # fmt: skip
    seconds = time.perf_counter() - start
    return SuiteResult(
        "detection", settings, measurements, curves={"chosen latents": chosen}, notes=notes, seconds=seconds
    )


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


def _detectors(
    model: Any,
    codes: Sequence[TextCodes],
    texts: Sequence[str],
    labels: Tensor,
    split: Split,
    named: Mapping[str, tuple[int, int]],
    asked: Sequence[Sequence[int]],
    ks: Sequence[int],
    choose_by: str,
    seed: int,
) -> Iterator[tuple[str, _Detector]]:
    """Name and scores of all texts of each detector; what is fitted or chosen is so on the training part."""
    truth = labels[split.train]
    for name, (sae, latent) in named.items():
        yield name, _Detector(codes[sae].codes.columns(torch.tensor([latent]))[:, 0], [latent], sae)
        before = codes[sae].pre_acts[:, asked[sae].index(latent)]
        yield name + BEFORE, _Detector(before, [latent], sae)
    for number, one in enumerate(codes):
        part = one.codes.take_rows(split.train)
        best = int(code_aurocs(part, truth).argmax())
        yield f"best latent of SAE {number}", _Detector(one.codes.columns(torch.tensor([best]))[:, 0], [best], number)
        live = part.live()
        if not len(live):
            continue
        drawn = live[torch.randint(len(live), (1,), generator=torch.Generator().manual_seed(seed))]
        yield f"random latent of SAE {number}", _Detector(one.codes.columns(drawn)[:, 0], drawn.tolist(), number, True)
        ranked = rank_latents(part, truth, choose_by)
        for k in (k for k in ks if k <= len(ranked)):
            probe = fit_sparse_probe(part, truth, ranked[:k])
            name = f"{k} latent{'s' * (k > 1)} of SAE {number}"
            yield name, _Detector(probe.score(one.codes), probe.latents.tolist(), number)
    for place, hidden in _places(model, codes).items():
        mean = [hidden[split.train][truth == value].double().mean(0) for value in (0, 1)]
        yield f"DiffMean at {place}", _Detector(hidden.double() @ (mean[1] - mean[0]), [], None, True)
        probe = fit_linear_probe(hidden[split.train], truth, seed=seed)
        yield f"linear probe at {place}", _Detector(probe.score(hidden), [], None, True)
    rows: list[int] = split.train.tolist()
    positives, negatives = ([texts[i] for i in rows if labels[i] == value] for value in (1, 0))
    yield "bag of words", _Detector(word_scorer(positives, negatives, seed=seed)(texts), [], None, True)


def _places(model: Any, codes: Sequence[TextCodes]) -> dict[str, Tensor]:
    """Each place that an SAE reads, once -> hidden states (n, d)."""
    configs = model.config.sae_configs
    return {config.read_at: one.hidden for config, one in zip(configs, codes, strict=True)}


def _trees(
    model: Any,
    codes: Sequence[TextCodes],
    labels: Tensor,
    split: Split,
    told: Mapping[str, _Detector],
    seed: int,
) -> Iterator[tuple[str, dict[str, float], Tensor | None]]:
    """Name, sizes, and what it says of the test part, of each tree; told: method -> whose latent to look for."""
    truth, held = labels[split.train], labels[split.test]
    for number, one in enumerate(codes):
        parts = [one.codes.take_rows(rows) for rows in (split.train, split.test)]
        whole = concept_tree(parts[0], truth, parts[1], held, seed=seed)
        yield f"tree on all latents of SAE {number}", _sizes(whole), whole.predicted
        everything = concept_tree(one.codes, labels, seed=seed)  # what SCAR's code reports
        yield f"tree on all latents of SAE {number}, fitted to all texts", _sizes(everything), None
        for name, latent in ((name, two.latents[0]) for name, two in told.items() if two.sae == number):
            shares = {"tree_top_share": whole.top_share(latent), "tree_root": float(whole.root == latent)}
            columns = [part.columns(torch.tensor([latent])) for part in parts]
            alone = concept_tree(columns[0], truth, columns[1], held, seed=seed)
            yield f"tree on {name}", {**_sizes(alone), **shares}, alone.predicted
    for place, hidden in _places(model, codes).items():
        tree = concept_tree(hidden[split.train], truth, hidden[split.test], held, seed=seed)
        yield TREE_BASELINE.format(place), _sizes(tree), tree.predicted


def _sizes(tree: Any) -> dict[str, float]:
    return {"tree_depth": float(tree.depth), "tree_nodes": float(tree.nodes)}


def _measure(
    model: Any, found: Mapping[str, Sequence[_Detector]], labels: Tensor, splits: Sequence[Split], counts: Tensor
) -> list[Measurement]:
    values: dict[tuple[str, str], tuple[float, Tensor]] = {}
    # A detector that a split does not have (fewer latents than k) is not reported.
    found = {name: many for name, many in found.items() if len(many) == len(splits)}
    for name, many in found.items():
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
            values[metric, name] = _mean(pairs)
    places = [config.read_at for config in model.config.sae_configs]
    for name, number in [(name, many[0].sae) for name, many in found.items() if many[0].sae is not None]:
        mine, other = values["auroc", name], values["auroc", f"DiffMean at {places[number]}"]
        values["auroc_minus_diffmean", name] = (mine[0] - other[0], mine[1] - other[1])
    n = len(torch.cat([split.test for split in splits]).unique())
    return [
        _with_interval(metric, name, value, drawn, n, len(splits)) for (metric, name), (value, drawn) in values.items()
    ]


def _measure_trees(
    sizes: Mapping[str, Sequence[Mapping[str, float]]],
    predicted: Mapping[str, Sequence[Tensor]],
    labels: Tensor,
    splits: Sequence[Split],
    counts: Tensor,
) -> list[Measurement]:
    found, n = [], len(torch.cat([split.test for split in splits]).unique())
    for name, rows in sizes.items():
        if name in predicted:
            pairs = [
                _accuracy(guess == labels[split.test], counts[:, split.test])
                for guess, split in zip(predicted[name], splits, strict=True)
            ]
            found.append(_with_interval("tree_accuracy", name, *_mean(pairs), n, len(splits)))
        better = {"tree_depth": "lower", "tree_nodes": "lower"}
        for metric, over in summary(rows).items():
            sized = over.n > 1 and metric in better
            ends = {"low": over.low, "high": over.high, "interval": STUDENT} if sized else {}
            found.append(
                Measurement(
                    metric, over.mean, name, seeds=over.n, n=over.n, better=better.get(metric, "higher"), **ends
                )
            )
    return found


def _accuracy(right: Tensor, counts: Tensor) -> tuple[float, Tensor]:
    return float(right.double().mean()), (counts @ right.double()) / counts.sum(1).clamp(min=1)


def _mean(pairs: Sequence[tuple[float, Tensor]]) -> tuple[float, Tensor]:
    return sum(value for value, _ in pairs) / len(pairs), torch.stack([drawn for _, drawn in pairs]).nanmean(0)


def _with_interval(metric: str, name: str, value: float, drawn: Tensor, n: int, seeds: int) -> Measurement:
    low, high = percentiles(drawn)
    return Measurement(metric, value, name, low=low, high=high, interval=BOOTSTRAP, n=n, seeds=seeds, better="higher")
