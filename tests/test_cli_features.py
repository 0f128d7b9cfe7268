"""The verbs `feature-table`, `steer-feature` and `ask-features`, from files to files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation_tables import read_annotations
from sae_transformers.evaluation.feature_table import logit_weights
from sae_transformers.evaluation.feature_table_files import read_feature_table
from sae_transformers.evaluation.unembedding import unembedding
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
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


def test_a_whole_sae_in_one_command(folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("sae", "options", "told"),
    [
        ("narrow", [], "d_out=16"),
        ("inside", [], "mlp_in"),
        ("sae", ["--match", "zebra"], "'zebra', which none does"),
        ("sae", ["--top-k", 0], "--top-k=0"),
        ("sae", ["--coherence", "glove"], "'glove'"),
        ("sae", ["--spans", "nowhere"], "nowhere"),
        ("sae", ["--text", "nowhere.txt", "--max-length", 64], "nowhere.txt"),
        ("sae", ["--text", "nowhere.txt"], "at most 128"),
    ],
)
def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path, sae: str, options: list, told: str) -> None:
    result = table(folder, tmp_path / "out", *options, sae=sae)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def steer(folder: Path, *options: object) -> Result:
    return invoke("steer-feature", folder / "base", "w1 w2 w3", "--sae", folder / "sae", *options)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines() if line.startswith("│")]


def test_steering_side_by_side(folder: Path) -> None:
    options = ["--feature", 5, "--samples", 2, "--max-new-tokens", 4, "--layer", 1]
    result = steer(folder, *options, "--coefficient", 40)
    assert result.exit_code == 0, result.output
    assert "feature 5, 40 absolute" in result.stdout and "unsteered" in result.stdout
    assert steer(folder, *options, "--coefficient", 40).stdout == result.stdout
    named = steer(folder, "--feature", "rivers", *options[2:], "--coefficient", 40)
    assert "feature rivers, 40 absolute" in named.stdout, named.output
    assert cells(named.stdout) == cells(result.stdout)
    nothing = steer(folder, *options, "--coefficient", 0, "--legacy").stdout
    rows = cells(nothing)
    assert rows and all(steered == unsteered for steered, unsteered in rows)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--feature", 5, "--coefficient", 1, "--layer", 2], "layers.1.resid_post"),
        (["--feature", 64, "--coefficient", 1], "feature=64"),
        (["--feature", 5, "--coefficient", "nan"], "value=nan"),
        (["--feature", 5, "--coefficient", 1, "--max-new-tokens", 200], "context of 128"),
    ],
)
def test_steering_mistakes(folder: Path, options: list, told: str) -> None:
    result = steer(folder, *options)
    assert result.exit_code == 2 and told in result.stderr, result.output


def yes_to_even(body: dict[str, Any]) -> str:
    numbers = map(int, re.findall(r"^Feature (\d+)", last_user_text(body), flags=re.MULTILINE))
    return json.dumps({"answers": [{"feature": n, "reason": "", "answer": "no" if n % 2 else "yes"} for n in numbers]})


def test_a_question(folder: Path, tmp_path: Path) -> None:
    assert table(folder, tmp_path / "out").exit_code == 0
    arguments = ["ask-features", tmp_path / "out" / "words.tsv", "--question", "Even?", "--out", tmp_path / "even.csv"]
    with FakeOpenAI(yes_to_even) as server:
        options = [
            "--model",
            "m",
            "--base-url",
            server.url,
            "--cache",
            tmp_path / "cache",
            "--first",
            7,
            "--at-once",
            4,
        ]
        dry = invoke(*arguments, *options, "--dry-run")
        assert dry.exit_code == 0 and not server.sent and not (tmp_path / "even.csv").exists()
        result = invoke(*arguments, *options)
        assert result.exit_code == 0, result.output
        assert len(server.sent) == 2
        folder_given = invoke("ask-features", tmp_path / "out", *arguments[2:], *options)
        assert folder_given.exit_code == 0 and len(server.sent) == 2  # the same features: all answered
        server.always = "500"
        again = invoke(*arguments, *options[:-4], "--first", 9, "--at-once", 9, "--max-attempts", 1)
    assert "yes: 4, no: 3" in result.stdout and "yes: features 0, 2, 4, 6" in result.stdout
    with (tmp_path / "even.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    assert again.exit_code == 1 and "9 of 9 features have no answer" in again.stderr
    assert invoke(*arguments).exit_code == 2  # which model?
