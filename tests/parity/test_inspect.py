"""Inspect AI over our models: its own `eval` with the provider in process, and its `openai-api` with our server.

Needs an environment with inspect-ai, which `make test-parity` makes:

    $(python benchmarks/peers.py inspect) -m pytest -m parity tests/parity/test_inspect.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import FeatureEdit, Steering, generate
from sae_transformers.evaluation.settings import GenerationSettings
from sae_transformers.workflows.loading import load
from sae_transformers.workflows.settings.generate import GenerateSettings
from tests.serving.running import running, served_model, served_tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect-ai is not installed"),
    pytest.mark.filterwarnings("default", "ignore::ResourceWarning"),  # of Inspect's own packages
]
STEERING = Steering([FeatureEdit(feature=3, op="direction", value=8.0)])
PROMPTS = ["w1 w2 w3", "w7 w40 w9 w11"]
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its steering in steering.json, `bad.json` beside it."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = served_model(), served_tokenizer()
    model.lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.saes[0].save_pretrained(folder / "sae")
    (folder / "steering.json").write_text(STEERING.to_json())
    (folder / "bad.json").write_text(Steering([FeatureEdit(feature=9999, op="ablate")]).to_json())
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[str]]:
    """Greedy texts of `generate`: `unsteered` and `steered`."""
    model, tokenizer, _ = load(folder / "base", str(folder / "sae"))
    settings = GenerateSettings(generation=GenerationSettings(max_new_tokens=TOKENS, temperature=0.0))
    texts = generate(model, tokenizer, PROMPTS, STEERING, settings).texts
    assert texts["steered"] != texts["unsteered"]
    return texts


@pytest.fixture
def in_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Inspect writes its logs and caches into a place of this test."""
    for name in ("INSPECT_LOG_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    yield folder


def ask(model: Any, targets: list[str], tmp_path: Path, **config: Any) -> Any:
    """The log of a task whose two samples want exactly these texts."""
    from inspect_ai import Task, eval  # pyright: ignore[reportMissingImports]
    from inspect_ai.dataset import Sample  # pyright: ignore[reportMissingImports]
    from inspect_ai.model import GenerateConfig  # pyright: ignore[reportMissingImports]
    from inspect_ai.scorer import exact  # pyright: ignore[reportMissingImports]
    from inspect_ai.solver import generate as answer  # pyright: ignore[reportMissingImports]

    samples = [Sample(input=prompt, target=target) for prompt, target in zip(PROMPTS, targets, strict=True)]
    settings = GenerateConfig(**{"max_tokens": TOKENS, "temperature": 0.0, **config})
    task = Task(dataset=samples, solver=answer(), scorer=exact(), config=settings)
    (log,) = eval(task, model=model, log_dir=str(tmp_path), display="none", retry_on_error=0)
    return log


def texts_of(log: Any) -> list[str]:
    assert log.status == "success", log.error
    return [sample.output.completion for sample in sorted(log.samples, key=lambda sample: sample.id)]


def in_process(folder: Path, **options: Any) -> Any:
    from inspect_ai.model import get_model  # pyright: ignore[reportMissingImports]

    return get_model(f"sae-transformers/{folder / 'base'}", saes=str(folder / "sae"), memoize=False, **options)


@pytest.mark.parametrize("kind", ["steered", "unsteered"])
def test_greedy_texts_are_those_of_generate(
    in_folder: Path, expected: dict[str, list[str]], tmp_path: Path, kind: str
) -> None:
    steering = {"steering": str(in_folder / "steering.json")} if kind == "steered" else {}
    log = ask(in_process(in_folder, **steering), expected[kind], tmp_path)
    assert texts_of(log) == expected[kind]
    assert log.results.scores[0].metrics["mean"].value == 1.0
    for sample, prompt in zip(sorted(log.samples, key=lambda one: one.id), PROMPTS, strict=True):
        (usage,) = sample.model_usage.values()
        assert (usage.input_tokens, usage.output_tokens) == (len(prompt.split()), TOKENS)
        assert sample.output.stop_reason == "max_tokens"


def test_a_task_brings_its_own_steering(in_folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    body = {"steering": STEERING.to_dict()}
    assert texts_of(ask(in_process(in_folder), expected["steered"], tmp_path, extra_body=body)) == expected["steered"]
    model = in_process(in_folder, steering=STEERING.to_dict())
    log = ask(model, expected["unsteered"], tmp_path, extra_body={"steering": False})
    assert texts_of(log) == expected["unsteered"]


def test_the_same_task_asks_the_server(in_folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    from inspect_ai.model import get_model  # pyright: ignore[reportMissingImports]

    model, tokenizer, _ = load(in_folder / "base", str(in_folder / "sae"))
    with running(model, tokenizer) as server:
        asked = get_model("openai-api/local/tiny", base_url=server.url, api_key="none", memoize=False)
        for kind, extra in (("unsteered", {}), ("steered", {"extra_body": {"steering": STEERING.to_dict()}})):
            assert texts_of(ask(asked, expected[kind], tmp_path, **extra)) == expected[kind]


def test_stop_seed_and_choices(in_folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    stop = expected["unsteered"][0].split()[2]
    log = ask(in_process(in_folder), PROMPTS, tmp_path, stop_seqs=[stop])
    assert texts_of(log)[0].strip() == expected["unsteered"][0].split(f" {stop}")[0].strip()
    assert min(log.samples, key=lambda one: one.id).output.stop_reason == "stop"
    drawn = [
        texts_of(ask(in_process(in_folder), PROMPTS, tmp_path, temperature=2.0, top_p=0.9, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    log = ask(in_process(in_folder), PROMPTS, tmp_path, temperature=2.0, seed=1, num_choices=2)
    assert [len(sample.output.choices) for sample in log.samples] == [2, 2]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"reasoning_tokens": 5}, "`reasoning_tokens` is not supported"),
        ({"logprobs": True}, "`logprobs` is not supported"),
        ({"top_p": 2.0}, "top_p"),
        ({"extra_body": {"steering": {"edits": [{"feature": 9999, "op": "ablate"}]}}}, "Bad steering"),
        ({"extra_body": {"unheard": 1}}, "unheard"),
    ],
)
def test_what_is_not_served_is_refused_by_name(in_folder: Path, tmp_path: Path, config: Any, named: str) -> None:
    log = ask(in_process(in_folder), PROMPTS, tmp_path, **config)
    assert log.status == "error"
    assert named in log.error.message


def test_a_prompt_too_long_ends_as_such(in_folder: Path, tmp_path: Path) -> None:
    log = ask(in_process(in_folder), PROMPTS, tmp_path, max_tokens=126)
    assert [sample.output.stop_reason for sample in log.samples] == ["model_length"] * 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steering": "bad.json"}, "9999"),
        ({"steering": {"edits": 3}}, "steering"),
        ({"stering": "steering.json"}, "Received: stering"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"base_url": "http://127.0.0.1"}, "openai-api"),
    ],
)
def test_bad_arguments_are_told_at_once(in_folder: Path, options: dict[str, Any], named: str) -> None:
    if options.get("steering") == "bad.json":
        options = {"steering": str(in_folder / "bad.json")}
    with pytest.raises(ValueError, match=named):
        in_process(in_folder, **options)


