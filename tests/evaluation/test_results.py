import hashlib
import json
import math

import pytest

from sae_transformers.evaluation.results import (
    FORMAT,
    DataFile,
    Measurement,
    Results,
    SuiteResult,
    data_file,
    is_baseline,
    read_results,
    versions,
    write_results,
)


def record() -> Results:
    suite = SuiteResult(
        "reconstruction",
        {"sae": 0, "skip_first": 1},
        [Measurement("fvu", 0.25, low=0.2, high=0.3, n=1000, data="held_out.txt", better="lower")],
        data=[DataFile("held_out.txt", "ab" * 32, rows=12)],
        curves={"by_position": [{"position": 1, "fvu": 0.3}]},
        notes=["The first token of each text is left out."],
    )
    return Results({"name": "me/model"}, "sae-transformers evaluate", "2026-01-01T00:00:00Z").with_suite(suite)


def test_round_trip(tmp_path):
    results = record()
    path = write_results(results, tmp_path / "new" / "results.json")
    again = read_results(path)
    assert again.to_dict() == results.to_dict()
    assert again.suites["reconstruction"].value("fvu") == 0.25
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_suite_replaces_its_last_result():
    results = record().with_suite(SuiteResult("reconstruction", {}, [Measurement("fvu", 0.5)]))
    assert results.suites["reconstruction"].value("fvu") == 0.5 and len(results.suites) == 1


def test_what_is_not_finite_is_null(tmp_path):
    results = record().with_suite(SuiteResult("speed", {}, [Measurement("ratio", math.nan, low=-math.inf)]))
    path = write_results(results, tmp_path / "results.json")
    found = json.loads(path.read_text())["suites"]["speed"]["measurements"][0]
    assert found["value"] is None and found["low"] is None
    assert read_results(path).to_dict() == results.to_dict()


def test_data_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"text" * 1000)
    assert data_file(file, rows=3) == DataFile("a.txt", hashlib.sha256(b"text" * 1000).hexdigest(), rows=3)


def test_versions_are_those_installed():
    import torch

    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "list"),
        ('{"format": "other/1"}', "other/1"),
        ("{", "Expecting"),
        (json.dumps({"format": FORMAT, "model": {}, "command": "", "created": "", "suite": {}}), r"\['suite'\]"),
        (json.dumps({"format": FORMAT, "model": {}}), "command"),
    ],
)
def test_other_files_are_refused(tmp_path, content, told):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=told):
        read_results(file)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        read_results(tmp_path / "none.json")
    with pytest.raises(ValueError, match="better='more'"):
        Measurement("fvu", 1.0, better="more")
    with pytest.raises(KeyError, match="'l0'"):
        record().suites["reconstruction"].value("l0")


@pytest.mark.parametrize(
    ("method", "baseline", "expected"),
    [
        ("none", None, True),
        ("DiffMean at layers.1.resid_post", None, True),
        ("praise of SAE 0", None, False),
        ("random access of SAE 0", None, True),  # as records were read that do not say it
        ("random access of SAE 0", False, False),
        ("anything", True, True),
    ],
)
def test_a_record_says_what_a_baseline_is(method: str, baseline: bool | None, expected: bool) -> None:
    assert is_baseline(Measurement("auroc", 0.5, method, baseline=baseline)) is expected


def test_a_record_of_before_is_read() -> None:
    suite = SuiteResult("detection", {}, [Measurement("auroc", 0.5, "none")])
    written = Results({}, "", "", {"detection": suite}).to_dict()
    del written["suites"]["detection"]["measurements"][0]["baseline"]
    (one,) = Results.from_dict(written).suites["detection"].measurements
    assert one.baseline is None and is_baseline(one)
