"""The verb `dashboard`; `space` is in space.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(dashboard)


def dashboard(
    out: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("dashboard.html"),
    table: Annotated[Path | None, typer.Option(help="Folder or table that feature-table wrote.")] = None,
    spans: Annotated[str | None, typer.Option(help="Folder that spans wrote.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Table that explain or judge wrote.")] = None,
    judgement: Annotated[int, typer.Option(help="Which of several judgements says what is intended, from 0.")] = 0,
    results: Annotated[list[Path] | None, typer.Option(help="results.json of evaluate. Repeatable.")] = None,
    sae_number: Annotated[int, typer.Option(help="Of the SAE in the model of --results.")] = 0,
    samples: Annotated[
        Path | None, typer.Option(help="Steered texts, .json or .jsonl: feature, strength, prompt, text, perplexity.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="Which are shown, e.g. 1,2,5-90. [default: all]")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    sae: Annotated[
        str | None, typer.Option(help="The SAE, as attach takes it: for neighbours and names. [default: none]")
    ] = None,
    neighbours: Annotated[int, typer.Option(help="Of each feature, with --sae; 0: none.")] = 6,
    model: Annotated[str | None, typer.Option(help="Base model, for --texts and --steer.")] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="Text to read with the model: histograms, and colours if it is the text of --spans."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of --texts for histograms, up to a whole block of rows.")] = 100_000,
    after: Annotated[int, typer.Option(help="Tokens shown behind the strongest one, with --texts.")] = 8,
    column: Annotated[str | None, typer.Option(help="Column of the text. [default: as in --spans, or text]")] = None,
    txt_rows: Annotated[
        str | None, typer.Option(help="A row of a .txt file: paragraph, line or file. [default: as in --spans]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. [default: as in --spans, or 256]")
    ] = None,
    steer: Annotated[str | None, typer.Option(help="Features to write steering samples for, e.g. 3,17.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="What is continued with --steer, one a line.")] = None,
    strengths: Annotated[str, typer.Option(help="Of --steer, in norms of the hidden state.")] = "-0.4,-0.2,0.2,0.4",
    new_tokens: Annotated[int, typer.Option(help="Of a continuation.")] = 40,
    save_samples: Annotated[Path | None, typer.Option(help="Write the samples of --steer here too, .json.")] = None,
    compress: Annotated[
        bool, typer.Option("--compress/--plain", help="Details as gzip, or as JSON that grep can read.")
    ] = True,
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of --steer.")] = 0,
) -> None:
    """One HTML page of an SAE's features: search, sort, histograms, spans, labels, steering; no server needed."""
    settings = dict(locals())
    from .errors import guarded

    guarded(_dashboard, settings)


def _dashboard(s: dict[str, Any], console: Any) -> None:
    from tqdm import tqdm

    from ..create_training_data.annotation_tables import feature_annotations, read_annotations
    from ..evaluation.feature_table_files import read_feature_table
    from ..evaluation.results import read_results
    from ..hub_cards.dashboard import write_dashboard
    from ..hub_cards.dashboard_data import DashboardData, measures_of, samples_of

    if not any(s[name] for name in ("table", "spans", "sae", "annotations", "results", "samples")):
        raise ValueError("Give at least --table, --spans or --sae.")
    chosen = None if s["features"] is None else feature_list(s["features"])
    steered = [] if s["steer"] is None else feature_list(s["steer"])
    table = None if s["table"] is None else read_feature_table(s["table"])
    annotations = [] if s["annotations"] is None else read_annotations(s["annotations"])
    records = [read_results(path) for path in s["results"] or ()]
    samples = [] if s["samples"] is None else _read_samples(s["samples"])
    named = {} if table is None else table.facts
    s["sae_name"], s["model_name"] = s["sae"] or named.get("sae"), s["model"] or named.get("model")
    base, tokenizer, sae = _models(s, bool(steered))
    _check_numbers([*(chosen or ()), *steered], table, sae)
    data: dict[str, Any] = {"table": table, "features": chosen, "results": _merged(records)}
    data["annotations"] = {
        f: one for f, one in feature_annotations(annotations, s["judgement"]).items() if one.meaning or one.judgements
    }
    data["facts"] = {**_facts(named, sae, s), **_spans(s, base, tokenizer, sae, chosen, data)}
    if sae is not None:
        data["names"] = _names(sae.config)
        if table is None and chosen is None:
            data["features"] = list(range(sae.config.d_sae))
        if s["sae"] is not None and s["neighbours"]:
            data["neighbours"] = _neighbours(sae, s["neighbours"], data["features"] or range(sae.config.d_sae))
    if steered:
        samples += _steer_samples(s, steered, base, tokenizer, sae)
    suites = [suite for record in records for suite in record.suites.values()]
    shown = [*samples, *(row for one in suites for row in one.samples if "steered" in row)]
    data["samples"] = samples_of(shown, sae=s["sae_number"])
    data["measures"] = {}
    for record in records:
        for name, column in measures_of(record, sae=s["sae_number"], names=data.get("names")).items():
            data["measures"].setdefault(name, {}).update(column)
    if chosen is not None:
        for name in ("names", "spans", "annotations", "samples"):
            data[name] = {f: value for f, value in data.get(name, {}).items() if f in set(chosen)}
    of = [data["facts"][name] for name in ("Base model", "Place") if name in data["facts"]]
    page = DashboardData(s["title"] or " ".join(["Features", *(["of", ", ".join(of)] if of else [])]), **data)
    n_features = len(page.shown())
    with tqdm(total=n_features, unit="features", desc="page") as bar:
        write_dashboard(page, s["out"], compress=s["compress"], report=bar.update)
    console.print(f"{s['out']}: {n_features:,} features, {s['out'].stat().st_size / 1e6:.1f} MB", markup=False)


