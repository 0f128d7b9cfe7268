"""Topic alignment (https://huggingface.co/papers/2506.12576) with five topics that an SAE knows well, less and not.

    python examples/topic_alignment.py --reference d_ref_prompts.csv --medical d_align_prompts.csv \\
        --pubmedqa pubmedqa_labeled.json --shakespeare shakespeare.txt --sae outputs/pretrain/sae

Runs `align_topic` for pages on medicine (similarity is measured to PubMedQA's questions, as in the
paper), PubMedQA's long answers, scenes of Shakespeare, Python's own standard library and strings of random tokens, 20
texts each; of the others, 40 more are what similarity is measured to. Scores, uncertainty, and the same prompts
continued under several methods; under all of them, and after a LoRA fine-tune, for the topics that --full names.
Prints numbers, never texts. Each topic has a folder in --out, and results.json has all reports. About 15 minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_transformers import (
    TopicEmbeddingSettings,
    TopicGenerationSettings,
    TopicMeasuringSettings,
    TopicScoringSettings,
    TopicSettings,
    TopicTexts,
    align_topic,
    load,
)

PARTS = ("coverage", "topic_coverage", "contamination", "reconstruction_error", "uncertainty")
ALL = ("SAE", "swap:replace", "swap:4", "swap:16", "weight", "clamp")
FEW = ("swap:4",)
OTHERS = ("pubmedqa", "shakespeare", "python", "random")


def long_pieces(text: str, size: int = 1000) -> list[str]:
    """Stretches of a text of `size` characters."""
    return [text[i : i + size] for i in range(0, len(text) - size + 1, size)]


def candidates(args: argparse.Namespace, topic: str, tokenizer: Any) -> list[str]:
    """Texts of a topic, from which those of a run are drawn."""
    if topic == "pubmedqa":
        return [row["LONG_ANSWER"] for row in pubmed_rows(args)]
    if topic == "shakespeare":
        return long_pieces(args.shakespeare.read_text(encoding="utf-8"))
    if topic == "python":
        library = Path(sysconfig.get_paths()["stdlib"])
        return long_pieces("\n".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))))
    draw = random.Random(args.seed)
    return [tokenizer.decode([draw.randrange(len(tokenizer)) for _ in range(128)]) for _ in range(60)]


def pubmed_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = json.loads(args.pubmedqa.read_text(encoding="utf-8"))
    return list(rows.values()) if isinstance(rows, Mapping) else rows


def sources(args: argparse.Namespace, tokenizer: Any) -> dict[str, TopicTexts]:
    """topic -> the texts it is given by and those that similarity is measured to."""
    draw, found = random.Random(args.seed), {}
    for topic in args.topics:
        if topic == "medical":
            questions = [row["QUESTION"] for row in pubmed_rows(args)]
            found[topic] = TopicTexts(args.reference, args.medical, topic_test=draw.sample(questions, 40))
            continue
        drawn = draw.sample([text for text in candidates(args, topic, tokenizer) if text.strip()], 60)
        found[topic] = TopicTexts(args.reference, drawn[:20], topic_test=drawn[20:])
    return found


def settings_of(args: argparse.Namespace, full: bool) -> TopicSettings:
    """With all methods and LoRA, or few."""
    generation = TopicGenerationSettings(max_new_tokens=args.new_tokens, seed=args.seed)
    default = TopicSettings()
    return replace(
        default,
        scoring=TopicScoringSettings(compare=ALL if full else FEW),
        embedding=TopicEmbeddingSettings(embedder=args.embedder),
        measuring=TopicMeasuringSettings(
            prompt_count=args.prompts, lora_epochs=args.lora_epochs if full else 0.0, generation=generation
        ),
        reading=replace(default.reading, max_length=args.max_length),
    )


def show(reports: Mapping[str, Any], console: Console) -> None:
    table = Table("topic", *PARTS, "threshold", "warning", title="Uncertainty")
    for topic, found in reports.items():
        values = [f"{found['uncertainty'][part]:.3f}" for part in PARTS]
        table.add_row(topic, *values, f"{found['threshold']:.3f}", "yes" if found["warning"] else "no")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("reference", "medical", "pubmedqa", "shakespeare"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sae", required=True, help="folder of an SAE, e.g. of examples/pretrain_sae.py")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--embedder", help="sentence-transformers model; all-MiniLM-L6-v2 by default")
    parser.add_argument("--out", type=Path, default=Path("outputs/topic_alignment"))
    parser.add_argument("--topics", nargs="+", default=["medical", *OTHERS], choices=["medical", *OTHERS])
    parser.add_argument("--full", nargs="*", default=["medical"], help="topics of which all methods and LoRA are run")
    parser.add_argument("--lora-epochs", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, reports = Console(width=180), {}
    model, tokenizer, _ = load(args.model, args.sae)
    for topic, texts in sources(args, tokenizer).items():
        console.print(f"[bold]{topic}[/]")
        found = align_topic(model, tokenizer, texts, settings_of(args, topic in args.full))
        for line in found.summary():
            console.print(line, markup=False)
        found.save(args.out / topic, {"sae": args.sae})
        reports[topic] = json.loads((args.out / topic / "report.json").read_text(encoding="utf-8"))
    (args.out / "results.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    show(reports, console)


if __name__ == "__main__":
    main()
