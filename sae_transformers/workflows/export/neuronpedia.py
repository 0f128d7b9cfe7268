"""Features in Neuronpedia's import layout: a folder that a local instance imports, as its own exports are.

    {model}/{layer}-{set}/model.jsonl, source.jsonl, sourceset.jsonl, release.jsonl     a row each
    {model}/{layer}-{set}/{features,activations,explanations}/batch-{i}.jsonl.gz        1,024 features a batch

All rows of a file have the same keys: the importer takes the columns of the first. Activations, maxima and logit
weights are those of unit decoder rows, as Neuronpedia's own are: times the norm of the row, or divided by it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...latents.output_files import whole_file
from ...modeling import SparseAutoencoder
from ..results import Progress
from ..settings.dashboard import ExportSettings
from .known import KnownFeatures, finite

FEATURES_EACH = 1024
HOOKS = {"resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out"}
HOOKS |= {"attn_out": "hook_attn_out"}


def write_neuronpedia(
    known: KnownFeatures, folder: str | Path, settings: ExportSettings, progress: Progress | None = None
) -> list[Path]:
    """Write features with their spans and descriptions; the files.

    Args:
        progress: called with (features done, features).

    Raises:
        ValueError: the base has no name, or spans are not scored by the SAE's own activation.
    """
    known.check_spans()
    rows = Rows(known, settings)
    place = Path(folder) / rows.model / rows.source
    files = []
    for name, row in rows.about().items():
        files.append(place / f"{name}.jsonl")
        with whole_file(files[-1]) as draft:
            draft.write_text(_line(row), encoding="utf-8")
    for number, start in enumerate(range(0, len(known.features), FEATURES_EACH)):
        part = known.features[start : start + FEATURES_EACH]
        kinds = {"features": rows.features(part), "activations": rows.activations(part)}
        for kind, found in {**kinds, "explanations": rows.explanations(part)}.items():
            files.append(place / kind / f"batch-{number}.jsonl.gz")
            _write(files[-1], found)
        if progress is not None:
            progress(start + len(part), len(known.features))
    return files


class Rows:
    """The rows of every file.

    Args:
        known: what is written.
        settings: by which names.
    """

    def __init__(self, known: KnownFeatures, settings: ExportSettings) -> None:
        self.known, self.settings = known, settings
        self.model = known.model_id(settings.model_id)
        self.set = known.source_set(settings.source_set)
        self.source = f"{known.layer()}-{self.set}"
        self.now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.creator = {"creatorId": settings.creator_id}
        site = known.sae.config.site or ""
        self.hook = f"blocks.{known.layer()}.{HOOKS[site]}" if site in HOOKS else None

    def about(self) -> dict[str, dict[str, Any]]:
        """File -> its one row: the model, the source, its set and its release."""
        release, creator, facts = self.settings.release, self.settings.creator, self.known.page.facts
        public, made = {"visibility": "PUBLIC"}, {**self.creator, "createdAt": self.now}
        name = {"displayNameShort": self.model, "displayName": self.model, "owner": creator}
        sizes = {"layers": 0, "neuronsPerLayer": 0, "dimension": self.known.sae.config.d_out}
        texts = self.known.page.title
        return {
            "model": {"id": self.model, "instruct": self.model.endswith(("-it", "-instruct")), **name, **sizes,
                      **public, "inferenceEnabled": False, "updatedAt": self.now, "website": None, **made},
            "release": {"name": release, "description": texts, "descriptionShort": texts, "urls": [], **public,
                        "creatorName": creator, "creatorNameShort": creator, **made},
            "sourceset": {"modelId": self.model, "name": self.set, "description": texts, "type": "", "urls": [],
                          "hasDashboards": True, "creatorName": creator, "releaseName": release, **public, **made},
            "source": {"modelId": self.model, "id": self.source, "setName": self.set, "hasDashboards": True,
                       "inferenceEnabled": False, "dataset": facts.get("Text"), "num_prompts": None,
                       "num_tokens_in_prompt": None, "hfRepoId": None, "hfFolderId": None, **public, **made},
        }  # fmt: skip

    def features(self, part: Iterable[int]) -> Iterator[dict[str, Any]]:
        """A row a feature: its numbers, tokens at both ends, histogram, neighbours, and its decoder row if asked."""
        for feature in part:
            norm, top = self.known.norm(feature), self.known.maximum(feature) or 0.0
            vector = _unit(self.known.sae, feature) if self.settings.vectors else []
            near = list(self.known.page.neighbours.get(feature, ()))
            heights, values = self._histogram(feature, norm)
            yield {
                **self._of(feature), **self.creator, "createdAt": self.now, "sourceSetName": self.set,
                "maxActApprox": top * norm, "frac_nonzero": self.known.frequency(feature) or 0.0,
                **self._tokens(feature, norm),
                "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": values,
                "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [],
                "topkCosSimIndices": [number for number, _ in near], "topkCosSimValues": [cos for _, cos in near],
                "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
                "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
                "decoder_weights_dist": [], "hasVector": bool(vector), "vector": vector, "vectorLabel": None,
                "vectorDefaultSteerStrength": top * norm, "hookName": self.hook,
            }  # fmt: skip

    def activations(self, part: Iterable[int]) -> Iterator[dict[str, Any]]:
        """A row a span: its tokens and their activations, 0 where a token does not count."""
        for feature in part:
            norm = self.known.norm(feature)
            for span in self.known.spans(feature):
                values = [value * norm for value in finite(span.activations)]
                peak = span.peak if span.peak >= 0 else values.index(max(values))
                tokens = list(span.tokens)
                yield {
                    "id": self._id("activation", feature, span.text, tokens), **self._of(feature), **self.creator,
                    "createdAt": self.now, "tokens": tokens, "values": values, "maxValue": max(values),
                    "maxValueTokenIndex": values.index(max(values)), "minValue": min(values), "dataIndex": None,
                    "dataSource": None, "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None,
                    "lossValues": [], "logitContributions": None, "binMin": None, "binMax": None,
                    "binContains": None, "qualifyingTokenIndex": peak,
                }  # fmt: skip

    def explanations(self, part: Iterable[int]) -> Iterator[dict[str, Any]]:
        """A row a description. Who explained and how is told of what came from Neuronpedia, whose tables know these
        names; an instance refuses others."""
        notes = self.known.notes
        theirs = notes is not None and notes.facts.get("source", "").startswith("Neuronpedia")
        for feature in part:
            for one in self.known.descriptions(feature):
                yield {
                    "id": self._id("explanation", feature, one.text), **self._of(feature),
                    "authorId": self.settings.creator_id, "description": one.text, "embedding": None,
                    "typeName": one.method if theirs else None, "umap_x": None, "umap_y": None,
                    "explanationModelName": one.explainer if theirs else None, "umap_cluster": None,
                    "umap_log_feature_sparsity": None,
                }  # fmt: skip

    def _of(self, feature: int) -> dict[str, Any]:
        return {"modelId": self.model, "layer": self.source, "index": str(feature)}

    def _id(self, *parts: Any) -> str:
        """A name of 25 characters for a row, the same each time, so that nothing is imported twice."""
        text = json.dumps([self.model, self.source, *parts])
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
        return "c" + "".join("0123456789abcdefghijklmnopqrstuvwxyz"[number // 36**n % 36] for n in range(24))

    def _tokens(self, feature: int, norm: float) -> dict[str, Any]:
        table = self.known.page.table
        if table is None:
            return {"pos_str": [], "pos_values": [], "neg_str": [], "neg_values": []}
        scale = max(norm, 1e-12)
        values = [
            (weights[feature] / scale).tolist()
            for weights in (table.weights.top_weights, table.weights.bottom_weights)
        ]
        return {
            "pos_str": table.top_tokens[feature], "pos_values": finite(values[0]),
            "neg_str": table.bottom_tokens[feature], "neg_values": finite(values[1]),
        }  # fmt: skip

    def _histogram(self, feature: int, norm: float) -> tuple[list[int], list[float]]:
        histograms = self.known.page.histograms
        if histograms is None:
            return [], []
        found = histograms.of(feature)
        middles = [(low + high) / 2 * norm for low, high in zip(found.edges, found.edges[1:], strict=False)]
        return found.counts, middles


def _unit(sae: SparseAutoencoder, feature: int) -> list[float]:
    row = sae.W_dec[feature].detach().float()
    return (row / row.norm().clamp_min(1e-12)).tolist()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of JSON, compressed; the same bytes for the same rows."""
    with (
        whole_file(path) as draft,
        draft.open("wb") as raw,
        gzip.GzipFile("", "wb", 5, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(map(_line, rows))
