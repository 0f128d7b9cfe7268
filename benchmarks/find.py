"""How long `find` takes over 65,536 descriptions, and how often it is right.

    python benchmarks/find.py --embedder sentence-transformers/all-MiniLM-L6-v2

Prints minimum and median of the CPU time of a query beside that of a plain scan for its words in all descriptions,
which is the baseline; the time to make the index, once; and for ten queries whose right features were judged by hand
the precision at 5: of the best five, the share that is right of as many as can be.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sae_transformers import FeatureAnnotations, find
from sae_transformers.workflows.reading.embedding import embedded
from tests.latents.annotations.relevance import DESCRIPTIONS, RELEVANT

QUERIES = list(RELEVANT)


def times(action: Callable[[str], object], repeats: int) -> tuple[float, float]:
    """Minimum and median milliseconds of CPU of a query."""
    taken = []
    for n in range(repeats):
        start = time.process_time()
        action(QUERIES[n % len(QUERIES)])
        taken.append(1e3 * (time.process_time() - start))
    return min(taken), statistics.median(taken)


def made_up(n: int) -> FeatureAnnotations:
    """Descriptions of nine words out of those of the ten queries' descriptions and 20,000 others."""
    drawn = random.Random(0)
    words = sorted(set(" ".join(DESCRIPTIONS).split())) * 8 + [f"word{i}" for i in range(20_000)]
    rows = [{"feature": i, "description": " ".join(drawn.choices(words, k=9)), "frequency": 0.01} for i in range(n)]
    return FeatureAnnotations.from_rows(rows)


def precision(notes: FeatureAnnotations, by: str = "auto") -> tuple[float, float]:
    """Mean over the queries of precision at 5 and of the first result being right."""
    at_5, first = [], []
    for query, right in RELEVANT.items():
        found = find(notes, query, 5, by=by).features
        at_5.append(len(set(found) & right) / min(5, len(right)))
        first.append(bool(found) and found[0] in right)
    return statistics.mean(at_5), statistics.mean(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--descriptions", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--embedder", help="a sentence-transformers model; without it only words are measured")
    asked = parser.parse_args()
    notes = made_up(asked.descriptions)
    texts = notes.descriptions["description"].to_pylist()
    start = time.process_time()
    notes.words  # noqa: B018, makes the index
    print(f"{len(texts):,} descriptions, index of words made in {time.process_time() - start:.2f} s, once")

    def scan(query: str) -> list[str]:
        pattern = re.compile("|".join(map(re.escape, query.split())))
        return [text for text in texts if pattern.search(text)]

    low, base = times(scan, 10)
    print(f"scan for the words       min {low:7.2f} ms  median {base:7.2f} ms  (baseline)")
    low, middle = times(lambda query: find(notes, query, by="words"), asked.repeats)
    print(f"find by words            min {low:7.2f} ms  median {middle:7.2f} ms  {middle / base:.2f} of the baseline")
    small = FeatureAnnotations.from_rows([{"feature": n, "description": text} for n, text in enumerate(DESCRIPTIONS)])
    print("precision at 5 by words       {:.2f}, first right {:.2f}".format(*precision(small, by="words")))
    if asked.embedder:
        told = embedded(small, asked.embedder)
        vectors = np.resize(np.asarray(told.embeddings), (len(texts), told.width))  # whatever they are
        few = notes.with_embeddings(vectors, asked.embedder)
        low, middle = times(lambda query: find(few, query), asked.repeats)
        ratio = f"{middle / base:.2f} of the baseline, with the query's embedding"
        print(f"find by embeddings       min {low:7.2f} ms  median {middle:7.2f} ms  {ratio}")
        print("precision at 5 by embeddings  {:.2f}, first right {:.2f}".format(*precision(told)))


if __name__ == "__main__":
    main()
