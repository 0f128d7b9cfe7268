"""A model with SAEs that save_pretrained, attach or steer wrote, as every verb reads one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def this_device() -> str:
    """Where this process keeps its model: of several processes each has the GPU of its local rank."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def read_config(name: str, revision: str | None) -> tuple[str, Any]:
    """Where a model was found, and its config.

    Raises:
        OSError: it cannot be found or read.
    """
    import transformers

    from ..create_training_data.base_model import find_base_model

    found = find_base_model(name).name
    try:
        return found, transformers.AutoConfig.from_pretrained(found, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"{name!r} could not be read as a model: {' '.join(str(error).split())}") from error


def has_saes(config: Any) -> bool:
    """Whether a config is that of a model with SAEs."""
    return config.model_type == "sae_transformer" and bool(config.saes)


def load_saved(
    name: str, revision: str | None, dtype: str, *, base: str | None = None, found: tuple[str, Any] | None = None
) -> tuple[Any, Any]:
    """A model with SAEs of its own on this process's device in eval mode, and its tokenizer or else its base's.

    Args:
        name: a folder or a Hub id.
        revision: of it.
        dtype: auto, float32, bfloat16 or float16.
        base: a base in place of the one that the model names.
        found: what `read_config` said of it, if it was asked.

    Raises:
        ValueError: it is no model with SAEs.
        OSError: it, its base or a tokenizer cannot be found or read.
    """
    import transformers

    from ..create_training_data.base_model import find_base_model
    from ..modeling import SaeForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place, config = found or read_config(name, revision)
    if not has_saes(config):
        raise ValueError(
            f"{name!r} has no SAE: give one with --sae, or a model that save_pretrained, attach or steer wrote. "
            f"Received: a model of type {config.model_type!r}."
        )
    device = this_device()
    if dtype not in DTYPES:
        raise ValueError(f"`model_dtype` must be auto, float32, bfloat16 or float16. Received: model_dtype={dtype!r}.")
    dtype = "float32" if dtype == "auto" and device == "cpu" else dtype
    options = {"revision": revision} if revision else {}
    given = {} if base is None else {"base_model": find_base_model(base).name}
    try:
        model: Any = SaeForCausalLM.from_pretrained(place, dtype=dtype, **options, **given)
    except OSError as error:
        raise OSError(str(error).replace("`base_model=`", "--base")) from error
    sources = [(place, revision), (given.get("base_model"), None)]
    sources.append((config.base_model_name_or_path, config.base_model_revision))
    tokenizer = load_tokenizer([(one, at) for one, at in sources if one])
    return model.to(device).eval(), tokenizer


def load_tokenizer(sources: list[tuple[str, str | None]]) -> Any:
    """The tokenizer of the first of some models, by name and revision, that has one.

    Raises:
        OSError: none has.
    """
    import transformers

    told: Mapping[str, str] = {}
    for source, revision in sources:
        folder = Path(source).is_dir()
        if folder and not any(Path(source).glob("*token*")) and source != sources[-1][0]:
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(source, revision=None if folder else revision)
        except (OSError, ValueError, KeyError) as error:
            told = {**told, source: " ".join(str(error).split())}
    name, *others = dict(sources)
    also = f", nor has its base {others[-1]!r}" if others else ""
    reasons = "; ".join(f"{source!r}: {reason}" for source, reason in told.items())
    raise OSError(
        f"{name!r} has no tokenizer that can be read{also}. Expected one beside the model: write the base's there by "
        f"`tokenizer.save_pretrained(...)`. Received: {reasons}"
    )


def read_steering(given: str | Path) -> Any:
    """The `Steering` of --steering: JSON, or a file of it; also in a report that has one, as steer writes.

    Raises:
        ValueError: it is neither.
    """
    from ..modeling import Steering

    text = str(given)
    if is_file := not text.lstrip().startswith(("{", "[")):
        text = Path(text).read_text(encoding="utf-8")
    try:
        told = json.loads(text)
        return Steering.from_dict(told.get("steering", told) if isinstance(told, dict) else told)
    except (ValueError, TypeError) as error:
        named = f"{str(given)!r}: " if is_file else ""
        raise ValueError(f"--steering must be the JSON of a Steering. Received: {named}{error}") from error
