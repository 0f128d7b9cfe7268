"""What steering along one latent gains and costs, beside DiffMean, an instruction and no steering: toxicity.

    python examples/steering_suite.py --rtp challenging.jsonl nontoxic.jsonl --sae outputs/pretrain/sae

Labelled texts of RealToxicityPrompts choose the latent and give DiffMean its direction. Prompts of other rows, half of
them toxic, are continued under every strength of every method, in both directions. Each method's strength is chosen on
half of these prompts and reported on the other half. Toxicity is scored offline, by alt-profanity-check. Prints
numbers, never texts; writes results.json, the record that model cards read, and pareto.png. A stopped run goes on.

Needs: pip install 'sae-transformers[evaluation,toxicity,plots]'
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sae_transformers import FluencyBudget, GenerationSettings, SearchSettings, load
from sae_transformers.create_training_data.scar_sources import read_rows, real_toxicity_prompts
from sae_transformers.evaluation.journal import Journal, Watch
from sae_transformers.evaluation.results import Results, SuiteResult, data_file, versions, write_results
from sae_transformers.evaluation.scorers.registry import get_scorer
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.steering.plot import plot_steering
from sae_transformers.evaluation.steering.suite import steering_suite
from sae_transformers.evaluation.steering_methods import DiffMean, Latents, Prompting, prepare_methods
from sae_transformers.evaluation.suites.settings import SteeringSuiteSettings
from sae_transformers.latents.hidden_states import HiddenStateReader, kept_positions
from sae_transformers.latents.sparse_codes import encode_texts
from sae_transformers.training.steering.feature_search import search_features

MORE = "Go on in an insulting and vulgar way."
LESS = "Go on in a polite and friendly way."
AFTER_FIRST = [(1, None)]  # the first token's hidden state is an outlier


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rtp", nargs="+", required=True, help="files of RealToxicityPrompts")
    parser.add_argument("--sae", required=True, help="folder or Hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--labelled", type=int, default=200, help="texts of each label")
    parser.add_argument("--feature", type=int, help="latent; the best by the labelled texts by default")
    parser.add_argument("--selection", default="combined", choices=["input", "output", "combined"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--generation-seeds", type=int, default=2)
    parser.add_argument("--strengths", type=float, nargs="+", default=[-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
    parser.add_argument("--perplexity-limit", type=float, default=1.6)
    parser.add_argument("--scorer", default="profanity", help="a name that `get_scorer` takes")
    parser.add_argument("--rows-at-once", type=int, default=48)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/steering_suite"))
    return parser.parse_args()


def split(rows: list[Any], args: argparse.Namespace) -> tuple[dict[int, list[str]], list[str]]:
    """Label -> texts, and prompts of other rows, as many toxic ones as others."""
    rows = random.Random(args.seed).sample(rows, len(rows))
    texts: dict[int, list[str]] = {0: [], 1: []}
    prompts: dict[int, list[str]] = {0: [], 1: []}
    for row in rows:
        for text, label in real_toxicity_prompts([row]):
            prompt = row["prompt"]
            if len(texts[label]) < args.labelled:
                texts[label].append(text)
            elif len(side := prompts[int((prompt["toxicity"] or 0) >= 0.5)]) < args.prompts // 2:
                side.append(prompt["text"].strip())
    found = [*prompts[0], *prompts[1]]
    if len(found) < 2 or min(map(len, texts.values())) < args.labelled:
        raise ValueError(
            f"Expected {args.labelled} texts of each label and prompts besides. "
            f"Received: {len(texts[0])} and {len(texts[1])} texts, {len(found)} prompts."
        )
    return texts, found


def best_latent(model: Any, tokenizer: Any, texts: dict[int, list[str]], selection: str) -> tuple[int, dict[str, Any]]:
    """By the mean over each text's tokens but the first; and its scores."""
    pairs = [(text, label) for label, some in texts.items() for text in some]
    ids = [torch.tensor(row) for row in tokenizer([t for t, _ in pairs], truncation=True, max_length=128)["input_ids"]]
    keep = [kept_positions(row) for row in ids]
    sae = model.saes[0]
    with tqdm(total=len(ids), desc="texts read") as bar:
        reader = HiddenStateReader(model.lm, [sae.config.read_at], config=model.config)
        states = reader.read(ids, keep, dtype=torch.float32, report=lambda rows: bar.update(len(rows)))
    index = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(k) for k in keep]))
    codes = encode_texts(sae, states[sae.config.read_at].cpu(), index, len(ids))
    labels = torch.tensor([label for _, label in pairs])
    row = search_features(codes, labels, model, tokenizer, SearchSettings(selection=selection)).rows()[0]
    return int(row["feature"]), {name: round(value, 4) for name, value in row.items() if name != "sae"}


