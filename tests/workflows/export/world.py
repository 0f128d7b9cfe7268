"""A dashboard of a tiny model with everything on it: table, spans with activations, histograms, descriptions."""

from __future__ import annotations

from typing import Any, NamedTuple

from sae_transformers import (
    DashboardSettings,
    DashboardSources,
    SaeForCausalLM,
    SpanSettings,
    annotate,
    dashboard,
    feature_table,
    spans,
)
from sae_transformers.create_training_data.annotation.tables import AnnotationRow
from sae_transformers.workflows.reading.dashboard import DashboardResult
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = [text for text in word_texts(12) if len(text.split()) > 1]
HOSTILE = "<script>alert(1)</script> =1+1 \x1b[31m \x00"
NOTES = [
    {"feature": 3, "description": "remarks that mean the opposite", "score": 0.5, "explainer": "m"},
    {"feature": 3, "description": "irony"}, {"feature": 5, "description": HOSTILE},
]  # fmt: skip


class Made(NamedTuple):
    found: DashboardResult
    spans: Any
    table: Any


def made(activation: str = "own", **settings: Any) -> Made:
    """The page of an SAE of 64 latents, top-4, after the second block."""
    tokenizer = word_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer))
    base.name_or_path = base.config.name_or_path = "org/Tiny-Llama-it"
    model = SaeForCausalLM.from_base(base, [tiny_sae(layer=1, site="resid_post", k=4)])
    model.saes[0].feature_max.zero_()
    annotate(model, NOTES)
    shown = SpanSettings(max_length=32, top_n=2, window=4, activation=activation)
    found = spans(model, tokenizer, TEXTS, shown)
    table = feature_table(model, tokenizer, texts=TEXTS)
    said = [AnnotationRow(9, "Span 1: x", "names of rivers", "yes")]
    sources = DashboardSources(table=table.table, spans=found, annotations=said)
    page = dashboard(sources, model, tokenizer, DashboardSettings(neighbours=3, **settings), texts=TEXTS)
    return Made(page, found, table)
