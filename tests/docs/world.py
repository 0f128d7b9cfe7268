"""What the pages name: bases and SAEs on a Hub of this process, and a folder of SAEs, models and data.

Everything is tiny and random; names, places and layouts are those of the pages.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets.config
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from sae_transformers import FeatureEdit, ReconstructionSuite, Steering, attach, convert, evaluate, load
from tests.create_training_data.annotation.sources.layouts import EXPLANATIONS, FEATURES, lines, write_bulk
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
from tests.docs.data import PEOPLE, sentence, write_data
from tests.loopback_hub import TOKEN, LoopbackHub, Repo
from tests.multimodal import multimodal, processor
from tests.tiny import WIDTH, tiny_base, tiny_sae

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Width and depth that pages tell; the rest is as small as can be.
OF_PAGES: dict[str, Any] = {"hidden_size": 576, "num_hidden_layers": 15, "intermediate_size": 16}
GEMMA, GEMMA_SCOPE = "google/gemma-3-270m", "google/gemma-scope-2-270m-pt"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
SELFREG_SAE: dict[str, Any] = {
    "weight": {"W_enc": torch.eye(WIDTH, 64), "b_enc": torch.ones(64), "b_dec": torch.ones(WIDTH)},
    "config": {"d_inp": WIDTH, "d_hide": 64, "topK": 3},
}
PUBLISHED = ("my-org/my-sae-model", "you/sentiment", "me/sentiment", "me/my-steered-model")
VOCABULARY = 400  # tokens of the bases, all 256 bytes among them
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
CHAT_WITH_IMAGES = """<bos> {% for turn in messages %}{% for part in turn.content %}{% if part.type == 'image' %}\
<start_of_image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"""


class World(NamedTuple):
    """folder: what a page finds beside it, to be copied. hub: where Hub ids are looked up."""

    folder: Path
    hub: LoopbackHub


@contextmanager
def tiny_world(home: Path) -> Iterator[World]:
    """A Hub and a chat model that clients in this process ask by default; caches are in `home`."""
    constants = huggingface_hub.constants
    with LoopbackHub() as hub, FakeOpenAI(answer) as chat, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the Hub of that moment
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("OPENAI_BASE_URL", chat.url)
        patch.setenv("OPENAI_API_KEY", "a-key-of-the-tests")
        patch.setenv("SERVE_KEY", "another-key-of-the-tests")
        patch.setenv("SAE_TRANSFORMERS_CACHE", str(home / "cache"))
        fill_hub(hub, home / "made")
        folder = home / "pages"
        folder.mkdir()
        write_data(folder)
        write_models(hub, folder)
        write_annotations(home / "cache", folder)
        yield World(folder, hub)


def write_annotations(cache: Path, folder: Path) -> None:
    """Descriptions as Neuronpedia's store has them, fetched before, and in files beside the page."""
    sarcasm = {"index": "7", "description": "sarcasm in replies", "explanationModelName": "gpt-4o-mini"}
    told = [*EXPLANATIONS, sarcasm]
    measured = [*FEATURES, {"index": "7", "maxActApprox": 3.0, "frac_nonzero": 0.01}]
    kept = cache / "neuronpedia" / "gemma-3-270m" / "12-gemmascope-2-res-16k"
    write_bulk(kept, explanations=told, features=measured)
    (folder / "explanations.jsonl").write_text(lines([*told, *measured]), encoding="utf-8")
    row = "9\tyes\tnames of rivers\tSpan 1: the Rhine\n"
    (folder / "explained.tsv").write_text(f"FeatureID\tVerify\tSummary\tWords\n{row}", encoding="utf-8")


def answer(body: dict[str, Any]) -> str:
    """What a chat model says that writes, explains and judges."""
    text = last_user_text(body)
    if "other meaning" in text:
        return "wave: to greet\nbow: of a violin"
    if "short instructions" in text:
        return "\n".join(f"Write a line {number} please" for number in range(20))
    return f"About rivers, {len(text)}. Final Decision: [[ Yes ]]"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the words of `data`: any text comes back as it was."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([f"{sentence(draw, n % 2)} {' '.join(PEOPLE)}" for n in range(300)], trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT, **special)


