"""Descriptions of an SAE's features with the numbers beside them, kept as columns, and the file that they are in."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...modeling import SparseAutoencoder
from ..output_files import whole_file
from .columns import NUMBERS, WORDS, Columns, as_long, from_rows
from .stored import FORMAT, KEY, read_columns
from .words import WordIndex

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDED = "folded"  # `facts["maxima"]`: activations times the norm of the decoder row


class Description(NamedTuple):
    """What a feature stands for. text: as it was given. explainer: who said so, a model or a person. method: how it
    was found. score: of the description, by the explainer's own measure. Each but the text may be unknown."""

    text: str
    explainer: str | None = None
    method: str | None = None
    score: float | None = None


class FeatureAnnotations:
    """What is known of an SAE's features: descriptions, as many as there are of each, and numbers.

    Made by `open_annotations` and put beside an SAE by `annotate`. It does not change.

    Args:
        descriptions: (m rows) by latent: feature, description, explainer, method, score; the features ascend.
        n_features: latents of the SAE, as far as that is known.
        numbers: name, one of `NUMBERS` -> (n_features,) float32, NaN where it is unknown.
        neighbours: (n_features, k) int32, nearest first, -1 where there are fewer.
        embeddings: (m, d) float16 of unit length, zeros where there is none.
        facts: texts about all of it: `source`, `licence`, `model`, `sae`, `score` (what it measures), `embedder` (the
            model of the embeddings), `maxima` (`folded` where activations are those of unit decoder rows).

    `maximum`, `frequency` and `output_score` are these numbers, None where nothing says.
    """

    def __init__(
        self,
        descriptions: pa.Table,
        n_features: int,
        numbers: Mapping[str, np.ndarray],
        neighbours: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.descriptions, self.n_features = descriptions, n_features
        self.neighbours, self.embeddings = neighbours, embeddings
        self.maximum, self.frequency, self.output_score = (numbers.get(name) for name in NUMBERS)
        self.facts = {name: str(value) for name, value in (facts or {}).items() if value}

    @classmethod
    def from_columns(cls, columns: Columns, facts: Mapping[str, str] | None = None) -> FeatureAnnotations:
        """From what a reader gathered."""
        return cls(*columns.finish(), facts)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        *,
        n_features: int | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> FeatureAnnotations:
        """From mappings: feature, and of description, explainer, method, score, embedding, maximum, frequency,
        output_score and neighbours what is known; several rows may be of one feature.

        Raises:
            ValueError: a value is of the wrong kind, or a feature is not there.
        """
        return cls.from_columns(from_rows(rows, n_features, "rows"), facts)

    def joined(self, other: FeatureAnnotations) -> FeatureAnnotations:
        """These and the descriptions of others, whose numbers, neighbours and embeddings fill what is unknown.

        Embeddings are kept where both have those of one model, or one has any.
        """
        n = max(len(self), len(other))
        table = pa.concat_tables([self.descriptions, other.descriptions])
        order = np.argsort(table["feature"].to_numpy(), kind="stable")
        numbers = {}
        for name in NUMBERS:
            columns = [as_long(c, n, np.nan) for one in (self, other) if (c := getattr(one, name)) is not None]
            if columns:
                numbers[name] = np.where(np.isnan(columns[0]), columns[-1], columns[0])
        near = next((as_long(c, n, -1) for c in (self.neighbours, other.neighbours) if c is not None), None)
        facts = {**other.facts, **self.facts}
        measured = self if self.maximum is not None else other
        facts["maxima"] = measured.facts.get("maxima", "")
        if self.maximum is not None and self.facts.get("maxima") != other.facts.get("maxima"):
            numbers["maximum"] = as_long(self.maximum, n, np.nan)  # two units do not mix
        for name in ("source", "licence"):
            facts[name] = "; ".join(dict.fromkeys(one.facts[name] for one in (self, other) if one.facts.get(name)))
        vectors, both = None, [one for one in (self, other) if one.embeddings is not None]
        if both and len({(one.facts.get("embedder"), one.width) for one in both}) == 1:
            none = np.zeros((0, both[0].width), np.float16)
            parts = [none if one.embeddings is None else one.embeddings for one in (self, other)]
            parts = [as_long(part, len(one.owners), 0) for part, one in zip(parts, (self, other), strict=True)]
            vectors = np.concatenate(parts)[order]
        return FeatureAnnotations(table.take(order).combine_chunks(), n, numbers, near, vectors, facts)

    # -- reading them -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.n_features

    def of(self, feature: int) -> list[Description]:
        """All descriptions of a feature, the best first: by score, then as they came."""
        if not 0 <= feature < self.n_features:
            return []
        part = self.descriptions.slice(self._starts[feature], self._starts[feature + 1] - self._starts[feature])
        columns = [part[name].to_pylist() for name in (*WORDS, "score")]
        found = [Description(*values) for values in zip(*columns, strict=True)]
        return sorted(found, key=lambda one: float("inf") if one.score is None else -one.score)

    def description(self, feature: int) -> str:
        """The best description of a feature; empty where there is none."""
        row = int(self._best[feature]) if 0 <= feature < self.n_features else -1
        return "" if row < 0 else self.descriptions["description"][row].as_py()

    def names(self, features: Iterable[int]) -> dict[int, str]:
        """Feature -> its best description, of those that have one."""
        found = {feature: self.description(feature) for feature in features}
        return {feature: text for feature, text in found.items() if text}

    @cached_property
    def described(self) -> np.ndarray:
        """(n,) int32: the features that have a description, ascending."""
        return np.unique(self.owners).astype(np.int32)

    def number(self, name: str, feature: int) -> float | None:
        """A feature's `maximum`, `frequency` or `output_score`; None where it is not known."""
        column = getattr(self, name)
        value = float("nan") if column is None or not 0 <= feature < self.n_features else float(column[feature])
        return None if value != value else value

    def latents_of(self, text: str) -> list[int]:
        """The features of which a whole description is this text; case and white space at its ends do not count."""
        wanted = text.strip().lower()
        hashes, rows = self._hashes
        first, last = (np.searchsorted(hashes, hash(wanted), side) for side in ("left", "right"))
        texts = self.descriptions["description"].take(pa.array(rows[first:last])).to_pylist()
        same = [row for row, one in zip(rows[first:last], texts, strict=True) if one.lower() == wanted]
        return np.unique(self.owners[same]).tolist()

    def like(self, text: str, k: int = 5) -> list[tuple[int, str]]:
        """The features whose descriptions fit some words best, with what they say."""
        scores = self.words.scores(text)
        places = [i for i in np.argsort(-scores, kind="stable")[: 4 * k].tolist() if scores[i] > 0]
        found: dict[int, str] = {}
        for place in places:
            found.setdefault(int(self.owners[place]), self.descriptions["description"][place].as_py())
        return list(found.items())[:k]

    @cached_property
    def words(self) -> WordIndex:
        """Of the descriptions, made once."""
        return WordIndex(text.as_py() for text in self.descriptions["description"])

    # -- for a model --------------------------------------------------------------------------------------------------

    def check_fits(self, sae: SparseAutoencoder) -> None:
        """
        Raises:
            ValueError: they are of an SAE with more latents.
        """
        if self.n_features > sae.config.d_sae:
            raise ValueError(
                f"The annotations are of an SAE with {self.n_features:,} latents or more. Expected those of one with "
                f"{sae.config.d_sae:,}. Received: {self.facts.get('source', 'annotations')}."
            )

    def fill_maxima(self, sae: SparseAutoencoder) -> int:
        """Give an SAE the maxima that it does not know itself, in its own units; how many those are.

        Maxima of activations that were multiplied by the norms of the decoder rows (`facts["maxima"] == "folded"`, as
        Neuronpedia shows them) are divided by these norms.
        """
        self.check_fits(sae)
        if self.maximum is None:
            return 0
        found = torch.zeros(sae.config.d_sae)
        found[: self.n_features] = torch.from_numpy(np.nan_to_num(self.maximum, nan=0.0))
        if self.facts.get("maxima") == FOLDED:
            found /= sae.W_dec.detach().float().norm(dim=-1).cpu().clamp_min(1e-12)
        new = (found > 0) & (sae.feature_max.cpu() == 0)
        with torch.no_grad():
            known = sae.feature_max.cpu().float()
            sae.feature_max.copy_(torch.where(new, found, known))
        return int(new.sum())

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one Parquet file, whole or not at all: a row a description, and one for each other feature of which
        a number is known. What is of the feature is in each of its rows."""
        bare = np.setdiff1d(self._numbered(), self.described)
        owners = np.concatenate([self.owners, bare]).astype(np.int32)
        table = pa.concat_tables(
            [self.descriptions, pa.table({"feature": pa.array(bare, pa.int32())})], promote_options="default"
        )
        for name in NUMBERS:
            if (column := getattr(self, name)) is not None:
                values = column[owners]
                table = table.append_column(name, pa.array(values, pa.float32(), mask=np.isnan(values)))
        if self.neighbours is not None:
            rows = [row[row >= 0] for row in self.neighbours[owners]]
            table = table.append_column("neighbours", pa.array(rows, pa.list_(pa.int32())))
        about: dict[str, Any] = {"format": FORMAT, "version": 1, "n_features": self.n_features, "facts": self.facts}
        if self.embeddings is not None:
            about["embedding"] = self.embeddings.shape[1]
            kind = pa.binary(2 * self.embeddings.shape[1])  # halves: Parquet's own are not read everywhere
            vectors = [row.tobytes() if row.any() else None for row in self.embeddings]
            table = table.append_column("embedding", pa.array([*vectors, *[None] * len(bare)], kind))
        table = table.replace_schema_metadata({KEY: json.dumps(about)})
        with whole_file(path) as draft:
            pq.write_table(table, draft, compression="zstd")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureAnnotations:
        """Read what `save` wrote.

        Raises:
            ValueError: it is something else, or damaged.
            OSError: it cannot be read.
        """
        columns, facts = read_columns(path)
        return cls.from_columns(columns, facts)

    # -- what shows them ----------------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """What there is, in lines."""
        known = [f"{len(self.described):,} of {self.n_features:,} features described"]
        extra = len(self.owners) - len(self.described)
        known += [f"{extra:,} further descriptions"] if extra else []
        for name in NUMBERS:
            if (column := getattr(self, name)) is not None:
                known.append(f"{name} of {int((~np.isnan(column)).sum()):,}")
        known += ["embeddings"] if self.embeddings is not None else []
        return [", ".join(known), *(f"{name}: {value}" for name, value in self.facts.items())]

    def __repr__(self) -> str:
        return f"FeatureAnnotations({self.summary()[0]})"

    def _repr_html_(self) -> str:
        rows = self.descriptions.slice(0, 20).to_pylist()
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape('' if v is None else str(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows
        )
        head = "".join(f"<th>{name}</th>" for name in self.descriptions.column_names)
        lines = "<br>".join(map(html.escape, self.summary()))
        return f"<p>{lines}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_frame(self) -> DataFrame:
        """A row a description, with the numbers of its feature, as a pandas DataFrame."""
        frame = self.descriptions.to_pandas()
        for name in NUMBERS:
            if (column := getattr(self, name)) is not None:
                frame[name] = column[self.owners]
        return frame

    def to_dict(self) -> dict[str, Any]:
        """As JSON: counts and facts, without the descriptions."""
        return {"features": self.n_features, "described": len(self.described), "facts": dict(self.facts)}

    def with_embeddings(self, embeddings: np.ndarray, embedder: str) -> FeatureAnnotations:
        """The same with other embeddings.

        Args:
            embeddings: (m, d), a row a description, in their order; made to have unit length.
            embedder: the model that made them, which then embeds queries.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(self.owners):
            raise ValueError(
                f"Expected embeddings ({len(self.owners)}, d), a row a description. Received: {embeddings.shape}."
            )
        numbers = {name: column for name in NUMBERS if (column := getattr(self, name)) is not None}
        length = np.linalg.norm(embeddings.astype(np.float32), axis=-1, keepdims=True)
        unit = (embeddings / np.maximum(length, 1e-12)).astype(np.float16)
        facts = {**self.facts, "embedder": embedder}
        return FeatureAnnotations(self.descriptions, self.n_features, numbers, self.neighbours, unit, facts)

    @property
    def width(self) -> int:
        """Numbers of an embedding; 0 where there are none."""
        return 0 if self.embeddings is None else self.embeddings.shape[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureAnnotations:
        return self  # it does not change, and a model's config is copied often

    @cached_property
    def owners(self) -> np.ndarray:
        """(m,) int32: the feature of each description."""
        return self.descriptions["feature"].to_numpy()

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.searchsorted(self.owners, np.arange(self.n_features + 1))

    @cached_property
    def _best(self) -> np.ndarray:
        """(n,) int64: the row of each feature's best description, -1 where there is none."""
        scores = np.nan_to_num(self.descriptions["score"].to_numpy().astype(np.float32), nan=-np.inf)
        order = np.lexsort((-scores, self.owners))  # stable: of equal ones the first
        features, first = np.unique(self.owners[order], return_index=True)
        found = np.full(self.n_features, -1, np.int64)
        found[features] = order[first]
        return found

    @cached_property
    def _hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """(m,) int64 of the descriptions in small letters, ascending, and their rows."""
        texts = self.descriptions["description"]
        found = np.fromiter((hash(text.as_py().lower()) for text in texts), np.int64, len(texts))
        order = np.argsort(found, kind="stable")
        return found[order], order

    def _numbered(self) -> np.ndarray:
        known = np.zeros(self.n_features, bool)
        for name in NUMBERS:
            if (column := getattr(self, name)) is not None:
                known |= ~np.isnan(column)
        if self.neighbours is not None:
            known |= (self.neighbours >= 0).any(-1)
        return known.nonzero()[0]
