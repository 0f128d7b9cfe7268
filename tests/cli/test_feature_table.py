"""The verb `feature-table`, from files to files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sae_transformers import SparseAutoencoder, attach
from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import read_annotations
from sae_transformers.evaluation.features.table import logit_weights
from sae_transformers.evaluation.features.table_files import read_feature_table
from sae_transformers.evaluation.features.table_view import COLUMNS
from sae_transformers.evaluation.features.unembedding import unembedding
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, k=4, feature_names={"5": "rivers"}).save_pretrained(folder / "sae")
    tiny_sae(layer=1, d_in=16).save_pretrained(folder / "narrow")
    tiny_sae(layer=1, site="mlp_in").save_pretrained(folder / "inside")
    (folder / "text.txt").write_text("\n\n".join(word_texts(40)), encoding="utf-8")
    (folder / "vectors.txt").write_text("w 1 0\n", encoding="utf-8")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def table(folder: Path, out: Path, *options: object, sae: str = "sae") -> Result:
    return invoke("feature-table", folder / "base", "--sae", folder / sae, "--out", out, *options)


def test_a_whole_sae_in_one_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = [folder / "base", folder / "text.txt", "--sae", folder / "sae", "--out", tmp_path / "spans"]
    spans = invoke("spans", *given, "--max-length", 64)
    assert spans.exit_code == 0, spans.output
    options = [
        "--spans",
        tmp_path / "spans",
        "--contexts",
        2,
        "--text",
        folder / "text.txt",
        "--top-k",
        3,
        "--max-length",
        64,
    ]
    result = table(folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"64 features x 94 tokens in \d+\.\d s", result.stdout)
    shown = result.stdout[result.stdout.index("feature  ") :].splitlines()
    assert shown[0].split() == list(COLUMNS) and [line.split()[0] for line in shown[1:12]] == [
        "0", "1", "2", "3", "4", "...", "59", "60", "61", "62", "63",
    ]  # fmt: skip
    assert max(map(len, shown[:13])) <= 80
    found = read_feature_table(tmp_path / "out")
    sae = tiny_sae(layer=1, k=4)
    expected = logit_weights(sae.W_dec.detach(), unembedding(tiny_base(), vocabulary=torch.arange(94)), top_k=3)
    torch.testing.assert_close(found.weights.kurtosis, expected.kurtosis, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.weights.top_ids, expected.top_ids)
    tokens = sum(len(text.split()) - 1 for text in (folder / "text.txt").read_text().split("\n\n"))
    assert found.facts["text_tokens"] == tokens and found.dead is not None and found.log10_frequency is not None
    active = (10 ** found.log10_frequency[~found.dead]).sum()
    assert float(active) <= 4 + 1e-6 and float(active) > 1  # k latents a token at most
    assert found.contexts is not None and any(found.contexts) and max(map(len, found.contexts)) == 2
    assert found.coherence is not None and float(found.coherence.abs().max()) > 0
    rows = read_annotations(tmp_path / "out" / "words.tsv")
    assert len(rows) == 64 and all(len(row.spans()) == 1 + len(found.contexts[row.feature_id]) for row in rows)
    assert len(json.loads((tmp_path / "out" / "features.json").read_text())) == 64


def test_options(folder: Path, tmp_path: Path) -> None:
    options = ["--keep-norm", "--no-centre", "--match", r"^w\d$", "--coherence", folder / "vectors.txt", "--top-k", 4]
    result = table(folder, tmp_path, *options)
    assert result.exit_code == 0, result.output
    found = read_feature_table(tmp_path)
    assert found.facts["tokens"] == 10 and not found.facts["fold_norm"] and not found.facts["centre"]
    assert found.dead is None and found.contexts is None
    assert found.coherence is not None and float(found.coherence.max()) == pytest.approx(1.0, abs=1e-4)  # all are "w"
    assert table(folder, tmp_path, "--coherence", "none").exit_code == 0
    assert read_feature_table(tmp_path).coherence is None


def test_counting_stops_at_max_tokens(folder: Path, tmp_path: Path) -> None:
    result = table(folder, tmp_path, "--text", folder / "text.txt", "--max-tokens", 25, "--max-length", 64)
    assert result.exit_code == 0, result.output
    assert read_feature_table(tmp_path).facts["text_tokens"] == 25


def test_a_saved_model_and_the_largest_activations(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1\n\n" + (folder / "text.txt").read_text(), encoding="utf-8")
    attach(str(folder / "base"), [folder / "sae"], tmp_path / "model")
    options = ["--text", tmp_path / "text.txt", "--max-length", 9, "--save-sae", tmp_path / "sae"]
    result = invoke("feature-table", tmp_path / "model", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert (
        "1 rows of the text have no token that counts." in result.stdout
        and "rows of the text were cut." in result.stdout
    )
    found = read_feature_table(tmp_path / "out")
    assert found.dead is not None
    maxima = SparseAutoencoder.from_pretrained(tmp_path / "sae").feature_max
    assert ((maxima == 0) == found.dead).all() and float(maxima.max()) > 0


def test_old_spellings_are_taken_with_a_note(folder: Path, tmp_path: Path) -> None:
    options = ["--text", folder / "text.txt", "--max-length", 64, "--tokens-at-once", 512, "--column", "text"]
    result = table(folder, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "--tokens-at-once is now --tokens-per-batch." in result.stderr
    assert "--column is now --text-column." in result.stderr


@pytest.mark.parametrize(
    ("sae", "options", "told"),
    [
        ("narrow", [], "d_out=16"),
        ("inside", [], "mlp_in"),
        ("sae", ["--match", "zebra"], "'zebra', which none does"),
        ("sae", ["--top-k", 0], "--top-k=0"),
        ("sae", ["--coherence", "glove"], "'glove'"),
        ("sae", ["--spans", "nowhere"], "nowhere"),
        ("sae", ["--text", "nowhere.txt"], "nowhere.txt"),
        ("sae", ["--max-length", 999], "from 2 to 128"),
        ("sae", ["--match", "["], "regular expression"),
        ("sae", ["--save-sae", "saved"], "--save-sae needs --text"),
    ],
)
def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path, sae: str, options: list, told: str) -> None:
    result = table(folder, tmp_path / "out", *options, sae=sae)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