def put(hub: LoopbackHub, name: str, folder: Path) -> None:
    """A folder's files as a model of this name."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repos["models", name] = Repo("models", name)
    hub.repos["models", name].commit("main", files, "tiny")


def fill_hub(hub: LoopbackHub, folder: Path) -> None:
    """The bases that pages name, and published SAEs."""
    tokenizer = byte_tokenizer()
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 2048, "eos_token_id": None}
    bases = {
        BASE: tiny_base(**common),
        "HuggingFaceTB/SmolLM2-135M": tiny_base(**common, **OF_PAGES),
        GEMMA: tiny_base("gemma3_text", **common, num_hidden_layers=16),
        MISTRAL: tiny_base("mistral", **common, num_hidden_layers=16),
    }
    for name, base in bases.items():
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        put(hub, name, folder / name)
    scope = folder / "scope" / "resid_post" / "layer_12_width_16k_l0_medium"
    scope.mkdir(parents=True)
    sae = tiny_sae(activation="jumprelu")
    weights = {"w_enc": sae.W_enc, "w_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    save_file({**weights, "threshold": sae.threshold}, scope / "params.safetensors")
    write_crosscoder(folder / "scope" / "crosscoder" / "layer_5_9_12_15_width_65k_l0_medium")
    put(hub, GEMMA_SCOPE, folder / "scope")
    tiny_sae(layer=13).save_pretrained(folder / "llama-sae")
    convert(folder / "llama-sae", folder / "llama" / "layers.13", to="sparsify")
    put(hub, "EleutherAI/sae-llama-3-8b-32x", folder / "llama")
    (folder / "selfreg").mkdir()
    torch.save(SELFREG_SAE, folder / "selfreg" / "TopK7_l16_h65k_FT_epoch5_TD.pth")
    put(hub, "wuxs/Mistral_TopK_SAE_l16_FT_ToxicDetect", folder / "selfreg")


def write_crosscoder(folder: Path) -> None:
    """Gemma Scope 2's files of four layers."""
    folder.mkdir(parents=True)
    for layer in range(4):
        sae = tiny_sae(seed=layer, activation="jumprelu", apply_b_dec_to_input=False, d_out=4 * WIDTH)
        w_dec = sae.W_dec.detach().unflatten(1, (4, WIDTH)).clone()
        w_dec[:, :layer] = 0
        weights = {"w_enc": sae.W_enc, "w_dec": w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec[:WIDTH].clone()}
        save_file({**weights, "threshold": sae.threshold}, folder / f"params_layer_{layer}.safetensors")


def write_models(hub: LoopbackHub, folder: Path) -> None:
    """SAEs for the base, models that `attach` wrote, one of them published, and what was measured of it."""
    settings: dict[str, Any] = {"d_sae": 2304, "k": 16, "site": "resid_post"}
    sae = tiny_sae(layer=1, concepts={"sentiment": 0, "positive sentiment": 0}, feature_names={"9": "joy"}, **settings)
    for name in ("my-sae", "outputs/sae", "outputs/pretrain/sae"):
        sae.save_pretrained(folder / name)
    tiny_sae(layer=2, seed=5, **settings).save_pretrained(folder / "my-other-sae")
    attach(BASE, [folder / "my-sae"], folder / "my-model")
    for name in ("outputs/quickstart", "sentiment"):
        shutil.copytree(folder / "my-model", folder / name)
    for name in PUBLISHED:
        put(hub, name, folder / "my-model")
    model, tokenizer, _ = load(folder / "my-model")
    labels: Any = {"id2label": {0: "other", 1: "toxic"}, "label2id": {"other": 0, "toxic": 1}}
    config = AutoConfig.from_pretrained(BASE, **labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "my-classifier")
    tokenizer.save_pretrained(folder / "my-classifier")
    evaluate(model, tokenizer, [ReconstructionSuite(["the film was lovely"] * 4)], folder)
    classifier = {"linear1.weight": torch.ones(1, WIDTH), "linear1.bias": torch.ones(1)}
    copied = {f"sae.{name}": value for name, value in SELFREG_SAE["weight"].items()}
    (folder / "SelfReg").mkdir()
    torch.save({"weight": {**classifier, **copied}, "config": {"in_dim": WIDTH}}, folder / "SelfReg" / "seed0.pt")
    (folder / "steering.json").write_text(Steering([FeatureEdit(feature=3, op="add", value=2.0)]).to_json())

    base, _ = multimodal()
    reader = processor()
    reader.chat_template = CHAT_WITH_IMAGES
    base.save_pretrained(folder / "image-base")
    reader.save_pretrained(folder / "image-base")
    attach(str(folder / "image-base"), [tiny_sae(layer=1)], folder / "my-image-model")
