"""The verbs `feature-table`, `steer-feature` and `ask-features`; `reduce-bias` is in bias.py."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .annotate import open_client
from .errors import guarded

PlaceOption = Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")]
DtypeOption = Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("feature-table")(feature_table)
    app.command("steer-feature")(steer_feature)
    app.command("ask-features")(ask_features)


def feature_table(
    model: Annotated[str, typer.Argument(help="Base model with an unembedding: a folder or a Hub id.")],
    sae: Annotated[str, typer.Option(help="The SAE, as attach takes it.")],
    out: Annotated[Path, typer.Option(help="Folder of features.parquet, .csv and .json, words.tsv and facts.json.")],
    top_k: Annotated[int, typer.Option(help="Tokens at each end.")] = 10,
    fold_norm: Annotated[
        bool, typer.Option("--fold-norm/--keep-norm", help="Count the gain of the final norm in the unembedding.")
    ] = True,
    centre: Annotated[
        bool, typer.Option("--centre/--no-centre", help="Take the mean over the vocabulary out of the unembedding.")
    ] = True,
    match: Annotated[
        str | None, typer.Option(help="Regular expression: only tokens that match count, e.g. '^ ?[a-z]+$'.")
    ] = None,
    spans: Annotated[
        str | None, typer.Option(help="Folder that the verb spans wrote: its strongest contexts join the table.")
    ] = None,
    contexts: Annotated[int, typer.Option(help="Of each feature, from --spans.")] = 5,
    text: Annotated[str | None, typer.Option(help="Text to count firing on, as harvest takes it.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of that text.")] = 100_000,
    max_length: Annotated[int, typer.Option(help="Tokens of a row of text; longer ones are cut.")] = 256,
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    coherence: Annotated[
        str, typer.Option(help="By the model's input or output embeddings, none, or a text file of word vectors.")
    ] = "input",
    place: PlaceOption = None,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    model_dtype: DtypeOption = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass over --text.")] = 4096,
) -> None:
    """What each feature writes: statistics of its logit weights, top and bottom tokens, frequency, contexts."""
    guarded(_feature_table, dict(locals()))


def _feature_table(s: dict[str, Any], console: Any) -> None:
    import time
    from dataclasses import replace

    from tqdm import tqdm

    from ..create_training_data.annotation_tables import write_annotations
    from ..create_training_data.feature_questions import annotation_rows
    from ..create_training_data.span_files import read_spans
    from ..evaluation.coherence import KINDS, read_vectors, token_coherence, word_coherence
    from ..evaluation.feature_table import count_firing, feature_table, firing_frequency
    from ..evaluation.feature_table_files import write_feature_table
    from .loading import load_base, load_sae

    if s["coherence"] not in (*KINDS, "none") and not Path(s["coherence"]).is_file():
        raise ValueError(f"--coherence must be input, output, none or a file. Received: {s['coherence']!r}.")
    found_spans = None if s["spans"] is None else read_spans(s["spans"])
    sae = load_sae(s["sae"], s["place"])
    base, tokenizer, name = load_base(s["model"], s["revision"], s["model_dtype"])
    sae = sae.to(base.device)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if s["text"] is not None and limit and s["max_length"] > limit:
        raise ValueError(f"--max-length must be at most {limit} for this model. Received: {s['max_length']}.")
    start = time.perf_counter()
    options = {one: s[one] for one in ("top_k", "fold_norm", "centre", "match")}
    with tqdm(total=sae.config.d_sae, unit="features") as bar:
        table = feature_table(base, tokenizer, sae, **options, report=bar.update)
    seconds = time.perf_counter() - start
    console.print(f"{len(table):,} features x {table.facts['tokens']:,} tokens in {seconds:.1f} s")
    facts = {**table.facts, "model": name, "sae": s["sae"], "seconds": seconds, "coherence": s["coherence"]}
    weights = table.weights
    if s["coherence"] in KINDS:
        scores = token_coherence(base, weights.top_ids, weights.top_weights, embedding=s["coherence"])
        table = replace(table, coherence=scores)
    elif s["coherence"] != "none":
        wanted = sorted({"".join(c for c in t.lower() if "a" <= c <= "z") for row in table.top_tokens for t in row})
        vectors = read_vectors(s["coherence"], wanted)
        table = replace(table, coherence=word_coherence(table.top_tokens, weights.top_weights, vectors))
    if s["text"] is not None:
        counts, tokens = count_firing(sae, _hidden_states(s, base, tokenizer, sae))
        frequency, dead = firing_frequency(counts, tokens)
        table = replace(table, log10_frequency=frequency, dead=dead)
        facts |= {"text": s["text"], "text_tokens": tokens}
    if found_spans is not None:
        if found_spans and max(found_spans) >= len(table):
            raise ValueError(
                f"Spans must be of this SAE, of {len(table):,} features. Received: feature {max(found_spans)} in "
                f"{s['spans']!r}."
            )
        best = [found_spans.get(i, [])[: s["contexts"]] for i in range(len(table))]
        table = replace(
            table,
            contexts=[[one.span for one in row] for row in best],
            context_scores=[[one.score for one in row] for row in best],
        )
        facts["spans"] = s["spans"]
    table = replace(table, facts=facts)
    files = write_feature_table(table, s["out"])
    rows = annotation_rows(table.top_tokens, table.contexts)
    files.append(write_annotations(rows, s["out"] / "words.tsv", ("FeatureID", "Words")))
    _show_table(table, console)
    console.print(" ".join(str(file) for file in files), markup=False)


def _hidden_states(s: dict[str, Any], base: Any, tokenizer: Any, sae: Any) -> Iterator[Any]:
    """Hidden states (n, d_in) of a text, block by block, without first tokens."""
    import torch
    from tqdm import tqdm

    from ..latents.hidden_states import HiddenStateReader
    from ..latents.texts import open_text

    reader = HiddenStateReader(base, [sae.config.read_at])
    source = open_text(s["text"], column=s["column"], txt_rows=s["txt_rows"])
    left = s["max_tokens"]
    with tqdm(total=left, unit="tok", unit_scale=True) as bar:
        for _, rows in source.blocks(128, itertools.count()):
            texts = [text for text in rows.texts if text.strip()]
            ids = (
                tokenizer(texts, truncation=True, max_length=s["max_length"], verbose=False)["input_ids"]
                if texts
                else []
            )
            keep = [torch.arange(1, len(row)) for row in ids]
            kept = []
            for places in keep:
                kept.append(places[: max(0, left)])
                left -= len(kept[-1])
            if any(len(places) for places in kept):
                states = reader.read([torch.tensor(row) for row in ids], kept, tokens_at_once=s["tokens_at_once"])[
                    sae.config.read_at
                ]
                bar.update(len(states))
                yield states
            if left <= 0:
                return


def _show_table(table: Any, console: Any) -> None:
    from rich.table import Table

    columns = {name: getattr(table.weights, name) for name in ("mean", "std", "skewness", "kurtosis")}
    columns |= {n: getattr(table, n) for n in ("log10_frequency", "coherence") if getattr(table, n) is not None}
    shown = Table("", "least", "5 %", "median", "95 %", "most", title=f"{len(table):,} features")
    for name, values in columns.items():
        known = values[~values.isnan()]
        if len(known):
            at = known.new_tensor([0, 0.05, 0.5, 0.95, 1])
            shown.add_row(name, *(f"{value:.4g}" for value in known.quantile(at).tolist()))
    console.print(shown)
    if table.dead is not None:
        console.print(f"{int(table.dead.sum()):,} features fired on none of {table.facts['text_tokens']:,} tokens")


def steer_feature(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What is continued.")],
    sae: Annotated[str, typer.Option(help="The SAE, as attach takes it.")],
    feature: Annotated[str, typer.Option(help="The latent's number, or its name in the SAE.")],
    coefficient: Annotated[float, typer.Option(help="How much of its decoder row is added.")],
    unit: Annotated[
        str, typer.Option(help="absolute: times the decoder row; norm: in lengths of the hidden state; max.")
    ] = "absolute",
    layer: Annotated[int | None, typer.Option(help="Where to steer; it must be the SAE's own.")] = None,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="As the original: all tokens of the prompt but the last, no others.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Continuations with steering, and as many without.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Of each.")] = 50,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens, as many as have this probability.")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken off a token's logit for each occurrence.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of both ways.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message of a chat.")] = False,
    place: PlaceOption = None,
    model_dtype: DtypeOption = "auto",
) -> None:
    """Steer with one feature: the same prompt continued with and without, side by side."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.feature_steering import check_layer, side_by_side, vector_steering
    from ..evaluation.settings import GenerationSettings
    from ..modeling import SaeForCausalLM
    from .errors import fail
    from .loading import load_base, load_sae

    try:
        autoencoder = load_sae(sae, place)
        check_layer(autoencoder.config, layer)
        number = autoencoder.config.resolve_feature(int(feature) if feature.isdecimal() else feature)
        steering = vector_steering(number, coefficient, unit=unit, legacy=legacy)
        base, tokenizer, _ = load_base(model, None, model_dtype)
        found = side_by_side(
            SaeForCausalLM.from_base(base, saes=[autoencoder]).eval(),
            tokenizer,
            prompt,
            steering,
            GenerationSettings(max_new_tokens, temperature, top_p, samples, chat, seed=seed),
            frequency_penalty=frequency_penalty,
        )
    except (ValueError, OSError, TypeError, ImportError) as error:
        fail(error, code=2)
    table = Table(f"feature {feature}, {coefficient:g} {unit}", "unsteered", show_lines=True)
    for steered, unsteered in zip(*found, strict=True):
        table.add_row(steered.replace("[", r"\["), unsteered.replace("[", r"\["))
    Console().print(table)


