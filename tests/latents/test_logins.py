"""Addresses lose their logins wherever they are written or said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from sae_transformers.cli.errors import fail
from sae_transformers.evaluation.results import Results, SuiteResult, read_results, write_results
from sae_transformers.latents.logins import is_loopback, without_logins


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
