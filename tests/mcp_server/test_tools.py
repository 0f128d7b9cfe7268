"""The tools in this process, asked by the official client: their answers are the library's, their errors are told."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from mcp import Client

from sae_transformers import (
    AttributionSettings,
    FeatureAnnotations,
    FeatureEdit,
    GenerateSettings,
    GenerationSettings,
    Receipt,
    Steering,
    attribute,
    detect,
    generate,
    tool_server,
    top_features,
)
from sae_transformers.mcp_server import limits, tools
from sae_transformers.workflows.loading import read_steering
from tests.serving.running import served_model, served_tokenizer

TEXT = "w3 w4 w5 w6 w7 w8"
PROMPTS = ["w3 w4", "w5 w6 w7", "w8 w9", "w10 w11 w12"]
EDITS = [{"feature": "sea", "op": "add", "value": 9.0}]
STEERING = Steering([FeatureEdit(feature="sea", op="add", value=9.0)], positions=[(1, None)])
NOTES = [
    {"feature": 9, "description": "water without an end", "explainer": "somebody", "score": 0.5, "frequency": 0.01},
    {"feature": 4, "description": "sarcasm \x1b[31m in replies " + "long " * 200},
]


@pytest.fixture(scope="module")
def model() -> Any:
    made = served_model()
    made.saes[0].annotations = FeatureAnnotations.from_rows(
        NOTES, n_features=64, facts={"licence": "CC-BY-4.0", "source": "a table"}
    )
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return served_tokenizer()


def with_client(server: Any, work: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with Client(server) as client:
            return await work(client)

    return anyio.run(run)


def call(server: Any, tool: str, **given: Any) -> dict[str, Any]:
    """The structured answer, which the client has checked against the tool's schema; its text is the same."""
    result = with_client(server, lambda client: client.call_tool(tool, given))
    assert not result.is_error, result.content[0].text
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


def refused(server: Any, tool: str, **given: Any) -> str:
    result = with_client(server, lambda client: client.call_tool(tool, given))
    assert result.is_error and result.structured_content is None
    return result.content[0].text


@pytest.fixture(scope="module")
def server(model: Any, tokenizer: Any) -> Any:
    return tool_server(model, tokenizer, "somebody/tiny")


def test_the_tools_have_schemas_and_none_writes(server: Any) -> None:
    listed = with_client(server, lambda client: client.list_tools()).tools
    assert [tool.name for tool in listed] == [
        "describe_model", "find_features", "top_features", "read_features", "detect", "attribute", "steer",
        "evaluate_steering",
    ]  # fmt: skip
    for tool in listed:
        assert tool.annotations.read_only_hint and not tool.annotations.open_world_hint
        assert tool.input_schema["additionalProperties"] is False
        assert tool.output_schema["type"] == "object" and tool.output_schema["required"]
        assert len(tool.description) > 40


def test_describe_model(server: Any, model: Any) -> None:
    told = call(server, "describe_model")
    assert (told["name"], told["n_saes"], told["context"], told["can_write"]) == ("somebody/tiny", 1, 128, False)
    (sae,) = told["saes"]
    assert (sae["place"], sae["d_in"], sae["n_features"]) == (model.saes[0].config.read_at, 32, 64)
    assert sae["names"] == {"sea": 9} and sae["described"] == 2 and sae["has_maxima"]
    assert sae["licence"] == "CC-BY-4.0" and sae["annotations"]["source"] == "a table"
    assert told["limits"]["longest_text"] == limits.LONGEST_TEXT and told["limits"]["max_k"] == limits.MAX_K


