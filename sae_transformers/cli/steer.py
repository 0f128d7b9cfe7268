"""The verb `steer`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded
from .options import Base, Cache, KeyEnv, LabelColumn, MaxLength, ModelDtype, Place, Seed, TextColumn, asking

if TYPE_CHECKING:
    from ..evaluation.journal import Journal
    from ..training.strength import Calibration, Scorer

_search = partial(typer.Option, rich_help_panel="Search")
_strength = partial(typer.Option, rich_help_panel="Strength")
_scoring = partial(typer.Option, rich_help_panel="Scoring")
_generation = partial(typer.Option, rich_help_panel="Generation")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(steer)


def steer(
    model: Base,
    labelled: Annotated[
        str, typer.Argument(help="Texts with a label, 1 where the concept is: a table, or a folder of concept-set.")
    ],
    sae: Annotated[list[str], typer.Option(help="An SAE to search, as attach takes it. Repeatable.")],
    prompts: Annotated[Path, typer.Option(help="Prompts to steer on, one a line: half choose, half report.")],
    out: Annotated[Path, typer.Option(help="Folder of steering.json, report.json, model/.")] = Path(
        "outputs/steering"
    ),
    concept: Annotated[int, typer.Option(help="Number of the concept in a folder of several.")] = 0,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    statistic: Annotated[str, _search(help="auroc, mutual_information or mean_difference.")] = "auroc",
    selection: Annotated[str, _search(help="input (by statistic), output (by output score), combined.")] = "combined",
    pool: Annotated[int, _search(help="Best features by statistic whose output score is measured.")] = 50,
    top: Annotated[int, _search(help="Features of each SAE that are tried by generating.")] = 3,
    ops: Annotated[str, _strength(help="Comma-separated: direction, set, at_least, scale, ablate.")] = "direction,set",
    strengths: Annotated[
        str | None, _strength(help="Comma-separated, weak to strong, for all ops. [default: 0.03 to 0.6 norms]")
    ] = None,
    lower: Annotated[bool, _strength("--lower", help="Less of the concept in place of more.")] = False,
    scorer: Annotated[
        str, _scoring(help="words (fitted to half of the texts), vader, toxicity, or judge (see --judge-model).")
    ] = "words",
    judge_model: Annotated[str | None, asking(help="Of --scorer judge: a model's name at the server.")] = None,
    judge_url: Annotated[str | None, asking(help="Its server, with OpenAI's interface.")] = None,
    judge_concept: Annotated[str | None, asking(help="What it looks for. [default: the concept's name]")] = None,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    chat: Annotated[bool, _generation("--chat/--plain", help="Prompts in the chat template, if there is one.")] = True,
    perplexity_limit: Annotated[float, _strength(help="Times the unsteered perplexity.")] = 1.6,
    repetition_limit: Annotated[
        float | None, _strength(help="Share of repeated trigrams that may be added. [default: any]")
    ] = None,
    new_tokens: Annotated[int, _generation(help="Of a continuation.")] = 40,
    temperature: Annotated[float, _generation(help="0 is greedy.")] = 0.7,
    samples: Annotated[int, _generation(help="Continuations of a prompt, with a temperature.")] = 1,
    max_length: MaxLength = 256,
    rows_at_once: Annotated[int, _generation(help="Continuations made together.")] = 32,
    place: Place = None,
    model_dtype: ModelDtype = "auto",
    seed: Seed = 0,
) -> None:
    """Find features by labelled texts, choose op and strength by generating, and save the steered model."""
    settings = dict(locals())
    guarded(_steer, settings)


def _steer(s: dict[str, Any], console: Any) -> None:
    from ..create_training_data.concept_sets import read_concept_sets
    from ..create_training_data.shards import Store
    from ..evaluation.continuations import chat_prompts, prompt_ids
    from ..evaluation.settings import FluencyBudget, GenerationSettings
    from ..latents.context import check_length
    from ..latents.splits import label_halves
    from ..modeling import SaeForCausalLM
    from ..training.feature_search import best_of, search_features
    from ..training.strength import calibrate, ladders_of
    from .loading import load_base, load_sae

    sets = read_concept_sets(s["labelled"], text_column=s["text_column"], label_column=s["label_column"])
    if not 0 <= s["concept"] < len(sets):
        raise ValueError(f"--concept must be in [0, {len(sets)}). Received: {s['concept']}.")
    examples, labels = sets[s["concept"]].labelled()
    prompts = [line for line in s["prompts"].read_text(encoding="utf-8").splitlines() if line.strip()]
    saes = [load_sae(name, s["place"]) for name in s["sae"]]
    base, tokenizer, name = load_base(s["model"], None, s["model_dtype"])
    check_length(base, s["max_length"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model: Any = SaeForCausalLM.from_base(base, saes=saes).eval()
    asked = chat_prompts(tokenizer, prompts) if s["chat"] else prompts
    prompt_ids(model, tokenizer, asked, s["new_tokens"])  # too long ones are told now
    ops = [op.strip() for op in s["ops"].split(",") if op.strip()]
    values = None if s["strengths"] is None else [float(value) for value in s["strengths"].split(",")]
    strengths = None if values is None else dict.fromkeys(ops, values)
    ladders_of([(0, 0)], ops, strengths=strengths)
    texts = [example.text for example in examples]
    searching, scoring = label_halves(labels, s["seed"])
    scorer = _scorer(s, [texts[i] for i in scoring], [labels[i] for i in scoring], sets[s["concept"]].concept)
    codes = _codes(model, tokenizer, [texts[i] for i in searching], s["max_length"])
    searches = [
        search_features(
            found, _tensor([labels[i] for i in searching]), model, tokenizer,
            sae=number, statistic=s["statistic"], selection=s["selection"], pool=s["pool"],
        )
        for number, found in enumerate(codes)
    ]  # fmt: skip
    _show_search(searches, s["top"], console)
    journal = _journal(s["out"], base, name, saes)
    if journal.found:
        console.print(f"Goes on after {journal.found} parts of {journal.path}", markup=False)
    ladders = ladders_of(best_of(searches, s["top"]), ops, strengths=strengths, lower=s["lower"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        found = calibrate(
            model, tokenizer, asked, scorer, ladders,
            GenerationSettings(
                s["new_tokens"], s["temperature"], 1.0, s["samples"], s["chat"], s["rows_at_once"], s["seed"]
            ),
            FluencyBudget(s["perplexity_limit"], s["repetition_limit"]),
            journal=journal,
        )  # fmt: skip
    for warning in told:
        console.print(f"Warning: {warning.message}", markup=False)
    _show(found, console)
    candidates = [row for search in searches for row in search.rows()[: s["top"]]]
    facts = {"concept": sets[s["concept"]].concept, "texts": len(examples), "prompts": len(prompts)}
    options = {key: value for key, value in s.items() if key in ("statistic", "selection", "scorer", "lower", "seed")}
    report = {**found.to_dict(), "candidates": candidates, **facts, **options}
    for file, values in {"steering.json": found.steering.to_dict(), "report.json": report}.items():
        Store(s["out"]).write_json(file, values)
    if found.steering:
        model.steering = found.steering
        model.config.base_model_name_or_path = name
        model.save_pretrained(s["out"] / "model")
        tokenizer.save_pretrained(s["out"] / "model")
    journal.remove()
    console.print(f"{s['out'] / 'steering.json'}, {s['out'] / 'report.json'}", markup=False)
    if found.steering:
        console.print(f"AutoModelForCausalLM.from_pretrained({str(s['out'] / 'model')!r}, trust_remote_code=True)")
    else:
        old = "; the one there is of an earlier run" if (s["out"] / "model").exists() else ""
        console.print(
            f"steering.json changes nothing, and no model was saved{old}. What may help: more features "
            f"(--top {2 * s['top']}), another --selection or --scorer, weaker --strengths, or a --perplexity-limit "
            f"above {s['perplexity_limit']:g}; the table shows which of them.",
            markup=False,
        )


def _journal(out: Path, base: Any, name: str, saes: Sequence[Any]) -> Journal:
    """Of the continuations under different steerings, which depend on the model and nothing else."""
    from ..evaluation.journal import Journal, fingerprint
    from ..evaluation.results import versions

    facts = [name, base.config.to_dict(), str(base.dtype), [fingerprint(sae) for sae in saes], dict(versions())]
    return Journal(out / "continuations.partial.jsonl", json.loads(json.dumps(facts, default=str)))


# -- shared ----------------------------------------------------------------------------------------------------------


def _tensor(values: Sequence[float]) -> Any:
    import torch

    return torch.tensor(values)


def _codes(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Any]:
    """Latents of each SAE, mean over a text's tokens but the first."""
    import torch
    from tqdm import tqdm

    from ..latents.hidden_states import HiddenStateReader, kept_positions
    from ..latents.sparse_codes import encode_texts

    ids = [torch.tensor(row) for row in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]
    keep = [kept_positions(row) for row in ids]
    if short := sum(not len(k) for k in keep):
        raise ValueError(f"Every text needs two tokens or more. Received: {short} shorter ones.")
    places = [sae.config.read_at for sae in model.saes]
    with tqdm(total=len(ids), desc="texts read") as bar:
        reader = HiddenStateReader(model.lm, list(dict.fromkeys(places)), config=model.config)
        states = reader.read(ids, keep, dtype=torch.float32, report=lambda members: bar.update(len(members)))
    index = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(k) for k in keep]))
    return [
        encode_texts(sae, states[where].cpu(), index, len(ids)) for sae, where in zip(model.saes, places, strict=True)
    ]


