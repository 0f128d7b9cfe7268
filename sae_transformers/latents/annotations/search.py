"""Which features a few words mean: by their descriptions, with how often they fire and what they do to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .table import FeatureAnnotations

RARE, DENSE = 0.01, 0.2  # shares of tokens: a feature active on more than the second says little
LEAST = 0.5  # what a dense or a dead feature counts
WITHOUT_EFFECT = 0.75  # what a feature of output score 0 counts
ROWS_AT_ONCE = 2**14
BESIDE = 0.25  # what words count beside embeddings


def weights(notes: FeatureAnnotations) -> np.ndarray:
    """(n,) float32: what the fit of a feature's description counts, 1 where nothing is known against it.

    1 up to a frequency of 0.01, from there linear in its logarithm down to 0.5 at 0.2 and above; 0.5 where it never
    fires. Times 0.75 + 0.25 * output score.
    """
    found = np.ones(len(notes), np.float32)
    if notes.frequency is not None:
        known = np.nan_to_num(notes.frequency, nan=RARE)
        share = np.log(np.maximum(known, RARE) / RARE) / np.log(DENSE / RARE)
        found *= 1 - (1 - LEAST) * np.where(known <= 0, 1.0, np.clip(share, 0, 1))
    if notes.output_score is not None:
        found *= WITHOUT_EFFECT + (1 - WITHOUT_EFFECT) * np.clip(np.nan_to_num(notes.output_score, nan=1.0), 0, 1)
    return found


def fit(notes: FeatureAnnotations, query: str, vector: Sequence[float] | None = None) -> np.ndarray:
    """(m,) float32: how well each description fits; 0 or less where it does not.

    Args:
        query: a few words.
        vector: (d,) the query's embedding, by the model of the file's: then the cosine counts, and a quarter for words
            that are the same.
    """
    scores = notes.words.scores(query)
    top = float(scores.max()) if len(scores) else 0.0
    if vector is None or notes.embeddings is None:
        return scores
    asked = np.asarray(vector, np.float32)
    if asked.shape != (notes.width,):
        raise ValueError(
            f"The query's embedding must be of the file's model, {notes.width} numbers. Received: {asked.shape}."
        )
    asked = asked / max(float(np.linalg.norm(asked)), 1e-12)
    cosines = np.empty(len(notes.embeddings), np.float32)
    for start in range(0, len(cosines), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosines[part] = notes.embeddings[part].astype(np.float32) @ asked
    return cosines + BESIDE * scores / max(top, 1e-12)


def search(
    notes: FeatureAnnotations, query: str, k: int = 10, vector: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The features that a few words mean, best first: rank, fit, feature, description and what else is known.

    A feature of several descriptions counts by the one that fits best. rank is that fit times `weights`.

    Args:
        k: features, at most.
        vector: see `fit`.
    """
    fits = fit(notes, query, vector)
    ranks = fits * weights(notes)[notes.owners] if len(fits) else fits
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    room = 4 * k + 16
    order = np.argpartition(-ranks, min(room, len(ranks) - 1))[:room] if len(ranks) > room else np.arange(len(ranks))
    order = order[np.lexsort((order, -ranks[order]))]
    if len(ranks) > room and len(set(notes.owners[order].tolist())) < k:  # many descriptions of few features
        order = np.argsort(-ranks, kind="stable")
    for place in order.tolist():
        feature = int(notes.owners[place])
        if ranks[place] <= 0 or len(found) == k:
            break
        if feature in seen:
            continue
        seen.add(feature)
        row = notes.descriptions.slice(place, 1).to_pylist()[0]
        found.append(
            {
                "feature": feature, "description": row["description"], "rank": float(ranks[place]),
                "fit": float(fits[place]), "frequency": notes.number("frequency", feature),
                "output_score": notes.number("output_score", feature), "maximum": notes.number("maximum", feature),
                "explainer": row["explainer"], "score": row["score"],
            }
        )  # fmt: skip
    return found
