"""The model of the verb `evaluate`: a published one, or a base with SAEs; and what the record says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def load_model(s: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model in eval mode, with the steering that was given as its default, and its tokenizer.

    Raises:
        ValueError: the model has no SAE, or a feature, steering or length does not fit it.
        OSError: it cannot be found.
    """
    from ..latents.context import check_length
    from ..workflows.loading import load, read_steering
    from .options import parse_feature

    loaded = load(
        s["model"],
        s["sae"] or None,
        hook_point=s["place"],
        base=s["base"],
        model_dtype=s["model_dtype"],
        revision=s["revision"],
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    check_length(model.lm, s["max_length"])
    if s["steering"] is not None:
        steering = read_steering(s["steering"])
        model.prepare_steering(steering)
        model.steering = steering
    for text in s["feature"] or ():
        sae, feature = parse_feature(text)
        if sae >= len(model.saes):
            raise ValueError(f"--feature: the model has {len(model.saes)} SAEs, from 0. Received: {text!r}.")
        model.config.sae_configs[sae].resolve_feature(feature)
    return model, tokenizer


def model_facts(s: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What the record says of the model: its name, base, precision, SAEs and default steering, as JSON."""
    from ..evaluation.journal import fingerprint

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
