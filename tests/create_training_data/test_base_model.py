import sys
from pathlib import Path

import pytest

from sae_transformers.create_training_data import base_model


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no config\.json"):
        base_model.find_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert base_model.find_base_model(str(tmp_path)) == (str(tmp_path.resolve()), "a local folder")


def test_order_is_hub_then_its_cache_then_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base_model, "hub_answers", lambda: True)
    assert base_model.find_base_model().name == base_model.DEFAULT_MODEL
    monkeypatch.setattr(base_model, "hub_answers", lambda: False)
    monkeypatch.setattr(base_model, "in_hub_cache", lambda name: True)
    assert base_model.find_base_model("me/mine") == ("me/mine", "the Hugging Face cache")
    monkeypatch.setattr(base_model, "in_hub_cache", lambda name: False)
    monkeypatch.setattr(base_model, "default_model_from_package", lambda say: tmp_path)
    assert base_model.find_base_model().name == str(tmp_path)
    with pytest.raises(OSError, match="'me/mine' is no folder"):
        base_model.find_base_model("me/mine")


def test_a_converted_model_is_not_converted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr(base_model, "download_package", lambda *a: pytest.fail("fetched again"))
    kept = tmp_path / "SmolLM2-135M-Instruct-from-Q4_1"
    kept.mkdir()
    assert base_model.default_model_from_package() == kept


def test_without_gguf_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf.*pip install 'sae-transformers\[quickstart\]'"):
        base_model.default_model_from_package()
