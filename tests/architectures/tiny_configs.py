"""A small configuration of any family, made from the family's default one by walking over its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.family_values import FAMILY_VALUES, START_VALUES
from tests.architectures.image_text_values import IMAGE_TEXT_VALUES
from tests.architectures.small_values import KEY_VALUE_HEADS, LAYERS, TEXT, TOWER, VOCAB

TEXT_PARTS = ("text_config", "decoder", "decoder_config", "language_config", "llm_config", "vlm_config")
LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth")


def tiny_config(model_type: str, task: str = "causal-lm") -> PreTrainedConfig:
    """The family's configuration with every size small, and its special tokens behind the words of the vocabulary.

    Args:
        model_type: a key of transformers' `CONFIG_MAPPING`.
        task: "causal-lm" or "image-text-to-text"; the same name may stand for two classes.
    """
    config_class = CONFIG_MAPPING[model_type]
    config = _shrink(config_class, model_type, "text")
    _place_special_tokens(config)
    if task == "causal-lm" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def _shrink(config_class: type, path: str, role: str) -> PreTrainedConfig:
    """One configuration of `config_class`; `path` is the family's name and the names of the parts down to here."""
    default = config_class(**START_VALUES.get(path, {}))
    sizes = TEXT if role == "text" else TOWER
    values: dict[str, Any] = dict(START_VALUES.get(path, {}))
    known = {field.name for field in dataclasses.fields(config_class)}
    known.update(config_class.attribute_map.get(name, name) for name in list(known))
    for name, value in vars(default).items():
        if name not in known:  # derived from others
            continue
        if isinstance(value, PreTrainedConfig):
            part_role = "text" if name in TEXT_PARTS and role == "text" else "tower"
            values[name] = _shrink(type(value), f"{path}.{name}", part_role)
        elif name in sizes and _replaceable(name, value):
            values[name] = sizes[name]
        elif role == "text" and name in KEY_VALUE_HEADS and value is not None:
            values[name] = _key_value_heads(name, default)
    values.update(_multimodal_rotary(default, values))
    values.update(FAMILY_VALUES.get(path, {}))
    values.update(IMAGE_TEXT_VALUES.get(path, {}))
    values.update(_layer_kinds(default, values))
    return config_class(**values)


def _replaceable(name: str, value: Any) -> bool:
    """Whether a size stands there: not a flag or a list, and no 0 that switches a part off."""
    if isinstance(value, (bool, list, tuple, dict, str)):
        return False
    return name.endswith("token_id") or name == "head_dim" or bool(value)


def _key_value_heads(name: str, default: PreTrainedConfig) -> int:
    """As many as query heads where the default says so (latent attention relies on it), else half of them."""
    fields = vars(default)
    return 4 if fields[name] == fields.get("num_attention_heads") else 2


def _multimodal_rotary(default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Sections for time, height and width that fill the few rotary frequencies of a small head."""
    if "mrope_section" not in (getattr(default, "ignore_keys_at_rope_validation", None) or ()):
        return {}
    rope = default.rope_parameters
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return {}
    heads = values.get("num_attention_heads", 4)
    head_dim = values.get("head_dim") or values.get("hidden_size", 32) // heads
    pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    height = max(pairs // 3, min(pairs - 1, 1))
    width = pairs // 3
    return {"rope_parameters": {**rope, "mrope_section": [pairs - height - width, height, width]}}


def _layer_kinds(default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, list[str]]:
    """For each list that names the kind of every layer: a list of `layers` names with every kind of the default."""
    fields = vars(default)
    counts = [(fields[name], values.get(name, fields[name])) for name in LAYER_COUNTS if name in fields]
    counts = [(before, now) for before, now in counts if isinstance(before, int) and isinstance(now, int)]
    found = {}
    for name, kinds in vars(default).items():
        if name in values or not isinstance(kinds, (list, tuple)) or not kinds or not isinstance(kinds[0], str):
            continue
        for before, now in counts:
            if len(kinds) == before:
                found[name] = _cover(list(kinds), now)
                break
    return found


def _cover(kinds: list[str], layers: int) -> list[str]:
    """The first `layers` of `kinds` if they hold every kind; else each kind once in order, then again from the front.

    The last kind stays last, where families put the full attention that some of them require there.
    """
    distinct = list(dict.fromkeys(kinds))
    if len(set(kinds[:layers])) == len(distinct):
        return kinds[:layers]
    filler = (kinds[:1] * layers)[: max(layers - len(distinct), 0)]
    return (filler + distinct)[:layers]


def _place_special_tokens(config: PreTrainedConfig) -> None:
    """Give image, video and audio tokens ids of their own, from `VOCAB` on, and make room for them."""
    text = config.get_text_config()
    if text is config and not config.sub_configs:
        return
    following = VOCAB
    for part in (config, text):
        for name, value in list(vars(part).items()):
            if isinstance(value, bool) or not isinstance(value, int) or value < 3 or not is_special_token(name):
                continue
            known = getattr(config, name, None) if part is text and text is not config else None
            if isinstance(known, int) and VOCAB <= known < following:
                setattr(part, name, known)
                continue
            setattr(part, name, following)
            following += 1
    if isinstance(getattr(config, "vocabulary_map", None), dict):  # Chameleon and Emu3 find the id there
        config.vocabulary_map["<image>"] = config.image_token_id
    for part in (config, text):
        for name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, max(getattr(part, name), following))


def is_special_token(name: str) -> bool:
    """Whether a field of that name holds the id of a token that stands for something else than text."""
    if name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"):
        return False
    return name.endswith(("_token_id", "_token_index", "_patch_id"))


__all__ = ["LAYERS", "is_special_token", "tiny_config"]
