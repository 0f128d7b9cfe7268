"""The verb `align-topic`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .errors import guarded

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.topic_alignment import TextEvidence, TopicUncertainty, UncertaintyThreshold
    from ..evaluation.topic_generation import TopicComparison
    from ..latents.text_states import TextStates
    from ..training.topic_scores import TopicScores


_texts = partial(typer.Option, rich_help_panel="Texts")
_method = partial(typer.Option, rich_help_panel="Method")
_embedding = partial(typer.Option, rich_help_panel="Embedding and uncertainty")
_measuring = partial(typer.Option, rich_help_panel="Measuring")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="align-topic")(align_topic)


def align_topic(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    reference: Annotated[str, typer.Option(help="Texts of all kinds: .csv, .jsonl, .parquet, .txt, a Hub id.")],
    topic: Annotated[str, typer.Option(help="Texts of the topic.")],
    sae: Annotated[str, typer.Option(help="The SAE whose latents are scored, as attach takes it.")],
    out: Annotated[Path, typer.Option(help="Folder of scores, steering and report.")] = Path("outputs/topic"),
    reference_column: Annotated[str | None, _texts(help="[default: text, or the only column]")] = None,
    topic_column: Annotated[str | None, _texts(help="[default: text, or the only column]")] = None,
    topic_test: Annotated[
        str | None, _texts(help="Other texts of the topic, that similarity is measured to. [default: --topic]")
    ] = None,
    topic_test_column: Annotated[str | None, _texts(help="[default: text, or the only column]")] = None,
    method: Annotated[str, _method(help="That is saved: swap, weight, clamp or SAE.")] = "swap",
    compare: Annotated[
        str, _method(help="Methods to measure beside it; a setting may follow: swap:replace, swap:4.")
    ] = "SAE,weight,clamp",
    keep_error: Annotated[
        bool,
        _method("--keep-error/--replace", help="Keep what the SAE does not reconstruct, or, as the paper, not."),
    ] = True,
    strength: Annotated[float, _method(help="Exponent of the scores; 1 is the paper's.")] = 1.0,
    summary: Annotated[str, _method(help="Of a reference text's latents: avg, max or counts.")] = "avg",
    clamp_top: Annotated[int, _method(help="Of clamp: how many latents.")] = 5,
    clamp_value: Annotated[float, _method(help="Of clamp: what is added to each.")] = 10.0,
    clamp_unit: Annotated[str, _method(help="Of clamp: absolute, max or norm.")] = "absolute",
    all_positions: Annotated[bool, _method("--all-positions", help="Steer the first token too.")] = False,
    scores: Annotated[Path | None, _method(help="A saved table of scores, in place of new ones.")] = None,
    embedder: Annotated[
        str | None, _embedding(help="sentence-transformers model. [default: all-MiniLM-L6-v2]")
    ] = None,
    long_texts: Annotated[str, _embedding(help="Beyond the embedder's limit: truncate, or chunks.")] = "truncate",
    embedding_tokens: Annotated[int | None, _embedding(help="That limit. [default: the embedder's]")] = None,
    quantile: Annotated[float, _embedding(help="Of the reference texts' own topics, for the warning.")] = 0.95,
    prompts: Annotated[
        str | None, _measuring(help="Texts to continue. [default: beginnings of reference texts]")
    ] = None,
    prompts_column: Annotated[str | None, _measuring(help="[default: text, or the only column]")] = None,
    prompt_count: Annotated[int, _measuring(help="Of prompts; 0: nothing is generated.")] = 32,
    prompt_tokens: Annotated[int, _measuring(help="Of each beginning.")] = 12,
    new_tokens: Annotated[int, _measuring(help="Of a continuation.")] = 40,
    top_k: Annotated[int, _measuring(help="Draw each token from so many; 1 is greedy.")] = 5,
    topic_prompt: Annotated[
        str | None,
        _measuring(help="Put before each prompt by the baseline. [default: the beginning of a topic text]"),
    ] = None,
    lora_epochs: Annotated[float, _measuring(help="Also fine-tune on the topic's texts with LoRA.")] = 0.0,
    lora_rank: Annotated[int, _measuring(help="Of LoRA.")] = 8,
    acceptability: Annotated[
        str | None, _measuring(help="A text classifier, e.g. of CoLA. [default: SLOR under the base]")
    ] = None,
    acceptability_label: Annotated[str | None, _measuring(help="Its label for acceptable.")] = None,
    save_model: Annotated[bool, typer.Option("--save-model", help="Save the model, steered by default.")] = False,
    seed: Annotated[int, typer.Option(help="Of draws and of the fine-tuning.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a text that the model reads; the rest is cut.")] = 256,
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 4096,
) -> None:
    """Steer towards the topic of some texts, and say how far to trust it."""
    guarded(_align, dict(locals()))


def _align(s: dict[str, Any], console: Any) -> None:
    from ..create_training_data.sentence_embeddings import SentenceEmbedder
    from ..evaluation.topic_alignment import topic_uncertainty
    from ..latents.hidden_states import HiddenStateReader
    from ..latents.text_states import read_text_states
    from ..latents.texts import read_column
    from ..modeling import SaeForCausalLM
    from ..training.topic_scores import SUMMARIES, read_topic_scores, topic_distances, topic_scores
    from .loading import load_base, load_sae

    variants = [_variant(s, name) for name in dict.fromkeys([s["method"], *s["compare"].split(",")]) if name]
    if s["summary"] not in SUMMARIES:
        raise ValueError(f"--summary must be one of {', '.join(SUMMARIES)}. Received: {s['summary']!r}.")
    texts = {part: read_column(s[part], s[f"{part}_column"]) for part in ("reference", "topic")}
    test = read_column(s["topic_test"], s["topic_test_column"]) if s["topic_test"] else texts["topic"]
    sae = load_sae(s["sae"], s["place"])
    base, tokenizer, name = load_base(s["model"], None, s["model_dtype"])
    model: Any = SaeForCausalLM.from_base(base, saes=[sae.to(base.device)]).eval()
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if s["max_length"] < 2 or (limit and s["max_length"] > limit):
        raise ValueError(f"--max-length must be from 2 to {limit} for this model. Received: {s['max_length']}.")
    embedder = SentenceEmbedder(
        s["embedder"], long_texts=s["long_texts"], max_tokens=s["embedding_tokens"], say=console.print
    )
    reader, states = HiddenStateReader(base, [sae.config.read_at]), {}
    begin = time.perf_counter()
    for part, found in texts.items():
        states[part] = read_text_states(
            reader,
            tokenizer,
            found,
            max_tokens=s["max_length"],
            max_norm=states["reference"].max_norm if states else None,
            tokens_at_once=s["tokens_at_once"],
            progress=f"hidden states: {part}",
        )
        if states[part].left_out:
            console.print(f"{states[part].left_out} {part} text(s) of a single token are left out")
    embeddings = {part: embedder.embed(states[part].texts) for part in states}
    centre = states["reference"].hidden.double().mean(0)
    evidence = {part: _evidence(sae, states[part], embeddings[part], s["summary"], centre) for part in states}
    given, distances = evidence["reference"], topic_distances(embeddings["reference"], embeddings["topic"])
    if s["scores"] is None:
        found = topic_scores(given.summaries, distances)
    else:
        found = read_topic_scores(s["scores"], sae.config.d_sae)
    seconds = time.perf_counter() - begin
    uncertainty = topic_uncertainty(evidence["topic"], given, found.scores)
    threshold = _threshold(given, len(states["topic"].texts), s["quantile"], console)
    _tell(uncertainty, threshold, console)
    steerings = {one.name: _steering(s, one, found.scores) for one in variants}
    model.prepare_steering(steerings[s["method"]])  # an error ends here, before anything is written
    comparison = None
    if s["prompt_count"] > 0:
        comparison = _comparison(s, model, tokenizer, embedder, states["reference"], test)
        _measure(s, comparison, steerings, states["topic"], tokenizer, seconds)
        _show(comparison, s, console)
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in s.items()}
    report: dict[str, Any] = {
        "facts": {**facts, "base": name, "embedder": embedder.name, "embedding_tokens": embedder.max_tokens},
        "texts": {part: len(one.texts) for part, one in states.items()},
        "tokens": {part: len(one.hidden) for part, one in states.items()},
        "mean_distance": float(distances.mean()),
        "uncertainty": uncertainty,
        "threshold": None if threshold is None else threshold.threshold,
        "warning": None if threshold is None else uncertainty["uncertainty"] > threshold.threshold,
        "seconds_of_scores": seconds,
        "methods": {} if comparison is None else comparison.rows,
    }
    steering = steerings[s["method"]]
    files = _write(s["out"], found, evidence, steering, report, None if comparison is None else comparison.samples())
    console.print(", ".join(map(str, files)), markup=False)
    if s["save_model"]:
        out = s["out"] / "model"
        model.steering = steering
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        console.print(f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


def _write(
    out: Path,
    scores: TopicScores,
    evidence: dict[str, TextEvidence],
    steering: Any,
    report: dict[str, Any],
    samples: list[dict[str, str]] | None,
) -> list[Path]:
    """The files of a run."""
    from ..create_training_data.shards import Store
    from ..evaluation.topic_alignment import feature_kinds, topic_selectivity
    from ..training.topic_scores import write_topic_scores

    selectivity = topic_selectivity(evidence["topic"].summaries, evidence["reference"].summaries)
    columns = {
        "reference_texts": evidence["reference"].summaries.counts().tolist(),
        "topic_share": [None if value != value else value for value in selectivity.tolist()],
        "kind": feature_kinds(selectivity),
    }
    tables = [write_topic_scores(out / f"scores.{ending}", scores, columns) for ending in ("csv", "parquet")]
    values = {"steering.json": steering.to_dict(), "report.json": report}
    if samples is not None:
        values["samples.json"] = samples
    for name, value in values.items():
        Store(out).write_json(name, value)
    return [*tables, *(out / name for name in values)]


def _evidence(sae: Any, states: TextStates, embeddings: Tensor, summary: str, centre: Tensor) -> TextEvidence:
    from ..evaluation.topic_alignment import TextEvidence, reconstruction_sums
    from ..training.topic_scores import prompt_summaries

    told = (states.hidden, states.text_index, len(states.texts))
    sums = reconstruction_sums(sae, *told, centre)
    return TextEvidence(prompt_summaries(sae, *told, summary=summary), embeddings, *sums)


def _threshold(reference: TextEvidence, topic_size: int, quantile: float, console: Any) -> UncertaintyThreshold | None:
    from ..evaluation.topic_alignment import calibrate_threshold
    from ..training.topic_scores import topic_distances, topic_scores

    def score(summaries: Any, distances: Tensor) -> Tensor:
        return topic_scores(summaries, distances).scores

    if 0 < quantile < 1 and len(reference) * (1 - quantile) < 1 - 1e-9:
        console.print(f"{len(reference)} reference texts are too few for a threshold: no warning can be given")
        return None
    return calibrate_threshold(reference, topic_size, score, topic_distances, quantile=quantile)


def _tell(found: TopicUncertainty, threshold: UncertaintyThreshold | None, console: Any) -> None:
    told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
    console.print(told)
    if threshold is None:
        return
    above = found["uncertainty"] > threshold.threshold
    line = (
        f"uncertainty {found['uncertainty']:.3f} is {'above' if above else 'not above'} the threshold of "
        f"{threshold.threshold:.3f}, below which {threshold.quantile:.0%} of topics made of reference texts lie"
    )
    console.print(
        f"[bold red]Warning:[/] {line}: the SAE and these texts represent the topic badly" if above else line
    )


class _Variant(NamedTuple):
    """A method as it is named in the table, with settings of its own."""

    name: str
    method: str
    keep_error: bool
    strength: float


def _variant(s: dict[str, Any], name: str) -> _Variant:
    """`swap`, or with settings that differ from the command's: `swap:replace`, `swap:4`, `swap:keep:4`."""
    from ..training.topic_scores import METHODS

    method, *parts = name.split(":")
    keep, strength = s["keep_error"], s["strength"]
    for part in parts:
        if part in ("keep", "replace"):
            keep = part == "keep"
        elif part.replace(".", "", 1).isdecimal():
            strength = float(part)
        else:
            raise ValueError(f"Settings of a method are keep, replace and a strength. Received: {name!r}.")
    if method not in METHODS:
        raise ValueError(f"Methods are {', '.join(METHODS)}. Received: {name!r}.")
    return _Variant(name, method, keep, strength)