def _models(s: dict[str, Any], steers: bool) -> tuple[Any, Any, Any]:
    """Base, tokenizer and SAE; None for what is not needed."""
    from .loading import load_base, load_sae

    if steers and s["prompts"] is None:
        raise ValueError("--steer needs --prompts, a file with one a line.")
    if not steers and s["texts"] is None:
        return None, None, None if s["sae"] is None else load_sae(s["sae"], s["place"])
    if not (s["sae_name"] and s["model_name"]):
        raise ValueError("--texts and --steer need --model and --sae. Received: no table that names them.")
    sae = load_sae(s["sae_name"], s["place"])
    base, tokenizer, _ = load_base(s["model_name"], None, s["model_dtype"])
    return base, tokenizer, sae.to(base.device)


def _check_numbers(features: Sequence[int], table: Any, sae: Any) -> None:
    sizes = [len(table)] if table is not None else []
    sizes += [sae.config.d_sae] if sae is not None else []
    if len(set(sizes)) > 1:
        raise ValueError(f"--table and --sae must be of one SAE. Received: {sizes[0]} and {sizes[1]} features.")
    if sizes and (wrong := [number for number in features if number >= sizes[0]]):
        raise ValueError(f"The SAE has {sizes[0]} features, numbered from 0. Received: {wrong[0]}.")


