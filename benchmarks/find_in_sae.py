"""`find` on a real SAE: features described by the words that they answer to most, and what ten queries find.

    python benchmarks/find_in_sae.py --base BASE --sae SAE --texts reviews.jsonl \\
        --embedder sentence-transformers/all-MiniLM-L6-v2

No language model explains: a description is the words, with the word before, on which a feature's twenty greatest
activations lie, the most frequent first. Prints for each query the best five by words and by embeddings, each with the
three texts in which it is strongest, to be judged by a reader; docs/results/find.md has a judgement.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_transformers import FeatureAnnotations, find, load
from sae_transformers.latents.hidden_states import read_hidden_states
from sae_transformers.workflows.reading.embedding import embedded

QUERIES = (
    "love and romance", "children and family", "comedy, laughter and jokes", "war and soldiers", "music and songs",
    "actors and their performances", "boredom", "violence and blood", "the director of a film", "death and murder",
)  # fmt: skip
TOP, WINDOW = 20, 6


def strongest(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of each latent its TOP greatest activations and the tokens that they are at, (d_sae, TOP)."""
    d_sae = model.saes[0].config.d_sae
    values, tokens = torch.zeros(d_sae, TOP), torch.full((d_sae, TOP), -1)
    for start in range(0, len(hidden), 2048):
        latents = model.saes[0].encode(hidden[start : start + 2048].float()).T  # (d_sae, part)
        found, places = latents.topk(TOP, dim=-1)
        values, chosen = torch.cat([values, found], 1).topk(TOP, dim=-1)
        tokens = torch.cat([tokens, places + start], 1).gather(1, chosen)
    return values, tokens


def words_at(ids: list[int], place: int, tokenizer: Any) -> str:
    """The word that a token is part of, and the one before it."""
    before = tokenizer.decode(ids[: place + 1]).split()
    rest = tokenizer.decode(ids[place + 1 : place + 4])
    end = rest.split(" ")[0] if rest and not rest.startswith(" ") else ""
    return " ".join(before[-2:]) + end


def main() -> None:
    args = parse()
    model, tokenizer, _ = load(args.base, str(args.sae))
    rows = [json.loads(line) for line in args.texts.read_text(encoding="utf-8").splitlines()][: args.rows]
    texts = [row["text"] for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    states = read_hidden_states(model, tokenizer, texts, max_tokens=128)
    first = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(states.text_index).cumsum(0)])
    values, tokens = strongest(model, states.hidden)
    table, contexts = [], {}
    for feature in range(len(values)):
        kept = tokens[feature][values[feature] > 0].tolist()
        places = [(int(states.text_index[token]), token) for token in kept]
        # States are without each text's first token.
        spots = [(text, token - int(first[text]) + 1) for text, token in places]
        counts = Counter(words_at(ids[text], place, tokenizer).lower() for text, place in spots)
        if counts:
            said = ", ".join(words for words, _ in counts.most_common(8))
            table.append({"feature": feature, "description": said, "frequency": 0.01})
            contexts[feature] = [
                tokenizer.decode(ids[text][max(0, place - WINDOW) : place + 1]).replace("\n", " ")
                for text, place in spots[:3]
            ]
    notes = FeatureAnnotations.from_rows(table)
    if args.embedder:
        notes = embedded(notes, args.embedder)
    print(f"{len(table)} of {len(values)} latents are described, from {len(states.hidden)} tokens.")
    for query in QUERIES:
        for by in ("words", "embeddings") if args.embedder else ("words",):
            found = find(notes, query, 5, by=by, embedder=args.embedder)
            print(f"\n{query!r} by {by}")
            for feature in found.features:
                print(f"  {feature}: {notes.description(feature)}")
                for context in contexts[feature]:
                    print(f"      ...{context}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help=".jsonl with text")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--embedder", help="model of sentences")
    return parser.parse_args()


if __name__ == "__main__":
    main()
