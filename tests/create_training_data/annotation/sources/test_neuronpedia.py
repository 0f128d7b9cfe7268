"""Neuronpedia's layouts: what is read of each, any size of batches, and what is wrong said with file and row."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sae_transformers.create_training_data.annotation.sources import json_rows as rows_of
from sae_transformers.create_training_data.annotation.sources.neuronpedia import is_neuronpedia, read_neuronpedia
from sae_transformers.latents.annotations.table import FeatureAnnotations
from tests.create_training_data.annotation.sources.layouts import (
    ACTIVATIONS,
    EXPLANATIONS,
    FEATURES,
    MODEL,
    OF,
    SOURCE,
    lines,
    write_bulk,
)


def check(notes: FeatureAnnotations) -> None:
    assert [one.text for one in notes.of(5)] == ["fresh water", "rivers"] and notes.of(5)[0].score == 0.75
    assert notes.of(3)[0][:3] == ("remarks that mean the opposite", "gpt-4o-mini", "oai_token-act-pair")
    assert notes.described.tolist() == [3, 5]
    assert notes.facts["model"] == MODEL and notes.facts["sae"] == SOURCE and notes.facts["maxima"] == "folded"
    assert notes.facts["page"] == f"https://www.neuronpedia.org/{MODEL}/{SOURCE}" and "ask" in notes.facts["licence"]


@pytest.mark.parametrize("rows_each", [1, 2, 1000])
@pytest.mark.parametrize("zipped", [True, False])
def test_bulk_files_with_any_size_of_batches(tmp_path: Path, rows_each: int, zipped: bool) -> None:
    folder = write_bulk(tmp_path / "bulk", rows_each, zipped)
    seen: list[tuple[int, int]] = []
    notes = read_neuronpedia(folder, n_features=64, progress=lambda *counts: seen.append(counts))
    check(notes)
    assert is_neuronpedia(folder) and len(notes) == 64 and seen[-1][0] == seen[-1][1] == len(seen)
    assert notes.number("maximum", 3) == 12.5 and notes.number("frequency", 5) == pytest.approx(0.3)
    assert notes.number("frequency", 63) == 0.0 and notes.number("maximum", 40) is None
    assert notes.neighbours is not None and notes.neighbours[3, :3].tolist() == [5, 7, -1]
    assert notes.embeddings is not None and notes.width == 2


def test_maxima_come_from_activations_where_no_feature_says_them(tmp_path: Path) -> None:
    folder = write_bulk(tmp_path / "bulk", 1, explanations=EXPLANATIONS, activations=ACTIVATIONS)
    assert read_neuronpedia(folder).number("maximum", 3) == 11.0
    assert read_neuronpedia(write_bulk(tmp_path / "all")).number("maximum", 3) == 12.5


def test_batches_are_read_in_their_order(tmp_path: Path) -> None:
    rows = [{"index": 7, "description": f"text {n}"} for n in range(12)]
    notes = read_neuronpedia(write_bulk(tmp_path / "bulk", 1, explanations=rows))
    assert [one.text for one in notes.of(7)] == [f"text {n}" for n in range(12)]


def api_feature() -> dict[str, Any]:
    """A feature as the API answers."""
    told = [row for row in EXPLANATIONS if row["index"] == "5"]
    texts = [{"tokens": ["a"], "values": [1.5]}, {"tokens": ["b", "c"], "values": [0, 2.5]}]
    return {**OF, **FEATURES[1], "explanations": told, "activations": texts}


@pytest.mark.parametrize("form", ["list", "object", "named list", "features", "lines"])
def test_json_exports(tmp_path: Path, form: str) -> None:
    explanations = [{**OF, **row} for row in EXPLANATIONS]
    inside = {"feature_index": 5, **{name: value for name, value in api_feature().items() if name != "index"}}
    values: Any = {
        "list": explanations, "object": api_feature(), "named list": {"explanations": explanations},
        "features": {"model_id": "x", "features": [inside]},
    }.get(form)  # fmt: skip
    file = tmp_path / f"export.{'jsonl' if form == 'lines' else 'json'}"
    file.write_text(lines(EXPLANATIONS) if form == "lines" else json.dumps(values, indent=1))
    notes = read_neuronpedia(file)
    assert [one.text for one in notes.of(5)] == ["fresh water", "rivers"]
    if form in ("object", "features"):
        assert notes.number("maximum", 5) == 4.0 and notes.number("frequency", 5) == pytest.approx(0.3)
    else:
        check(notes)


def test_a_feature_without_a_maximum_has_that_of_its_texts(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps([{**api_feature(), "maxActApprox": None}]))
    assert read_neuronpedia(file).number("maximum", 5) == 2.5


def test_a_long_list_is_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of, "PART", 7)
    file = tmp_path / "f.json"
    file.write_text(
        "\ufeff [\n" + " ,\n".join(json.dumps({"index": n, "description": f"text {n}"}) for n in range(9)) + " ]"
    )
    notes = read_neuronpedia(file)
    assert [notes.description(n) for n in range(9)] == [f"text {n}" for n in range(9)]


WRONG = [
    ('{"index": 1, "description": 7}', "`description` must be a text. Received: 7"),
    ('{"index": 1, "description": ["x"]}', r"`description` must be a text. Received: \['x'\]"),
    ('{"index": -1, "description": "x"}', "the number of a latent must be whole, from 0. Received: -1"),
    ('{"index": 64, "description": "x"}', "The SAE has 64 latents, numbered from 0. Received: 64"),
    ('{"index": 1e400, "description": "x"}', "Received: inf"),
    ('{"index": null, "description": "x"}', "Received: None"),
    ('{"description": "x"}', "the number of a latent in `index`. Received: .*description"),
    ('{"index": 1, "frac_nonzero": "often"}', "`frequency` must be a finite number. Received: 'often'"),
    ('{"index": 1, "maxActApprox": 1e999}', "`maximum` must be a finite number. Received: inf"),
    ('{"index": 1, "topkCosSimIndices": {"a": 1}}', "neighbours must be a list"),
    ('{"index": 1, "explanations": "none"}', "`explanations` must be a list. Received: 'none'"),
    ('{"index": 1, "explanations": [3]}', "explanation 0: expected an object. Received: 3"),
    ('{"index": 1, "description": "x", "scores": 1}', "`scores` must be a list"),
    ('{"index": 1, "description": "x", "embedding": "[1,"}', "`embedding` must be a list of numbers"),
    ('{"modelId": "other", "layer": "0-x", "index": 1}', "expected rows of one source, .*'other/0-x'"),
    ("[1, 2]", "must be an object of JSON. Received: b'\\[1, 2\\]"),
    ("{" + '"a":{' * 20000, "must be an object of JSON"),
    ('{"index": ' + "9" * 5000 + "}", "must be an object of JSON"),
    ("\x1b[31m{", r"must be an object of JSON. Received: b'\\x1b\[31m"),
    ('{"index": 1, "description": "\udcff"}', "must be an object of JSON"),
]


@pytest.mark.parametrize(("row", "told"), WRONG)
def test_what_is_wrong_is_said_with_file_and_row(tmp_path: Path, row: str, told: str) -> None:
    folder = tmp_path / "bulk" / "explanations"
    folder.mkdir(parents=True)
    good = lines([{"index": 2, "description": "good"}]) * 2
    (folder / "batch-0.jsonl").write_text(good)
    (folder / "batch-1.jsonl").write_bytes(f"{good}\n{row}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"batch-1\.jsonl, row 4.*{told}") as error:
        read_neuronpedia(folder.parent, n_features=64)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1000


def test_unknown_keys_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"index": 1, "description": "x", "__proto__": {}, "formula": "=1+1", "list": [[[]]]}\n')
    assert read_neuronpedia(file).description(1) == "x"


@pytest.mark.parametrize("text", ['[{"index": 1, "description": "x"}', '[{"index": 1, "descr', "[1]", "", "{", "[[]]"])
def test_lists_that_are_cut_short_or_hold_something_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"f\.json.*(cut short|object of JSON)"):
        read_neuronpedia(file)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    folder = write_bulk(tmp_path / "bulk", 100)
    file = folder / "explanations" / "batch-0.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"batch-0\.jsonl\.gz is cut short or damaged.*Fetch it again"):
        read_neuronpedia(folder)
    file.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_neuronpedia(folder)


def test_one_endless_row_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of, "LONGEST_ROW", 2**20)
    file = tmp_path / "f.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"index": 1, "description": "' + b"x" * 2**26))
    tracemalloc.start()
    with pytest.raises(ValueError, match="row 1 must have at most 1,048,576 bytes"):
        read_neuronpedia(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "explanations").mkdir()
    assert not is_neuronpedia(tmp_path)
    with pytest.raises(ValueError, match="without a row"):
        read_neuronpedia(tmp_path)


@pytest.mark.slow
def test_memory_of_many_rows_is_that_of_their_columns(tmp_path: Path) -> None:
    """A million rows of 40 characters are 40 MB of text; a dict for each would be some 400 MB."""
    rows, file = 10**6, tmp_path / "f.jsonl.gz"
    with gzip.open(file, "wt", compresslevel=1) as out:
        for n in range(rows):
            out.write(f'{{"index": {n}, "description": "{n:040d}", "x": [1, 2, 3]}}\n')
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    notes = read_neuronpedia(file)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    columns = pa.total_allocated_bytes() - arrow  # which are not traced
    assert len(notes) == rows and notes.description(rows - 1).endswith("999999")
    assert kept < 2**25 and peak < 2**26, (kept, peak)
    assert columns < 2**27 and notes.descriptions.nbytes < 2**27, (columns, notes.descriptions.nbytes)
