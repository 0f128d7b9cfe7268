"""Requests made of the server's own description, right and wrong ones, at the real application over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from sae_transformers import Gate, Steering, Strength
from tests.serving.running import STEERINGS, Running, running, served_model, served_tokenizer

MODEL, TOKENIZER = served_model(), served_tokenizer()
WRITING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/detect")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, TOKENIZER, max_tokens=4) as made:
        yield made


def body_of(server: Running, path: str) -> Any:
    operation = server.get("/openapi.json")["paths"][path]["post"]
    return operation["requestBody"]["content"]["application/json"]["schema"]


def test_every_endpoint_is_described(server: Running) -> None:
    paths = server.get("/openapi.json")["paths"]
    assert {*WRITING, "/v1/features", "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)
    for path in WRITING:
        assert {"400", "401", "413", "429", "503"} <= set(paths[path]["post"]["responses"])


@pytest.mark.parametrize("of", [Gate, Strength, Steering])
def test_every_field_is_described(server: Running, of: Any) -> None:
    said = set(re.findall(r'"(\w+)":', json.dumps(body_of(server, "/v1/completions")["properties"]["steering"])))
    assert {one.name for one in fields(of)} <= said


def test_the_description_accepts_what_the_server_does(server: Running) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2}
    good = [("/v1/chat/completions", {**chat, "steering": one.to_dict()}) for one in STEERINGS]
    push = {"feature": 3, "op": "direction", "value": 1.0}
    good += [
        ("/v1/chat/completions", {**chat, "steering": {"edits": [{**push, **own}], **whole}})
        for own, whole in (
            ({"exclude_tokens": [5, "special"]}, {}),
            ({}, {"strength": {"first": 2}}),
            ({}, {"receipt": {"format": "sae_transformers.receipt/1", "effect": None}}),  # as a signed file has it
            ({}, {"when": {"feature": 3, "over": "prompt", "pool": "mean"}}),
            ({"when": {"feature": 3, "above": 0.5, "until": 0.1, "skip_first": 1}}, {}),
            ({}, {"when": {"some": [{"feature": 3, "over": "so_far"}, {"feature": 4, "over": "last"}]}}),
        )
    ]
    good += [
        ("/v1/chat/completions", {**chat, "steering": False, "temperature": 0.5, "stop": ["w3"], "user": "me"}),
        ("/v1/completions", {"model": "tiny", "prompt": [[4, 5], [6]], "n": 2, "logit_bias": {"3": -1.5}}),
        ("/v1/responses", {"model": "tiny", "input": "w1", "instructions": "w2", "max_output_tokens": 2}),
        ("/v1/detect", {"model": "tiny", "input": ["w1 w2"], "feature": "sea", "pooling": "max"}),
    ]
    for path, body in good:
        jsonschema_rs.validate(body_of(server, path), drop_nulls(body))
        assert server.request("POST", path, body).status == 200, (path, body)
    for path, body in (
        ("/v1/chat/completions", {**chat, "temprature": 1}),
        ("/v1/completions", {"model": "tiny", "prompt": [94]}),
        ("/v1/detect", {"model": "tiny", "input": "w1 w2", "feature": 64}),
    ):
        assert not jsonschema_rs.is_valid(body_of(server, path), body)
        assert server.request("POST", path, body).status == 400


def drop_nulls(value: Any) -> Any:
    """Null is the same as leaving a field out."""
    if isinstance(value, dict):
        return {name: drop_nulls(one) for name, one in value.items() if one is not None}
    return [drop_nulls(one) for one in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", WRITING)
def test_nothing_that_is_sent_makes_the_server_fail(server: Running, path: str, mode: str) -> None:
    """No 500, every refusal in OpenAI's form, and right requests mostly served."""
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json"))
    operation = schema[path]["POST"]
    statuses: list[int] = []

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @settings(
        max_examples=200, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )  # fmt: skip
    def ask(case: Any) -> None:
        answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code != 200:
            error = json.loads(answer.text)["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}

    ask()
    assert len(statuses) >= 100 and (mode == "negative" or 200 in statuses)
    assert server.get("/ready") == {"status": "ready"} and server.idle()
    assert server.chat("w1 w2 w3").choices[0].message.content  # it goes on


def test_steering_as_it_is_written_down_is_described(server: Running) -> None:
    schema = body_of(server, "/v1/completions")["properties"]["steering"]
    for steering in (*STEERINGS, Steering()):
        jsonschema_rs.validate(schema, drop_nulls(steering.to_dict()) | {"positions": steering.to_dict()["positions"]})
