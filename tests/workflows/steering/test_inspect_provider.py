"""Without inspect-ai: what is said. With it: tests/parity/test_inspect.py."""

import sys

import pytest


def test_without_the_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    monkeypatch.delitem(sys.modules, "sae_transformers.workflows.steering.inspect_provider", raising=False)
    with pytest.raises(ImportError, match=r"inspect-ai.*sae-transformers\[inspect\]"):
        __import__("sae_transformers.workflows.steering.inspect_provider")
