"""The verb `serve`: from a folder to a server and back to the prompt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.cli import app
from tests.serving.running import offline, served_model, served_tokenizer
from tests.tiny import tiny_base, tiny_sae

KEY = "sk-of-the-command-0123456789"
CONTEXT = 4096
STEERING = Steering([FeatureEdit(feature="sea", op="set", value=9.0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    base = tiny_base(vocab_size=94, max_position_embeddings=CONTEXT)
    base.generation_config.eos_token_id = None
    base.save_pretrained(folder / "base")
    sae = tiny_sae(layer=1, site="resid_post", concepts={"sea": 9})
    sae.save_pretrained(folder / "sae")
    model = SaeForCausalLM.from_base(base, saes=[sae], weights_scope="full", steering=STEERING)
    model.save_pretrained(folder / "steered")
    tokenizer = served_tokenizer()
    for name in ("base", "steered"):
        tokenizer.save_pretrained(folder / name)
    model.lm.requires_grad_(False)
    model.config.weights_scope = "sae"
    model.config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "no tokenizer")  # as save_pretrained leaves it
    shutil.copytree(folder / "base", folder / "base without", ignore=shutil.ignore_patterns("*token*"))
    model.config.base_model_name_or_path = str(folder / "base without")
    model.save_pretrained(folder / "no tokenizer anywhere")
    return folder


@pytest.fixture(autouse=True)
def with_a_key(command_line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEY", KEY)


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(port: int) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return True
        except OSError:
            time.sleep(0.02)
    return False


def ask(port: int, key: str, **fields: Any) -> Any:
    body = json.dumps({"prompt": "w1 w2 w3", "max_tokens": 6, **fields}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    return urllib.request.urlopen(request, timeout=30)


def complete(port: int, key: str, **fields: Any) -> str:
    with ask(port, key, **fields) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def stream(port: int, key: str, **fields: Any) -> Any:
    return ask(port, key, stream=True, **fields)


CASES: dict[str, list[str]] = {
    "a steered repository": ["steered", "--name", "mine", "--log-level", "info"],
    "a repository whose tokenizer is its base's": ["no tokenizer", "--name", "mine"],
    "a base with an SAE and a default": ["base", "--sae", "sae", "--steering", STEERING.to_json(), "--name", "mine"],
    "a base alone": ["base", "--max-concurrent", "1", "--name", "mine"],
}


@pytest.mark.parametrize("case", CASES)
def test_serve_answers_until_ctrl_c(folder: Path, case: str) -> None:
    port, found, last = free_port(), [], []

    def client() -> None:
        """Ask as soon as the server listens; at the end Ctrl-C is pressed while a long answer is being written."""
        if not listens(port):
            return  # the command failed, and with it the test: there is nobody to interrupt
        try:
            found.append(complete(port, KEY, model="mine"))
            found.append(complete(port, KEY, model="mine", steering=False))
            with stream(port, KEY, model="mine", max_tokens=4000, temperature=5.0) as events:
                events.readline()
                os.kill(os.getpid(), signal.SIGINT)
                last.append(events.read().decode())
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)
            raise

    asking = threading.Thread(target=client)
    asking.start()
    arguments = [folder / word if (folder / word).exists() else word for word in CASES[case]]
    result = serve(*arguments, "--port", port, "--api-key-env", "SERVE_KEY")
    asking.join()
    assert result.exit_code == 0, result.output
    plain, tokenizer = served_model(context=CONTEXT), served_tokenizer()
    steering = None if case == "a base alone" else STEERING
    assert found == [offline(plain, tokenizer, "w1 w2 w3", one, 6) for one in (steering, None)]
    assert found[0] != found[1] or steering is None
    assert "The server is stopping" in last[0] and "[DONE]" not in last[0]
    assert f"http://127.0.0.1:{port}/v1" in result.stdout and result.stdout.rstrip().endswith("Stopped.")
    assert KEY not in result.output and "w1 w2" not in result.output
    assert ("unsteered by default" in result.stdout) == (case == "a base alone")


def test_a_taken_port_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = serve("/no/such/model", "--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "in use" in result.stderr and "model" not in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--port", "70000"], "--port must be at most 65535. Received: --port=70000"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--max-concurrent", "0"], "--max-concurrent must be an integer of 1 or more. Received: --max-concurrent=0"),
        (["--max-answer-tokens", "0"], "--max-answer-tokens must be an integer of 1 or more"),
        (["--log-level", "loud"], "'loud'"),
        (["--model-dtype", "int3"], "int3"),
        (["--dtype", "int3", "--max-tokens", "8"], "int3"),
        (["--steering", '{"edits": [{"feature": 64, "op": "ablate"}]}'], "64"),
        (["--steering", "no-such-file.json"], "no-such-file.json"),
        (["--sae", "sae"], "SAEs of its own"),
    ],
)
def test_mistakes(folder: Path, options: list[str], told: str) -> None:
    options = [str(folder / option) if option == "sae" else option for option in options]
    result = serve(folder / "steered", *(["--port", "0"] if "--port" not in options else []), *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]


def test_a_model_without_a_tokenizer_anywhere_says_so_in_whole_sentences(folder: Path) -> None:
    result = serve(folder / "no tokenizer anywhere", "--port", "0")
    name, base = str(folder / "no tokenizer anywhere"), str(folder / "base without")
    assert result.exit_code == 2, result.output
    assert f"Error: {name!r} has no tokenizer that can be read, nor has its base {base!r}. Expected" in result.stderr
    assert f"Received: {base!r}: " in result.stderr and not result.stderr.rstrip().endswith(":")


def test_without_its_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("sae_transformers.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = serve("/no/such/model")
    assert result.exit_code == 2 and "sae-transformers[serve]" in result.stderr and "fastapi" in result.stderr