def _scorer(s: dict[str, Any], texts: list[str], labels: list[int], concept: str) -> Scorer:
    """Texts -> scores, higher for what is wanted."""
    sign = -1.0 if s["lower"] else 1.0
    if s["scorer"] == "words":
        from ..evaluation.concept_steering import word_scorer

        sides = [[text for text, label in zip(texts, labels, strict=True) if label == value] for value in (1, 0)]
        words = word_scorer(*sides, seed=s["seed"])
        return lambda found: sign * words(found)
    if s["scorer"] == "vader":
        from ..evaluation.sentiment import vader_scorer

        sentiment = vader_scorer()
        return lambda found: [sign * sentiment(text) for text in found]
    if s["scorer"] == "toxicity":
        from ..evaluation.toxicity import toxicity_scorer

        toxicity = toxicity_scorer()
        return lambda found: sign * toxicity(found)
    if s["scorer"] != "judge":
        raise ValueError(f"--scorer must be words, vader, toxicity or judge. Received: {s['scorer']!r}.")
    from ..create_training_data.concept_making import rate_answers
    from ..create_training_data.llm_client import LLMClient
    from ..create_training_data.packages import cache_folder

    if s["judge_model"] is None:
        raise ValueError("--scorer judge needs --judge-model, a model's name at the server.")
    client = LLMClient(
        s["judge_model"], s["judge_url"], s["api_key_env"], cache=s["cache"] or cache_folder() / "answers"
    )
    wanted = s["judge_concept"] or concept

    def judged(found: Sequence[str]) -> list[float]:
        return [sign * one for one in rate_answers(client, wanted, found, found, kinds=["concept"])["concept"]]

    return judged


