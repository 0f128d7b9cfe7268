"""The one loader: a model with SAEs and its tokenizer, by names or from objects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from ..create_training_data.base_model import find_base_model
from ..modeling import SaeForCausalLM, SparseAutoencoder
from ..modeling.configuration_sparse_autoencoder import SITES

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """model: in eval mode, on its device. tokenizer: pads on the left. name: where the model was found."""

    model: SaeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str


def load(
    name: str | os.PathLike[str],
    saes: str | SparseAutoencoder | Sequence[str | SparseAutoencoder] | None = None,
    *,
    hook_point: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Loaded:
    """A model with SAEs: one that `attach`, `steer` or `save_pretrained` wrote, or a base and the SAEs to put into it.

    Args:
        name: a folder or Hub id.
        saes: for a base: SAEs, or their names as `SparseAutoencoder.from_pretrained` takes them.
        hook_point: of SAEs that do not say where they read, such as `layers.14.resid_post`, or a module's path.
        base: for a saved model: another place of its base.
        dtype: auto (float32 on a CPU, else as published), float32, bfloat16 or float16.
        revision: of `name` on the Hub.

    Raises:
        ValueError: no SAE, SAEs for a model that has its own, or an unknown dtype.
        OSError: something is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}.")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": "float32" if dtype == "auto" and device == "cpu" else dtype}
    if revision:
        options["revision"] = revision
    found = find_base_model(os.fspath(name)).name
    config = _config(found, revision)
    if config.model_type != "sae_transformer":
        model = _base_with_saes(found, saes, hook_point, base, options)
        sources = [found]
    else:
        if saes is not None:
            raise ValueError(
                f"{found!r} has SAEs of its own. Received: saes={saes!r}; give its base to put in others."
            )
        if not config.saes:
            raise ValueError(f"{found!r} has no SAE. Expected a model with SAEs, or a base with `saes=`.")
        place = {} if base is None else {"base_model": find_base_model(base).name}
        model = SaeForCausalLM.from_pretrained(found, **options, **place)
        sources = [found, *place.values(), config.base_model_name_or_path]
    tokenizer = _tokenizer([source for source in sources if source], revision)
    return Loaded(model.to(device).eval(), tokenizer, found)  # pyright: ignore[reportArgumentType]


def parse_place(place: str | None) -> dict[str, Any]:
    """A place as one text, as the options of an SAE: `layers.14.resid_post` is layer and site, all else a path."""
    if place is None:
        return {}
    parts = place.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit() and parts[2] in SITES:
        return {"layer": int(parts[1]), "site": parts[2]}
    return {"hook": place}


def _config(name: str, revision: str | None) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"{name!r} could not be read as a model: {' '.join(str(error).split())}") from error


def _base_with_saes(name: str, saes: Any, hook_point: str | None, base: str | None, options: dict[str, Any]) -> Any:
    if base is not None:
        raise ValueError(f"{name!r} is a base itself. Received: base={base!r}; leave it out.")
    wanted = [saes] if isinstance(saes, (str, SparseAutoencoder)) else list(saes or ())
    if not wanted:
        raise ValueError(
            f"{name!r} has no SAE: give one with `saes=`, or a model that `attach`, `steer` or `save_pretrained` "
            f"wrote. Received: saes={saes!r}."
        )
    place = parse_place(hook_point)
    loaded = [
        one if isinstance(one, SparseAutoencoder) else SparseAutoencoder.from_pretrained(one, **place)
        for one in wanted
    ]
    return SaeForCausalLM.from_base(name, saes=loaded, **options)


def _tokenizer(sources: Sequence[str], revision: str | None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, else its base's."""
    problems = []
    for number, source in enumerate(sources):
        if Path(source).is_dir() and not any(Path(source).glob("*token*")):
            problems.append(f"{source!r} has no tokenizer")
            continue
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=None if number else revision)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{source!r}: {' '.join(str(error).split())}")
            continue
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer
    raise OSError(f"Expected a tokenizer beside the model or its base. Received: {'; '.join(problems)}.")
