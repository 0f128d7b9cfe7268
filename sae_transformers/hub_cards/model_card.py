"""The card of a model with SAEs, or of one SAE: facts and measurements -> Markdown with a `model-index`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..create_training_data.annotation.tables import FeatureAnnotation
from ..evaluation.method_ids import PRE_ACTIVATION
from ..evaluation.results import Measurement, Results, SuiteResult, is_baseline, method_of
from ..evaluation.suites import card_facts, expected_suites
from .card_file import marked
from .citations import bibtex, methods_used
from .described import described
from .facts import AuthorFacts, ModelFacts, SaeFacts
from .markdown import number, one_line, python, render, without_folders
from .receipt_table import receipt_table
from .result_tables import result_tables

PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForSequenceClassification": "text-classification"}
NOT_A_FEATURE = (PRE_ACTIVATION, "latent_tree", "random_latent")
SHOWN = 300  # characters of a sample


def model_card(
    model: ModelFacts,
    author: AuthorFacts | None = None,
    results: Results | None = None,
    *,
    annotations: Mapping[int, FeatureAnnotation] | None = None,
    annotated_sae: int = 0,
    max_features: int = 50,
    max_examples: int = 3,
) -> str:
    """A card, whole: every fact that is known and a line for each that is not.

    Args:
        model: what `read_model` found.
        author: what `read_author_facts` found.
        results: the record of `evaluate`.
        annotations: of the features of one SAE, see `read_feature_annotations`.
        annotated_sae: the number of that SAE.
        max_features: rows of the table of features; those with a name or a measurement come first.
        max_examples: prompts shown with and without steering, of each way to steer.

    Raises:
        ValueError: the annotations are of an SAE that the model does not have, or the results of another base.
    """
    author = author or AuthorFacts()
    if results is not None:
        check_results(model, results)
    if author.base:
        model = replace(model, config={**model.config, "base_model_name_or_path": author.base})
    annotations = annotations or {}
    if annotations and not 0 <= annotated_sae < len(model.saes):
        raise ValueError(
            f"The annotated SAE must be one of {len(model.saes)}. Received: annotated_sae={annotated_sae!r}."
        )
    if annotations and (largest := max(annotations)) >= model.saes[annotated_sae].d_sae:
        raise ValueError(
            f"SAE {annotated_sae} has {model.saes[annotated_sae].d_sae:,} features. Received: annotations of feature "
            f"{largest}; are they of another SAE?"
        )
    name = author.repo_id or model.folder.resolve().name
    methods = methods_used([sae.entry for sae in model.saes], model.config, author.methods)
    features, more = _features(model, annotations, annotated_sae, results, max_features)
    context = {
        "metadata": metadata(model, author, results, name).to_yaml(),
        "name": name,
        "model": model,
        "author": author,
        "use": _use(model),
        "labels": _labels(model),
        "saes": model.saes,
        "features": features,
        "more_features": more,
        "described": described(model),
        "default_steering": _steering_lines(model.config.get("steering")),
        "receipt": receipt_table(model.config.get("steering")),
        "examples": _examples(results, max_examples),
        "suites": _suites(results),
        "results": results,
        "not_measured": [suite for suite in expected_suites() if results is None or suite not in results.suites],
        "data": _data(results),
        "trained_on": _trained_on(model.saes),
        "command": without_folders(author.command or (results.command if results else "")),
        "citations": "\n\n".join(filter(None, [author.citation.strip(), bibtex(methods)])),
        "has_dashboard": "dashboard" in model.files,
        "shown": SHOWN,
    }
    return marked(render("model.md.jinja", context))


def check_results(model: ModelFacts, results: Results) -> None:
    """That a record is of this model, as far as both say what they are of."""
    for field in ("base", "base_model", "base_model_name_or_path"):
        measured, own = results.model.get(field), model.config.get("base_model_name_or_path")
        if measured and own and _last(measured) != _last(own):
            raise ValueError(
                f"The results must be of this model, whose base is {own!r}. Received: results of a model with "
                f"{field}={measured!r}."
            )
    measured = [str(one.get("place") or "") for one in results.model.get("saes") or () if isinstance(one, Mapping)]
    own = [sae.place for sae in model.saes]
    if all(measured) and measured and all(own) and measured != own:
        raise ValueError(
            f"The results must be of this model, whose SAEs read {', '.join(own)}. Received: results of SAEs that "
            f"read {', '.join(measured)}."
        )


def _last(name: Any) -> str:
    return re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower()


# -- metadata --------------------------------------------------------------------------------------------------------


def metadata(model: ModelFacts, author: AuthorFacts, results: Results | None, name: str) -> ModelCardData:
    """The block at the top of a card, as the Hub reads it."""
    extra: dict[str, Any] = {}
    if model.base and model.auto_class and not model.self_contained:
        extra["base_model_relation"] = "adapter"
    evaluated = eval_results(model, results)
    return ModelCardData(
        base_model=model.base or None,
        datasets=[one_line(one) for one in author.datasets] or None,
        language=[one_line(one) for one in author.languages] or None,
        library_name="transformers" if model.auto_class else "sae-transformers",
        license=one_line(author.licence) or None,
        license_name=one_line(author.licence_name) or None,
        license_link=one_line(author.licence_link) or None,
        pipeline_tag=PIPELINES.get(model.auto_class),
        tags=["sparse-autoencoder", "interpretability", "steering", *(one_line(tag) for tag in author.tags)],
        model_name=one_line(name) if evaluated else None,
        eval_results=evaluated or None,
        **extra,
    )


def eval_results(model: ModelFacts, results: Results | None) -> list[EvalResult]:
    """Measurements of this model on named data, for the `model-index`. Baselines and intervals are in the tables."""
    found: dict[tuple, EvalResult] = {}
    for suite in (results.suites if results else {}).values():
        facts = card_facts(suite.name)
        if not facts.of_model:
            continue
        files = {one.name: one for one in suite.data}
        for one in suite.measurements:
            data = one_line(one.data or " + ".join(list(files)[:3]))
            if one.value is None or not data or is_baseline(one) or facts.compares(one.metric):
                continue
            file = files.get(data)
            described = f"{suite.name}: {one.metric}" + (f" ({one.method})" if one.method else "")
            made = EvalResult(
                task_type=facts.task or PIPELINES.get(model.auto_class, "feature-extraction"),
                dataset_type=re.sub(r"[^\w.-]+", "-", data).strip("-") or "data",
                dataset_name=data,
                dataset_split=one_line(file.split) or None if file else None,
                dataset_args={"sha256": file.sha256} if file and file.sha256 else None,
                metric_type=one_line(one.metric),
                metric_value=float(f"{one.value:.6g}"),
                metric_name=one_line(described),
            )
            key = (*made.unique_identifier, made.metric_type, made.metric_name)
            found.setdefault(key, made)
    return list(found.values())


# -- sections --------------------------------------------------------------------------------------------------------


def _use(model: ModelFacts) -> dict[str, Any]:
    """The edit that the two lines show: the default steering, else a concept's direction, else that of a latent."""
    steering = bool((model.config.get("steering") or {}).get("edits"))
    concept = next(((sae.number, name) for sae in model.saes for name in sae.concepts), None)
    sae, feature = concept if concept else (0, 0)
    shown = python(feature) if isinstance(feature, str) else feature
    edit = f'{{"sae": {sae}, "feature": {shown}, "op": "direction", "value": 0.1, "unit": "norm"}}'
    return {"edit": edit, "default": steering, "tokenizer": "tokenizer_config.json" in model.files}


