"""What the dashboard's file holds, read back from it; and what is refused."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers.create_training_data.annotation.tables import FeatureAnnotation
from sae_transformers.evaluation.features.histograms import ActivationHistograms
from sae_transformers.evaluation.features.table import FeatureTable
from sae_transformers.evaluation.results import Measurement, Results, SuiteResult
from sae_transformers.hub_cards import dashboard as module
from sae_transformers.hub_cards.dashboard import write_dashboard
from sae_transformers.hub_cards.dashboard_data import (
    DashboardData,
    SpanShown,
    SteeringSample,
    measures_of,
    samples_of,
)
from tests.hub_cards.made_up import EVIL, evil, weights


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = []

    def handle_data(self, data: str) -> None:
        self._inside.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.texts.append((tag, self.tags[-1][1], "".join(self._inside)))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Reader]:
    """Index and details of a page."""
    found = Reader(path.read_text(encoding="utf-8"))
    index: dict[str, Any] = {}
    details: list[dict[str, Any]] = []
    for tag, attributes, text in found.texts:
        if attributes.get("id") == "index":
            index = json.loads(text)
        elif tag == "script" and attributes.get("type"):
            assert attributes["id"] == f"chunk-{len(details) // index['chunk']}"
            packed = attributes["type"] == "application/gzip"
            details += json.loads(gzip.decompress(base64.b64decode(text)) if packed else text)
    return index, details, found


@pytest.mark.parametrize("compress", [True, False])
def test_everything_is_in_the_file(tmp_path: Path, compress: bool) -> None:
    data = evil()
    path = write_dashboard(data, tmp_path / "a" / "b.html", compress=compress, chunk=5)
    index, details, found = read(path)
    n = len(EVIL)
    assert index["feature"] == list(range(n)) and len(details) == n and index["title"] == EVIL[0]
    assert index["explanation"] == EVIL and index["name"][3] == EVIL[3] and index["tokens"][0] == [EVIL[0], " fine"]
    assert index["label"][:3] == ["intended", "unintended", "unintended"]
    columns = {column["name"]: column["values"] for column in index["columns"]}
    assert columns["Largest activation"] == [3.0] * n and columns[EVIL[0]][:2] == [0.5, None]
    assert columns["Firing frequency"] == pytest.approx([1 / n] * n, rel=1e-3) and columns["Kurtosis"][4] == 4
    for number, one in enumerate(details):
        text = EVIL[number]
        assert one["top"] == [[text, 1.5], [" fine", 0.5]] and one["bottom"][1] == [text, -0.5]
        assert one["spans"] == [[2.0, 4, ["before ", text, " after"], [None, 2.0, 0.5], 1]]
        assert one["judgements"] == [[text, text]] and one.get("verified", "") == text
        assert [row[1] for row in one["samples"]] == [text, text] and one["samples"][-1][3] in (None, 3.0)
        assert one["raised"] == [[text, -0.25, text, text]]
        assert one["neighbours"] == [[(number + 1) % n, 0.5]] and sum(one["histogram"][1]) == 1
    # Texts opened no element: the file has the template's, and one script without a type.
    assert [a for tag, a in found.tags if tag == "script" and "type" not in a] == [{}]
    assert not {tag for tag, _ in found.tags} & {"img", "iframe", "link", "object"}
    assert not re.search(r'(?:src|href)="(?!#)', path.read_text(encoding="utf-8"))
    assert not [p for p in path.parent.iterdir() if p != path]


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    found = read(write_dashboard(evil(), tmp_path / "a.html"))[2]
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = (text for name, a, text in found.texts if name == tag and "type" not in a)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    index, details, _ = read(write_dashboard(DashboardData("t", names={4: "joy", 2: "sea"}), tmp_path / "a.html"))
    assert index["feature"] == [2, 4] and index["name"] == ["sea", "joy"] and details == [{}, {}]
    assert index["columns"] == index["dead"] == index["tokens"] == index["label"] == index["samples"] == []


def test_frequency_and_contexts_of_a_table(tmp_path: Path) -> None:
    frequency = torch.tensor([0.25, 0.0], dtype=torch.float64)
    table = FeatureTable(
        weights(2, 1), [["a"], ["b"]], [["c"], ["d"]], (frequency + 1e-10).log10(), frequency == 0,
        torch.tensor([0.5, torch.nan], dtype=torch.float64), [["a context"], []], [[3.25], []],
    )  # fmt: skip
    index, details, _ = read(write_dashboard(DashboardData("t", table=table, features=[1, 0]), tmp_path / "a.html"))
    columns = {column["key"]: column["values"] for column in index["columns"]}
    assert index["feature"] == [1, 0] and index["dead"] == [1, 0]
    assert columns["frequency"] == [0.0, 0.25] and columns["coherence"] == [None, 0.5]
    assert details[1]["spans"] == [[3.25, None, ["a context"], [], -1]] and "spans" not in details[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"features": []},
        {"features": [1, 1], "names": {1: "a"}},
        {"features": [-1], "names": {1: "a"}},
        {"table": FeatureTable(weights(2, 1), [["a"]] * 2, [["a"]] * 2), "features": [2]},
        {"table": FeatureTable(weights(2, 1), [["a"]] * 2, [["a"]] * 2), "spans": {7: [SpanShown(1.0, ["a"])]}},
    ],
)
def test_features_that_are_not_there(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected features, each once"):
        write_dashboard(DashboardData("t", **wrong), tmp_path / "a.html")
    with pytest.raises(ValueError, match="chunk=0"):
        write_dashboard(DashboardData("t", names={1: "a"}), tmp_path / "a.html", chunk=0)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dashboard(DashboardData("t", names={1: "a"}), tmp_path / "a.html")
    before, done = path.read_bytes(), []
    details = module.feature_details

    def interrupted(data: DashboardData, feature: int) -> dict[str, Any]:
        done.append(feature)
        if len(done) == 300:
            raise OSError("no room")
        return details(data, feature)

    monkeypatch.setattr(module, "feature_details", interrupted)
    with pytest.raises(OSError, match="no room"):
        write_dashboard(DashboardData("t", names={i: "b" for i in range(500)}), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_measures_of_an_evaluation() -> None:
    measured = [
        Measurement("auroc", 0.9, "latent 17", data="reviews"),
        Measurement("auroc", 0.8, "feature 3 of SAE 0", data="reviews"),
        Measurement("auroc", 0.7, "diffmean", data="reviews"),
        Measurement("auroc", None, "latent 4", data="other"),
        Measurement("auroc", 0.65, "latent 17 of SAE 0 before activation", data="reviews"),
        Measurement("auroc", 0.64, "latent 17 of SAE 1", data="reviews"),
        Measurement("auroc", 0.63, "best latent of SAE 0", data="reviews"),
        Measurement("auroc", 0.62, "1 latent of SAE 0", data="reviews"),
        Measurement("auroc", 0.61, "sea of SAE 0", data="reviews"),
        Measurement("f1", 0.6, "latent 17"),
    ]
    record = Results({}, "", "", {"detection": SuiteResult("detection", {}, measured)})
    before = {"AUROC, before activation, reviews": {17: 0.65}}
    assert measures_of(record) == {"AUROC, reviews": {17: 0.9, 3: 0.8}, **before}
    assert measures_of(record, names={4: "sea"}) == {"AUROC, reviews": {17: 0.9, 3: 0.8, 4: 0.61}, **before}
    assert measures_of(record, sae=1) == {"AUROC, reviews": {17: 0.64}}
    assert measures_of(record, "f1") == {"F1": {17: 0.6}}


def test_samples_of_rows() -> None:
    rows = [
        {"feature": 3, "strength": -8, "prompt": "p", "text": "less", "op": "set", "unit": "norm", "perplexity": 4},
        {"feature": 3, "strength": 2.5, "prompt": "p", "text": "more"},
        {"strength": 0, "prompt": "p", "text": "plain", "perplexity": 3},
        {"strength": 0, "prompt": "q", "text": "of another prompt"},
        {"method": "latent 9", "goal": "raise", "setting": "+0.2", "prompt": "r", "steered": "s", "unsteered": "u"},
        {"method": "latent 9 of SAE 1", "setting": "+1", "prompt": "r", "steered": "t", "unsteered": "u"},
        {"method": "prompt", "goal": "raise", "setting": "", "prompt": "r", "steered": "s", "unsteered": "u"},
    ]
    assert samples_of(rows) == {
        3: [
            SteeringSample("p", "less", "set −8 norm", -8.0, 4.0),
            SteeringSample("p", "more", "+2.5", 2.5, None),
            SteeringSample("p", "plain", "", 0.0, 3.0),
        ],
        9: [SteeringSample("r", "s", "+0.2", 1.0, None), SteeringSample("r", "u", "", 0.0, None)],
    }
    assert samples_of(rows[5:], sae=1) == {9: [SteeringSample("r", "t", "+1", 1.0), SteeringSample("r", "u")]}
    for wrong in ({"feature": 3, "strength": 1, "prompt": "p"}, {"strength": 1, "prompt": "p", "text": "t"}):
        with pytest.raises(ValueError, match="row 0"):
            samples_of([wrong])


def test_numbers_that_are_none(tmp_path: Path) -> None:
    data = DashboardData(
        "t",
        spans={0: [SpanShown(float("inf"), ["a"], [float("nan")], 0)]},
        annotations={0: FeatureAnnotation("a")},
        measures={"m": {0: float("nan")}},
        histograms=ActivationHistograms(1),
    )
    index, details, _ = read(write_dashboard(data, tmp_path / "a.html"))
    assert index["columns"][-1]["values"] == [None] and details[0]["spans"] == [[None, None, ["a"], [None], 0]]
