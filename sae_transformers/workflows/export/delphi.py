"""Features in delphi's layout: what its scorers read in place of its own explanations and activations.

    explanations/{module}_latent{n}.txt           a description, JSON
    latents/{module}/0_{d_sae - 1}.safetensors    spans as rows of tokens, with activations; config.json
    neighbours/{module}-decoder_similarity.json   latents with cosines, nearest first

A row of tokens has the activations of the one feature that the span is of; others may be active in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...latents.output_files import whole_file
from ..results import Progress
from ..settings.dashboard import ExportSettings
from .known import KnownFeatures, finite

MODULES = {"resid_post": "layers.{0}", "mlp_out": "layers.{0}.mlp", "attn_out": "layers.{0}.attn"}


def module_of(known: KnownFeatures) -> str:
    """The place that the SAE reads as delphi names it: `layers.3` for a block's output, else the path."""
    config = known.sae.config
    return MODULES.get(config.site or "", config.read_at if config.placed else "sae").format(config.layer)


def write_delphi(
    known: KnownFeatures, folder: str | Path, settings: ExportSettings, progress: Progress | None = None
) -> list[Path]:
    """Write descriptions, spans and neighbours; the files.

    Args:
        settings: of which `model_id` names the base for its tokenizer, as it is loaded.
        progress: called with (features done, features).

    Raises:
        ValueError: spans are not scored by the SAE's own activation, or there are spans and no fast tokenizer.
    """
    known.check_spans()
    place, module = Path(folder), module_of(known)
    files: list[Path] = []
    for done, feature in enumerate(known.features, 1):
        if found := known.descriptions(feature):  # one each, the best
            files.append(place / "explanations" / f"{module}_latent{feature}.txt")
            _write_json(files[-1], found[0].text)
        if progress is not None:
            progress(done, len(known.features))
    if near := {
        str(n): [list(pair) for pair in known.page.neighbours[n]] for n in known.features if n in known.page.neighbours
    }:
        files.append(place / "neighbours" / f"{module}-decoder_similarity.json")
        _write_json(files[-1], near)
    tensors = _spans(known)
    if tensors is not None:
        files.append(place / "latents" / module / f"0_{known.sae.config.d_sae - 1}.safetensors")
        with whole_file(files[-1]) as draft:
            save_file(tensors, draft)
        name = settings.model_id or known.page.facts.get("Base model") or known.sae.config.metadata.get("base_model")
        files.append(files[-1].with_name("config.json"))
        width = int(tensors["tokens"].shape[1])
        facts = {"model_name": name, "ctx_len": width, "cache_ctx_len": width, "n_tokens": int(tensors["tokens"].size)}
        text = {"dataset_repo": known.page.facts.get("Text", ""), "dataset_split": "", "dataset_name": ""}
        _write_json(files[-1], {**facts, **text, "dataset_column": "text", "n_splits": 1})
    return files


def _spans(known: KnownFeatures) -> dict[str, np.ndarray] | None:
    """tokens (spans, longest) int64; locations (n, 3) of span, token and latent, and activations (n,) float16, where
    these are not 0. A token has the activation of the piece of text in which it ends."""
    spans = [(feature, span) for feature in known.features for span in known.spans(feature)]
    if not spans:
        return None
    tokenizer: Any = known.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError("Spans in delphi's layout need the base's fast tokenizer. Received: none.")
    read = tokenizer(
        ["".join(span.tokens) for _, span in spans], add_special_tokens=False, return_offsets_mapping=True
    )
    width = max(1, max(map(len, read["input_ids"])))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    tokens = np.full((len(spans), width), fill, np.int64)
    locations, values = [], []
    for row, (feature, span) in enumerate(spans):
        tokens[row, : len(read["input_ids"][row])] = read["input_ids"][row]
        ends = np.cumsum([len(piece) for piece in span.tokens])
        activations = finite(span.activations)
        pieces = np.searchsorted(ends, [max(end - 1, 0) for _, end in read["offset_mapping"][row]], side="right")
        last = {int(piece): column for column, piece in enumerate(pieces)}  # a piece's value is that of its last token
        for piece, column in last.items():
            if piece < len(activations) and activations[piece]:
                locations.append((row, column, feature))
                values.append(activations[piece])
    kind = np.uint16 if max(len(spans), known.sae.config.d_sae) < 2**16 else np.uint32
    return {
        "locations": np.array(locations, kind).reshape(-1, 3), "activations": np.array(values, np.float16),
        "tokens": tokens,
    }  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as draft:
        draft.write_text(json.dumps(value), encoding="utf-8")
