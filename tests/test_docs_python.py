"""docs/python.md: each verb's snippet runs, in ten lines or fewer, on tiny files under the names it uses."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub
import typer

from sae_transformers import attach
from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import AnnotationRow, write_annotations
from tests.create_training_data.fake_openai import FakeOpenAI
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_base, tiny_sae

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
MAX_LINES = 10


# What a snippet reads that another one of the page has written.
BEFORE = {"judge": "explain", "train": "harvest"}


def sections() -> dict[str, str]:
    """Heading -> its snippet."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page names: base, sae, model, texts.csv (text, label), prompts.txt, features.tsv (of spans),
    polite.txt, rude.txt, questions.jsonl."""
    path = tmp_path_factory.mktemp("python")
    base, tokenizer = tiny_base(), word_tokenizer()
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    tiny_sae(layer=1).save_pretrained(path / "sae")
    attach(str(path / "base"), [path / "sae"], path / "model")
    draw = random.Random(0)
    with (path / "texts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(60):
            words = WORDS[:45] if number % 2 else WORDS[30:]
            rows.writerow([" ".join(draw.choices(words, k=8)), number % 2])
    prompts = [" ".join(draw.choices(WORDS, k=4)) for _ in range(8)]
    (path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    spans = [AnnotationRow(number, f"Span 1: {prompt}") for number, prompt in enumerate(prompts)]
    write_annotations(spans, path / "features.tsv", ("FeatureID", "Words"))
    save_tiny_embedder(path)
    for name, word in (("polite", "w3"), ("rude", "w70")):
        (path / f"{name}.txt").write_text("\n".join(f"{prompt} {word}" for prompt in prompts), encoding="utf-8")
    questions = [
        {"question": f"{prompt} w{number}", "org_context": "w1 w2", "org_answer": ["w2"], "sub_context": "w1 w9",
         "sub_answer": ["w9"], **({"org_answer": ["w9"], "sub_answer": ["w2"]} if number % 2 else {})}
        for number, prompt in enumerate(prompts * 2)
    ]  # fmt: skip
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (path / "winobias").mkdir()
    for name in ("type1_dev", "type2_dev", "type1_test", "type2_test"):
        for side, line in (("pro", "1 [w5] saw w1 and [he] left w7"), ("anti", "1 [w5] saw w2 and [she] left w7")):
            (path / "winobias" / f"{side}_stereotyped_{name}.txt").write_text(line, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Headings whose snippet has run in the folder; other processes have folders of their own."""
    return set()


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What answers where a snippet asks a language model, or the Hub."""
    with FakeOpenAI() as server, LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the Hub of that moment
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-tests")
        monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path))
        yield


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("heading", list(sections()))
def test_the_snippet_of(heading: str, folder: Path, ran: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = sections()[heading]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    assert all(line.startswith("from sae_transformers import ") for line in lines if "sae_transformers" in line)
    monkeypatch.chdir(folder)
    for one in (BEFORE.get(heading), heading):
        if one is not None and one not in ran:
            exec(compile(sections()[one], f"{PAGE.name}: {one}", "exec"), {})  # noqa: S102
            ran.add(one)


def test_every_verb_has_a_section() -> None:
    verbs = set(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    # `quickstart` prints and is a program of its own; `learn_steering` is a function alone.
    assert set(sections()) == verbs - {"quickstart"} | {"learn_steering"}
