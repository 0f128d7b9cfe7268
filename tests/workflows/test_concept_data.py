"""`concept_data` as a function and as a verb: texts with labels from SCAR's sources and from any table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from sae_transformers import ConceptDataSettings, concept_data
from sae_transformers.cli import app
from sae_transformers.create_training_data import scar_sources
from sae_transformers.workflows.settings.concept_set import SOURCES


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_each_kind_of_source(tmp_path: Path) -> None:
    after = {"text": "b", "toxicity": 0.1}
    rtp = [{"prompt": {"text": "a", "toxicity": score}, "continuation": after} for score in (0.9, 0.2)]
    file = write(tmp_path / "rtp.jsonl", rtp)
    both = concept_data("real_toxicity_prompts", file)
    assert both.rows() == [{"text": "ab", "toxicity": 1}, {"text": "ab", "toxicity": 0}]
    assert both.summary() == ["toxicity: 2 texts, 1 with, 1 without"]
    alone = concept_data("real_toxicity_prompts_prompt_only", file, ConceptDataSettings("rude"))
    assert alone.concept == "rude" and alone.rows()[0] == {"text": "a", "rude": 1}
    table = concept_data(
        "table", file, ConceptDataSettings(text_column="prompt.text", label_column="prompt.toxicity", threshold=0.1)
    )
    assert table.rows() == [{"text": "a", "toxicity": 1}] * 2
    (tmp_path / "original").write_text("thou art\n")
    (tmp_path / "modern").write_text("you are\nhe is\n")
    pair = concept_data("shakespeare", [str(tmp_path / "original"), str(tmp_path / "modern")])
    assert pair.data["shakespeare"][:] == [0, 0, 1] and pair.data["text"][2] == "thou art"
    plain = write(tmp_path / "wiki.jsonl", [{"text": word} for word in "abc"])
    drawn = concept_data("wikitext", plain, ConceptDataSettings(max_rows=2))
    assert drawn.data["toxicity"][:] == [-100] * 2 and "2 unknown" in drawn.summary()[0]


def test_files_of_several_concepts_have_the_same_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    found = concept_data("table", file, ConceptDataSettings("rude", others=("warm", "old")))
    assert found.rows() == [{"text": t, "rude": r, "warm": -100, "old": -100} for t, r in (("a", 1), ("b", 0))]
    for others in (("rude",), ("text",)):
        with pytest.raises(ValueError, match=f"Received: '{others[0]}'"):
            concept_data("table", file, ConceptDataSettings("rude", others=others))


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_the_verb_writes_what_harvest_reads(name: str, tmp_path: Path) -> None:
    rows = [{"text": "a, b", "score": 0.7}, {"text": "c", "score": 0.2}, {"text": "d", "score": None}]
    file = write(tmp_path / "rows.jsonl", rows)
    out = str(tmp_path / name)
    result = CliRunner().invoke(app, ["concept-data", "table", file, "--label-column", "score", "--out", out])
    assert result.exit_code == 0, result.output
    assert "score: 3 texts, 1 with, 1 without, 1 unknown" in result.stdout
    kind = {"jsonl": "json", "csv": "csv", "parquet": "parquet"}[name.rpartition(".")[2]]
    data = load_dataset(kind, data_files=out, split="train", cache_dir=str(tmp_path / "cache"))
    assert data.to_list() == [  # pyright: ignore
        {"text": "a, b", "score": 1}, {"text": "c", "score": 0}, {"text": "d", "score": -100},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rtp", "--out", "a.jsonl"], "--source must be one of real_toxicity_prompts, |`source` must be one of real_"),
        (["table", "--out", "a.jsonl"], "A table is read from `files`. Received: none."),
        (["shakespeare", "one", "--out", "a.jsonl"], "two `files`, original and modern. Received: 1."),
        (["table", "rows.jsonl", "--out", "a.txt"], "must end in .jsonl, .csv, .parquet. Received: --out='a.txt'."),
    ],
)
def test_what_is_refused(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["concept-data", *words])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert any(part in " ".join(result.stderr.split()) for part in told.split("|")), result.stderr


def test_every_source_of_the_library_is_a_source_of_the_verb() -> None:
    assert [*scar_sources.SOURCES, "shakespeare", "table"] == list(SOURCES)