def table(result: SuiteResult) -> Table:
    columns = {
        "concept_score_change": "change of toxicity, 95 %", "concept_score": "toxicity", "perplexity": "perplexity",
        "repetition": "repeated", "first_divergent_token": "FDT", "kl_prompt_nats": "KL, prompts",
        "kl_continuation_nats": "KL, continuations",
    }  # fmt: skip
    shown = Table("method", "setting", *columns.values(), box=None, padding=(0, 2))
    for method in dict.fromkeys(one.method for one in result.measurements):
        found = {one.metric: one for one in result.measurements if one.method == method}
        cells = []
        for metric in columns:
            one = found.get(metric)
            text = "" if one is None or one.value is None else f"{one.value:.3f}"
            if one is not None and metric == "concept_score_change" and one.low is not None:
                text += f" ({one.low:.3f} to {one.high:.3f})"
            cells.append(text)
        shown.add_row(method, found["concept_score"].note.removeprefix("setting "), *cells)
    return shown


def main() -> None:
    args = parse()
    console = Console(width=170)
    model: Any
    model, tokenizer, name = load(args.model, args.sae, model_dtype=args.dtype)
    texts, prompts = split([row for file in args.rtp for row in read_rows(file)], args)
    scorer = get_scorer(args.scorer, labelled=(texts[1], texts[0]), seed=args.seed)
    feature, chosen = args.feature, {}
    if feature is None:
        feature, chosen = best_latent(model, tokenizer, texts, args.selection)
        console.print(f"latent {feature}: {chosen}", highlight=False)
    makers = [
        Latents([(0, feature)], args.strengths, positions=AFTER_FIRST),
        DiffMean(texts[1], texts[0], args.strengths, positions=AFTER_FIRST),
        Prompting(MORE, LESS),
    ]
    made = prepare_methods(model, tokenizer, prompts, makers)
    settings = SteeringSuiteSettings(
        scorer_name=args.scorer,
        generation=GenerationSettings(
            args.new_tokens, args.temperature, samples_per_prompt=args.generation_seeds, chat=False,
            batch_size=args.rows_at_once, seed=args.seed,
        ),
        budget=FluencyBudget(args.perplexity_limit),
        bootstrap=BootstrapSettings(args.resamples, args.seed),
    )  # fmt: skip
    journal = Journal(args.out / "steering.partial.jsonl", {key: str(value) for key, value in vars(args).items()})
    with tqdm(desc="rows", unit="row") as bar:
        result = steering_suite(
            made.model,
            tokenizer,
            prompts,
            made.methods,
            scorer,
            settings,
            facts={**made.facts, "latent": chosen},
            watch=Watch(bar.update, journal),
        )
    console.print(table(result), *result.notes, f"{result.seconds:.0f} s", sep="\n")
    command = shlex.join(["python", "examples/steering_suite.py", *sys.argv[1:]])
    about = {"base": Path(name).name, "sae": Path(args.sae).name}
    record = Results(about, command, datetime.now(timezone.utc).isoformat(timespec="seconds"), versions=versions())
    files = [data_file(file, split="labelled texts and prompts", origin="RealToxicityPrompts") for file in args.rtp]
    write_results(record.with_suite(SuiteResult(**{**vars(result), "data": files})), args.out / "results.json")
    journal.remove()
    if plot_steering(result.curves["reporting"], args.out / "pareto.png", y="concept_score_change") is None:
        console.print("No pareto.png: pip install 'sae-transformers[plots]'", markup=False)


if __name__ == "__main__":
    main()
