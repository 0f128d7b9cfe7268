"""Descriptions as sentence embeddings, made once and kept with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ...create_training_data.sentence_embeddings import SentenceEmbedder
from ...latents.annotations.table import FeatureAnnotations
from ..results import Progress

AT_ONCE = 1024  # descriptions that are embedded between two reports
Embedder = str | Callable[[list[str]], Any]  # a sentence-transformers model, or a function of texts


def embedded(notes: FeatureAnnotations, embedder: Embedder, progress: Progress | None = None) -> FeatureAnnotations:
    """The annotations with embeddings of all descriptions.

    Args:
        embedder: by whose name queries are embedded later; a function has none.
        progress: called with (descriptions done, descriptions).
    """
    texts, parts = notes.descriptions["description"].to_pylist(), []
    for start in range(0, len(texts), AT_ONCE):
        parts.append(vectors(embedder, texts[start : start + AT_ONCE]))
        if progress is not None:
            progress(min(start + AT_ONCE, len(texts)), len(texts))
    made = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    return notes.with_embeddings(made, embedder if isinstance(embedder, str) else "")


def vectors(embedder: Any, texts: list[str]) -> np.ndarray:
    """(n, d) float32."""
    made = embedder(texts) if callable(embedder) else _sentence_embedder(embedder).embed(texts)
    vectors = np.asarray(made, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"`embedder` must give ({len(texts)}, d) numbers. Received: shape {vectors.shape}.")
    return vectors


@lru_cache(maxsize=1)
def _sentence_embedder(name: str) -> SentenceEmbedder:
    return SentenceEmbedder(name)
