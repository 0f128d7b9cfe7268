"""What a model with sparse autoencoders is: the base's config, one entry for each SAE, and how the two are saved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig

from .base_fingerprint import VALUES
from .configuration_sparse_autoencoder import (
    LossWeights,
    SparseAutoencoderConfig,
    check_choice,
    check_dtype,
    check_kind,
    read_fields,
)
from .feature_head import FeatureHeadConfig
from .feature_penalty import FeaturePenalty, penalties_from
from .group_penalty import GroupPenalty, groups_from
from .steering import Steering

WEIGHTS_SCOPES = ("sae", "full")
# Of a base's config: configs make lists of these lengths, and models that many blocks.
LENGTHS = re.compile(r"(?:\w+_)?(?:n_layer|layers|num_blocks|num_labels|k_dense_replace)")
MOST = {"num_labels": 10**5}
MOST_BLOCKS = 10**4
POSITIVE = {
    "d_model", "hidden_size", "n_embd", "n_head", "n_layer", "num_attention_heads", "num_heads", "num_hidden_layers",
    "num_key_value_heads", "vocab_size",
}  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_sae.SaeConfig",
    "AutoModel": "modeling_sae.SaeModel",
    "AutoModelForCausalLM": "modeling_sae_causal_lm.SaeForCausalLM",
    "AutoModelForImageTextToText": "modeling_sae_causal_lm.SaeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_sae_sequence_classification.SaeForSequenceClassification",
}


class SaeConfig(PreTrainedConfig):
    """A base model and the sparse autoencoders inside it.

    Args:
        text_config: config of the base model, or its dict.
        saes: one `SparseAutoencoderConfig` (or its dict) for each SAE; its position is its number.
        weights_scope: `sae` saves the SAEs (and a classifier's head) beside a pointer to the base; `full` saves all.
        base_model_name_or_path: repository of the base, needed to load a `sae` checkpoint.
        base_model_revision: its revision; a commit hash where one is known.
        base_fingerprint: what tells the base from another of the same shape; set by `from_base`.
        steering: default steering as JSON (`Steering.to_dict()`), applied at every call until switched off.
        loss_weights: `LossWeights` or its dict.
        detach_hidden: whether the SAE losses leave the base alone (True) or also regularise it (False).
        feature_head: `FeatureHeadConfig` or its dict: a classifier reads an SAE's hidden state in place of the base's
            last one.
        feature_penalties: `FeaturePenalty` objects or their dicts: terms of the loss on features of the SAEs.
        group_penalties: of a classifier, `GroupPenalty` objects or their dicts: terms of the loss on what groups of
            features do to its scores.
    """

    model_type = "sae_transformer"
    # No `sub_configs`: the class of the base's config is only known at run time. The name `text_config` is what
    # `get_text_config()` looks for, so caches, masks and vocabulary checks of `generate` find the base's values.
    keys_to_ignore_at_inference = [
        "past_key_values", "cache", "cache_params", "state", "mems", "past_buckets_states", "rope_deltas",
        "image_hidden_states", "router_logits", "aux_loss", "hidden_states", "attentions", "sae_features",
        "sae_inputs", "sae_losses", "lm_loss", "pooled_states",
    ]  # fmt: skip
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        saes: Sequence[SparseAutoencoderConfig | Mapping[str, Any]] = (),
        weights_scope: str = "sae",
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_fingerprint: Mapping[str, Any] | None = None,
        steering: Mapping[str, Any] | None = None,
        loss_weights: LossWeights | Mapping[str, float] | None = None,
        detach_hidden: bool = True,
        feature_head: FeatureHeadConfig | Mapping[str, Any] | None = None,
        feature_penalties: Sequence[FeaturePenalty | Mapping[str, Any]] = (),
        group_penalties: Sequence[GroupPenalty | Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        check_choice("weights_scope", weights_scope, WEIGHTS_SCOPES)
        check_sizes(kwargs, "")
        check_dtype(kwargs)
        check_kind("text_config", text_config, (PreTrainedConfig, Mapping, type(None)), "a config or its dict")
        if isinstance(text_config, Mapping):
            text_config = _config_from_dict(text_config)
        self.text_config = text_config
        check_kind("saes", saes or (), (list, tuple), "a list of SparseAutoencoderConfig objects or their dicts")
        # By attribute and not by class, which remote code has twice.
        entries: list[Any] = [s.to_dict() if hasattr(s, "placed") else s for s in cast("Sequence[Any]", saes or ())]
        self.saes = [dict(s) if isinstance(s, Mapping) else s for s in entries]
        self.weights_scope = weights_scope
        check_kind("base_model_name_or_path", base_model_name_or_path, (str, type(None)), "a folder or a Hub id")
        check_kind("base_model_revision", base_model_revision, (str, type(None)), "a commit, a branch or a tag")
        for name, value in (("base_fingerprint", base_fingerprint), ("steering", steering)):
            check_kind(name, value, (Mapping, type(None)), "a dict")
        _check_fingerprint(base_fingerprint or {})
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_fingerprint = dict(base_fingerprint) if base_fingerprint else None
        self.steering = steering
        if steering is not None:
            self.steering = dict(steering) if Steering.from_dict(steering) else None
        weights = loss_weights or LossWeights()
        if not isinstance(weights, Mapping) and not hasattr(weights, "unintended_state"):
            raise TypeError(f"`loss_weights` must be a LossWeights or its dict. Received: {loss_weights!r}.")
        if isinstance(weights, Mapping):
            weights = read_fields(LossWeights, weights, "loss weight")
        self.loss_weights = asdict(weights)
        self.detach_hidden = bool(detach_hidden)
        self.feature_head = feature_head
        if feature_head is not None:
            values = feature_head if isinstance(feature_head, Mapping) else feature_head.to_dict()
            self.feature_head = FeatureHeadConfig.from_dict(values).to_dict()
        self.feature_penalties = [penalty.to_dict() for penalty in penalties_from(feature_penalties)]
        self.group_penalties = [group.to_dict() for group in groups_from(group_penalties)]
        for entry in self.sae_configs:
            if entry.hooks_out and self.loss_weights["reconstruction"]:
                raise ValueError(
                    f"What an SAE of several places must reconstruct is the sum over all layers of its transcoder. "
                    f"Expected loss_weights without `reconstruction`. Received: "
                    f"reconstruction={self.loss_weights['reconstruction']!r}, an SAE that writes {entry.write_at}."
                )
            if not entry.placed:
                raise ValueError(
                    f"Every SAE needs a place in the base: `layer` (and `site`) or `hook`. Received: "
                    f"{entry.to_dict()}."
                )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        if text_config is not None:
            for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
                kwargs.setdefault(name, getattr(text_config, name, None))
            if "num_labels" not in kwargs and kwargs.get("id2label") is None:
                kwargs.update(id2label=text_config.id2label, label2id=text_config.label2id)
            kwargs.setdefault("problem_type", text_config.problem_type)
        # The parent's constructor resets the attention and experts implementation of every sub-config.
        kept = _implementations(text_config)
        super().__init__(**kwargs)
        for name, value in kept.items():
            setattr(text_config, name, value)
        if (
            text_config is not None
            and kept.get("_attn_implementation_internal")
            and "attn_implementation" not in kwargs
        ):
            self._attn_implementation_internal = kept["_attn_implementation_internal"]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config of the decoder, which a multimodal base nests once more."""
        options = {k: v for k, v in (("decoder", decoder), ("encoder", encoder)) if v is not None}
        return self if self.text_config is None else self.text_config.get_text_config(**options)

    @property
    def sae_configs(self) -> list[SparseAutoencoderConfig]:
        """One parsed, checked entry for each SAE."""
        entries = [SparseAutoencoderConfig.from_dict(entry) for entry in self.saes]
        for entry, stored in zip(entries, getattr(self, "sae_annotations", ()), strict=False):  # of a model's config
            entry.describe(stored)
        return entries

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("sae_annotations", None)  # of the model, which keeps them in files of their own
        if isinstance(output.get("text_config"), dict):
            # The base is saved as plain tensors here, or not at all: its quantisation is the loader's choice.
            output["text_config"].pop("quantization_config", None)
        return output


def _implementations(config: PreTrainedConfig | None) -> dict[str, Any]:
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}


