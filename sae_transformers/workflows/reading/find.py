"""Features by a few words: a search over what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...create_training_data.sentence_embeddings import DEFAULT_EMBEDDER
from ...latents.annotations.search import search
from ...latents.annotations.table import FeatureAnnotations
from ...latents.text_latents import sae_of
from ...modeling import SparseAutoencoder
from ...modeling.modeling_sae import SaePreTrainedModel
from ..results import Progress, Result, save_csv
from .embedding import Embedder, embedded, vectors

WAYS = ("auto", "words", "embeddings")


@dataclass(frozen=True)
class FindResult(Result):
    """Features that a few words mean, best first.

    Args:
        query: what was sought.
        found: rows of sae, feature, description, rank, fit, frequency, output_score, maximum, explainer, score.
        by: words or embeddings.
        note: why not by embeddings, where they are there.
    """

    query: str
    found: list[dict[str, Any]] = field(repr=False)
    by: str = "words"
    note: str = ""

    def __len__(self) -> int:
        return len(self.found)

    @property
    def features(self) -> list[int]:
        """Numbers of the features, best first."""
        return [row["feature"] for row in self.found]

    @property
    def best(self) -> int:
        """The number of the best feature, as `feature=` takes it.

        Raises:
            ValueError: nothing was found.
        """
        if not self.found:
            raise ValueError(f"No description fits. Try other words. Received: query={self.query!r}.")
        return self.found[0]["feature"]

    def rows(self) -> list[dict[str, Any]]:
        """A row a feature."""
        return self.found

    def table(self) -> list[dict[str, Any]]:
        """The rows without columns of which nothing is known."""
        used = [name for name in (self.found[0] if self.found else ()) if any(r[name] is not None for r in self.found)]
        return [{name: row[name] for name in used} for row in self.found]

    def summary(self) -> list[str]:
        """What was sought, and how."""
        found = f"{len(self.found):,} features for {self.query!r}, by {self.by}"
        return [found, *([self.note] if self.note else [])]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"query": self.query, "by": self.by, "features": self.found}

    def save(self, path: str | Path) -> None:
        """Write `rows()` as .csv."""
        save_csv(path, self.found)


def find(
    model: SaePreTrainedModel | SparseAutoencoder | FeatureAnnotations,
    query: str,
    k: int = 10,
    *,
    sae: int | None = None,
    by: str = "auto",
    embedder: Embedder | None = None,
    progress: Progress | None = None,
) -> FindResult:
    """The features whose descriptions fit a few words best: `find(model, "sarcasm")`.

    A whole description that was found names its feature wherever one is named, as its number does:
    `FeatureEdit(feature=found.best, ...)`, `detect(model, ..., feature="remarks that mean the opposite")`. Where
    several features have that description the error tells which.

    Features that fire on many tokens, or never, come later among equals, as do those that change the output little
    where that is known.

    Args:
        model: a model with SAEs that have `annotations`, one such SAE, or annotations themselves; see `annotate`.
        query: a few words.
        k: features, at most.
        sae: number of the model's SAE; by default all that have annotations.
        by: `words`: BM25 over stemmed words. `embeddings`: cosine of sentence embeddings, and a little for equal
            words; those of the file where its model can embed the query, else made now, once, of all descriptions,
            and kept with the annotations. `auto`: the embeddings of the file where they are and can be used, else
            words.
        embedder: makes embeddings: a sentence-transformers model by name, or a function of a list of texts that gives
            (n, d). By default the model that the file names, else all-MiniLM-L6-v2.
        progress: called with (descriptions done, descriptions) while embeddings are made.

    Raises:
        ValueError: there are no annotations, or no query.
        ImportError: `by="embeddings"` without sentence-transformers.
    """
    if by not in WAYS:
        raise ValueError(f"`by` must be one of {', '.join(WAYS)}. Received: by={by!r}.")
    if not query.strip() or k < 1:
        raise ValueError(f"Expected a few words to find, and `k` of 1 or more. Received: query={query!r}, k={k!r}.")
    found, note, used = [], "", by if by != "auto" else "words"
    for number, notes, holder in _annotated(model, sae):
        vector = None
        if by != "words":
            notes, vector, note = _embedded(notes, query, by, embedder, progress)
            if holder is not None and notes is not holder.annotations:
                holder.annotations = notes
            used = "embeddings" if vector is not None else used
        found += [{"sae": number, **row} for row in search(notes, query, k, vector)]
    found.sort(key=lambda row: -row["rank"])
    return FindResult(query, found[:k], used, note)


def _annotated(
    model: SaePreTrainedModel | SparseAutoencoder | FeatureAnnotations, sae: int | None
) -> list[tuple[int, FeatureAnnotations, Any]]:
    """Number, annotations and, where they can be replaced, the SAE that has them."""
    if isinstance(model, FeatureAnnotations):
        return [(0, model, None)]
    if isinstance(model, SparseAutoencoder):
        holders = [(0, model)]
    else:
        numbers = range(len(model.saes)) if sae is None else [sae]
        holders = [(number, sae_of(model, number)) for number in numbers]
    found = [(number, notes, one) for number, one in holders if (notes := one.annotations) is not None]
    if not found:
        raise ValueError(
            "There are no annotations to search. Expected an SAE that `annotate` has put some beside, or annotations "
            "of `open_annotations`. Received: none."
        )
    return found


def _embedded(
    notes: FeatureAnnotations, query: str, by: str, embedder: Embedder | None, progress: Progress | None
) -> tuple[FeatureAnnotations, Sequence[float] | None, str]:
    """The annotations, with embeddings where they were made now; the query's embedding; why there is none."""
    own = notes.facts.get("embedder")
    if notes.embeddings is not None and (embedder is not None or own is not None):
        name = embedder if embedder is not None else own
        if callable(name) or own is None or name == own:
            try:
                return notes, vectors(name, [query])[0], ""
            except (ImportError, OSError) as error:
                if by == "embeddings":
                    raise
                return notes, None, f"Not by embeddings: {error}"
    if by == "auto":
        told = "" if notes.embeddings is None else "Not by the file's embeddings: give `embedder`, the model of them."
        return notes, None, told
    chosen = embedder if embedder is not None else DEFAULT_EMBEDDER
    return embedded(notes, chosen, progress), vectors(chosen, [query])[0], ""
