"""Tokens of spans and their activations, against a forward pass of each text by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SaeForCausalLM
from sae_transformers.create_training_data.spans.activations import (
    SpanOrigin,
    _whole_characters,
    read_span_index,
    read_span_tokens,
)
from sae_transformers.create_training_data.spans.collect import SpanCollector
from sae_transformers.create_training_data.spans.files import read_table
from sae_transformers.create_training_data.spans.settings import SpanSettings
from sae_transformers.latents.texts import TextSource, rows_of_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = word_texts(50)
SMALL: dict[str, Any] = {"top_n": 2, "window": 4, "max_length": 64, "rows_per_block": 8}


def collected(folder: Path, **settings: Any) -> tuple[Any, Any, SpanSettings, dict[str, Any]]:
    base, sae = tiny_base(vocab_size=94), tiny_sae(layer=1, k=4)
    chosen = SpanSettings(**{**SMALL, **settings})
    SpanCollector(base, word_tokenizer(), sae, rows_of_list(TEXTS), chosen, out=folder).run()
    return base, sae, chosen, read_table(folder / "spans.parquet")


@pytest.mark.parametrize("activation", ["relu", "own"])
@pytest.mark.parametrize("include_peak", [True, False])
def test_activations_are_those_of_the_whole_text(tmp_path: Path, activation: str, include_peak: bool) -> None:
    base, sae, settings, spans = collected(tmp_path, activation=activation, include_peak=include_peak)
    index = read_span_index(str(tmp_path))
    assert SpanSettings.from_identity(index["settings"]) == settings
    assert index["source"] == dict(rows_of_list(TEXTS).facts)
    found = read_span_tokens(SpanOrigin(base, word_tokenizer(), sae, rows_of_list(TEXTS), settings), spans, after=2)
    model: Any = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    hidden: list[torch.Tensor] = []
    for text in TEXTS:
        ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
        hidden.append(model(input_ids=ids, output_sae_inputs=True, stop_at_last_sae=True).sae_inputs[0][0].detach())
    assert len(found) == len(spans["span"]) > 60
    for number, one in enumerate(found):
        text = TEXTS[one.text]
        states = hidden[one.text]
        latents = sae.encode(states) if activation == "own" else sae.encode_pre_acts(states).relu()
        feature, position = int(spans["feature"][number]), int(spans["position"][number])
        begin = position - one.peak
        assert text.split()[begin : begin + len(one.tokens)] == [token.strip() for token in one.tokens]
        assert "".join(one.tokens).startswith(spans["span"][number])
        assert len(one.tokens) == min(len(states), position + 3) - begin
        expected = latents[begin : begin + len(one.tokens), feature].detach()
        if begin == 0:
            assert math.isnan(one.activations[0])  # the first token of a text does not count
        shown = torch.tensor(one.activations)
        known = ~shown.isnan()
        torch.testing.assert_close(shown[known], expected[known], rtol=1e-3, atol=1e-3)
        assert one.activations[one.peak] == pytest.approx(float(spans["score"][number]), rel=1e-3)


def test_the_first_tokens_are_visited_once(tmp_path: Path) -> None:
    base, sae, settings, spans = collected(tmp_path, activation="own")
    some = {name: column[:1] for name, column in spans.items()}
    counted = sum(len(text.split()) - 1 for text in TEXTS[:16])
    seen: list[int] = []
    read_span_tokens(
        SpanOrigin(base, word_tokenizer(), sae, rows_of_list(TEXTS), settings), some,
        max_tokens=sum(len(text.split()) - 1 for text in TEXTS[:8]) + 1,
        visit=lambda indices, values: seen.append(len(indices)),
    )  # fmt: skip
    assert sum(seen) == counted  # two blocks of eight
    none = {name: column[:0] for name, column in spans.items()}
    assert read_span_tokens(SpanOrigin(base, word_tokenizer(), sae, rows_of_list(TEXTS), settings), none) == []


def test_parts_of_a_character_become_one_token() -> None:
    found = _whole_characters(7, ["a", "", "", "é", "b", ""], torch.tensor([1.0, 2.0, 5.0, 3.0, math.nan, 4.0]), 2)
    assert (found.text, found.tokens, found.peak) == (7, ["a", "é", "b", ""], 1)
    assert found.activations[:2] == [1.0, 5.0] and math.isnan(found.activations[2]) and found.activations[3] == 4.0


def test_other_text_or_weights_are_refused(tmp_path: Path) -> None:
    base, sae, settings, spans = collected(tmp_path, activation="own")

    def read(source: TextSource, autoencoder: Any = sae) -> None:
        read_span_tokens(SpanOrigin(base, word_tokenizer(), autoencoder, source, settings), spans)

    with pytest.raises(ValueError, match="other characters"):
        read(rows_of_list(word_texts(50, seed=1)))
    with pytest.raises(ValueError, match="without .* of their rows"):
        read(rows_of_list(TEXTS[:10]))
    with pytest.raises(ValueError, match="where the spans say"):
        read(rows_of_list(TEXTS), tiny_sae(seed=5, layer=1, k=4))
    with pytest.raises(FileNotFoundError, match="index.json"):
        read_span_index(str(tmp_path / "nowhere"))
