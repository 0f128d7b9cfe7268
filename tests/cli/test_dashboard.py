"""The verb `dashboard`, from files to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import AnnotationRow, write_annotations
from sae_transformers.evaluation.results import Measurement, Results, SuiteResult, write_results
from sae_transformers.workflows.reading.dashboard_sources import short_name
from sae_transformers.workflows.settings.dashboard import feature_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.hub_cards.test_dashboard import read
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")

D_SAE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an SAE, a text, and what feature-table, spans, judge and evaluate make of them."""
    folder = tmp_path_factory.mktemp("dashboard")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base(vocab_size=94).save_pretrained(folder / "base")
    sae = tiny_sae(layer=1, k=4, concepts={"sea": 9}, feature_names={"3": "sky"})
    sae.save_pretrained(folder / "sae")
    tiny_sae(layer=1, d_sae=32).save_pretrained(folder / "other")
    (folder / "text.txt").write_text("\n\n".join(word_texts(40)), encoding="utf-8")
    (folder / "longer.txt").write_text("\n\n".join(word_texts(41)), encoding="utf-8")
    common = ["--sae", folder / "sae", "--max-length", 64]
    spans = ["--window", 4, "--top-n", 2, "--activation", "own"]
    invoke("feature-table", folder / "base", *common, "--out", folder / "table", "--top-k", 3, "--coherence", "none")
    invoke("spans", folder / "base", folder / "text.txt", *common, "--out", folder / "spans", *spans)
    rows = [
        AnnotationRow(0, "Span 1: w1", "Some words.", "yes", "yes|||They fit."),
        AnnotationRow(1, "Span 1: w2", "Other words.", "-", "maybe|||Not sure.|||no|||Never."),
        AnnotationRow(2, "", "Cannot Tell.", "-", "-"),
        AnnotationRow(3, "Span 1: w3", "Cannot tell.", "-", "no|||Nothing to tell."),
    ]
    write_annotations(rows, folder / "judged.tsv")
    sample = {
        "method": "latent 5",
        "goal": "raise",
        "setting": "+0.2",
        "prompt": "w1",
        "steered": "s",
        "unsteered": "u",
    }
    measured = [Measurement("auroc", 0.75, "latent 9", data="reviews"), Measurement("l0", 4.0)]
    for name, suite in (
        ("a", SuiteResult("detection", {}, measured)),
        ("b", SuiteResult("steering", {}, [], samples=[sample])),
    ):
        write_results(Results({}, "evaluate", "", {suite.name: suite}), folder / f"{name}.json")
    (folder / "prompts.txt").write_text("w1 w2\n\nw3\n", encoding="utf-8")
    return folder


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def columns(index: dict[str, Any]) -> dict[str, list[Any]]:
    return {column["name"]: column["values"] for column in index["columns"]}


def test_everything_at_once(folder: Path, tmp_path: Path) -> None:
    given = ["--table", folder / "table", "--spans", folder / "spans", "--annotations", folder / "judged.tsv"]
    given += [
        "--results",
        folder / "a.json",
        "--results",
        folder / "b.json",
        "--sae",
        folder / "sae",
        "--neighbours",
        3,
    ]
    given += ["--texts", folder / "text.txt", "--after", 1, "--max-tokens", 10_000]
    steer = ["--steer", "7", "--prompts", folder / "prompts.txt", "--strengths", "-0.5,0.5", "--max-new-tokens", 3]
    saved = tmp_path / "samples.json"
    out = tmp_path / "page" / "dashboard.html"
    result = invoke("dashboard", *given, *steer, "--save-samples", saved, "--out", out)
    assert f"{out}: 64 features, 0." in result.stdout
    index, details, _ = read(out)
    tokens = sum(len(text.split()) - 1 for text in word_texts(40))
    facts = dict(index["facts"])
    assert facts["Base model"] == "base" and facts["SAE"] == "sae" and facts["Activation"] == "topk, k = 4"
    assert f"text.txt, {tokens} tokens" in facts["Text"] and str(tmp_path.parent) not in out.read_text()
    assert index["feature"] == list(range(D_SAE)) and (index["name"][9], index["name"][3]) == ("sea", "sky")
    assert index["explanation"][:4] == ["Some words.", "Other words.", "", "Cannot tell."]
    assert index["label"][:4] == ["intended", "unintended", "", ""]
    assert columns(index)["AUROC, reviews"] == [0.75 if f == 9 else None for f in range(D_SAE)]
    assert index["results"] == [["detection", "l0", "", 4.0, None, None, None]]
    assert index["activation"] == "the SAE's own activation"
    assert [row for row in details[1]["judgements"]] == [["maybe", "Not sure."], ["no", "Never."]]
    frequency = columns(index)["Firing frequency"]
    for feature, one in enumerate(details):
        active = sum(one["histogram"][1]) if "histogram" in one else 0
        assert frequency[feature] == pytest.approx(active / tokens, rel=1e-3)
        assert [latent for latent, _ in one["neighbours"]] != [] and feature not in dict(one["neighbours"])
        for score, _, pieces, values, peak in one.get("spans", ()):
            assert values[peak] == pytest.approx(score, rel=6e-3) and len(pieces) == len(values) <= 5
            assert columns(index)["Largest activation"][feature] >= score * 0.99
    assert [row[2] for row in details[7]["samples"]] == ["direction −0.5 norm"] * 2 + [""] * 2 + [
        "direction +0.5 norm"
    ] * 2
    assert {row[0] for row in details[7]["samples"]} == {"w1 w2", "w3"} and details[5]["samples"][-1][:3] == [
        "w1",
        "s",
        "+0.2",
    ]
    again = tmp_path / "again.html"
    invoke(
        "dashboard",
        "--table",
        folder / "table",
        "--samples",
        saved,
        "--features",
        "7,3-4",
        "--no-compress",
        "--out",
        again,
    )
    index, some, _ = read(again)
    assert index["feature"] == [7, 3, 4] and some[0]["samples"] == details[7]["samples"]