def _neighbours(sae: Any, k: int, features: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    from ..evaluation.decoder_neighbours import decoder_neighbours

    near = decoder_neighbours(sae.W_dec, min(k, sae.config.d_sae - 1), features)
    pairs = zip(features, near.latents.tolist(), near.cosines.tolist(), strict=True)
    return {feature: list(zip(latents, cosines, strict=True)) for feature, latents, cosines in pairs}


def _spans(
    s: dict[str, Any], base: Any, tokenizer: Any, sae: Any, chosen: Any, data: dict[str, Any]
) -> dict[str, str]:
    """Spans and histograms into `data`; what is to be said of the text."""
    import torch
    from tqdm import tqdm

    from ..create_training_data.span_activations import read_span_settings, read_span_tokens
    from ..create_training_data.span_files import read_spans, read_table
    from ..create_training_data.span_tokens import SpanSettings
    from ..evaluation.activation_histograms import ActivationHistograms
    from ..hub_cards.dashboard_data import OWN_ACTIVATION, SpanShown
    from ..latents.texts import open_text

    if s["texts"] is None:
        if s["spans"] is not None:
            found = read_spans(s["spans"])
            data["spans"] = {
                f: [SpanShown(o.score, [o.span], text=o.text_id) for o in few] for f, few in found.items()
            }
        return {}
    settings, known = SpanSettings(), {}
    table: dict[str, Any] = {n: torch.zeros(0, dtype=torch.long) for n in ("feature", "text_id", "score", "position")}
    if s["spans"] is not None:
        settings, known = read_span_settings(s["spans"])
        table = read_table(f"{s['spans'].rstrip('/')}/spans.parquet")
        if chosen is not None:
            rows = torch.isin(table["feature"], torch.tensor(chosen)).nonzero()[:, 0]
            table = {n: [c[i] for i in rows.tolist()] if isinstance(c, list) else c[rows] for n, c in table.items()}
    elif s["max_length"] is not None:
        settings = SpanSettings(max_length=s["max_length"])
    source = open_text(
        s["texts"],
        column=s["column"] or known.get("column", "text"),
        txt_rows=s["txt_rows"] or known.get("txt_rows", "paragraph"),
        split=known.get("split", "train"),
        subset=known.get("subset"),
    )
    if known.get("max_rows"):
        source = source.first(known["max_rows"])
    _check_source(known, source.facts)
    histograms = ActivationHistograms(sae.config.d_sae)
    with tqdm(unit="tok", unit_scale=True, desc="text") as bar:
        found = read_span_tokens(
            base, tokenizer, sae, source, settings, table,
            after=s["after"], max_tokens=s["max_tokens"], visit=histograms.add, report=bar.update,
        )  # fmt: skip
    shown: dict[int, list[SpanShown]] = {}
    for feature, score, one in zip(table["feature"].tolist(), table["score"].tolist(), found, strict=True):
        shown.setdefault(feature, []).append(SpanShown(score, one.tokens, one.activations, one.peak, one.text))
    data["spans"], data["histograms"] = shown, histograms
    rectified = "the rectified pre-activation, whatever the SAE's activation is"
    data["activation"] = {"relu": rectified, "own": OWN_ACTIVATION}[settings.activation] if shown else ""
    return {"Text": f"{short_name(s['texts'])}, {histograms.n_tokens:,} tokens for histograms"}


def _check_source(known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [key for key in known if key != "text" and known[key] != now.get(key)]
    if different:
        told = "; ".join(f"{key} was {known[key]!r} and is {now.get(key)!r}" for key in different)
        raise ValueError(f"--texts must be the text that --spans was collected on. Received: {told}.")


def _steer_samples(
    s: dict[str, Any], features: list[int], base: Any, tokenizer: Any, sae: Any
) -> list[dict[str, Any]]:
    import json

    from tqdm import tqdm

    from ..create_training_data.shards import Store
    from ..evaluation.steering_samples import steering_samples
    from ..modeling import SaeForCausalLM

    prompts = [line for line in s["prompts"].read_text(encoding="utf-8").splitlines() if line.strip()]
    strengths = [float(value) for value in s["strengths"].split(",")]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    with tqdm(total=len(prompts) * (1 + len(features) * len(strengths)), unit="texts", desc="steering") as bar:
        rows = steering_samples(
            model, tokenizer, prompts, features, strengths,
            new_tokens=s["new_tokens"], seed=s["seed"], report=bar.update,
        )  # fmt: skip
    if s["save_samples"] is not None:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        Store(s["save_samples"].parent).put(
            s["save_samples"].name, lambda path: path.write_text(text + "\n", encoding="utf-8")
        )
    return rows


def feature_list(text: str) -> list[int]:
    """Numbers of "1,2,5-90", in this order, each once.

    Raises:
        ValueError: it is no such list.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"Features are numbers and ranges, such as 1,2,5-90. Received: {part!r} in {text!r}.")
        found.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return list(found)


def short_name(name: str) -> str:
    """A Hub id as it is; of a path the last folder, since others have no use for the rest."""
    return name if not Path(name).is_absolute() and Path(name).parts[:1] != ("..",) else Path(name).name


def _read_samples(path: Path) -> list[dict[str, Any]]:
    import json

    text = path.read_text(encoding="utf-8")
    try:
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise ValueError(f"Expected JSON in --samples. Received: {str(path)!r}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--samples must hold a list of objects. Received: {str(path)!r} with something else.")
    return rows


def _merged(records: Sequence[Any]) -> Any:
    merged: Any = records[0] if records else None
    for record in records[1:]:
        for suite in record.suites.values():
            merged = merged.with_suite(suite)
    return merged


def _names(config: Any) -> dict[int, str]:
    names = {int(number): str(name) for number, name in config.feature_names.items() if str(number).isdecimal()}
    return {**names, **{latent: name for name, latent in config.concepts.items()}}


def _facts(named: Mapping[str, Any], sae: Any, s: dict[str, Any]) -> dict[str, str]:
    found = {"Base model": s["model_name"], "SAE": s["sae_name"]}
    shown = {name: short_name(str(value)) for name, value in found.items() if value}
    if place := named.get("place") or (sae is not None and sae.config.placed and sae.config.read_at):
        shown["Place"] = str(place)
    if sae is not None:
        shown["Activation"] = sae.config.activation + (f", k = {sae.config.k}" if sae.config.k else "")
    if named.get("text"):
        shown["Frequencies"] = f"{short_name(str(named['text']))}, {named['text_tokens']:,} tokens"
    return shown
