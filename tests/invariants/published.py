"""Repositories to publish and what their models answer, for tests that load them in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sae_transformers import FeatureEdit, Gate, SaeForCausalLM, SaeForSequenceClassification, Steering, Strength
from tests.tiny import VOCAB, prompt, tiny_sae

SCRIPTS = Path(__file__).parent.parent / "scripts"
STEERING = Steering([FeatureEdit(0, "good", "set", 9.0), FeatureEdit(1, 5, "add", 4.0)])
SO_FAR = Gate(feature=7, sae=1, above=0.2, over="so_far", pool="mean")
COMBINED = Gate(feature=5, sae=1, above=0.3, until=0.1) & ~Gate(feature="good", over="last")
# What else the declaration can say, by what is new in it.
MORE = {
    "erased": Steering([FeatureEdit(0, feature, "erase") for feature in range(16)]),
    "gated": Steering(
        [FeatureEdit(0, "good", "set", 9.0, when=SO_FAR), FeatureEdit(0, 11, "add", 6.0, when=COMBINED)]
    ),
    "strength": Steering(
        [
            FeatureEdit(0, "good", "set", 9.0, strength=Strength(feature=7, high=1.0, least=0.5, first=4)),
            FeatureEdit(1, 5, "add", 4.0, strength="adaptive"),
        ],
    ),
    "excluded": Steering([FeatureEdit(0, "good", "set", 9.0)], exclude_tokens=["bos", *range(3, VOCAB, 2)]),
}
# With what was measured of it, as any file may carry.
RECEIPT = {"format": "sae_transformers.receipt/1", "effect": {"value": -0.25, "low": -0.5, "high": 0.0, "n": 20}}
DEFAULT = Steering([FeatureEdit(0, 11, "add", -7.0)], positions="generated", receipt=RECEIPT)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id: decoding and encoding are inverse."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def saes() -> list:
    return [
        tiny_sae(layer=1, site="resid_post", concepts={"good": 3}),
        tiny_sae(seed=2, activation="relu", normalization="layer_norm", layer=0, site="mlp_out"),
    ]


def language_model(base: str, scope: str, **options: Any) -> SaeForCausalLM:
    """With a default steering in its generation config."""
    model = SaeForCausalLM.from_base(base, saes(), weights_scope=scope, **options)
    model.generation_config.sae_steering = DEFAULT.to_dict()
    return model


def classifier(base: str, scope: str, **options: Any) -> SaeForSequenceClassification:
    torch.manual_seed(5)
    return SaeForSequenceClassification.from_base(
        base, saes(), weights_scope=scope, id2label={0: "bad", 1: "fine", 2: "good"},
        label2id={"bad": 0, "fine": 1, "good": 2}, **options,
    )  # fmt: skip


@torch.no_grad()
def language_model_answers(model: SaeForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    greedy = {"max_new_tokens": 6, "do_sample": False}
    answers = {
        "logits": model(ids, steering=False).logits,
        "tokens_none": model.generate(ids, **greedy, steering=False),
        "tokens_steered": model.generate(ids, **greedy, steering=STEERING),
        **{
            f"tokens_{name}": model.generate(ids, **greedy, steering=one.with_tokenizer(tokenizer()))
            for name, one in MORE.items()
        },
        "tokens_default": model.generate(ids, **greedy),
        "features": model(ids, output_features=True).sae_features[0].to_dense(),
        "detected": model.detect(ids, feature="good", pre_activations=True, skip_first=0).per_text,
        "hidden": model(ids, output_hidden_states=True).hidden_states[-1],
    }
    one, steered = model.generate(ids[:1], **greedy), model.generate(ids[:1], **greedy, steering=STEERING)
    with torch.enable_grad():
        found = model(ids, output_features=True, features_require_grad=True, steering=False)
        gradients = torch.autograd.grad(found.logits[:, -1].square().sum(), found.sae_features[0].values)
    answers |= {"gradient": gradients[0]}
    answers |= {"tokens_pipeline": one[:, ids.shape[1] :], "tokens_pipeline_steered": steered[:, ids.shape[1] :]}
    return answers


@torch.no_grad()
def classifier_answers(model: SaeForSequenceClassification, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": model(ids).logits, "steered": model(ids, steering=STEERING).logits}


def clean_environment(home: Path) -> dict[str, str]:
    """No way to the checkout, no Hub, a cache of its own."""
    dropped = ("HF_", "TRANSFORMERS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run_script(name: str, *arguments: object, folder: Path, env: dict[str, str], timeout: int = 300) -> str:
    """Run a script of tests/scripts in a fresh interpreter, outside the checkout; returns what it printed."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def load_repositories(
    repositories: dict[str, dict], folder: Path, env: dict[str, str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `scripts/load_repositories.py` found in the repositories: facts and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"ids": prompt()}, folder / "inputs.safetensors")
    job = {
        "inputs": str(folder / "inputs.safetensors"),
        "steering": STEERING.to_dict(),
        "repositories": repositories,
        "more": {name: one.to_dict() for name, one in MORE.items()},
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_script("load_repositories.py", folder / "job.json", folder, folder=folder, env=env)
    return json.loads((folder / "facts.json").read_text()), load_file(folder / "tensors.safetensors")
