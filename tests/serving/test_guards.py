"""Who is served: the names of a request, and pages of other sites."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sae_transformers import ServeLimits
from sae_transformers.serving.web.guards import HostCheck, host_name
from tests.serving.running import running, served_model, served_tokenizer


def status(check: HostCheck, host: str, arrived_at: str = "127.0.0.1", **headers: str) -> int:
    """What a request gets. 204: it came to the application."""
    found = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": host, **headers}.items()]
    scope = {"type": "http", "headers": raw, "server": (arrived_at, 8000)}
    asyncio.run(check(scope, None, send))
    return found[0]


async def served(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})


@pytest.mark.parametrize(
    ("header", "name"),
    [("LocalHost:80", "localhost"), ("[::1]:8000", "::1"), ("[::1]", "::1"), ("127.0.0.1", "127.0.0.1"), ("", "")],
)
def test_a_name_stands_without_its_port(header: str, name: str) -> None:
    assert host_name(header) == name


OWN = ["localhost", "LOCALHOST:9", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "127.8.9.1"]
FOREIGN = [
    "other.test",
    "other.test:8000",
    "localhost.other.test",
    "192.0.2.7:8000",
    "127.0.0.1.other.test",
    "",
    "::1",
]


@pytest.mark.parametrize("arrived_at", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.0.0.5"])
def test_at_a_loopback_address_only_its_names_are_served(arrived_at: str) -> None:
    check = HostCheck(served)
    assert {status(check, host, arrived_at) for host in OWN} == {204}
    assert {status(check, host, arrived_at) for host in FOREIGN} == {403}


def test_other_addresses_are_served_under_any_name_unless_names_are_given() -> None:
    assert {status(HostCheck(served), host, "192.0.2.7") for host in [*OWN, *FOREIGN]} == {204}
    check = HostCheck(served, ["Model.test", "192.0.2.7"])
    for arrived_at in ("127.0.0.1", "192.0.2.7"):
        for host in [*OWN, "model.test", "model.test:8000", "192.0.2.7:8000"]:
            assert status(check, host, arrived_at) == 204
        assert {status(check, host, arrived_at) for host in ("other.test", "a.model.test", "")} == {403}


def test_pages_of_other_sites_are_refused_everywhere() -> None:
    for arrived_at in ("127.0.0.1", "192.0.2.7"):
        assert status(HostCheck(served), "localhost", arrived_at, sec_fetch_site="cross-site") == 403
        for kind in ("same-origin", "same-site", "none"):
            assert status(HostCheck(served), "localhost", arrived_at, sec_fetch_site=kind) == 204


def test_a_server_tells_what_to_do_about_its_name() -> None:
    with running(served_model(), served_tokenizer(), limits=ServeLimits(allowed_host=("model.test",))) as server:
        for host, expected in (("model.test:80", 200), ("localhost", 200), ("other.test", 403)):
            answer = server.request("GET", "/v1/models", headers={"Host": host})
            assert answer.status == expected
        assert answer.error["code"] == "host_not_allowed" and "--allowed-host" in answer.error["message"]
        assert "'other.test'" in answer.error["message"]
        crossed = server.request("POST", "/v1/completions", {}, {"Sec-Fetch-Site": "cross-site"})
        assert (crossed.status, crossed.error["code"]) == (403, "cross_site")


@pytest.mark.parametrize("name", ["", "http://model.test", "model.test:80", "[::1]", "two words"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="`allowed_host` must be a name"):
        ServeLimits(allowed_host=("model.test", name))