def _show_search(searches: Sequence[Any], top: int, console: Any) -> None:
    from rich.table import Table

    table = Table("SAE", "feature", searches[0].statistic.replace("_", " "), "output score")
    for search in searches:
        for row in search.rows()[:top]:
            output = f"{row['output_score']:.4f}" if "output_score" in row else ""
            table.add_row(str(row["sae"]), str(row["feature"]), f"{row[search.statistic]:.4f}", output)
    console.print(table)


def _show(found: Calibration, console: Any) -> None:
    from rich.table import Table

    table = Table("steering", "score", "perplexity", "repeated", "within budget", title="prompts that choose")
    for name, point in [("none", found.unsteered), *((_name(p.steering), p) for p in found.curve)]:
        chosen = " (chosen)" if point.steering and point.steering == found.steering else ""
        table.add_row(
            name + chosen, f"{point.score:.3f} ± {point.score_error:.3f}", f"{point.perplexity:.1f}",
            f"{point.repetition:.1%}", "yes" if point.within_budget else "no",
        )  # fmt: skip
    console.print(table)
    if found.report is not None:
        table = Table("steering", "score", "perplexity", "repeated", title="prompts that report")
        for name, point in zip(("none", _name(found.steering)), found.report, strict=True):
            table.add_row(
                name,
                f"{point.score:.3f} ± {point.score_error:.3f}",
                f"{point.perplexity:.1f}",
                f"{point.repetition:.1%}",
            )
        console.print(table)


def _name(steering: Any) -> str:
    edits = [
        f"SAE {e.sae} feature {e.feature} {e.op}" + ("" if e.value is None else f" {e.value:g}")
        for e in steering.feature_edits
    ]
    return ", ".join(edits) or "none"
