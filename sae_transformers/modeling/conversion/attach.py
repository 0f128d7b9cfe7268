"""A model with published SAEs as a repository of its own, without loading the base's weights."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from ..base_classes import base_from_config
from ..modeling_sae_causal_lm import SaeForCausalLM
from ..modeling_sae_sequence_classification import SaeForSequenceClassification
from ..output_files import locked_folder
from ..repository_files import commit_of
from ..sae_files import PLACE
from ..sparse_autoencoder import SparseAutoencoder
from . import SeveralSaes

HEADS = {"causal-lm": SaeForCausalLM, "sequence-classification": SaeForSequenceClassification}


def read_saes(name: str | os.PathLike, **options: Any) -> list[SparseAutoencoder]:
    """The SAE of a name, or all layers of a cross-layer transcoder or crosscoder, in their order.

    Args:
        name, options: as `SparseAutoencoder.from_pretrained` takes them. Layers of one transcoder have places of their
            own, which no option can give.
    """
    try:
        return [SparseAutoencoder.from_pretrained(name, **options)]
    except SeveralSaes as several:
        if not several.one_object or any(options.get(place) for place in PLACE):
            raise
        return [
            SparseAutoencoder.from_pretrained(several.root, **{**options, "sae_id": path})
            for path in several.one_object
        ]


def attach(
    base: str | None,
    saes: Sequence[SparseAutoencoder | str | os.PathLike],
    out: str | os.PathLike,
    *,
    head: str = "causal-lm",
    revision: str | None = None,
    force: bool = False,
    base_options: Mapping[str, Any] | None = None,
) -> Any:
    """Write the repository that `from_pretrained` loads: SAEs, code, a pointer to the base, and its tokenizer (of a
    base that reads images, its processor). Where that cannot be had a warning says so, and the rest is written.

    Args:
        base: folder or Hub id; the one that the SAEs name by default.
        saes: SAEs that know their place, or names of such as `SparseAutoencoder.from_pretrained` takes them, or the
            folder of a cross-layer transcoder or crosscoder.
        out: folder.
        head: `causal-lm` or `sequence-classification`.
        revision: of the base; its commit is noted.
        force: see `from_base`.
        base_options: for the base's config: `token`, `cache_dir`, ...

    Returns:
        The model, with the base's parameters on the meta device.

    Raises:
        ValueError: no base is known, or an SAE does not fit it.
        OSError: the base's config cannot be found, or the folder not be written.
    """
    if head not in HEADS:
        raise ValueError(f"`head` must be one of {', '.join(HEADS)}. Received: head={head!r}.")
    saes = [one for sae in saes for one in ([sae] if isinstance(sae, SparseAutoencoder) else read_saes(sae))]
    named = {str(sae.config.metadata["base_model"]) for sae in saes if sae.config.metadata.get("base_model")}
    if base is None:
        if len(named) != 1:
            raise ValueError(f"The SAEs name {len(named)} base models; give one with `base`. Received: base=None.")
        base = named.pop()
    options = {**(base_options or {}), **({"revision": revision} if revision else {})}
    config = AutoConfig.from_pretrained(base, **options)
    cls: Any = HEADS[head]
    with torch.device("meta"):
        lm = base_from_config((cls.auto_model, *cls.other_auto_models), config, {})
    lm.name_or_path = base
    with contextlib.suppress(OSError):  # none published
        lm.generation_config = GenerationConfig.from_pretrained(base, **options)
    model = cls.from_base(lm.eval(), saes, force=force)
    model.config.base_model_revision = commit_of(base, options)
    # What has no values yet, a classifier's head too, is not written.
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    with locked_folder(out):
        model.save_pretrained(out, state_dict=stored)
        reads_images = config.get_text_config() is not config
        reader, what = (AutoProcessor, "processor") if reads_images else (AutoTokenizer, "tokenizer")
        try:
            reader.from_pretrained(base, **options).save_pretrained(out)
        except (OSError, ValueError, KeyError, ImportError) as error:  # none published, or it needs a package
            warnings.warn(
                f"The {what} of the base could not be read, so {str(out)!r} has none: pipelines need one there. "
                f"Save one with `{what}.save_pretrained({str(out)!r})`. Received: base={base!r}: "
                f"{' '.join(str(error).split())}",
                stacklevel=2,
            )
    return model
