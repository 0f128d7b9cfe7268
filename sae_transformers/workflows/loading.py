"""The one loader: a model with SAEs and its tokenizer, by names or from objects."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from ..create_training_data.base_model import find_base_model
from ..modeling import SaeForCausalLM, SaeForSequenceClassification, SparseAutoencoder, Steering
from ..modeling.base_classes import keep_soft_cap
from ..modeling.configuration_sparse_autoencoder import SITES
from ..modeling.conversion.attach import read_saes
from ..modeling.modeling_sae import SaePreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """model: in eval mode, on its device. tokenizer: pads on the left. name: where the model was found."""

    model: SaeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str


class LoadedWithHead(NamedTuple):
    """As `Loaded`; model: a `SaeForCausalLM` or a `SaeForSequenceClassification`."""

    model: SaePreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load(
    name: str | os.PathLike[str],
    saes: str | SparseAutoencoder | Sequence[str | SparseAutoencoder] | None = None,
    *,
    hook_point: str | None = None,
    base: str | None = None,
    model_dtype: str = "auto",
    revision: str | None = None,
) -> Loaded:
    """A model with SAEs: one that `attach`, `steer` or `save_pretrained` wrote, or a base and the SAEs to put into it.

    Args:
        name: a folder or Hub id.
        saes: for a base: SAEs, or their names as `SparseAutoencoder.from_pretrained` takes them, or the folder of a
            cross-layer transcoder or crosscoder; [] for none.
        hook_point: of SAEs that do not say where they read, such as `layers.14.resid_post`, or a module's path.
        base: for a saved model: another place of its base.
        model_dtype: auto (float32 on a CPU, else as published), float32, bfloat16 or float16.
        revision: of `name` on the Hub.

    Raises:
        ValueError: no SAE, SAEs for a model that has its own, or an unknown precision.
        OSError: something is not there.
    """
    return Loaded(*_loaded(name, saes, SaeForCausalLM, hook_point, base, model_dtype, revision))


def load_with_head(
    name: str | os.PathLike[str],
    saes: str | SparseAutoencoder | Sequence[str | SparseAutoencoder] | None = None,
    *,
    hook_point: str | None = None,
    model_dtype: str = "auto",
) -> LoadedWithHead:
    """As `load`, with the head that `name` was saved with: a classifier is one, all else a language model.

    Args, Raises: as of `load`.
    """
    return LoadedWithHead(*_loaded(name, saes, None, hook_point, None, model_dtype, None))


def _loaded(
    name: str | os.PathLike[str],
    saes: Any,
    kind: Any,
    hook_point: str | None,
    base: str | None,
    model_dtype: str,
    revision: str | None,
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    options = _options(model_dtype)
    if revision:
        options["revision"] = revision
    found = find_base_model(os.fspath(name)).name
    config = _config(found, revision)
    sources: list[tuple[Any, str | None]] = [(found, revision)]
    kind = kind or _kind_of(config)
    if config.model_type != "sae_transformer":
        model = _base_with_saes(kind, found, saes, hook_point, base, options)
    else:
        if saes:
            raise ValueError(f"{found!r} has SAEs of its own; others go into its base. Received: saes={saes!r}.")
        if not config.saes:
            raise ValueError(f"{found!r} has no SAE. Expected a model with SAEs, or a base with `saes=`.")
        place = {} if base is None else {"base_model": find_base_model(base).name}
        model = kind.from_pretrained(found, **options, **place)
        sources += [(place.get("base_model"), None), (config.base_model_name_or_path, config.base_model_revision)]
    tokenizer = _tokenizer([(source, at) for source, at in sources if source])
    return model.to(this_device()).eval(), tokenizer, found


def read_steering(given: str | os.PathLike[str], model: str | None = None) -> Steering:
    """A steering from JSON, or from a file of it; also from a report that has one, as `steer` writes.

    Args:
        given: JSON, a file, or with `model` the name of a .json file there.
        model: a folder or Hub id.

    Raises:
        ValueError: it is neither.
        OSError: there is no such file.
    """
    text = os.fspath(given)
    if is_file := not text.lstrip().startswith(("{", "[")):
        path = Path(text)
        if model is not None and not path.exists():
            path = _file_of_model(model, text)
        text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text)
        return Steering.from_dict(values.get("steering", values) if isinstance(values, dict) else values)
    except (ValueError, TypeError) as error:
        named = f"{os.fspath(given)!r}: " if is_file else ""
        raise ValueError(f"`steering` must be the JSON of a Steering. Received: {named}{error}") from error


def _file_of_model(model: str, name: str) -> Path:
    """The file `name` or `name.json` of a model's folder or repository."""
    for file in (name, f"{name}.json"):
        found = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found)
    there = sorted(path.name for path in Path(model).glob("*.json")) if Path(model).is_dir() else []
    has = f"; it has {', '.join(there)}" if there else ""
    raise OSError(f"No steering of that name: neither a file, nor one of {model!r}{has}. Received: steering={name!r}.")


def load_sae(
    name: str, hook_point: str | None = None, *, dtype: str | None = None, **options: Any
) -> SparseAutoencoder:
    """An SAE by itself, as it is stored.

    Args:
        name: as `SparseAutoencoder.from_pretrained` takes it.
        hook_point: where it reads, if it does not say that itself.
        dtype: float32, bfloat16 or float16; by default as stored.
        options: more of `SparseAutoencoder.from_pretrained`, such as `sae_id`.

    Raises:
        ValueError: an unknown precision, or what `from_pretrained` refuses.
        OSError: it is not there.
    """
    return SparseAutoencoder.from_pretrained(name, dtype=_dtype(dtype), **options, **parse_place(hook_point))