def test_the_command_line(in_folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    """`inspect eval` finds the provider by its entry point, and the server by its address."""
    lines = [json.dumps({"input": p, "target": t}) for p, t in zip(PROMPTS, expected["steered"], strict=True)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import json_dataset\n"
        "from inspect_ai.scorer import exact\n\n\n"
        "@task\ndef small():\n"
        f"    return Task(dataset=json_dataset({str(tmp_path / 'samples.jsonl')!r}), scorer=exact())\n"
    )
    inspect = [sys.executable, "-c", "from inspect_ai._cli.main import main; main()", "eval", "task.py"]
    ours = ["--model", f"sae-transformers/{in_folder / 'base'}", "-M", f"saes={in_folder / 'sae'}"]
    model, tokenizer, _ = load(in_folder / "base", str(in_folder / "sae"))
    with running(model, tokenizer) as server:
        served = ["--model", "openai-api/local/tiny", "--model-base-url", server.url]
        for arguments in (
            [*ours, "-M", f"steering={in_folder / 'steering.json'}"],
            [*served, "--extra-body", json.dumps({"steering": STEERING.to_dict()})],
        ):
            options = ["--temperature", "0", "--max-tokens", str(TOKENS), "--log-dir", str(tmp_path)]
            done = subprocess.run(
                [*inspect, *arguments, *options, "--display", "plain"], cwd=tmp_path, capture_output=True, text=True,
                check=False, timeout=300, env={**os.environ, "LOCAL_API_KEY": "none"},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert "mean" in done.stdout and "1.000" in done.stdout, done.stdout
