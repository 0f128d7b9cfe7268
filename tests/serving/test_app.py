"""The server over HTTP, with the official client and with requests that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from sae_transformers import FeatureAnnotations, FeatureEdit, Gate, Steering
from sae_transformers.modeling.gates import OVER
from sae_transformers.modeling.tested_releases import NEWEST, OLDEST
from tests.serving.running import STEERINGS, Running, offline, running, served_model, served_tokenizer

KEY = "sk-of-the-server-0123456789"
DEFAULT = Steering([FeatureEdit(feature=20, op="add", value=5.0)])
TEXT = "w1 w2 w3"
PLAIN, TOKENIZER = served_model(), served_tokenizer()


MEANT = "remarks <b>that mean</b> the opposite"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model = served_model()
    model.steering = DEFAULT
    model.saes[0].annotations = FeatureAnnotations.from_rows(
        [{"feature": 3, "description": MEANT, "frequency": 0.01}, {"feature": 9, "description": "opposite sides"}]
    )
    with running(model, served_tokenizer(), KEY, aliases=("/a/folder",)) as made:
        yield made


def expected(steering: Any = None, text: str = TEXT, tokens: int = 8) -> str:
    return offline(PLAIN, TOKENIZER, text, steering, tokens)


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 4, **fields}


# -- answers ---------------------------------------------------------------------------------------------------------


def test_steering_of_each_request(server: Running) -> None:
    for steering in STEERINGS[1:]:
        answer = server.chat(TEXT, extra_body={"steering": steering.to_dict()})
        assert answer.choices[0].message.content == expected(steering)
    assert len({expected(one) for one in [*STEERINGS, DEFAULT]}) == len(STEERINGS) + 1
    for unsteered in (False, {}, []):
        assert server.chat(TEXT, extra_body={"steering": unsteered}).choices[0].message.content == expected()
    for default in ({}, {"extra_body": {"steering": None}}):
        assert server.chat(TEXT, **default).choices[0].message.content == expected(DEFAULT)
    edits = {"steering": [{"feature": "sea", "op": "set", "value": 9.0}]}
    assert server.chat(TEXT, extra_body=edits).choices[0].message.content == expected(
        Steering([FeatureEdit(feature=9, op="set", value=9.0)])
    )


def test_gates(server: Running) -> None:
    edit = FeatureEdit(feature=2, op="direction", value=6.0)
    shut, kinds = Gate(feature=7, above=1e9), [dict[str, Any](over=over) for over in OVER]
    kinds += [{"over": "prompt", "pool": "mean"}, {"above": 0.2, "until": 0.1}, {"over": "prompt", "skip_first": 1}]
    gates = [gate for kind in kinds for gate in (Gate(feature=7, **kind), ~Gate(feature=7, **kind), shut)]
    gated = [Steering([edit], when=gate) for gate in gates]
    for steering in gated:
        answer = server.chat(TEXT, extra_body={"steering": steering.to_dict()})
        assert answer.choices[0].message.content == expected(steering)
    assert len({expected(steering) for steering in gated}) > 1


def test_an_answer_has_all_that_openai_says(server: Running) -> None:
    answer = server.chat(TEXT, n=2, extra_body={"steering": False})
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.message.content for choice in answer.choices} == {expected()}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None and answer.object == "chat.completion" and answer.model == "tiny"
    used = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert used == (3, 16, 19)
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    messages: Any = [{"role": "developer", "content": parts}, {"role": "user", "content": "w3"}]
    said = server.openai.chat.completions.create(
        model="/a/folder", messages=messages, max_completion_tokens=8, extra_body={"steering": False}
    )
    assert said.choices[0].message.content == expected()
    extra = server.chat("w1 w2", extra_body={"steering": False, "chat_template_kwargs": {"extra": "w3"}})
    assert extra.choices[0].message.content == expected()


def test_streams_say_the_same(server: Running) -> None:
    steering = {"steering": STEERINGS[2].to_dict()}
    chunks = list(server.chat(TEXT, stream=True, n=2, stream_options={"include_usage": True}, extra_body=steering))
    texts, ends = ["", ""], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.finish_reason] if choice.finish_reason else []
        assert chunk.usage is None and chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id
    assert texts == [expected(STEERINGS[2])] * 2 and ends == ["length", "length"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16
    assert len(chunks) == 2 + 16 + 2 + 1  # a role, a token, an end; the usage
    raw = server.post("/chat/completions", ask(stream=True))
    assert raw.kind.startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(json.loads(one[6:]) for one in events[:-2])


@pytest.mark.parametrize("temperature", [1e-320, 1e-7, 0])
def test_the_coldest_temperatures_are_greedy(server: Running, temperature: float) -> None:
    answer = server.chat(TEXT, temperature=temperature, top_p=0.5, extra_body={"steering": False})
    assert answer.choices[0].message.content == expected()


def test_stop_texts(server: Running) -> None:
    whole = expected()
    word = whole.split()[2]
    for stop in (word, [word, "w999"]):
        answer = server.chat(TEXT, stop=stop, extra_body={"steering": False})
        assert answer.choices[0].message.content == whole[: whole.index(word)]
        assert answer.choices[0].finish_reason == "stop"
    streamed = server.chat(TEXT, stop=word, stream=True, extra_body={"steering": False})
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole[: whole.index(word)]


def test_random_answers_repeat_by_their_seed(server: Running) -> None:
    options: Any = {"temperature": 3.0, "n": 3}
    first = [choice.message.content for choice in server.chat(TEXT, seed=7, **options).choices]
    assert len(set(first)) == 3
    assert [choice.message.content for choice in server.chat(TEXT, seed=7, **options).choices] == first
    assert [choice.message.content for choice in server.chat(TEXT, seed=99, **options).choices] != first
    assert server.chat(TEXT, temperature=3.0, seed=9).choices[0].message.content == first[2]  # seed 7, answer 2


def test_text_completions(server: Running) -> None:
    answer = server.openai.completions.create(
        model="tiny", prompt=[TEXT, "w5"], max_tokens=8, n=2, extra_body={"steering": False}
    )
    assert [choice.text for choice in answer.choices] == [expected()] * 2 + [expected(text="w5")] * 2
    assert answer.usage is not None and answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 32
    ids: Any = TOKENIZER(TEXT)["input_ids"]
    for prompt in (ids, [ids]):
        said = server.openai.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, stream=True, extra_body={"steering": STEERINGS[1].to_dict()}
        )
        assert "".join(chunk.choices[0].text for chunk in said) == expected(STEERINGS[1])


def test_responses(server: Running) -> None:
    given: Any = {"extra_body": {"steering": STEERINGS[1].to_dict()}}
    answer = server.openai.responses.create(model="tiny", input=TEXT, max_output_tokens=8, **given)
    assert answer.output_text == expected(STEERINGS[1]) and answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 8)
    messages: Any = [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]
    events = list(
        server.openai.responses.create(
            model="tiny", instructions="w1", input=messages, max_output_tokens=8, stream=True, **given
        )
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected(STEERINGS[1]) and len(deltas) == 8
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for body, told in (
        ({"input": 3}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": TEXT, "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": TEXT, "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages"),
    ):
        answered = server.post("/responses", {"model": "tiny", **body})
        assert answered.status == 400 and answered.error["param"].startswith(told), answered.text


def test_responses_need_a_transformers_that_has_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cli.serving import response

    monkeypatch.delattr(response, "_ResponseStreamBuilder")
    answer = server.post("/responses", {"model": "tiny", "input": TEXT})
    assert answer.status == 501 and f"transformers {OLDEST} to {NEWEST}" in answer.error["message"]
    assert server.chat(TEXT).choices[0].message.content == expected(DEFAULT)  # the rest does not need them


# -- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_detection_is_that_of_the_unsteered_model(server: Running, pooling: str) -> None:
    texts = ["w7 w8 w9 w10", TEXT, *[f"w{i} w{i + 3}" for i in range(30)]]
    body = {"model": "tiny", "input": texts, "feature": "sea", "pooling": pooling, "pre_activations": True}
    answer = server.post("/detect", {**body, "per_token": True}).json()
    for text, entry in zip(texts, answer["data"], strict=True):
        with torch.no_grad():
            single = PLAIN.detect(
                TOKENIZER(text, return_tensors="pt"), feature=9, pooling=pooling, pre_activations=True, skip_first=1
            )
        assert entry["score"] == pytest.approx(float(single.per_text[0]), abs=1e-4)
        assert entry["values"] == pytest.approx(single.per_token[0].tolist(), abs=1e-4)
        assert entry["tokens"] == text.split()
    assert [entry["index"] for entry in answer["data"]] == list(range(32)) and answer["feature"] == 9
    assert answer["usage"]["prompt_tokens"] == 67
    assert "values" not in server.post("/detect", body).json()["data"][0]


def test_what_is_served(server: Running) -> None:
    (model,) = server.openai.models.list().data
    assert model.id == "tiny" and model.to_dict()["steering"] == DEFAULT.to_dict()
    assert server.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("org/other")
    (sae,) = server.get("/v1/features")["data"]
    assert sae["place"] == "layers.1.resid_post" and sae["concepts"] == {"sea": 9} and sae["n_features"] == 64
    assert sae["annotations"] == {"features": 10, "described": 2, "facts": {}}
    assert server.get("/health") == {"status": "ok", "running": 0, "waiting": 0}


def test_features_are_found_by_words_and_named_by_what_was_found(server: Running) -> None:
    first, second = server.get("/v1/features?query=mean+opposite")["data"]
    assert (first["feature"], first["description"], first["sae"]) == (3, MEANT, 0) and second["feature"] == 9
    assert first["frequency"] == pytest.approx(0.01) and second["frequency"] is None
    assert server.get("/v1/features?query=opposite&k=1")["data"] == [
        server.get("/v1/features?query=opposite")["data"][0]
    ]
    assert server.get("/v1/features?query=mountain")["data"] == []
    edit = {"op": "add", "value": 5.0}
    named, numbered = (
        server.chat(TEXT, extra_body={"steering": {"edits": [{"feature": feature, **edit}]}}) for feature in (MEANT, 3)
    )
    assert named.choices[0].message.content == numbered.choices[0].message.content
    score = [
        server.post("/detect", {"model": "tiny", "input": TEXT, "feature": one}).json()["data"][0]["score"]
        for one in (MEANT, 3)
    ]
    assert score[0] == score[1]


@pytest.mark.parametrize("query", ["query=", "query=" + "x" * 257, "query=x&k=0", "query=x&k=101", "query=x&k=many"])
def test_searches_that_are_wrong(server: Running, query: str) -> None:
    answer = server.request("GET", f"/v1/features?{query}")
    assert answer.status == 400 and answer.error["param"] in ("query", "k")


# -- what is refused -------------------------------------------------------------------------------------------------

EDIT = {"feature": 3, "op": "add", "value": 1.0}
BAD_STEERING = [
    {"edits": [{"feature": 3, "op": "push", "value": 1}]},
    {"edits": [{"feature": 64, "op": "ablate"}]},
    {"edits": [{"feature": "joy", "op": "ablate"}]},
    {"edits": [{**EDIT, "sae": 1}]},
    {"edits": [{**EDIT, "strength": 2}]},
    {"edits": [{"feature": 3, "op": "add"}]},
    {"edits": 3},
    {"edits": [EDIT], "positions": [[0, 10**40]]},
    {"edits": [EDIT], "positions": "middle"},
    {"edits": [EDIT], "reconstruct": [7]},
    {"edits": [{"scores": [1.0, 2.0]}]},
    {"edits": [{"scores": "many"}]},
    {"edits": [EDIT] * 17},
    {"edits": [EDIT], "positions": [[0, 1]] * 65},
    {"edits": [EDIT], "reconstruct": [0, 0]},
    {"edits": [{"scores": [1.0] * 65}]},
    {"edits": [{"scores": "1" * 64}]},
    {"edits": [{"scores": ["1"] * 64}]},
    {"edits": [{"scores": 5}]},
    {"edits": [{"scores": None}]},
    {"edits": [{"scores": [10**400] * 64}]},
    {"edits": [{**EDIT, "value": 10**400}]},
    {"edits": [{"feature": "x" * 257, "op": "ablate"}]},
    {"edits": [{"feature": f"name {i}", "op": "ablate"} for i in range(257)]},
    {"edits": [EDIT], "when": {"feature": 3, "over": "prompts"}},
    {"edits": [{**EDIT, "when": {"feature": 64}}]},
    {"edits": [EDIT], "when": {"every": [{"feature": 3, "above": i} for i in range(64)]}},
    {"edits": [EDIT], "when": "always"},
    {"unknown": 1},
    [[EDIT]],
    True,
    "none",
    7,
]


@pytest.mark.parametrize("steering", BAD_STEERING, ids=lambda bad: str(bad)[:60])
def test_bad_steering_is_refused_before_anything_is_written(server: Running, steering: Any) -> None:
    steps = server.engine.steps
    for path, fields in (("/chat/completions", ask(stream=True)), ("/completions", {"model": "tiny", "prompt": TEXT})):
        answer = server.post(path, {**fields, "steering": steering})
        error = answer.error
        assert answer.status == 400 and error["param"] == "steering", answer.text
        assert error["type"] == "invalid_request_error" and 30 < len(error["message"]) < 1100
        assert "'float'" not in error["message"] and "float()" not in error["message"]  # Python's own words
    assert server.engine.steps == steps


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{"content": "w1"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "w1"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "w1 \ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": "w1 " * 125}]}, "messages"),
    ({"max_tokens": 126}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_completion_tokens": True}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"logit_bias": {"3": -(10**400)}}, "logit_bias"),
    ({"top_p": 10**400}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"seed": 0.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"94": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"3": 101}}, "logit_bias"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logprobs": True}, "logprobs"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"temprature": 1}, "temprature"),
    ({"model": 3}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=str)
def test_wrong_fields(server: Running, fields: dict[str, Any], param: str) -> None:
    steps = server.engine.steps
    answer = server.post("/chat/completions", ask(**fields))
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
    assert f"`{param.partition('[')[0]}" in answer.error["message"] or param == "messages"
    assert server.engine.steps == steps


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "w2"]}, "prompt"),
        ({"prompt": [94]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": TEXT, "echo": True}, "echo"),
        ({"prompt": TEXT, "suffix": "w"}, "suffix"),
        ({"prompt": TEXT, "best_of": 2}, "best_of"),
        ({"prompt": [TEXT] * 65, "n": 2}, "n"),
    ],
)
def test_wrong_prompts(server: Running, body: dict[str, Any], param: str) -> None:
    answer = server.post("/completions", {"model": "tiny", **body})
    assert (answer.status, answer.error["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"feature": 64}, "feature"),
        ({"feature": "joy"}, "feature"),
        ({"feature": None}, "feature"),
        ({"feature": "x" * 257}, "feature"),
        ({"feature": 10**400}, "feature"),
        ({"sae": 1}, "sae"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input"),
        ({"input": "w1"}, "input[0]"),
        ({"input": ["w1 w2", "w1 " * 129]}, "input[1]"),
        ({"pooling": "sum"}, "pooling"),
        ({"per_token": 1}, "per_token"),
        ({"threshold": 1}, "threshold"),
    ],
)
def test_wrong_detections(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/detect", {"model": "tiny", "input": TEXT, "feature": 9, **fields})
    assert (answer.status, answer.error["param"]) == (400, param), answer.text


def test_bodies_that_are_no_json_object(server: Running) -> None:
    for raw in (b"", b"{", b"[1]", b"\xff", b'"a"', b'{"model": NaN}', b"[" * 100_000):
        answer = server.post("/chat/completions", raw)
        assert answer.status == 400 and answer.error["message"], raw[:20]
    form = {"Content-Type": "text/plain"}  # a page in a browser could send it without being asked
    assert server.request("POST", "/v1/chat/completions", ask(), form).status == 400
    strange = server.post("/chat/completions", ask(**{"\ud800": 1}))
    assert strange.status == 400 and strange.error["param"] == "\\ud800"
    long = server.post("/chat/completions", b" " * (8 * 2**20 + 1))
    assert long.status == 413 and long.error["code"] == "body_too_long"


def test_other_errors_have_openais_form(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "w1"}])
    assert error.value.code == "model_not_found" and "'tiny'" in str(error.value)
    with pytest.raises(openai.BadRequestError) as error:
        server.chat("w1 " * 127, max_tokens=2)
    assert error.value.code == "context_length_exceeded"
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        answer = server.request("GET", path)
        assert answer.status == status and answer.error["message"]


def test_without_the_key_nothing_is_told(server: Running) -> None:
    for given in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"):
        answer = server.request("GET", "/v1/models", headers={"Authorization": given})
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
        assert KEY not in answer.text
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="wrong").models.list()
    assert server.request("GET", "/health", headers={"Authorization": ""}).status == 200


def test_a_default_in_the_generation_config_and_no_chat_template() -> None:
    model, tokenizer = served_model(), served_tokenizer()
    model.generation_config.sae_steering = STEERINGS[1].to_json()
    tokenizer.chat_template = None
    with running(model, tokenizer, max_tokens=5) as server:
        answer = server.openai.completions.create(model="tiny", prompt=TEXT)
        assert answer.choices[0].text == expected(STEERINGS[1], tokens=5)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.chat(TEXT)
