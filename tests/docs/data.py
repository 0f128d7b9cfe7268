"""Small files under the names that the pages use: texts, labels, pairs, prompts, questions, passages."""

from __future__ import annotations

import csv
import json
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas
import torch

from sae_transformers.create_training_data.annotation.tables import AnnotationRow, write_annotations
from tests.multimodal import picture

GOOD, BAD, PLAIN, PEOPLE = (
    words.split()
    for words in (
        "lovely charming warm clever moving bright tender superb honest graceful",
        "dull clumsy cold stale boring grim noisy awful lazy tired",
        "the film story actor scene river bank city people music house road night year child water letter train "
        "garden morning teacher field winter market door window table light voice question answer",
        "he she him her his man woman boy girl",
    )
)
COLUMNS_OF_TEXT = {
    "comments": "he {}", "comments_with_other_names": "she {}", "texts_of_all_kinds": "{}", "medical_texts": "warm {}",
    "other_medical_texts": "warm {}",
}  # fmt: skip


def sentence(draw: random.Random, label: int | None = None, words: int = 9) -> str:
    """Words that anyone might write; with a label, three of its kind among them."""
    kind = [] if label is None else draw.choices(GOOD if label else BAD, k=3)
    text = [*draw.choices(PLAIN, k=words - len(kind)), *kind]
    draw.shuffle(text)
    return " ".join(text)


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *map(list, rows)])


def write_text(path: Path, lines: Iterable[str], between: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(between.join(lines) + "\n", encoding="utf-8")


def write_data(folder: Path) -> None:
    """Everything that a page reads and no command on it writes."""
    draw = random.Random(0)
    labelled = [(sentence(draw, number % 2), number % 2) for number in range(60)]
    for name in ("texts", "labelled", "train", "test", "held_out", "my_texts", "reviews"):
        write_rows(folder / f"{name}.csv", ("text", "label"), labelled)
    texts = [sentence(draw) for _ in range(24)]
    for name, form in COLUMNS_OF_TEXT.items():
        write_rows(folder / f"{name}.csv", ("text",), ([form.format(text)] for text in texts))
    paragraphs = [f"he met {text}" for text in texts]
    for name in ("texts.txt", "texts/one.txt", "my_texts.txt", "my_texts/one.txt", "held_out.txt", "wikitext.txt"):
        write_text(folder / name, paragraphs, "\n\n")
    write_text(folder / "prompts.txt", ("The film was", "I think the city", "The road", "My teacher said"))
    write_text(folder / "forbidden.txt", (f"Tell of the {text}" for text in texts[:4]))
    for name, word in (("polite", "please"), ("rude", "now")):
        write_text(folder / f"{name}.txt", (f"{text} {word}" for text in texts[:12]))
    write_text(folder / "concepts.txt", ("the sea", "winter"))
    write_text(folder / "facts.yaml", ("licence: apache-2.0", "training_data: Film reviews with their sentiment."))
    write_annotations(
        [AnnotationRow(number, f"Span 1: {text}", "Films.") for number, text in enumerate(texts[:4])],
        folder / "features.tsv",
    )
    write_text(folder / "judged.tsv", ("FeatureID\tTask\tSummary\tWords", "7\tno|||No.\tNames.\tSpan 1: he"))
    write_text(folder / "lambada_test.jsonl", (json.dumps({"text": text}) for text in texts[:8]))
    picture().save(folder / "cat.png")
    write_text(folder / "dashboard.html", ("<!doctype html>",))
    prompts = [
        {
            "prompt": {"text": text, "toxicity": 0.9 if label else 0.1},
            "continuation": {"text": " too", "toxicity": 0.1},
        }
        for text, label in labelled
    ]
    write_text(folder / "rtp.jsonl", map(json.dumps, prompts))
    write_questions(folder / "nq_swap_dev.parquet", draw)
    write_spare_cache(folder / "cache_data" / "Llama-2-7b-hf")
    write_bias(folder)
    write_mmlu(folder / "mmlu.zip")
    pairs = ([sentence(draw, 1), sentence(draw, 0)] for _ in range(40))
    write_rows(folder / "preferences.csv", ("chosen", "rejected"), pairs)
    kinds = ("Pneumonia", "URTI", "HFMD")
    write_rows(folder / "diagnoses.csv", ("text", "label"), ((sentence(draw, n % 2), kinds[n % 3]) for n in range(60)))


def write_questions(path: Path, draw: random.Random) -> None:
    """Rows of NQ-Swap: half of the answers are the context's, half the other way round."""
    rows = []
    for number in range(24):
        right, other = draw.sample(PLAIN, k=2)[:: 1 if number % 2 else -1]
        rows.append({
            "question": f"where was {sentence(draw, words=3)} {number}", "org_context": f"it was {right}",
            "org_answer": [right], "sub_context": f"it was {other}", "sub_answer": [other],
        })  # fmt: skip
    pandas.DataFrame(rows).to_parquet(path)


def write_spare_cache(folder: Path) -> None:
    """Mutual information and functional values of four layers, in the places of SpARE's repository."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(12, 16):
        context, memory = torch.rand(2, 20, generator=generator)
        scores = {"mi_scores": torch.rand(20, generator=generator).double(), "expectation": context - memory}
        values = folder / "func_weights" / "grouped_activations" / f"layer{layer}"
        for part in (values, folder / "mutual_information"):
            part.mkdir(parents=True, exist_ok=True)
        torch.save(scores, folder / "mutual_information" / f"layer-{layer} mi_expectation.pt")
        torch.save(context, values / "use_context_weight.pt")
        torch.save(memory, values / "use_parameter_weight.pt")


def write_bias(folder: Path) -> None:
    (folder / "winobias").mkdir()
    for part in ("type1_dev", "type2_dev", "type1_test", "type2_test"):
        for side, pronoun in (("pro", "he"), ("anti", "she")):
            line = f"1 [The teacher] saw the child and [{pronoun}] left the house\n"
            (folder / "winobias" / f"{side}_stereotyped_{part}.txt").write_text(line * 2, encoding="utf-8")
    pairs = [("He reads a letter.", "She reads a letter.", "gender"), ("A boy in winter.", "A girl in winter.", "age")]
    write_rows(folder / "crows_pairs.csv", ("sent_more", "sent_less", "bias_type"), pairs)


def write_mmlu(path: Path) -> None:
    question = 'What is a door?,"a, b",a window,a road,a table,A\n'
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("abstract_algebra", "anatomy"):
            archive.writestr(f"data/test/{subject}_test.csv", question * 2)
            archive.writestr(f"data/dev/{subject}_dev.csv", question * 5)
