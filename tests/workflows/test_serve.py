"""`serve` as a function: the application alone, and what is refused before a model is loaded."""

from __future__ import annotations

import socket

import pytest
from fastapi.testclient import TestClient

from sae_transformers import FeatureEdit, Steering
from sae_transformers.workflows.serve import open_port, serve
from sae_transformers.workflows.settings.publish import ServeSettings
from tests.serving.running import offline, served_model, served_tokenizer


def test_the_application_answers_without_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-of-this-test")
    model, tokenizer = served_model(), served_tokenizer()
    steering = Steering([FeatureEdit(feature=9, op="set", value=9.0)])
    expected = offline(served_model(), tokenizer, "w1 w2 w3", steering, 6)
    settings = ServeSettings(api_key_env="A_KEY", max_answer_tokens=6)
    app = serve(model, tokenizer, ("mine", "other"), settings, steering=steering, run=False)
    with TestClient(app, headers={"Authorization": "Bearer sk-of-this-test"}) as client:
        for name in ("mine", "other"):
            answer = client.post("/v1/completions", json={"model": name, "prompt": "w1 w2 w3"})
            assert answer.json()["choices"][0]["text"] == expected
        assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401


def test_a_key_and_a_port_are_looked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE"):
        open_port(ServeSettings(port=0, api_key_env="NO_SUCH_VARIABLE"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        open_port(ServeSettings(port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match="`log_level` must be one of"):
        ServeSettings(log_level="loud")
