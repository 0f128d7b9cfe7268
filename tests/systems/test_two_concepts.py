"""Two concepts in one SAE, from two tables to two detectors and steered text, by the verbs of docs/papers/scar.md."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_transformers import SparseAutoencoder
from sae_transformers.cli import app
from sae_transformers.evaluation.results import read_results
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("command_line")]

WORDS_OF = {"rude": WORDS[80:82], "warm": WORDS[85:87]}
PLAIN = WORDS[:20]


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def table(path: Path, concept: str, count: int, seed: int) -> Path:
    """Texts of twelve words with a score, 0.9 where five of them are of the concept; every other pair of texts has
    words of the other concept too, with it or without."""
    draw, lines = random.Random(seed), []
    (other,) = set(WORDS_OF) - {concept}
    for number in range(count):
        mine = draw.choices(WORDS_OF[concept], k=5) if number % 2 else []
        mine += draw.choices(WORDS_OF[other], k=5) if number % 4 > 1 else []
        words = [*draw.choices(PLAIN, k=12 - len(mine)), *mine]
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "score": 0.9 if number % 2 else 0.1}))
    path.write_text("\n".join(lines) + "\n")
    return path


def labelled(path: Path, concept: str, count: int, seed: int) -> Path:
    """The same with a label, for `detect` and `evaluate`."""
    rows = [json.loads(line) for line in table(path, concept, count, seed).read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": r["text"], "label": int(r["score"] > 0.5)}) + "\n" for r in rows))
    return path


def test_two_concepts_in_one_sae(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_base(vocab_size=94).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    (tmp_path / "concepts").mkdir()
    for seed, (concept, other) in enumerate((("rude", "warm"), ("warm", "rude"))):
        rows = table(tmp_path / f"{concept}.jsonl", concept, 300, seed)
        told = run(
            "concept-data", "table", rows, "--label-column", "score", "--concept", concept, "--others", other,
            "--out", tmp_path / "concepts" / f"{concept}.jsonl",
        )  # fmt: skip
        assert f"{concept}: 300 texts, 150 with, 150 without" in told
    run(
        "harvest", base, tmp_path / "concepts", "--label", "rude", "--label", "warm",
        "--hook-point", "layers.0.resid_post", "--max-length", 64, "--out", tmp_path / "states",
    )  # fmt: skip
    run(
        "train", "--config", "scar", "--data", tmp_path / "states", "--layer", 0, "--site", "resid_post",
        "--d_sae", 64, "--k", 8, "--concepts", "{rude: 0, warm: 1}", "--learning_rate", 0.01, "--num_train_epochs", 40,
        "--per_device_train_batch_size", 512, "--output_dir", tmp_path / "sae", "--save_strategy", "no",
        "--report_to", "none",
    )  # fmt: skip
    assert SparseAutoencoder.from_pretrained(tmp_path / "sae").config.concepts == {"rude": 0, "warm": 1}
    run("attach", "--base", base, "--sae", tmp_path / "sae", "--out", tmp_path / "model")
    for concept in WORDS_OF:
        rows = labelled(tmp_path / f"held_out_{concept}.jsonl", concept, 200, seed=7)
        auroc = {}
        for feature in WORDS_OF:
            told = run("detect", tmp_path / "model", rows, "--feature", feature, "--pre-activations")
            auroc[feature] = float(re.findall(r"AUROC (\d\.\d+)", told)[0])
        other = next(name for name in WORDS_OF if name != concept)
        assert auroc[concept] > 0.95 and 0.3 < auroc[other] < 0.7, auroc  # each detects its own concept alone
        run(
            "evaluate", tmp_path / "model", "--suite", "detection", "--labelled", rows, "--out", tmp_path / concept,
            "--feature", concept, "--seeds", 0, "--ks", 1, "--resamples", 20,
        )  # fmt: skip
        found = read_results(tmp_path / concept / "results.json").suites["detection"]
        of_all = "tree on all latents of SAE 0, fitted to all texts"
        for p in (1, 5):
            score = found.value(f"tree_fms_{p}", of_all)
            assert score is not None and 0.5 < score <= 1.0, (concept, p, score)
    written = {}
    for concept in WORDS_OF:
        out = tmp_path / f"{concept}.csv"
        run(
            "generate", tmp_path / "model", "w1 w2 w3", "--feature", f"{concept}=2n", "--max-new-tokens", 12,
            "--temperature", 0, "--out", out,
        )  # fmt: skip
        written[concept] = out.read_text()
    assert written["rude"] != written["warm"]
