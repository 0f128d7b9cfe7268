"""A tiny steered model behind a real server on a free port."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any, NamedTuple

import openai
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering, Strength
from sae_transformers.serving.app import build_app
from sae_transformers.serving.listening import bind, listener
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{{ extra or '' }}"
# Of all kinds of positions and ops; the last two cannot share a batch with each other.
STEERINGS = [
    Steering(),
    Steering([FeatureEdit(feature=3, op="add", value=6.0)]),
    Steering([FeatureEdit(feature="sea", op="set", value=9.0)], positions="generated"),
    Steering([FeatureEdit(feature=11, op="direction", value=4.0)], positions="prompt"),
    Steering([FeatureEdit(feature=3, op="add", value=6.0)], exclude_tokens=[6, *range(20, 94, 2)]),
    Steering(
        [
            FeatureEdit(feature=3, op="add", value=9.0, strength=Strength(feature=7, high=1.0, least=0.5, first=5)),
            FeatureEdit(feature=4, op="erase"),
        ]
    ),
    Steering([FeatureEdit(feature=7, op="scale", value=3.0)], positions=[(1, 3), (-2, None)]),
    Steering([FeatureEdit(feature=5, op="set", value=3.0)], keep_error=False),
]


def served_model(context: int = 128, **settings: Any) -> Any:
    """A model that never ends by itself and reads the words of `word_tokenizer`."""
    base = tiny_base(vocab_size=94, max_position_embeddings=context)
    base.generation_config.eos_token_id = None
    sae = tiny_sae(layer=1, site="resid_post", **{"concepts": {"sea": 9}, **settings})
    return SaeForCausalLM.from_base(base, saes=[sae]).eval()


def served_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = None
    return tokenizer


def offline(model: Any, tokenizer: Any, text: str, steering: Any, tokens: int) -> str:
    """What the model writes after a prompt when it is asked alone, without a server."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
    output = model.generate(ids, steering=steering if steering else False, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def settles(condition: Callable[[], bool], within_s: float = 60) -> bool:
    """Whether it comes to hold: what other threads do is waited for."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


class Reply(NamedTuple):
    """What came back over HTTP."""

    status: int
    kind: str
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        return self.json()["error"]


class Running:
    """A server that listens. `openai` is the official client."""

    def __init__(self, app: Any, port: int, key: str) -> None:
        self.app, self.port, self.engine = app, port, app.state.engine
        self.url = f"http://127.0.0.1:{port}/v1"
        self.openai = openai.OpenAI(api_key=key, base_url=self.url, max_retries=0, timeout=60)
        self.key = key

    def chat(self, text: str, **options: Any) -> Any:
        options.setdefault("max_tokens", 8)
        return self.openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], **options
        )

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """A request without a client's checks. body: bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        usual = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, raw, {**usual, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, response.headers.get("Content-Type", ""), response.read().decode())
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> Reply:
        return self.request("POST", f"/v1{path}", body)

    def get(self, path: str) -> Any:
        return self.request("GET", path).json()

    def idle(self) -> bool:
        """Whether nothing is written or held, waited for."""
        engine = self.engine
        return settles(lambda: not engine.running and not engine.waiting and engine.batch.cache is None)


@contextmanager
def running(
    model: Any, tokenizer: Any, key: str | None = None, send_buffer: int | None = None, **options: Any
) -> Iterator[Running]:
    """A server that listens. send_buffer: bytes that the machine keeps of an answer that is not read."""
    app = build_app(model, tokenizer, "tiny", api_key=key, **options)
    with bind("127.0.0.1", 0) as socket:
        if send_buffer is not None:
            socket.setsockopt(SOL_SOCKET, SO_SNDBUF, send_buffer)
        server = listener(app, "error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            made = Running(app, socket.getsockname()[1], key or "none")
            with made.openai:
                yield made
        finally:
            server.should_exit = True
            thread.join()
