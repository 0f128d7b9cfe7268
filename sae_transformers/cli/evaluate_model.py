"""The model of the verb `evaluate`: a published one, or a base with SAEs; and what the record says of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def load_model(s: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model in eval mode, with the steering that was given as its default, and its tokenizer.

    Raises:
        ValueError: the model has no SAE, or a feature, steering or length does not fit it.
        OSError: it cannot be found.
    """
    from ..latents.context import check_length
    from ..modeling import SaeForCausalLM
    from .evaluate_suites import parse_feature
    from .loading import load_base, load_sae

    model: Any
    if s["sae"]:
        if s["base"] is not None:
            raise ValueError(f"With --sae the model is the base. Received: --base {s['base']!r} too.")
        saes = [load_sae(name, s["place"]) for name in s["sae"]]
        loaded, tokenizer, name = load_base(s["model"], s["revision"], s["model_dtype"])
        model = SaeForCausalLM.from_base(loaded, saes=saes).eval()
        model.config.base_model_name_or_path = name
    else:
        model, tokenizer = _published(s)
    check_length(model.lm, s["max_length"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if s["steering"] is not None:
        steering = _steering(s["steering"])
        model.prepare_steering(steering)
        model.steering = steering
    for text in s["feature"] or ():
        sae, feature = parse_feature(text)
        if sae >= len(model.saes):
            raise ValueError(f"--feature: the model has {len(model.saes)} SAEs, from 0. Received: {text!r}.")
        model.config.sae_configs[sae].resolve_feature(feature)
    return model, tokenizer


def _published(s: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    import transformers

    from ..create_training_data.base_model import find_base_model
    from ..modeling import SaeForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"revision": s["revision"]} if s["revision"] else {}
    found = find_base_model(s["model"]).name
    try:
        config = transformers.AutoConfig.from_pretrained(found, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{s['model']!r} could not be read as a model: {str(error).splitlines()[0]}") from error
    if config.model_type != "sae_transformer" or not config.saes:
        raise ValueError(
            f"{s['model']!r} has no SAE: give one with --sae, or a model that save_pretrained, attach or steer wrote. "
            f"Received: a model of type {config.model_type!r}."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = s["model_dtype"]
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"`model_dtype` must be auto, float32, bfloat16 or float16. Received: model_dtype={dtype!r}.")
    dtype = "float32" if dtype == "auto" and device == "cpu" else dtype
    base = {} if s["base"] is None else {"base_model": find_base_model(s["base"]).name}
    try:
        model = SaeForCausalLM.from_pretrained(found, dtype=dtype, **options, **base).to(device).eval()
    except OSError as error:
        raise OSError(str(error).replace("`base_model=`", "--base")) from error
    sources = [found, base.get("base_model"), config.base_model_name_or_path]
    return model, _tokenizer([source for source in sources if source], options)


def _tokenizer(sources: list[str], options: Mapping[str, Any]) -> Any:
    """The model's own tokenizer, or the base's: attach writes none."""
    import transformers

    for place, source in enumerate(sources):
        if Path(source).is_dir() and not any(Path(source).glob("*token*")) and place + 1 < len(sources):
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(source, **(options if place == 0 else {}))
        except (OSError, ValueError, KeyError) as error:
            if place + 1 == len(sources):
                raise OSError(f"No tokenizer in {' or '.join(map(repr, sources))}: {error}") from error
    raise OSError(f"No tokenizer in {' or '.join(map(repr, sources))}.")


def _steering(path: Path) -> Any:
    from ..modeling import Steering

    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Steering.from_dict(told.get("steering", told) if isinstance(told, dict) else told)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--steering must be the JSON of a Steering. Received: {str(path)!r}: {error}") from error


def model_facts(s: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What the record says of the model: its name, base, precision, SAEs and default steering, as JSON."""
    config = model.config
    facts = {
        "name": s["model"],
        "revision": s["revision"],
        "base": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "base_type": config.get_text_config().model_type,
        "base_parameters": sum(parameter.numel() for parameter in model.lm.parameters()),
        "dtype": str(model.lm.dtype).removeprefix("torch."),
        "saes": [
            {
                "place": entry.read_at,
                "writes": entry.write_at,
                "d_in": entry.d_in,
                "d_sae": entry.d_sae,
                "activation": entry.activation,
                "k": entry.k,
                "concepts": dict(entry.concepts),
                "sha256": fingerprint(sae),
            }
            for entry, sae in zip(config.sae_configs, model.saes, strict=True)
        ],
        "steering": model.steering.to_dict() if model.steering else None,
    }
    return json.loads(json.dumps(facts))


def fingerprint(module: Any) -> str:
    """sha256 over names, shapes and bytes of a module's tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