def load_saes(
    name: str, hook_point: str | None = None, *, dtype: str | None = None, **options: Any
) -> list[SparseAutoencoder]:
    """The SAE of a name, or all layers of a cross-layer transcoder or crosscoder, in their order.

    Args:
        name, hook_point, dtype, options: as of `load_sae`; layers of one transcoder say themselves where they read.

    Raises:
        ValueError, OSError: as of `load_sae`.
    """
    return read_saes(name, dtype=_dtype(dtype), **options, **parse_place(hook_point))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES[1:]:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES[1:])}. Received: dtype={name!r}.")
    return None if name is None else getattr(torch, name)


class LoadedBase(NamedTuple):
    """model: in eval mode, on its device. tokenizer: of it; with `images` its processor. name: where it was found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_base(
    name: str | os.PathLike[str], *, model_dtype: str = "auto", revision: str | None = None, images: bool = False
) -> LoadedBase:
    """A base model as it was published, without SAEs, and its tokenizer: what `harvest` reads.

    Args:
        name: a folder or Hub id.
        model_dtype: see `load`.
        revision: of the model on the Hub.
        images: load a base that reads images, with its processor in the tokenizer's place.

    Raises:
        ValueError: an unknown precision.
        OSError: it is not there, or is no such model.
    """
    options = _options(model_dtype)
    found = find_base_model(os.fspath(name)).name
    reader = transformers.AutoProcessor if images else transformers.AutoTokenizer
    kind = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    try:
        tokenizer = reader.from_pretrained(found, revision=revision)
        base = keep_soft_cap(kind.from_pretrained(found, revision=revision, **options), options)
    except (OSError, ValueError) as error:
        raise OSError(f"{found!r} could not be read as a model: {str(error).strip().splitlines()[0]}") from error
    return LoadedBase(base.to(this_device()).eval(), tokenizer, found)  # pyright: ignore[reportArgumentType]


def base_of(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the base that a model with SAEs points to.

    Raises:
        ValueError: it points to none.
        OSError: the model is not there.
    """
    config = _config(name, revision)
    if getattr(config, "base_model_name_or_path", None) is None:
        raise ValueError(f"{name!r} names no base and has no tokenizer. Expected one of them.")
    return config.base_model_name_or_path, config.base_model_revision


def this_device() -> str:
    """Where this process keeps its model: of several processes each has the GPU of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def parse_place(place: str | None) -> dict[str, Any]:
    """A place as one text, as the options of an SAE: `layers.14.resid_post` is layer and site, all else a path."""
    if place is None:
        return {}
    parts = place.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit() and parts[2] in SITES:
        return {"layer": int(parts[1]), "site": parts[2]}
    return {"hook": place}


def _options(model_dtype: str) -> dict[str, Any]:
    """Of `from_pretrained`; and transformers keeps quiet while it loads."""
    if model_dtype not in DTYPES:
        raise ValueError(f"`model_dtype` must be one of {', '.join(DTYPES)}. Received: model_dtype={model_dtype!r}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {"dtype": "float32" if model_dtype == "auto" and this_device() == "cpu" else model_dtype}


def _config(name: str, revision: str | None) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"{name!r} could not be read as a model: {' '.join(str(error).split())}") from error


def _kind_of(config: PreTrainedConfig) -> Any:
    """The class of ours for what a config was saved from."""
    saved_from = getattr(config, "architectures", None) or ()
    is_classifier = any(str(one).endswith("ForSequenceClassification") for one in saved_from)
    return SaeForSequenceClassification if is_classifier else SaeForCausalLM


def _base_with_saes(
    kind: Any, name: str, saes: Any, hook_point: str | None, base: str | None, options: dict[str, Any]
) -> Any:
    if base is not None:
        raise ValueError(f"{name!r} is a base itself: leave out `base=`. Received: base={base!r}.")
    wanted = [saes] if isinstance(saes, (str, SparseAutoencoder)) else list(saes or ())
    if saes is None:
        raise ValueError(
            f"{name!r} has no SAE: give one with `saes=`, or a model that `attach`, `steer` or `save_pretrained` "
            f"wrote. Received: saes={saes!r}."
        )
    loaded = [
        sae for one in wanted for sae in ([one] if isinstance(one, SparseAutoencoder) else load_saes(one, hook_point))
    ]
    return kind.from_base(name, saes=loaded, **options)


def _tokenizer(sources: Sequence[tuple[str, str | None]]) -> PreTrainedTokenizerBase:
    """The tokenizer of the first of some models, by name and revision, that has one."""
    reasons: dict[str, str] = {}
    for source, revision in sources:
        folder = Path(source).is_dir()
        if (
            folder
            and not any(file.suffix != ".py" for file in Path(source).glob("*token*"))
            and source != sources[-1][0]
        ):
            continue
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=None if folder else revision)
        except (OSError, ValueError, KeyError) as error:
            reasons[source] = " ".join(str(error).split())
            continue
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer
    name, *others = dict(sources)
    also = f", nor has its base {others[-1]!r}" if others else ""
    raise OSError(
        f"{name!r} has no tokenizer that can be read{also}. Expected one beside the model: write the base's there by "
        f"`tokenizer.save_pretrained(...)`. Received: {'; '.join(f'{s!r}: {reason}' for s, reason in reasons.items())}"
    )