def test_spans_alone_have_no_colours(folder: Path, tmp_path: Path) -> None:
    invoke("dashboard", "--spans", folder / "spans", "--title", "mine", "--out", tmp_path / "a.html")
    index, details, _ = read(tmp_path / "a.html")
    assert index["title"] == "mine" and index["tokens"] == [] and list(columns(index)) == ["Largest activation"]
    score, text, pieces, values, peak = details[0]["spans"][0]
    assert len(pieces) == 1 and values == [] and peak == -1 and score > 0 and isinstance(text, int)


def test_texts_alone_give_histograms(folder: Path, tmp_path: Path) -> None:
    given = [folder / "base", "--sae", folder / "sae", "--texts", folder / "text.txt", "--max-length", 64]
    invoke("dashboard", *given, "--out", tmp_path / "a.html")
    index, details, _ = read(tmp_path / "a.html")
    assert len(details) == D_SAE and any("histogram" in one for one in details) and index["dead"].count(0) > 8


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "Give at least --table, --spans or --sae."),
        (["--title", "mine"], "Give at least --table, --spans or --sae."),
        (["--table", "{}/table", "--features", "3,x"], "'x'"),
        (["--table", "{}/table", "--features", "9-3"], "'9-3'"),
        (["--table", "{}/table", "--features", "64"], "64 features, numbered from 0. Received: 64"),
        (["--table", "{}/nowhere"], "nowhere"),
        (["--table", "{}/table", "--sae", "{}/other"], "64 and 32 features"),
        (["--spans", "{}/spans", "--texts", "{}/text.txt"], "a model and --sae"),
        (["--table", "{}/table", "--steer", "3"], "--prompts"),
        (["--table", "{}/table", "--spans", "{}/spans", "--texts", "{}/longer.txt"], "files was"),
        (["--table", "{}/table", "--spans", "{}/table", "--texts", "{}/text.txt"], "index.json"),
        (["--table", "{}/table", "--samples", "{}/prompts.txt"], "prompts.txt"),
        (["--table", "{}/table", "--samples", "{}/a.json"], "a list of objects"),
        (["--table", "{}/table", "--results", "{}/prompts.txt"], "prompts.txt"),
        (["--table", "{}/table", "--annotations", "{}/judged.tsv", "--judgement", "1"], "judgement(s)"),
        (["--table", "{}/table", "--steer", "3", "--prompts", "{}/prompts.txt", "--strengths", "0"], "other than 0"),
    ],
)
def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path, given: list[str], told: str) -> None:
    arguments = [part.replace("{}", str(folder)) for part in given]
    result = invoke("dashboard", *arguments, "--out", tmp_path / "a.html", code=2)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ") and told in line, line
    assert not list(tmp_path.iterdir())


def test_numbers_of_features() -> None:
    assert feature_list("7, 3-5,4,3") == (7, 3, 4, 5)
    assert short_name("/home/me/sae") == "sae" and short_name("org/sae") == "org/sae"
    assert short_name("../shared/text.txt") == "text.txt"
