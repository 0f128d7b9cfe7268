"""Writes modeling/conversion/names/saelens.json, the table of SAELens' names, from an installed SAELens.

    python tests/scripts/saelens_registry.py .../site-packages/sae_lens/pretrained_saes.yaml 6.54.12

One line a release. Its ids fall into rules: `layer_{0}_width_{1}/canonical` with what the placeholders take, so that
13,857 ids with their paths and Neuronpedia pages are lines and not a book."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).parents[2] / "sae_transformers/modeling/conversion/names/saelens.json"
VARIABLE = re.compile(r"(?:big|medium|small)(?:_affine|_seed_\d+)?(?![a-z])|\d+(?:\.\d+)?[km]?(?![a-z\d])|\d+")
FIELDS = ("id", "path", "neuronpedia")
# TransformerLens' names of models whose Hub ids are others.
HUB_IDS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2": "openai-community/gpt2",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")},
}


def skeleton(text: str) -> tuple[str, tuple[str, ...]]:
    """`a_12_b` as `a_{}_b` and its variables."""
    return VARIABLE.sub("{}", text), tuple(VARIABLE.findall(text))


def compress(rows: list[tuple[str, ...]]) -> list[Any] | str:
    """Tuples as a tree: [[values, branch], ...], the last level values alone; equal branches share a line."""
    if len(rows[0]) == 1:
        return runs(dict.fromkeys(row[0] for row in rows))
    by_first: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        by_first.setdefault(row[0], []).append(row[1:])
    branches: list[tuple[list[str], Any]] = []
    for first, rest in by_first.items():
        branch = compress(rest)
        same = next((values for values, there in branches if there == branch), None)
        if same is None:
            branches.append(([first], branch))
        else:
            same.append(first)
    return [[runs(values), branch] for values, branch in branches]


def runs(values: Iterable[str]) -> str:
    """Values with commas between; whole numbers in a row as `0-25`."""
    numbers = sorted({int(value) for value in values if value.isdigit() and str(int(value)) == value})
    texts = sorted(set(values) - {str(number) for number in numbers})
    found: list[str] = []
    while numbers:
        n = next((i for i, number in enumerate(numbers) if number != numbers[0] + i), len(numbers))
        found += [f"{numbers[0]}-{numbers[n - 1]}"] if n > 2 else [str(number) for number in numbers[:n]]
        numbers = numbers[n:]
    return ",".join([*found, *texts])


def rules(saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[list[tuple[str, ...]]]] = {}
    for sae in saes:
        parts = [skeleton(str(sae[field])) if field in sae else ("", ()) for field in FIELDS]
        groups.setdefault(tuple(part[0] for part in parts), []).append([part[1] for part in parts])
    return [rule(shapes, found) for shapes, found in groups.items()]


def rule(shapes: tuple[str, ...], found: list[list[tuple[str, ...]]]) -> dict[str, Any]:
    """Placeholders that are always equal become one, and those that never change become text."""
    columns: list[tuple[str, ...]] = []
    made: dict[str, Any] = {}
    for number, (name, shape) in enumerate(zip(FIELDS, shapes, strict=True)):
        pieces = shape.split("{}")
        text = pieces[0]
        for slot, piece in enumerate(pieces[1:]):
            column = tuple(row[number][slot] for row in found)
            if len(set(column)) == 1 and len(found) > 1:
                text += column[0]
            elif column in columns:
                text += f"{{{columns.index(column)}}}"
            else:
                text += f"{{{len(columns)}}}"
                columns.append(column)
            text += piece
        if text:
            made[name] = text
    if made["path"] == made["id"]:
        del made["path"]
    if columns:
        made["of"] = compress(list(zip(*columns, strict=True)))
    return made


def release(entry: dict[str, Any]) -> dict[str, Any]:
    made = {"repository": entry["repo_id"], "base": HUB_IDS.get(entry["model"], entry["model"])}
    if entry["conversion_func"]:
        made["reader"] = entry["conversion_func"]
    if normalize := (entry.get("config_overrides") or {}).get("normalize_activations"):
        made["normalize"] = normalize
    return {**made, "rules": rules(entry["saes"])}


def main(source: str, version: str) -> None:
    entries = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    lines = [f"{json.dumps(name)}: {json.dumps(release(entry))}" for name, entry in entries.items()]
    text = ",\n".join([f'"version": {json.dumps(version)}', *lines])
    TARGET.write_text(f"{{{text}}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