def ask_features(
    features: options.Table,
    question: Annotated[str, typer.Option(help="Answered for each feature, e.g. 'Does it concern gender?'.")],
    out: Annotated[Path, typer.Option(help="The .csv file to write: feature, answer, reason, failure.")],
    answers: Annotated[str, typer.Option(help="The answers to choose from.")] = "yes,maybe,no",
    model: options.LLMModel = None,
    base_url: options.BaseUrl = None,
    local_model: options.LocalModel = None,
    at_once: Annotated[int, typer.Option(help="Features of a request; small models need 1.")] = 20,
    api_key_env: options.KeyEnv = "OPENAI_API_KEY",
    concurrency: options.Concurrency = 8,
    max_tokens_total: options.MaxTokensTotal = None,
    max_cost: options.MaxCost = None,
    price_in: options.PriceIn = None,
    price_out: options.PriceOut = None,
    max_attempts: options.MaxAttempts = 6,
    timeout: options.Timeout = 120.0,
    cache: options.Cache = None,
    batch_size: options.BatchSize = 8,
    first: options.First = None,
    dry_run: options.DryRun = False,
) -> None:
    """Ask a language model one question about each feature of a table, many features to a request."""
    settings = {**locals(), "submit": False, "batch_file": None, "batch_results": None}
    from collections import Counter

    from rich.console import Console

    from ..create_training_data.annotation_tables import read_annotations
    from ..create_training_data.feature_questions import ask_about_features, question_requests, write_answers
    from ..create_training_data.llm_client import ServiceRefused
    from .errors import fail

    console = Console(soft_wrap=True, highlight=False)
    labels = tuple(label.strip() for label in answers.split(","))
    size = 1 if local_model is not None else at_once
    try:
        rows = read_annotations(features)[:first]
        with open_client(settings) as client:
            requests = question_requests(question, rows, labels, at_once=size)
            console.print(f"{client.model}: {client.estimate(requests)}", markup=False)
            if dry_run:
                return
            found = ask_about_features(question, rows, client, labels, at_once=size)
        write_answers(found, out)
    except ServiceRefused as error:
        fail(f"{error}. What was answered is kept: the same command goes on from there.", code=1)
    except (ValueError, OSError, ImportError, TypeError) as error:
        fail(error, code=2)
    counts = Counter(row.answer or "no answer" for row in found)
    console.print(", ".join(f"{name}: {count:,}" for name, count in counts.most_common()), markup=False)
    positive = [row.feature for row in found if row.answer == labels[0]]
    console.print(f"{labels[0]}: features {', '.join(map(str, positive[:50])) or 'none'}", markup=False)
    console.print(str(out), markup=False)
    if failures := [row.failure for row in found if row.failure]:
        fail(f"{len(failures):,} of {len(found):,} features have no answer, one because: {failures[0]}", code=1)