def _steering(s: dict[str, Any], variant: _Variant, scores: Tensor) -> Any:
    from ..training.topic_scores import AFTER_FIRST, topic_steering

    return topic_steering(
        variant.method,
        scores,
        # Otherwise `SAE` would be the unsteered model.
        keep_error=variant.keep_error and variant.method != "SAE",
        strength=variant.strength,
        top=s["clamp_top"],
        value=s["clamp_value"],
        unit=s["clamp_unit"],
        positions="all" if s["all_positions"] else AFTER_FIRST,
    )


def _comparison(
    s: dict[str, Any], model: Any, tokenizer: Any, embedder: Any, reference: TextStates, test: list[str]
) -> TopicComparison:
    from ..evaluation.acceptability import AcceptabilityClassifier, SlorScorer, unigram_log_probs
    from ..evaluation.topic_generation import TopicComparison
    from ..latents.texts import read_column

    if s["prompts"] is not None:
        prompts = read_column(s["prompts"], s["prompts_column"])[: s["prompt_count"]]
    else:
        starts = [tokenizer.decode(ids[: s["prompt_tokens"]], skip_special_tokens=True) for ids in reference.ids]
        prompts = [start for start in dict.fromkeys(starts) if start.strip()][: s["prompt_count"]]
    if s["acceptability"] is not None:
        scorer: Any = AcceptabilityClassifier(s["acceptability"], label=s["acceptability_label"])
    else:
        # Of the base itself: the model around it would apply its default steering.
        scorer = SlorScorer(
            model.lm, tokenizer, unigram_log_probs(reference.ids, model.config.get_text_config().vocab_size)
        )
    return TopicComparison(
        model,
        tokenizer,
        prompts,
        embedder.embed(test),
        embedder.embed,
        scorer.score,
        new_tokens=s["new_tokens"],
        top_k=s["top_k"],
        seed=s["seed"],
    )


