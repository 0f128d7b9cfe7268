"""Texts from elsewhere hold no login, no code of a terminal and no formula, wherever they are written or said."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
import typer

from sae_transformers.cli.errors import fail
from sae_transformers.cli.tables import open_console, show_rows, show_suite
from sae_transformers.create_training_data.annotation.questions import FeatureAnswer, write_answers
from sae_transformers.evaluation.results import Results, SuiteResult, read_results, write_results
from sae_transformers.latents.safe_texts import from_cell, is_loopback, to_cell, visible, without_logins
from sae_transformers.latents.texts import open_text
from sae_transformers.training.steering.topic_scores import TopicScores, write_topic_scores
from sae_transformers.workflows.concept_data import concept_data
from sae_transformers.workflows.results import save_csv
from sae_transformers.workflows.settings.concept_set import ConceptDataSettings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://reader:pass-word@host.example:8000/v1", "https://host.example:8000/v1"),
        ("--llm-url http://token@127.0.0.1/v1 --top 3", "--llm-url http://127.0.0.1/v1 --top 3"),
        (json.dumps({"a": "s3://k:%40x@b/c", "b": "me@host"}), json.dumps({"a": "s3://b/c", "b": "me@host"})),
        ("https://host/v1?mail=a@b https://host/a@b", "https://host/v1?mail=a@b https://host/a@b"),
        ("hf://datasets/me/mine@main/a.tsv", "hf://datasets/me/mine@main/a.tsv"),
    ],
)
def test_an_address_loses_its_login_and_nothing_else(given: str, expected: str) -> None:
    assert without_logins(given) == expected


def test_no_login_is_in_a_record_or_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://reader:pass-word@host.example/v1"
    suite = SuiteResult("mine", {"asked": {"judge_url": address}}, ())
    record = Results({"name": "m"}, f"evaluate m --llm-url {address}", "2026", {"mine": suite})
    file = write_results(record, tmp_path / "results.json")
    assert "pass-word" not in file.read_text() and "reader" not in file.read_text()
    assert read_results(file).suites["mine"].settings["asked"] == {"judge_url": "https://host.example/v1"}
    with pytest.raises(typer.Exit):
        fail(ValueError(f"No answer. Received: base_url={address!r}."), code=2)
    assert capsys.readouterr().err == "Error: No answer. Received: base_url='https://host.example/v1'.\n"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"])
def test_this_machine_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", [None, "", "0.0.0.0", "10.0.0.1", "localhost.example", "127.0.0.1.example", "::2", "host"]
)
def test_other_hosts_are_other_machines(host: str | None) -> None:
    assert not is_loopback(host)


# -- terminals -------------------------------------------------------------------------------------------------------

CODES = ["\x1b[2J", "\x1b]0;title\x07", "\x08\x08", "\r", "\x9b31m", "\u202egnp.exe", "\x00", "\ud800"]


@pytest.mark.parametrize("code", CODES)
def test_codes_of_a_terminal_are_shown_and_not_sent(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"before {code} after"
    console = open_console(width=200)
    console.print(text)
    console.print(text, style="bold")
    show_rows(console, [{"name": text, text: 1.5}], title=text)
    suite = type("Suite", (), {"rows": staticmethod(lambda result: [{"method": text, text: text}])})()
    show_suite(console, SuiteResult(text, {}, (), notes=(text,)), suite)
    with pytest.raises(typer.Exit):
        fail(ValueError(text.replace("\r", "")), code=2)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert not [one for one in shown if one not in "\n" and not one.isprintable()]
    assert shown.count("before ") >= 8 and repr(code)[1:3] in shown


def test_other_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("café 日本 👩\u200d👧", ":smile: [bold]x[/]", "a\tb\nc", "שלום"):
        assert visible(text) == text
        open_console(width=200).print(text)
        assert capsys.readouterr().out.expandtabs() == f"{text}\n".expandtabs()


# -- spreadsheets ----------------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+cmd", "-2+3", "@sum", "\t=1", "\r=1", "\n=1", "- an item", "'=1", "''-x"]
PLAIN = ["", "text", "a=b", "'quoted'", "'", "-1.5", "+3", "-1e-5", "'-3", " =1", "日本"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_is_a_formula(text: str) -> None:
    cell = to_cell(text)
    assert cell[0] == "'" and from_cell(cell) == text


@pytest.mark.parametrize("text", [text for text in PLAIN if text != "'-3"])
def test_other_texts_and_numbers_stay(text: str) -> None:
    assert to_cell(text) == from_cell(text) == text
    assert (to_cell(-1), to_cell(-0.5), to_cell(None)) == (-1, -0.5, None)


def test_every_text_comes_back() -> None:
    words = ["".join(letters) for n in range(5) for letters in itertools.product("'=-1x", repeat=n)]
    assert len(set(map(to_cell, words))) == len(words)
    assert [from_cell(to_cell(word)) for word in words] == words
    assert not [word for word in words if to_cell(word)[:1] in ("=", "+", "@")]


def test_the_files_of_the_verbs_hold_no_formula_and_read_back(tmp_path: Path) -> None:
    texts = [*FORMULAS, *PLAIN[1:]]
    rows = [{"text": text, "=score": -0.5, "n": number} for number, text in enumerate(texts)]
    save_csv(tmp_path / "rows.csv", rows)
    found = list(open_text(str(tmp_path / "rows.csv")).rows())
    assert [row["text"] for row in found] == texts and {row["=score"] for row in found} == {"-0.5"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in texts))
    made = concept_data("table", str(tmp_path / "rows.jsonl"), ConceptDataSettings("rude"))
    made.save(tmp_path / "data.csv")
    assert [row["text"] for row in open_text(str(tmp_path / "data.csv")).rows()] == texts
    write_answers([FeatureAnswer(n, "yes", text, text) for n, text in enumerate(texts)], tmp_path / "answers.csv")
    scores = TopicScores(*torch.ones(2, len(texts), dtype=torch.float64))
    write_topic_scores(tmp_path / "scores.csv", scores, {"words": texts})
    for name in ("rows", "data", "answers", "scores"):
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r\n") and not _is_number(cell)], name
        assert [from_cell(cell) for cell in cells if from_cell(cell) in FORMULAS], name


def _is_number(cell: str) -> bool:
    try:
        return float(cell) is not None
    except ValueError:
        return False
