"""`feature_table` as a function: what its result holds, writes and shows, and the unit `max` that it fills."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import (
    FeatureTableSettings,
    ReadingSettings,
    SaeForCausalLM,
    SparseAutoencoder,
    feature_table,
)
from sae_transformers.create_training_data.spans.files import TextSpan
from sae_transformers.evaluation.features.table_files import read_feature_table
from sae_transformers.evaluation.features.table_view import COLUMNS
from sae_transformers.modeling.conversion import saelens
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_base, tiny_sae

TEXTS = [*word_texts(12), "w1", ""]


def read_once(model: SaeForCausalLM, texts: list[str]) -> torch.Tensor:
    """Hidden states of all tokens but the first of each text."""
    found = []
    for text in texts:
        ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
        found.append(model(input_ids=ids, output_sae_inputs=True).sae_inputs[0][0, 1:].detach())
    return torch.cat(found)


def test_a_table_of_a_model_and_of_a_base_are_one() -> None:
    sae = tiny_sae(layer=1, k=4)
    model = SaeForCausalLM.from_base(tiny_base(), saes=[sae]).eval()
    seen: list[tuple[int, int]] = []
    found = feature_table(model, word_tokenizer(), texts=TEXTS, progress=lambda *at: seen.append(at))
    other = feature_table(tiny_base(), word_tokenizer(), sae=tiny_sae(layer=1, k=4), texts=TEXTS)
    assert torch.equal(found.table.weights.top_ids, other.table.weights.top_ids)
    assert found.table.log10_frequency is not None and other.table.log10_frequency is not None
    assert torch.equal(found.table.log10_frequency, other.table.log10_frequency)
    hidden = read_once(model, TEXTS[:12])
    assert found.table.facts["text_tokens"] == len(hidden) and (found.missing, found.cut) == (2, 0)
    assert (64, 64) in seen and seen[-1] == (len(hidden), 100_000)
    torch.testing.assert_close(sae.feature_max, sae.encode(hidden).detach().abs().amax(0))


def test_without_a_text_nothing_is_measured() -> None:
    sae = tiny_sae(layer=1)
    before = sae.feature_max.clone()
    found = feature_table(tiny_base(), word_tokenizer(), FeatureTableSettings(coherence="none"), sae=sae)
    assert found.table.dead is None and torch.equal(sae.feature_max, before) and found.summary() == []


def test_what_it_writes_and_shows(tmp_path: Path) -> None:
    settings = FeatureTableSettings(top_k=3, max_tokens=20, contexts=1, reading=ReadingSettings(max_length=4))
    spans = {5: [TextSpan(0, 2.0, "a b c"), TextSpan(1, 1.0, "d")], 7: []}
    found = feature_table(tiny_base(), word_tokenizer(), settings, sae=tiny_sae(layer=1), texts=TEXTS, spans=spans)
    assert found.cut > 0 and found.table.facts["text_tokens"] == 20
    files = found.save(tmp_path, {"sae": "mine"})
    names = ["facts.json", "features.csv", "features.json", "features.parquet", "words.tsv"]
    assert sorted(file.name for file in files) == names
    written = read_feature_table(tmp_path)
    assert written.facts["sae"] == "mine" and written.contexts is not None and written.contexts[5] == ["a b c"]
    json.dumps(found.to_dict())
    assert len(found.to_frame()) == 64 and [row[""] for row in found.statistics()][:2] == ["mean", "std"]
    assert "<table>" in found._repr_html_()
    assert list(found.to_frame())[:7] == list(COLUMNS)
    assert repr(found) == found.text() and len(repr(found).splitlines()) <= 5 + 1 + 5 + 3


def published(folder: Path, sparsity: torch.Tensor) -> SparseAutoencoder:
    """An SAE as SAELens saves it, with the file that its training adds."""
    sae = tiny_sae(layer=1)
    assert saelens.FORMAT.write is not None
    saelens.FORMAT.write(sae.config, sae.state_dict(), folder)
    save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    return SparseAutoencoder.from_pretrained(folder)


def test_sparsity_is_read_where_it_was_published(tmp_path: Path) -> None:
    sparsity = (torch.rand(64, generator=torch.Generator().manual_seed(0)) / 8 + 1e-10).log10()
    sae = published(tmp_path / "saelens", sparsity)
    sae.save_pretrained(tmp_path / "ours")  # it still knows where it is from
    for one in (sae, SparseAutoencoder.from_pretrained(tmp_path / "ours")):
        found = feature_table(tiny_base(), word_tokenizer(), sae=one, texts=TEXTS)
        assert found.table.sparsity is not None and torch.equal(found.table.sparsity, sparsity.double())
        assert found.table.log10_frequency is not None and not torch.equal(found.table.log10_frequency, sparsity)
        assert f"as published, {tmp_path}/saelens/sparsity.safetensors" in found.text(width=500)
        assert found.to_frame()["sparsity"].tolist() == sparsity.tolist()


@pytest.mark.parametrize("wrong", [torch.zeros(63), torch.ones(64), torch.full((64,), torch.nan), None])
def test_sparsity_that_cannot_be_read_is_told(wrong: torch.Tensor | None, tmp_path: Path) -> None:
    sae = published(tmp_path, torch.zeros(64) if wrong is None else wrong)
    if wrong is None:
        (tmp_path / "sparsity.safetensors").unlink()
    found = feature_table(tiny_base(), word_tokenizer(), sae=sae)
    assert found.table.sparsity is None and "sparsity.safetensors" in found.summary()[0]


@pytest.mark.hub
def test_sparsity_of_a_hub_repository(tmp_path: Path) -> None:
    published(tmp_path / "repo" / "blocks.1", torch.linspace(-5, 0, 64))
    script = """
        import sys
        from huggingface_hub import HfApi
        from sae_transformers import SparseAutoencoder
        from sae_transformers.modeling.conversion.saelens import published_sparsity

        HfApi().create_repo("tester/saes")
        HfApi().upload_folder(repo_id="tester/saes", folder_path=sys.argv[1])
        found = published_sparsity(SparseAutoencoder.from_pretrained("tester/saes/blocks.1").config)
        print(found.source, len(found.values), float(found.values.min()))
    """
    with LoopbackHub() as hub:
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "repo")]
        run = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["tester/saes/blocks.1/sparsity.safetensors", "64", "-5.0"]


def test_spans_of_another_sae_are_refused() -> None:
    with pytest.raises(ValueError, match="of 64 features. Received: feature 99"):
        feature_table(tiny_base(), word_tokenizer(), sae=tiny_sae(layer=1), spans={99: []})