def test_of_a_folder_only_the_last_part_is_told(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert call(tool_server(model, tokenizer, str(tmp_path)), "describe_model")["name"] == tmp_path.name


def test_find_features(server: Any) -> None:
    assert [row["feature"] for row in call(server, "find_features", query="water")["features"]] == [9]
    row = call(server, "find_features", query="water", sae=0, k=1)["features"][0]
    assert (row["description"], row["explainer"], row["score"]) == ("water without an end", "somebody", 0.5)
    assert math.isclose(row["frequency"], 0.01, rel_tol=1e-6)
    (other,) = call(server, "find_features", query="sarcasm")["features"]
    assert len(other["description"]) == limits.LONGEST_TOLD and "\x1b" not in other["description"]
    assert other["maximum"] is None


def test_without_annotations_find_says_what_to_do(tokenizer: Any) -> None:
    assert "`annotate`" in refused(tool_server(served_model(), tokenizer), "find_features", query="water")


def test_top_features_are_those_of_the_library(server: Any, model: Any, tokenizer: Any) -> None:
    expected = top_features(model, tokenizer, TEXT, 5).strongest(5)
    told = call(server, "top_features", text=TEXT, k=5)
    assert told["n_tokens"] == len(tokenizer(TEXT)["input_ids"]) and not told["cut"]
    assert len(expected) == 5
    for row, one in zip(told["features"], expected, strict=True):
        assert (row["feature"], row["tokens"], row["at"]) == (one["feature"], one["tokens"], one["at"])
        assert math.isclose(row["max"], one["max"], rel_tol=1e-5)


def test_read_features_are_the_activations(server: Any, model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    strongest = call(server, "top_features", text=TEXT, k=1)["features"][0]["feature"]
    told = call(server, "read_features", text=TEXT, features=["sea", strongest, 9])
    assert [row["feature"] for row in told["features"]] == [9, strongest]
    assert told["features"][0]["name"] == "sea" and len(told["tokens"]) == ids.shape[1]
    for row in told["features"]:
        expected = model.detect(ids, feature=row["feature"]).per_token[0]
        assert torch.allclose(torch.tensor(row["values"]), expected, atol=1e-5)
        assert math.isclose(row["max"], max(row["values"]))
    assert told["features"][1]["max"] > 0


def test_long_texts_are_cut(server: Any) -> None:
    told = call(server, "top_features", text="w3 w4 " * 100)
    assert told["cut"] and told["n_tokens"] <= 128


def test_detect_scores_as_the_library(server: Any, model: Any, tokenizer: Any) -> None:
    texts, labels = [f"{prompt} w{20 + n}" for n, prompt in enumerate(PROMPTS * 2)], [0, 1, 0, 1, None, 1, 0, 1]
    feature = call(server, "top_features", text=texts[1], k=1)["features"][0]["feature"]
    expected = detect(model, tokenizer, texts, feature, labels)
    told = call(server, "detect", texts=texts, feature=feature, labels=labels)
    assert told["scores"] == pytest.approx(expected.scores.tolist(), rel=1e-4) and max(told["scores"]) > 0
    assert told["quality"] == pytest.approx(expected.quality()) and "auroc" in told["quality"]


def test_attribute_gives_the_effects_of_the_library(server: Any, model: Any, tokenizer: Any) -> None:
    expected: Any = attribute(model, tokenizer, TEXT, ("w30", "w31"), position=-2)
    told = call(server, "attribute", text=TEXT, target=["w30", "w31"], position=-2, k=6, faithfulness=True)
    assert (told["target"], told["method"]) == ("'w30' - 'w31'", "gradient x latent")
    assert told["n_tokens"] == len(tokenizer(TEXT)["input_ids"]) - 1
    assert (told["n_pairs"], told["value"]) == (len(expected.rows()), pytest.approx(expected.effects.value, rel=1e-5))
    assert len(told["features"]) == len(told["pairs"]) == 6
    for row, one in zip(told["features"] + told["pairs"], expected.strongest(6) + expected.rows()[:6], strict=True):
        numbers = {name: one[name] for name in ("effect", "activation") if name in one}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-7)
        assert {**row, **numbers} == one
    assert any(row["effect"] for row in told["pairs"])
    assert told["check"].pop("against") == expected.agreement.against == "ablation"
    assert told["check"] == pytest.approx({n: getattr(expected.agreement, n) for n in told["check"]})
    curve = expected.curve
    assert told["faithfulness"]["pairs_move"] == pytest.approx(curve.whole - curve.none, rel=1e-4)
    assert told["faithfulness"]["kept"] == pytest.approx(curve.area("keep"), rel=1e-3)
    assert told["faithfulness"]["kept_at_random"] == pytest.approx(curve.area("keep_random"), rel=1e-3)
    assert told["faithfulness"]["for_80_percent"] == curve.needed()


@pytest.mark.parametrize("method", ["integrated gradients", "ablation"])
def test_attribute_by_other_methods(method: str, server: Any, model: Any, tokenizer: Any) -> None:
    settings = AttributionSettings(curve=False, skip_first=2, sae_numbers=(0,), max_pairs=limits.MAX_ABLATED)
    expected: Any = attribute(model, tokenizer, TEXT, position="w6", method=method, settings=settings)
    told = call(server, "attribute", text=TEXT, position="w6", method=method, skip_first=2, sae=0)
    assert (told["target"], told["faithfulness"]) == ("'w6'", None)
    assert [row["effect"] for row in told["pairs"]] == pytest.approx(
        [row["effect"] for row in expected.rows()[:10]], rel=1e-4
    )
    assert told["check"]["spearman"] == pytest.approx(expected.agreement.spearman)


def test_attribute_tells_names_as_words_of_others(tokenizer: Any) -> None:
    named = served_model()
    named.saes[0].config.feature_names = {str(number): f"name {number} \x1b[31m" for number in range(64)}
    told = call(tool_server(named, tokenizer), "attribute", text=TEXT)
    assert all("name" in row["name"] and "\x1b" not in row["name"] for row in told["features"] + told["pairs"])


def test_steer_writes_what_generate_writes(server: Any, model: Any, tokenizer: Any) -> None:
    settings = GenerateSettings(generation=GenerationSettings(max_new_tokens=8, temperature=0.0))
    expected = generate(model, tokenizer, PROMPTS[:2], {"steered": STEERING}, settings)
    told = call(server, "steer", prompts=PROMPTS[:2], edits=EDITS, max_new_tokens=8)
    assert [row["steered"] for row in told["texts"]] == expected.texts["steered"]
    assert [row["unsteered"] for row in told["texts"]] == expected.texts["unsteered"]
    assert expected.texts["steered"] != expected.texts["unsteered"]
    whole = call(server, "steer", prompts=PROMPTS[:2], steering=STEERING.to_dict(), max_new_tokens=8)
    assert whole == told and told["steering"] == STEERING.digest


def test_evaluate_then_save(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    server = tool_server(model, tokenizer, write_to=tmp_path / "new")
    assert call(server, "describe_model")["can_write"]
    told = call(
        server, "evaluate_steering", prompts=PROMPTS, neutral=[TEXT], edits=EDITS, scorer="refusal", max_new_tokens=4
    )
    assert {"effect", "perplexity_ratio", "kl_neutral_nats", "dose_in_norms"} <= set(told["numbers"])
    assert told["numbers"]["dose_in_norms"]["value"] > 0 and told["numbers"]["effect"]["n"] == len(PROMPTS)
    saved = call(server, "save_steering", name="sea", edits=EDITS, receipt=told["receipt"])
    assert saved == {"file": "sea.json", "sha256": STEERING.digest, "with_receipt": True}
    kept = read_steering(tmp_path / "new" / "sea.json")
    found = Receipt.of(kept)
    assert kept == STEERING and found is not None
    assert found.numbers["effect"].value == told["numbers"]["effect"]["value"]
    before = (tmp_path / "new" / "sea.json").read_bytes()
    assert "already" in refused(server, "save_steering", name="sea", edits=EDITS)
    assert (tmp_path / "new" / "sea.json").read_bytes() == before
    other = refused(server, "save_steering", name="b", edits=[{**EDITS[0], "value": 1.0}], receipt=told["receipt"])
    assert "A receipt is of the steering that was measured" in other
    assert "receipt" in refused(server, "save_steering", name="b", edits=EDITS, receipt={"format": "x"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sea.json"]


@pytest.mark.parametrize("name", ["../out", "a/b", "/etc/x", ".hidden", "", "a" * 81, "con.txt", "a\n"])
def test_a_file_is_in_the_folder_or_nowhere(name: str, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    server = tool_server(model, tokenizer, write_to=tmp_path / "in")
    assert "`name`" in refused(server, "save_steering", name=name, edits=EDITS)
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


def test_a_link_is_not_written_through(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.json").symlink_to(tmp_path / "out.json")
    server = tool_server(model, tokenizer, write_to=tmp_path / "in")
    assert "already" in refused(server, "save_steering", name="link", edits=EDITS)
    assert not (tmp_path / "out.json").exists()


def test_without_a_folder_there_is_no_tool_that_writes(server: Any) -> None:
    assert "There is no tool 'save_steering'. There are describe_model" in refused(
        server, "save_steering", name="a", edits=EDITS
    )


WRONG = {
    "nothing": ("top_features", {}, ["`text` is needed and was not given"]),
    "another name": ("top_features", {"text": TEXT, "top": 3}, ["no argument `top`", "text, k, sae, skip_first"]),
    "another kind": ("top_features", {"text": TEXT, "k": "three"}, ["`k`", "valid integer", "'three'"]),
    "too many": ("top_features", {"text": TEXT, "k": 51}, ["`k`", "less than or equal to 50", "Received: 51"]),
    "too long": ("top_features", {"text": "x" * 20_001}, ["`text`", "at most 20000 characters"]),
    "no text": ("top_features", {"text": "  "}, ["Expected texts with a word"]),
    "no such SAE": ("top_features", {"text": TEXT, "sae": 3}, ["`sae` must be from 0 to 0. Received: sae=3"]),
    "no such feature": ("detect", {"texts": [TEXT], "feature": 64}, ["[0, 64)", "feature=64"]),
    "no such name": ("detect", {"texts": [TEXT], "feature": "see"}, ["it has 'sea'", "feature='see'"]),
    "labels": ("detect", {"texts": [TEXT], "feature": 9, "labels": [1, 0]}, ["a label for each of 1", "2 labels"]),
    "two tokens": ("attribute", {"text": TEXT, "target": ["w3 w4"]}, ["which is 2", "'w3 w4'"]),
    "no such token": ("attribute", {"text": TEXT, "target": [999]}, ["from 0 to 93. Received: target=999"]),
    "three targets": ("attribute", {"text": TEXT, "target": [1, 2, 3]}, ["`target`", "at most 2"]),
    "a token not there": ("attribute", {"text": TEXT, "position": "w70"}, ["'w70' is not a token of the text"]),
    "beyond the end": ("attribute", {"text": TEXT, "position": 6}, ["from -6 to 5", "position=6"]),
    "no method": ("attribute", {"text": TEXT, "method": "shapley"}, ["`method`", "'ablation'", "'shapley'"]),
    "attribution to no SAE": ("attribute", {"text": TEXT, "sae": 1}, ["`sae` must be from 0 to 0. Received: sae=1"]),
    "a text too long": ("attribute", {"text": "w3 " * 200}, ["`text` must be of at most 128 tokens"]),
    "all is skipped": ("attribute", {"text": TEXT, "skip_first": 6}, ["after the first 6 of 6 tokens"]),
    "no edits": ("steer", {"prompts": PROMPTS}, ["one of `edits` and `steering`", "none"]),
    "both": ("steer", {"prompts": PROMPTS, "edits": EDITS, "steering": {}}, ["Received: both"]),
    "no op": ("steer", {"prompts": PROMPTS, "edits": [{"feature": 1, "op": "boost"}]}, ["`edits.0.op`", "'boost'"]),
    "no value": ("steer", {"prompts": PROMPTS, "edits": [{"feature": 1, "op": "add"}]}, ["Bad steering", "value"]),
    "no steering": ("steer", {"prompts": PROMPTS, "steering": {"edit": []}}, ["Bad steering", "edit"]),
    "nothing done": ("steer", {"prompts": PROMPTS, "steering": {"edits": []}}, ["does something"]),
    "a long prompt": ("steer", {"prompts": ["w3 " * 200], "edits": EDITS}, ["128"]),
    "many tokens": ("steer", {"prompts": PROMPTS, "edits": EDITS, "max_new_tokens": 257}, ["256", "257"]),
    "scorer": (
        "evaluate_steering",
        {"prompts": PROMPTS, "edits": EDITS, "scorer": "judge"},
        ["'sentiment'", "'judge'"],
    ),
    "no number": (
        "steer",
        {"prompts": PROMPTS, "edits": [{**EDITS[0], "value": math.inf}]},
        ["`value` must be a finite number"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_told(case: str, server: Any) -> None:
    tool, given, expected = WRONG[case]
    told = refused(server, tool, **given)
    assert all(part in told for part in expected), told
    assert len(told) < 1200


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no file /home/me/key.txt at http://me:secret@host/x"), "no file <path> at http://host/x"),
        (KeyError("/home/me/secret"), "top_features failed for a reason of the server's own"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_an_error_tells_no_place_and_no_login(
    error: Exception, expected: str, server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tools, "top_features", fails)
    told = refused(server, "top_features", text=TEXT)
    assert expected in told and "secret" not in told and "/home" not in told
    assert isinstance(error, KeyError) == ("top_features failed" in caplog.text)


def test_calls_of_the_model_are_one_at_a_time(model: Any, server: Any) -> None:
    inside, most = [], []

    def enter(*_: Any) -> None:
        inside.append(threading.get_ident())
        most.append(len(set(inside)))

    def leave(*_: Any) -> None:
        inside.remove(threading.get_ident())

    async def work(client: Client) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(client.call_tool, "top_features", {"text": TEXT})

    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        with_client(server, work)
    finally:
        for handle in handles:
            handle.remove()
    assert most == [1] * 4


def test_a_call_that_nobody_waits_for_ends_and_the_next_one_runs(model: Any, server: Any) -> None:
    passes, begun = [], threading.Event()

    def count(*_: Any) -> None:
        passes.append(1)
        begun.set()

    async def work(client: Client) -> Any:
        async with anyio.create_task_group() as group:
            arguments = {"prompts": ["w3"], "edits": EDITS, "max_new_tokens": 100}
            group.start_soon(client.call_tool, "steer", arguments)
            while not begun.is_set():
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        return await client.call_tool("describe_model", {}), len(passes)

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        result, made = with_client(server, work)
    finally:
        handle.remove()
    assert not result.is_error
    assert 1 <= made < 100
    assert made == len(passes)  # describe_model waited until the other had ended; nothing runs on
