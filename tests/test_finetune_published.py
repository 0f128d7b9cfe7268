"""The examples of fine-tuning end to end: trained, pushed to a Hub, and loaded from it without the library."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.create_training_data.words import word_tokenizer
from tests.invariants.published import run_script
from tests.loopback_hub import LoopbackHub
from tests.test_examples import EXAMPLES, tiny_files

pytestmark = pytest.mark.hub  # four other interpreters
CHECKOUT = EXAMPLES.parent
TEXT = "w1 w2 w3"


@pytest.mark.parametrize(
    ("script", "kind", "options"),
    [
        (
            "finetune_classifier",
            "SequenceClassification",
            ["--train", "train.csv", "--test", "test.csv", "--unintended", "3,9"],
        ),
        ("finetune_language_model", "CausalLM", ["--text", "text.txt", "--feature", "3", "--scale", "2"]),
        pytest.param(
            "finetune_language_model",
            "CausalLM",
            ["--text", "text.txt", "--feature", "3", "--scale", "2", "--trl"],
            marks=pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL"),
        ),
    ],
)
def test_what_was_pushed_answers_without_the_library(
    script: str, kind: str, options: list[str], tmp_path: Path
) -> None:
    folder = tiny_files(tmp_path)
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--base", "base", "--sae", "sae", *options]
    command += ["--learning-rate", "0.02", "--repo", "tester/tuned", "--out", "out"]
    with LoopbackHub() as hub:
        env = hub.environment(tmp_path / "author") | {"PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        assert f"AutoModelFor{kind}.from_pretrained('tester/tuned', trust_remote_code=True)" in done.stdout
        env = {name: value for name, value in hub.environment(tmp_path / "user").items() if name != "PYTHONPATH"}
        said = run_script("load_finetuned.py", kind, "tester/tuned", TEXT, folder=tmp_path, env=env)
    found = json.loads(said[said.index("FOUND ") + 6 :].splitlines()[0])
    auto = AutoModelForSequenceClassification if kind == "SequenceClassification" else AutoModelForCausalLM
    model: Any = auto.from_pretrained(folder / "out" / "model", trust_remote_code=True)
    with torch.no_grad():
        expected = model(**word_tokenizer()(TEXT, return_tensors="pt")).logits.flatten()
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=0)
    (answer,) = found["answer"]
    if kind == "CausalLM":
        ids = torch.tensor([word_tokenizer()(TEXT)["input_ids"]])
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert answer["generated_text"] == f"{TEXT}{word_tokenizer().decode(new, skip_special_tokens=True)}"
    else:
        assert answer["label"] == model.config.id2label[int(expected.argmax())]
