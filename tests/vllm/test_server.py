"""`sae-transformers serve --engine vllm` on loopback, asked by OpenAI's client."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.serving.running import STEERINGS, offline, served_tokenizer, settles
from tests.tiny import tiny_base, tiny_sae
from tests.vllm.worlds import SIZES, WIDTH, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
    pytest.mark.filterwarnings("ignore"),
]
# No two alike, for as many requests as are under way together.
DIFFERENT = [
    Steering([FeatureEdit(sae=n % 2, feature=n, op=("set", "add", "direction")[n % 3], value=4.0 + n / 8)])
    for n in range(32)
]
TEXTS = [f"w{i} w{i + 7} w{i + 11} w{2 * i} w{3 * i}" for i in range(1, 9)]


class World(NamedTuple):
    """A running server, the model that it serves, and where its log is."""

    url: str
    model: Any
    tokenizer: Any
    log: Path

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("served")
    base = tiny_base(**{**SIZES, "vocab_size": 94, "eos_token_id": None})
    base.generation_config.eos_token_id = None
    base.save_pretrained(folder / "base")
    tokenizer = served_tokenizer()
    tokenizer.save_pretrained(folder / "base")  # and not in the repository: it is the base's
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    saes = [
        tiny_sae(d_in=WIDTH, activation="jumprelu", layer=1, site="resid_post", concepts={"sea": 9}),
        tiny_sae(d_in=WIDTH, seed=2, layer=1, site="mlp_out"),
    ]
    model = SaeForCausalLM.from_base(base, saes).eval()
    model.save_pretrained(folder / "repository")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "sae_transformers", "serve", str(folder / "repository"), "--engine", "vllm", "--name",
        "tiny", "--port", str(port), "--", "--enforce-eager", "--max-model-len", "256", "--max-num-batched-tokens",
        "64", "--max-num-seqs", "8",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        assert settles(lambda: is_up(url) or server.poll() is not None, within_s=300)
        assert server.poll() is None, (folder / "log").read_text()[-6000:]
        yield World(url, model, tokenizer, folder / "log")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.mark.parametrize("stream", [False, True])
def test_many_requests_at_once(world, stream):
    client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0)
    jobs = [(TEXTS[n % len(TEXTS)], steering) for n, steering in enumerate(DIFFERENT)]
    jobs += [(text, steering) for text in TEXTS for steering in STEERINGS]

    def ask(job) -> str:
        text, steering = job
        answer: Any = client.completions.create(
            model="tiny", prompt=text, max_tokens=8, temperature=0, stream=stream,
            extra_body={"steering": steering.to_dict() if steering else False, "ignore_eos": True},
        )  # fmt: skip
        return "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text

    wanted = [offline(world.model, world.tokenizer, text, steering, 8) for text, steering in jobs]
    assert len(set(wanted)) > len(STEERINGS)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, jobs))
    assert [text.strip() for text in found] == wanted


def test_chat_and_plain_vllms_way(world):
    steering = STEERINGS[2]
    messages = [{"role": "user", "content": TEXTS[0]}]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    status, chat = world.post("/v1/chat/completions", {**body, "messages": messages, "steering": steering.to_dict()})
    wanted = offline(world.model, world.tokenizer, TEXTS[0], steering, 8)
    assert (status, chat["choices"][0]["message"]["content"].strip()) == (200, wanted)
    xargs = {"vllm_xargs": {"steering": steering.to_json()}}
    status, answer = world.post("/v1/completions", {**body, "prompt": TEXTS[0], **xargs})
    assert (status, answer["choices"][0]["text"].strip()) == (200, wanted)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steering": {"edits": [{"feature": 999, "op": "set", "value": 1}]}}, "an integer in"),
        ({"steering": {"edits": [{"feature": "lake", "op": "set", "value": 1}]}}, "lake"),
        ({"steering": {"edits": [{"feature": 3, "op": "zap", "value": 1}]}}, "`op` must be one of"),
        ({"steering": {"editz": []}}, "Unknown fields"),
        ({"steering": 5}, "must be an object"),
        ({"vllm_xargs": {"steering": "{bro"}}, "must be JSON"),
        ({"vllm_xargs": {"steering": "[]"}, "steering": []}, "came twice"),
        ({"vllm_xargs": {"sae_read": "x"}}, "use /v1/detect"),
        ({"use_beam_search": True, "steering": [{"feature": 3, "op": "set", "value": 1}]}, "beam search"),
    ],
)
def test_a_bad_request_is_refused_and_harms_nobody(world, fields, told):
    good: list[tuple[int, Any]] = []
    body = {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    steered = {**body, "steering": STEERINGS[1].to_dict()}
    beside = threading.Thread(target=lambda: good.append(world.post("/v1/completions", steered)))
    beside.start()
    status, answer = world.post("/v1/completions", {**body, **fields})
    beside.join()
    assert status == 400
    assert told in answer["error"]["message"]
    assert good[0][1]["choices"][0]["text"].strip() == offline(world.model, world.tokenizer, TEXTS[1], STEERINGS[1], 8)


@pytest.mark.parametrize("options", [
    {"feature": "sea"}, {"feature": 7, "sae": 1, "pooling": "max", "pre_activations": True},
    {"feature": 12, "pooling": "last", "skip_first": 0},
])  # fmt: skip
def test_detect_is_the_librarys(world, options):
    status, answer = world.post("/v1/detect", {"model": "tiny", "input": TEXTS, "per_token": True, **options})
    assert status == 200
    for entry, text in zip(answer["data"], TEXTS, strict=True):
        wanted = world.model.detect(world.tokenizer(text, return_tensors="pt")["input_ids"], **options)
        assert entry["score"] == pytest.approx(wanted.per_text.item(), abs=1e-4)
        assert entry["values"] == pytest.approx(wanted.per_token[0].tolist(), abs=1e-4)
    again = world.post("/v1/detect", {"model": "tiny", "input": TEXTS, "per_token": True, **options})[1]
    assert [e["score"] for e in again["data"]] == pytest.approx([e["score"] for e in answer["data"]], abs=1e-4)


def test_what_there_is_and_is_not(world):
    with urllib.request.urlopen(f"{world.url}/v1/features") as answer:
        saes = json.load(answer)["data"]
    assert [(sae["place"], sae["concepts"]) for sae in saes] == [
        ("layers.1.resid_post", {"sea": 9}), ("layers.1.mlp_out", {}),
    ]  # fmt: skip
    for body, code in (
        ({"model": "other", "input": "w1 w2"}, 404),
        ({"model": "tiny", "input": "w1"}, 400),
        (b"{", 400),
    ):
        assert world.post("/v1/detect", body)[0] == code
