"""Sockets and keys, before there is a model."""

from __future__ import annotations

import socket

import pytest

from sae_transformers.serving.listening import bind, key_from


def test_a_free_port_is_taken_and_a_taken_one_told() -> None:
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert port > 0
        bound.listen()
        with pytest.raises(OSError, match=f"Port {port} of 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port):  # free again at once
        pass


@pytest.mark.parametrize(
    ("host", "port", "told"),
    [("127.0.0.1", -1, "Received: -1"), ("192.0.2.1", 0, "Cannot listen at 192.0.2.1"), ("no host", 0, "'no host'")],
)
def test_addresses_that_are_not_there(host: str, port: int, told: str) -> None:
    with pytest.raises((OSError, ValueError), match=told):
        bind(host, port)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6() -> None:
    try:
        bound = bind("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with bound:
        assert bound.family is socket.AF_INET6


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEY", " sk-1 \n")
    assert key_from("SERVE_KEY") == "sk-1" and key_from(None) is None
    for bad in ("", "  ", "two words", "schlüssel"):
        monkeypatch.setenv("SERVE_KEY", bad)
        with pytest.raises(ValueError, match="SERVE_KEY") as error:
            key_from("SERVE_KEY")
        assert not bad.strip() or bad.strip() not in str(error.value)
    monkeypatch.delenv("SERVE_KEY")
    with pytest.raises(ValueError, match="SERVE_KEY"):
        key_from("SERVE_KEY")
