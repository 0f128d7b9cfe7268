"""`spans` from Python: its result and tables, and the largest activations that it fills, whatever stopped it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_transformers import FeatureEdit, SaeForCausalLM, SpanSettings, SparseAutoencoder, Steering, load, spans
from sae_transformers.cli import app
from sae_transformers.create_training_data.spans.collect import SpanCollector
from sae_transformers.workflows.reading.spans import read_spans_result
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = word_texts(18)
FILES = ("spans.parquet", "spans.tsv", "features.tsv", "spans.json", "work/feature_max.safetensors")
SMALL: dict[str, Any] = {"max_length": 24, "top_n": 2, "window": 4, "rows_per_block": 4, "blocks_per_save": 1}


def made(activation: str = "topk") -> tuple[Any, Any]:
    sae = tiny_sae(layer=1, activation=activation)
    return SaeForCausalLM.from_base(tiny_base(), saes=[sae]).eval(), word_tokenizer()


def by_hand(model: Any, tokenizer: Any) -> torch.Tensor:
    """Each latent's largest activation over the tokens of all texts, without the first of each."""
    largest = torch.zeros(64)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :24]
        with torch.no_grad():
            latents = model(ids, output_features=True).sae_features[0].to_dense()[0, 1:]
        largest = torch.maximum(largest, latents.abs().amax(0)) if len(latents) else largest
    return largest


@pytest.mark.parametrize("kind", ["relu", "own"])
@pytest.mark.parametrize("activation", ["topk", "abs_topk", "relu", "jumprelu", "gated"])
def test_the_largest_activations_are_measured(activation: str, kind: str) -> None:
    model, tokenizer = made(activation)
    expected = by_hand(model, tokenizer)
    reports: list[tuple[int, int]] = []
    found = spans(
        model, tokenizer, TEXTS, SpanSettings(**SMALL, activation=kind), progress=lambda *at: reports.append(at)
    )
    assert found.feature_max is not None and bool((expected > 0).any())
    torch.testing.assert_close(found.feature_max, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.saes[0].feature_max, expected, rtol=1e-4, atol=1e-5)
    assert reports[-1] == (18, 18) and [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_the_unit_max_of_steering_works_afterwards() -> None:
    model, tokenizer = made()
    feature = int(by_hand(model, tokenizer).argmax())
    steering = Steering([FeatureEdit(feature=feature, op="set", value=1.0, unit="max")])
    ids = torch.tensor([[5, 6, 7]])
    model.saes[0].feature_max.zero_()
    with pytest.raises(ValueError, match="measure_feature_max"):
        model(ids, steering=steering)
    spans(model, tokenizer, TEXTS, SpanSettings(**SMALL))
    assert not torch.equal(model(ids, steering=steering).logits, model(ids).logits)


class Killed(BaseException):
    pass


def test_they_go_on_with_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = made()
    whole = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path / "whole")
    real, done = SpanCollector.add_block, []

    def mortal(self: SpanCollector, number: int, *rest: Any) -> tuple[int, int]:
        done.append(number)
        if len(done) == 4:
            raise Killed
        return real(self, number, *rest)

    monkeypatch.setattr(SpanCollector, "add_block", mortal)
    with pytest.raises(Killed):
        spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path / "killed")
    monkeypatch.setattr(SpanCollector, "add_block", real)
    model, _ = made()
    again = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path / "killed")
    assert again.feature_max is not None and whole.feature_max is not None
    assert torch.equal(again.feature_max, whole.feature_max)
    assert torch.equal(model.saes[0].feature_max, whole.feature_max) and again.sae is model.saes[0]
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    finished = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path / "killed")
    assert finished.feature_max is not None and torch.equal(finished.feature_max, whole.feature_max)


def test_a_run_that_was_begun_without_them_goes_on_without_them(tmp_path: Path) -> None:
    model, tokenizer = made()
    whole = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path)
    part = tmp_path / "work" / "part-00000.safetensors"
    save_file({name: value for name, value in load_file(part).items() if name != "feature_max"}, part)
    (tmp_path / "work" / "feature_max.safetensors").unlink()
    (tmp_path / "spans.json").unlink()
    model.saes[0].feature_max.zero_()
    again = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path)
    assert again.feature_max is None and again.span == whole.span and not bool(model.saes[0].feature_max.any())


def test_the_result_as_tables_and_files(tmp_path: Path) -> None:
    model, tokenizer = made()
    in_folder = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL), out=tmp_path / "a")
    found = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL))
    found.save(tmp_path / "b")
    for name in (*FILES, "work/index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    frame = found.to_frame()
    assert list(frame.columns) == ["feature", "text_id", "score", "position", "start", "end", "span"]
    assert frame["span"].tolist() == found.span and found.rows()[0]["score"] == pytest.approx(float(found.score[0]))
    assert found.to_dict()["spans"] == len(found.span) and found.to_dict()["settings"]["skip_first"] is True
    assert found.summary()[0].startswith("18 texts, ") and "<table>" in found._repr_html_()
    read = read_spans_result(tmp_path / "b")
    assert read.settings.identity() == in_folder.settings.identity() and read.span == found.span
    assert read.feature_max is not None and found.feature_max is not None
    assert torch.equal(read.feature_max, found.feature_max) and read.counts() == found.counts()
    with pytest.raises(ValueError, match="without their SAE"):
        _ = read.sae
    with pytest.raises(FileNotFoundError, match="index.json"):
        read_spans_result(tmp_path)


def test_texts_are_cut_at_what_the_model_reads() -> None:
    model, tokenizer = made()
    assert spans(model, tokenizer, TEXTS).settings.max_length == 128


def test_a_saved_model_and_the_sae_that_is_saved(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    tiny_sae(layer=1).save_pretrained(tmp_path / "sae")
    SaeForCausalLM.from_base(str(tmp_path / "base"), saes=[tiny_sae(layer=1)]).save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    text = [str(tmp_path / "texts.txt"), "--max-length", "24"]

    def run(*words: str) -> Any:
        result = CliRunner().invoke(app, ["spans", *words])
        assert result.exit_code == 0, result.output
        return result

    run(str(tmp_path / "base"), *text, "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "a"))
    run(str(tmp_path / "model"), *text, "--out", str(tmp_path / "b"), "--save-sae", str(tmp_path / "measured"))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    wrong = CliRunner().invoke(
        app, ["spans", str(tmp_path / "model"), *text, "--out", str(tmp_path / "c"), "--number", "1"]
    )
    assert wrong.exit_code == 2 and "The model has SAEs 0 to 0. Received: SAE 1" in wrong.output
    model, tokenizer, _ = load(tmp_path / "model")
    measured: Any = SparseAutoencoder.from_pretrained(str(tmp_path / "measured"))
    torch.testing.assert_close(measured.feature_max, by_hand(model, tokenizer), rtol=1e-4, atol=1e-5)
