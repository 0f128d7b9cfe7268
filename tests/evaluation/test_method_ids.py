"""What a measurement is of, as data, in new records and in those of before."""

from __future__ import annotations

import json

import pytest

from sae_transformers.evaluation.method_ids import FEATURE, PRE_ACTIVATION, MethodId, feature_methods, old_method
from sae_transformers.evaluation.results import Measurement, Results, SuiteResult, method_of, with_methods

NAMES = ["prompt injection", "mean-spirited", "base rate neglect", "random access", "none of SAE 3"]


def test_a_record_keeps_the_method_beside_its_label() -> None:
    methods = feature_methods({f"{name} of SAE 0": (0, i) for i, name in enumerate(NAMES)}, None)
    measured = with_methods([Measurement("auroc", 0.5, label) for label in methods], methods.values())
    record = Results({}, "", "").with_suite(SuiteResult("detection", {}, measured))
    written = json.loads(json.dumps(record.to_dict()))
    assert written["suites"]["detection"]["measurements"][0]["of"] == {
        "kind": "feature", "sae": 0, "feature": 0, "name": "prompt injection",
    }  # fmt: skip
    read = Results.from_dict(written)
    assert read.to_dict() == record.to_dict()
    for one, name in zip(read.suites["detection"].measurements, NAMES, strict=True):
        of = method_of(one)
        assert (of.kind, of.sae, of.name, of.label) == (FEATURE, 0, name, one.method) and one.baseline is False


def test_a_feature_asked_for_by_its_number_has_no_name() -> None:
    named = {"latent 9 of SAE 0": (0, 9), "sea of SAE 0": (0, 9)}
    methods = feature_methods(named, [(0, 9), (0, "sea")])
    assert [one.name for one in methods.values()] == ["", "sea"]


def test_a_record_without_it_is_written_as_before() -> None:
    record = Results({}, "", "").with_suite(SuiteResult("detection", {}, [Measurement("auroc", 0.5, "latent 9")]))
    (one,) = record.to_dict()["suites"]["detection"]["measurements"]
    assert "of" not in one


@pytest.mark.parametrize(
    ("label", "baseline", "expected"),
    [
        ("latent 17", None, (FEATURE, None, 17, False)),
        ("feature 3 of SAE 1", None, (FEATURE, 1, 3, False)),
        ("sea of SAE 0 before activation", None, (PRE_ACTIVATION, 0, "sea", False)),
        ("sea of SAE 0", False, (FEATURE, 0, "sea", False)),
        ("base rate neglect of SAE 0", False, (FEATURE, 0, "base rate neglect", False)),
        ("DiffMean at layers.1.resid_post", None, ("diffmean", None, "DiffMean at layers.1.resid_post", True)),
        ("random latent of SAE 0", True, ("random_latent", 0, "random latent", True)),
        ("none", None, ("none", None, "none", True)),
    ],
)
def test_what_an_old_label_tells(label: str, baseline: bool | None, expected: tuple) -> None:
    of = old_method(label, baseline)
    assert (of.kind, of.sae, of.feature, of.baseline) == expected


def test_a_measurement_of_an_unknown_method_is_refused() -> None:
    with pytest.raises(KeyError, match="a"):
        with_methods([Measurement("fvu", 0.5, "a")], [MethodId("sae", "b")])
