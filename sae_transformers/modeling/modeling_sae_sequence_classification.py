"""A text classifier with SAEs in its forward pass."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification

from .configuration_sae import SaeConfig
from .modeling_sae import SaePreTrainedModel
from .outputs import SaeSequenceClassifierOutput

LABEL_FIELDS = ("id2label", "label2id", "problem_type")


class SaeForSequenceClassification(SaePreTrainedModel):
    """Any Hugging Face sequence classifier with sparse autoencoders inside. Its head is saved beside the SAEs."""

    auto_model = AutoModelForSequenceClassification
    _keys_to_ignore_on_load_unexpected = [r"^(lm\.)?(lm_head|embed_out)\."]
    _base_options = LABEL_FIELDS

    def __init__(self, config: SaeConfig, lm: Any = None, saes: Any = None) -> None:
        if lm is None and config.text_config is not None:
            for name in LABEL_FIELDS:
                setattr(config.text_config, name, getattr(config, name))
            if config.text_config.pad_token_id is None:
                config.text_config.pad_token_id = config.pad_token_id
        super().__init__(config, lm, saes)
        self.num_labels = self.config.num_labels
        self._base_arguments = frozenset(inspect.signature(self.lm.forward).parameters)

    def _is_head(self, name: str) -> bool:
        return not name.startswith(f"{self.lm.base_model_prefix}.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        steering: Any = None,
        steering_rows: Tensor | None = None,
        steering_mask: Tensor | None = None,
        output_features: bool | None = None,
        features: Any = None,
        pre_activations: bool = False,
        output_sae_inputs: bool | None = None,
        stop_at_last_sae: bool = False,
        concept_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SaeSequenceClassifierOutput | tuple:
        """As the base's forward, with the SAE options of `SaeForCausalLM.forward`.

        SAE terms are means over texts of the mean over a text's real tokens. With `num_items_in_batch` (set by
        `Trainer`: labels in the whole accumulated batch) they and the base's loss add up over micro-batches.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        inputs = {name: value for name, value in given.items() if value is not None}
        record = self._open_record(
            inputs,
            steering=steering,
            steering_rows=steering_rows,
            steering_mask=steering_mask,
            output_features=output_features,
            features=features,
            pre_activations=pre_activations,
            output_sae_inputs=output_sae_inputs,
            stop_at_last_sae=stop_at_last_sae,
            concept_labels=concept_labels,
            with_losses=labels is not None or concept_labels is not None or self.training,
        )
        if record is not None and record.token_weights is not None:
            record.token_weights = _by_text(record.token_weights, labels)
        if labels is not None and not stop_at_last_sae:
            inputs["labels"] = labels
        if stop_at_last_sae:
            inputs["use_cache"] = False
        out = self._run(record, {**inputs, "return_dict": True}) or {}
        terms = self._sae_losses(record, num_items_in_batch if labels is not None else None)
        lm_loss = out.get("loss")
        if lm_loss is not None and labels is not None and num_items_in_batch is not None:
            lm_loss = lm_loss * (labels.ne(-100).sum() / num_items_in_batch)  # the base gives its micro-batch's mean
        return self._output(SaeSequenceClassifierOutput, out, record, terms, lm_loss, return_dict=return_dict)


def _by_text(token_weights: Tensor, labels: Tensor | None) -> Tensor:
    """(batch, seq): weights of tokens that add up to the known labels of their text, or to 1 without labels."""
    weights = token_weights / token_weights.sum(-1, keepdim=True).clamp(min=1)
    return weights if labels is None else weights * labels.ne(-100).reshape(len(labels), -1).sum(-1, keepdim=True)
