"""What slow clients and long texts cost the others: 32 steered streams alone, and beside them.

    python benchmarks/serving_load.py

Beside 200 clients that send half a request and drip on; beside a text of 4 MiB that is refused by its characters; and
beside one whose beginning has to be tokenized first, since it might fit into the model's 131,072 tokens.
One process holds the servers and their clients; the model is random, of `--layers` by `--width`. All settings take
turns, round by round, in an order that changes. The ratio of each round is to its own time alone; the median is told.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_transformers import (
    FeatureEdit,
    SaeForCausalLM,
    ServeLimits,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
)
from sae_transformers.serving.app import build_app
from sae_transformers.serving.listening import bind, listener

WORDS, STREAMS, SLOW, LONG_TEXT = 2000, 32, 200, 4 * 2**20
SHORT_CONTEXT, LONG_CONTEXT = 2048, 131_072
LONGEST = "w" * 40  # a word, so that the long text is no longer than the longer context's longest words
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def random_model(layers: int, width: int, context: int) -> SaeForCausalLM:
    """A model with an SAE in its middle, which never ends by itself."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=WORDS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=context,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=width, d_sae=8 * width, activation="topk", k=32, layer=layers // 2, site="resid_post"
        )
    )
    return SaeForCausalLM.from_base(base, saes=[sae]).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = [f"w{i}" for i in range(WORDS - 1)] + [LONGEST]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


@contextmanager
def serving(model: SaeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """The port of a server."""
    app = build_app(model, tokenizer, "model", limits=ServeLimits(receive_s=600))  # slow ones stay for the whole round
    with bind("127.0.0.1", 0) as bound:
        server = listener(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


def post(port: int, **fields: Any) -> str:
    """The whole answer as text, also where the server refuses."""
    body = json.dumps({"model": "model", **fields}).encode()
    address, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=600) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.read().decode()


def streams(port: int, tokens: int) -> float:
    """Seconds until all steered streams have ended."""

    def ask(number: int) -> str:
        edit = FeatureEdit(feature=number, op="set" if number % 2 else "add", value=2.0 + number / 8)
        prompt = " ".join(f"w{number * 7 + place}" for place in range(20))
        return post(port, prompt=prompt, stream=True, max_tokens=tokens, steering=Steering([edit]).to_dict())

    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        texts = list(pool.map(ask, range(STREAMS)))
    assert all(text.endswith("data: [DONE]\n\n") for text in texts), min(texts, key=len)
    return time.perf_counter() - start


@contextmanager
def slow_clients(port: int) -> Iterator[None]:
    """Half of them are in the head of a request, half in its body, and each sends a byte now and then."""
    over = threading.Event()
    with ExitStack() as held:
        clients = [held.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(SLOW)]
        for number, client in enumerate(clients):
            client.sendall(HEAD + (b"X-" if number % 2 else b"Content-Length: 100000\r\n\r\n"))

        def drip() -> None:
            while not over.wait(1):
                for client in clients:
                    client.send(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        yield
        over.set()
        thread.join()


@contextmanager
def long_texts(port: int) -> Iterator[None]:
    """A text that is sent when the streams have begun, and refused."""
    refused = []
    text = " ".join(random.Random(0).choices(["w1", "w22", "w333"], k=LONG_TEXT // 4))[:LONG_TEXT]

    def send() -> None:
        time.sleep(0.2)
        refused.append(json.loads(post(port, prompt=text))["error"]["code"])

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
    assert refused == ["context_length_exceeded"], refused


@contextmanager
def nobody(port: int) -> Iterator[None]:
    yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer, order = word_tokenizer(), random.Random(0)
    with ExitStack() as servers:
        ports = [
            servers.enter_context(serving(random_model(options.layers, options.width, context), tokenizer))
            for context in (SHORT_CONTEXT, LONG_CONTEXT)
        ]
        beside = {
            "alone": (nobody, ports[0]),
            f"{SLOW} slow clients": (slow_clients, ports[0]),
            "a text of 4 MiB, refused by its characters": (long_texts, ports[0]),
            "a text of 4 MiB, tokenized": (long_texts, ports[1]),
        }
        for port in ports:
            streams(port, 2)
        found: dict[str, list[float]] = {name: [] for name in beside}
        for turn in range(options.rounds):
            for name in order.sample(list(beside), len(beside)):
                others, port = beside[name]
                with others(port):
                    found[name].append(streams(port, options.tokens))
            print(f"round {turn + 1} of {options.rounds}", flush=True)
    print(f"\n| {STREAMS} streams of {options.tokens} tokens beside | s | times alone |\n|---|---|---|")
    for name, times in found.items():
        ratios = [time_s / alone for time_s, alone in zip(times, found["alone"], strict=True)]
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