def _check_fingerprint(values: Mapping[str, Any]) -> None:
    for name, found in values.items():
        numbers = found if isinstance(found, (list, tuple)) else ()
        if len(numbers) != VALUES or not all(type(number) in (int, float) for number in numbers):
            raise ValueError(
                f"`base_fingerprint` must give {VALUES} numbers for each name. Received: {name!r}: {found!r}."
            )


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a number in a config, or in one inside it, of which there is no model."""
    waiting = [(where, values)]
    while waiting:
        where, values = waiting.pop()
        for name, value in values.items():
            place = f"{where}{name}"
            if isinstance(value, Mapping):
                waiting.append((f"{place}.", value))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                most = MOST.get(name, MOST_BLOCKS) if LENGTHS.fullmatch(str(name)) else None
                if name in POSITIVE and not value >= 1:
                    raise ValueError(f"`{place}` must be at least 1. Received: {name}={value!r}.")
                if most is not None and not value <= most:
                    raise ValueError(f"`{place}` must be at most {most:,}. Received: {name}={value!r}.")


def _config_from_dict(values: Mapping[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    check_dtype(values)
    check_sizes(values, "text_config.")
    model_type = values.pop("model_type", None)
    check_kind("text_config.model_type", model_type, (str, type(None)), "the name of a family, as 'llama'")
    if not model_type:
        raise ValueError(
            "`text_config` must name its `model_type`, as every Hugging Face config does. Received: none."
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # whatever a family's own checks raise; many have none
        raise ValueError(f"`text_config` does not describe a {model_type} model: {error!r}") from error