def _labels(model: ModelFacts) -> list[tuple[str, str]]:
    """Of a classifier, by number; none where they are not named."""
    found = model.config.get("id2label") if model.auto_class == "AutoModelForSequenceClassification" else None
    named = {str(number): str(label) for number, label in (found or {}).items()}
    return [] if all(label == f"LABEL_{number}" for number, label in named.items()) else list(named.items())


def _features(
    model: ModelFacts,
    annotations: Mapping[int, FeatureAnnotation],
    annotated: int,
    results: Results | None,
    limit: int,
) -> tuple[list[dict[str, Any]], int]:
    """Rows of the table of features, and how many more there are."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}

    def row(sae: int, feature: int) -> dict[str, Any]:
        empty = {"sae": sae, "feature": feature, "names": [], "meaning": "", "judged": "", "measured": []}
        return rows.setdefault((sae, feature), empty)

    for sae in model.saes:
        for name, feature in sae.concepts.items():
            row(sae.number, feature)["names"].append(name)
        for feature, name in sae.feature_names.items():
            names = row(sae.number, feature)["names"]
            if name not in names:
                names.append(name)
    for sae, feature, one in _detections(model, results):
        row(sae, feature)["measured"].append(one)
    for feature, annotation in annotations.items():
        if annotation.meaning or (annotated, feature) in rows:
            row(annotated, feature).update(meaning=annotation.meaning, judged=annotation.judged)
    order = sorted(rows, key=lambda key: (not rows[key]["names"], not rows[key]["measured"], key))
    return [rows[key] for key in order[:limit]], max(0, len(order) - limit)


def _detections(model: ModelFacts, results: Results | None) -> list[tuple[int, int, Measurement]]:
    """Measured detection: (SAE, feature, measurement)."""
    found = []
    for suite in (results.suites if results else {}).values():
        shown = card_facts(suite.name).of_features
        for one in suite.measurements:
            of = method_of(one)
            if one.value is None or one.metric not in shown or of.feature is None or of.kind in NOT_A_FEATURE:
                continue
            for sae in model.saes:
                named = {**{name: latent for latent, name in sae.feature_names.items()}, **sae.concepts}
                feature = named.get(of.feature) if isinstance(of.feature, str) else of.feature
                if of.sae in (None, sae.number) and feature is not None and feature < sae.d_sae:
                    found.append((sae.number, feature, one))
                    break
    return found


def _steering_lines(steering: Mapping[str, Any] | None) -> list[str]:
    """What a default steering does, an edit a line."""
    lines = []
    for edit in (steering or {}).get("edits", ()):
        if "scores" in edit:
            lines.append(
                f"SAE {edit.get('sae', 0)}: the whole code re-weighted by scores ({edit.get('mode', 'swap')})"
            )
            continue
        value = "" if edit.get("value") is None else f" {number(edit['value'])}"
        units = {"max": " times the latent's typical maximum", "norm": " times the hidden state's norm"}
        unit = units.get(edit.get("unit", ""), "")
        what = f"SAE {edit.get('sae', 0)}, feature {edit.get('feature')}: {edit.get('op', 'scale')}{value}{unit}"
        lines.append(what)
    if lines and steering:
        positions = steering.get("positions", "all")
        lines.append(f"at positions: {positions if isinstance(positions, str) else list(positions)}")
    return lines


def _examples(results: Results | None, limit: int) -> list[dict[str, Any]]:
    """Ways to steer, each with what it gained and cost and a few texts: the samples of the suite `steering`."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for suite in (results.suites if results else {}).values():
        for sample in suite.samples:
            if not {"prompt", "unsteered", "steered"} <= set(sample):
                continue
            method, goal = str(sample.get("method", "")), str(sample.get("goal", ""))
            group = groups.setdefault(
                (suite.name, method, goal),
                {"method": method, "goal": goal, "setting": str(sample.get("setting", "")), "rows": []},
            )
            if len(group["rows"]) < limit:
                group["rows"].append({key: str(sample[key]) for key in ("prompt", "unsteered", "steered")})
            named = f"{method} ({goal})" if goal else method
            group["costs"] = [
                {"metric": metric, "unsteered": _value(suite, metric, "none"), "steered": _value(suite, metric, named)}
                for metric in ("concept_score", "perplexity", "repetition")
            ]
    return list(groups.values())


