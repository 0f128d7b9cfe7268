"""A text classifier with SAEs in its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from .call_options import CALL_OPTIONS, SaeCallOptions, source_of
from .call_output import call_output
from .call_record import CallRecord
from .configuration_sae import SaeConfig
from .feature_head import FeatureHead, FeatureHeadConfig, task_loss
from .group_penalty import BoundGroup
from .grouped_model import GroupMixin, Without, known_labels
from .modeling_sae import SaePreTrainedModel
from .outputs import SaeSequenceClassifierOutput
from .sae_losses import HEAD_LOSSES, SAE_LOSSES, counted_tokens, mean_losses

LABEL_FIELDS = ("id2label", "label2id", "problem_type")


class SaeForSequenceClassification(GroupMixin, SaePreTrainedModel):
    """Any Hugging Face sequence classifier with sparse autoencoders inside. Its head is saved beside the SAEs.

    Its scores can be kept off groups of features (`group_penalties`). With `feature_head` it scores the hidden state
    that an SAE reads, later layers do not run, the SAEs are frozen, and features that a person calls unintended can be
    penalised and removed (`set_unintended`).
    """

    auto_model = AutoModelForSequenceClassification
    _keys_to_ignore_on_load_unexpected = [r"^(lm\.)?(lm_head|embed_out)\."]
    _base_options = LABEL_FIELDS
    _head_is_saved = True
    _losses = ("lm", *SAE_LOSSES, *HEAD_LOSSES)
    _penalised_tokens = ("all", "mask")

    def __init__(self, config: SaeConfig, lm: Any = None, saes: Any = None) -> None:
        if lm is None and config.text_config is not None:
            for name in LABEL_FIELDS:
                setattr(config.text_config, name, getattr(config, name))
            if config.text_config.pad_token_id is None:
                config.text_config.pad_token_id = config.pad_token_id
        super().__init__(config, lm, saes)
        self.num_labels = self.config.num_labels
        self.feature_head = self._new_feature_head()
        self._freeze_saes()

    def _init_penalties(self) -> None:
        self._init_groups()
        super()._init_penalties()

    def _freeze_saes(self) -> None:
        super()._freeze_saes()
        if self.config.feature_head is not None:  # else the penalty could be lowered by changing what the features are
            self.saes.requires_grad_(False)

    def _new_feature_head(self) -> FeatureHead | None:
        if self.config.feature_head is None:
            return None
        values: Any = self.config.feature_head
        settings, num_labels = FeatureHeadConfig.from_dict(values), self.num_labels or 1
        entries = self.config.sae_configs
        if settings.sae >= len(entries):
            raise ValueError(f"The model has {len(entries)} SAE(s). Received: feature_head sae={settings.sae!r}.")
        sae = self.saes[settings.sae]
        entry, device = entries[settings.sae], sae.device if sae.device.type != "meta" else None
        head = FeatureHead(settings, entry.d_in, entry.d_sae, num_labels).to(device=device, dtype=sae.dtype)
        if num_labels == 1 and self.config.problem_type is None:
            self.config.problem_type = "multi_label_classification"  # one yes-or-no label
        return head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureHead) and not getattr(module.unintended, "_is_hf_initialized", False):
            module.unintended.zero_()

    def set_unintended(self, features: Sequence[int] | Mapping[str | int, Sequence[int]]) -> None:
        """Name the latents that the head must not use.

        Args:
            features: indices for all labels, or label (name or index) -> indices with `per_label`.

        Raises:
            ValueError: no feature head, an index outside the SAE, an unknown label.
        """
        if self.feature_head is None:
            raise ValueError("The model has no feature head: give `feature_head=` when you make it.")
        rows = self.feature_head.unintended
        by_label: Mapping[Any, Any] = features if isinstance(features, Mapping) else {0: features}
        if isinstance(features, Mapping) != self.feature_head.config.per_label:
            raise ValueError(
                f"A mapping of labels goes with per_label=True, a list with False. "
                f"Received: {type(features).__name__}, per_label={self.feature_head.config.per_label!r}."
            )
        new = torch.zeros_like(rows)
        for label, indices in by_label.items():
            row: Any = label if isinstance(label, int) else (self.config.label2id or {}).get(label, -1)
            if not 0 <= row < len(rows):
                raise ValueError(f"Labels are {', '.join(self.config.label2id or {})}. Received: {label!r}.")
            wanted = torch.as_tensor(list(indices), dtype=torch.long)
            if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= rows.shape[1]):
                raise ValueError(
                    f"Features are integers in [0, {rows.shape[1]}); is the list of another SAE? "
                    f"Received: {int(wanted.min())} to {int(wanted.max())}."
                )
            new[row, wanted.to(new.device)] = True
        rows.copy_(new)

    def _is_head(self, name: str) -> bool:
        if self.config.feature_head is not None:  # the base's own head is not used, so it is neither trained nor kept
            return False
        return not name.startswith(f"{self.lm.base_model_prefix}.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        concept_targets: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        pooled_states: Tensor | None = None,
        **kwargs: Any,
    ) -> SaeSequenceClassifierOutput | tuple:
        """As the base's forward, with `SaeCallOptions` besides.

        With a feature head, `pooled_states` (batch, d_in) of an earlier output are scored in place of texts.

        SAE terms are means over texts of the mean over a text's real tokens. With `num_items_in_batch` (set by
        `Trainer`: labels in the whole accumulated batch) they and the base's loss add up over micro-batches.
        Penalties on features are means alike; those with over='mask' count tokens that are 1 in the keyword
        argument `penalty_mask` (batch, seq), a column that `Trainer` keeps with `remove_unused_columns=False`.
        """
        if pooled_states is not None:
            return self._score(pooled_states, labels, num_items_in_batch, return_dict=return_dict)
        options, kwargs = SaeCallOptions.take(kwargs)
        penalty_mask = kwargs.pop("penalty_mask", None)  # `take` made this dict
        head = self.feature_head
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        inputs = self.base_arguments.prepared(given, CALL_OPTIONS)
        asked = options
        if head is not None:  # its pass is ours; without it the base's own, as the base does it
            inputs = self.with_positions(inputs)
            asked = replace(options, output_sae_inputs=True, stop_at_last_sae=True)
        with_losses = labels is not None or concept_targets is not None or self.training
        penalties = self._penalties_of_call(inputs, None, penalty_mask, with_labels=labels is not None)
        record = self._open_record(asked, inputs, concept_targets, with_losses=with_losses, penalties=penalties)
        if labels is not None and not asked.stop_at_last_sae:
            inputs["labels"] = labels
        if asked.stop_at_last_sae:
            inputs["use_cache"] = False
        draws = self._draws(source_of(inputs).device)
        out = self._run(record, {**inputs, "return_dict": True})
        count, terms = num_items_in_batch if labels is not None else None, {}
        if record is not None and record.request.losses:
            weights = _by_text(counted_tokens(source_of(inputs), inputs.get("attention_mask"), None), labels)
            terms = mean_losses(record.request.losses, record.losses, weights, count)
        terms |= self._penalty_terms_by_text(record, inputs, labels, penalty_mask, count)
        if head is not None and record is not None:
            hidden, sae = record.inputs[head.config.sae], self.saes[head.config.sae]
            mask = self._real_tokens(input_ids, attention_mask)
            if labels is not None and self.config.loss_weights["unintended_state"]:
                terms["unintended_state"] = head.activity(hidden, mask, sae) * _share(labels, hidden, count)
            pooled = head.read(hidden, mask, sae)

            def pooled_without(one: BoundGroup) -> Tensor:
                return self._pooled_without(one, hidden, options, inputs, draws)

            return self._score(
                pooled, labels, count, terms, record, options, without=pooled_without, return_dict=return_dict
            )
        lm_loss = None if out is None else out.get("loss")
        if lm_loss is not None and labels is not None and count is not None:
            lm_loss = lm_loss * (labels.ne(-100).sum() / count)  # the base gives its micro-batch's mean
        if out is not None:
            terms |= self._group_terms(
                out["logits"],
                labels,
                count,
                lambda one: self._passed_without(one, options, inputs, draws)[0]["logits"],
            )
        return call_output(
            self,
            SaeSequenceClassifierOutput,
            out,
            record,
            options,
            terms=terms,
            lm_loss=lm_loss,
            return_dict=return_dict,
        )

    def _real_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """(batch, seq) mask of tokens that are no padding, None where all are taken to be."""
        pad = self.config.get_text_config().pad_token_id
        if attention_mask is not None or input_ids is None or pad is None:
            return attention_mask
        return input_ids != pad

    def _check_head_trains(self) -> None:
        """PEFT's SEQ_CLS trains modules of the name `score`, and freezes all others."""
        head: Any = self.feature_head
        if any(p.requires_grad for p in head.parameters()):
            return
        other = [n for n, p in self.lm.named_parameters() if p.requires_grad and "score" in n]
        if other:
            raise ValueError(
                f"A model with a feature head does not use the head of its base, which is what would be trained, and "
                f"the feature head is frozen. Expected LoraConfig(..., task_type='SEQ_CLS', "
                f"modules_to_save=['feature_head']). Received: trainable lm.{other[0]}."
            )

    def _score(
        self,
        pooled: Tensor,
        labels: Tensor | None,
        count: Any,
        terms: dict[str, Tensor] | None = None,
        record: CallRecord | None = None,
        options: SaeCallOptions | None = None,
        *,
        without: Without | None = None,
        return_dict: bool | None = None,
    ) -> SaeSequenceClassifierOutput | tuple:
        """Logits, and with labels the loss, of pooled states (batch, d_in).

        Args:
            without: these states without a group of features.
        """
        if self.feature_head is None:
            raise ValueError("`pooled_states` are for a model with a feature head; this one has none.")
        settings, terms, task = self.feature_head.config, dict(terms or {}), None
        sae = self.saes[settings.sae]
        draws = self._draws(pooled.device)
        logits = self.feature_head(pooled)

        scored_without = None if without is None else lambda one: self._scored_again(without(one), draws)
        terms |= self._group_terms(logits, labels, count, scored_without)
        if labels is not None:
            if self.training:
                self._check_head_trains()
            task = task_loss(logits, labels, self.config.problem_type, pairwise=settings.pairwise)
            share = _share(labels, logits, count)
            task = task if count is None else task * share
            if self.config.loss_weights["unintended"]:
                terms["unintended"] = self.feature_head.penalty(sae) * share
        out = {"logits": logits, "pooled_states": pooled}
        options = options or SaeCallOptions()
        return call_output(
            self, SaeSequenceClassifierOutput, out, record, options, terms=terms, lm_loss=task, return_dict=return_dict
        )


def _share(labels: Tensor, logits: Tensor, count: Any) -> Any:
    """The part that a batch's labels are of those of the whole accumulated batch."""
    return 1.0 if count is None else known_labels(labels, logits).sum() / count


def _by_text(token_weights: Tensor, labels: Tensor | None) -> Tensor:
    """(batch, seq): weights of tokens that add up to the known labels of their text, or to 1 without labels."""
    weights = token_weights / token_weights.sum(-1, keepdim=True).clamp(min=1)
    return weights if labels is None else weights * labels.ne(-100).reshape(len(labels), -1).sum(-1, keepdim=True)