def _measure(
    s: dict[str, Any],
    comparison: TopicComparison,
    steerings: dict[str, Any],
    topic: TextStates,
    tokenizer: Any,
    seconds: float,
) -> None:
    from tqdm import tqdm

    from ..evaluation.topic_generation import UNSTEERED
    from ..training.topic_lora import tune_on_texts

    names = [name for name in steerings if name != UNSTEERED]
    with tqdm(total=len(names) + 2 + (s["lora_epochs"] > 0), desc="continuations", disable=None) as bar:
        comparison.measure(UNSTEERED)
        bar.update()
        for name in names:
            scored = 0.0 if name == "SAE" else seconds
            comparison.measure(name, steerings[name], preparation_seconds=scored)
            bar.update()
        prefix = s["topic_prompt"] or tokenizer.decode(topic.ids[0], skip_special_tokens=True)
        comparison.measure("prompting", prefix=f"{prefix}\n\n")
        bar.update()
        if s["lora_epochs"] > 0:
            begin = time.perf_counter()
            tuned = tune_on_texts(
                comparison.model.lm, topic.ids, rank=s["lora_rank"], epochs=s["lora_epochs"], seed=s["seed"]
            )
            trained = time.perf_counter() - begin
            made = comparison.generate(generator=tuned)
            tuned.unload()  # the base judges as it was
            comparison.judge("LoRA", made, trained)
            bar.update()


def _show(comparison: TopicComparison, s: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    judged = "P(acceptable)" if s["acceptability"] else "SLOR"
    columns = ("similarity", "change", "perplexity", judged, "repeated", "extra ms a token", "preparation, s")
    table = Table("", *columns, title=f"{len(comparison.prompts)} continuations: mean ± standard error")
    for name, row in comparison.rows.items():
        table.add_row(
            name,
            f"{row['similarity']:.3f} ± {row['similarity_error']:.3f}",
            f"{row['similarity_change']:+.3f} ± {row['similarity_change_error']:.3f}",
            f"{row['perplexity']:.1f}",
            f"{row['acceptability']:.2f} ± {row['acceptability_error']:.2f}",
            f"{row['repetition']:.1%}",
            f"{1000 * row['extra_seconds_per_token']:+.2f}",
            f"{row['preparation_seconds']:.1f}",
        )
    console.print(table)