def _value(suite: SuiteResult | None, metric: str, method: str) -> float | None:
    try:
        return suite.value(metric, method) if suite else None
    except KeyError:
        return None


def _suites(results: Results | None) -> list[dict[str, Any]]:
    return [
        {
            "name": suite.name,
            "tables": result_tables(suite),
            "notes": suite.notes,
            "intervals": sorted({one.interval for one in suite.measurements if one.interval}),
        }
        for suite in (results.suites if results else {}).values()
    ]


def _data(results: Results | None) -> list[Any]:
    found = {
        (one.name, one.sha256): one for suite in (results.suites if results else {}).values() for one in suite.data
    }
    return list(found.values())


def _trained_on(saes: Sequence[SaeFacts]) -> list[str]:
    """What the SAEs' own metadata says of their origin, a line an SAE that says something."""
    lines = []
    for sae in saes:
        keys = ("training_data", "dataset", "dataset_path", "origin", "source", "license", "licence")
        told = [f"{key.replace('_', ' ')}: {sae.metadata[key]}" for key in keys if sae.metadata.get(key)]
        if sae.metadata.get("training_texts"):
            told.append(f"{sae.metadata['training_texts']} texts")
        if told:
            lines.append(f"SAE {sae.number}: {'; '.join(told)}")
    return lines
