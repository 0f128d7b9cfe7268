"""From the arguments of a call to the record that hooks follow, and from the record to the fields of the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base_arguments import cached_tokens, positions_of
from .call_record import CallRecord
from .configuration_sparse_autoencoder import LossWeights
from .outputs import output_class
from .steering_plan import BoundSteering


class ForwardPassMixin:
    """What every head does before and after it runs the base."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _open_record(
        self,
        inputs: Mapping[str, Any],
        *,
        steering: Any = None,
        steering_rows: Tensor | None = None,
        steering_mask: Tensor | None = None,
        steering_past: int | None = None,
        output_features: bool | None = None,
        features: Any = None,
        pre_activations: bool = False,
        output_sae_inputs: bool | None = None,
        stop_at_last_sae: bool = False,
        concept_targets: Tensor | None = None,
        token_labels: Tensor | None = None,
        with_losses: bool = False,
    ) -> CallRecord | None:
        """The record of a pass over `inputs`, or None when there is nothing for the SAEs to do."""
        generation = self._scope.generation
        if steering is None and generation is not None:
            steering = generation.bound if generation.bound is not None else False
        plan = self._steering_of_call(steering)
        losses = self._loss_names(concept_targets is not None) if with_losses else ()
        wanted = output_features or features is not None or output_sae_inputs or stop_at_last_sae
        if plan is None and not losses and not wanted:
            return None
        source: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        record = CallRecord(source.shape[0], source.shape[1])
        record.inputs = bool(output_sae_inputs)
        record.pre_activations = pre_activations
        numbers = range(len(self.config.saes))
        if features is not None:
            record.features = self._feature_columns(features, source.device)
        elif output_features:
            record.features = dict.fromkeys(numbers)
        if stop_at_last_sae:
            needed = (
                set(record.features) if features is not None and not record.inputs and not losses else set(numbers)
            )
            record.stop_after = frozenset(needed or numbers)
        if losses:
            record.losses, record.detach = losses, self.config.detach_hidden
            record.token_weights = counted_tokens(source, inputs.get("attention_mask"), token_labels)
            if concept_targets is not None:
                record.concept_targets = self._split_labels(concept_targets, record)
        if plan is not None:
            self._place_steering(record, plan, inputs, source, steering_rows, steering_mask, steering_past)
        return record

    def with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a forward pass of our own gives the base: with padding, its mask and positions that begin at a text's
        first real token, as `generate` gives them."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        config = self.config.get_text_config()
        pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        told = pad is not None and pad not in (ends if isinstance(ends, (list, tuple)) else [ends])
        if mask is None and ids is not None and told and bool((ids == pad).any()):
            mask = (ids != pad).long()
            mask = None if not bool(mask.any(-1).all()) else mask
        if mask is None:
            return inputs
        inputs = {**inputs, "attention_mask": mask}
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())
        base = self.base_arguments
        wanted = "position_ids" in base.named and not base.counts_positions
        if padded and wanted and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions_of(mask)
        return inputs

    def _loss_names(self, has_concept_targets: bool) -> tuple[str, ...]:
        weights = LossWeights(**self.config.loss_weights)
        names = ("reconstruction", "sparsity") + (("conditioning",) if has_concept_targets else ())
        return tuple(name for name in names if getattr(weights, name))

    def _place_steering(
        self,
        record: CallRecord,
        steering: Any,
        inputs: Mapping[str, Any],
        source: Tensor,
        steering_rows: Tensor | None,
        steering_mask: Tensor | None,
        past: Any,
    ) -> None:
        bound: BoundSteering | None = steering if getattr(steering, "is_bound", False) else None
        plan = steering if bound is None else bound.plan
        if past is None:
            past = self._past_of(inputs, source)
        if bound is not None and steering_rows is not None and isinstance(past, int) and bound.is_over(past):
            return
        generation = self._scope.generation
        if bound is not None and steering_rows is None and generation is not None and generation.masked:
            return
        record.plan = plan
        if plan.count == 1 and plan.intervals is None and steering_mask is None:
            return  # every token of every row alike
        if past is None:
            raise ValueError(
                "Steering at positions needs to know how many tokens the cache holds, and this base's recurrent "
                "state does not say. Expected an `attention_mask` over all tokens, earlier ones included. Received: "
                "none."
            )
        if steering_rows is None:
            table, prompt_length = None, None
            if generation is not None and bound is not None:  # the unconditional branch of guidance
                if generation.own_prompt_length is None:
                    generation.own_prompt_length = source.shape[1]
                prompt_length = generation.own_prompt_length
                if generation.rows is not None:
                    table = generation.rows[:, 0]
                    table = table.repeat_interleave(source.shape[0] // table.shape[0])
            steering_rows = steering_rows_for(
                source, inputs.get("attention_mask"), past, prompt_length, rows=table, count=plan.count
            )
        if plan.count > 1:
            record.rows = steering_rows[:, 0]
        if plan.intervals is not None or steering_mask is not None:
            columns = past + torch.arange(source.shape[1], device=source.device)
            record.mask = plan.position_mask(columns, steering_rows)
            if steering_mask is not None:
                allowed = _mask_at(steering_mask.to(source.device), columns)
                record.mask = allowed if record.mask is None else record.mask & allowed

    def _past_of(self, inputs: Mapping[str, Any], source: Tensor) -> Any:
        """How many tokens came before those of `source`: an int, or a tensor ()."""
        cache = next((inputs[name] for name in (self.base_arguments.cache, "state", "mems") if name in inputs), None)
        past = cached_tokens(cache)
        mask = inputs.get("attention_mask")
        if past is None and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= source.shape[1]:
            past = mask.shape[1] - source.shape[1]
        return past

    def _feature_columns(self, features: Any, device: torch.device) -> dict[int, Tensor | None]:
        if not isinstance(features, Mapping):
            features = {0: features}
        # dynamo cannot trace the reading of a config.
        configs = self._entries if torch.compiler.is_compiling() else self.config.sae_configs
        columns: dict[int, Tensor | None] = {}
        for number, wanted in features.items():
            if not isinstance(number, int) or not 0 <= number < len(configs):
                raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={number!r}.")
            if wanted is None:
                columns[number] = None
                continue
            wanted = [wanted] if isinstance(wanted, (int, str)) else list(wanted)
            columns[number] = torch.tensor([configs[number].resolve_feature(f) for f in wanted], device=device)
        return columns

    def _split_labels(self, labels: Tensor, record: CallRecord) -> dict[int, Tensor]:
        """`concept_targets` by SAE, (batch, length, n_concepts); labels per text hold for all its tokens."""
        counts = [len(c.concepts) for c in self.config.sae_configs]
        if labels.ndim == 1:
            labels = labels[:, None]
        if labels.ndim == 2:
            labels = labels[:, None, :].expand(-1, record.length, -1)
        expected = (record.batch_size, record.length, sum(counts))
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"`concept_targets` must be (batch, {expected[2]}) per text or {expected} per token, one column for "
                f"each "
                f"concept of each SAE in order. Received: shape {tuple(labels.shape)}."
            )
        return {n: part for n, part in enumerate(labels.split(counts, dim=-1)) if counts[n]}

    def _collected(self, record: CallRecord | None) -> dict[str, Any]:
        """The output fields that a record fills."""
        if record is None:
            return {}
        numbers = range(len(self.config.saes))
        found: dict[str, Any] = {}
        if record.features:
            found["sae_features"] = tuple(record.found_features.get(n) for n in numbers)
        if record.inputs:
            found["sae_inputs"] = tuple(record.found_inputs.get(n) for n in numbers)
        return found

    def _output(
        self,
        kind: Any,
        out: Any,
        record: CallRecord | None,
        terms: Mapping[str, Tensor] | None = None,
        lm_loss: Tensor | None = None,
        *,
        return_dict: bool | None = None,
    ) -> Any:
        """A head's output: all that the base returned, the record's fields, and the losses.

        Args:
            kind: the class where the base returned nothing, for the pass was stopped.
            out: the base's output, fields by name, or None.
            lm_loss: the base's loss, if it is another than its output says.
        """
        values = {} if out is None else dict(out.items())
        kind = output_class(type(out), kind)
        lm_loss = values.pop("loss", None) if lm_loss is None else lm_loss
        loss = self._weighted(lm_loss, terms or {})
        if loss is not None:
            values["loss"] = loss
        output = kind(**values, **self._collected(record), sae_losses=terms or None, lm_loss=lm_loss)
        wants_dict = self.config.return_dict is not False if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _sae_losses(self, record: CallRecord | None, count: Any = None) -> dict[str, Tensor]:
        """Each loss term as the mean over counted tokens and over the SAEs that have it (those without concepts have
        no conditioning).

        Args:
            count: number of counted tokens in the whole accumulated batch, so that micro-batches add up to its mean.
        """
        if record is None or not record.losses:
            return {}
        weights = record.token_weights if record.token_weights is not None else torch.ones(())
        total = weights.sum().clamp(min=1) if count is None else count
        terms = {}
        for name in record.losses:
            per_sae = [found[name] for found in record.found_losses.values() if name in found]
            if per_sae:
                terms[name] = sum((loss * weights.to(loss)).sum() for loss in per_sae) / (total * len(per_sae))
        return terms

    def _weighted(self, lm_loss: Tensor | None, terms: Mapping[str, Tensor]) -> Tensor | None:
        weights = LossWeights(**self.config.loss_weights)
        loss = None if lm_loss is None else (lm_loss if weights.lm == 1 else weights.lm * lm_loss)
        for name, value in terms.items():
            value = getattr(weights, name) * value
            loss = value if loss is None else loss + value.to(loss.device)
        return loss


def steering_rows_for(
    source: Tensor,
    attention_mask: Any,
    past: Any,
    prompt_length: int | None,
    rows: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """(batch, 3) int64: row of the steering's tables, first real column, end of the prompt.

    Without a prompt length the tokens at hand are the prompt if nothing came before them, and generated if something
    did.

    Args:
        source: input ids (batch, seq) or embeddings (batch, seq, d).
        attention_mask: (batch, past + seq), or anything else, which is then not looked at.
        past: number of cached columns.
        rows: (batch,), row of the tables; one for each batch row by default.
        count: number of rows in the tables.
    """
    batch, length = source.shape[:2]
    if rows is None:
        if count > 1 and count != batch:
            raise ValueError(f"One steering for each row is needed: {batch} rows. Received: {count} steerings.")
        rows = (
            torch.arange(batch, device=source.device)
            if count > 1
            else torch.zeros_like(source[:, 0], dtype=torch.long)
        )
        rows = rows.reshape(batch, -1)[:, 0]
    first = torch.zeros_like(rows)
    end = torch.full_like(rows, prompt_length) if prompt_length is not None else first + past
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        mask = attention_mask.to(source.device).long()
        first = mask.argmax(-1)
        if prompt_length is None and isinstance(past, int) and past == 0:
            end = mask.shape[1] - mask.flip(-1).argmax(-1)
    elif prompt_length is None and isinstance(past, int) and past == 0:
        end = torch.full_like(rows, length)
    return torch.stack([rows.to(source.device), first, end], dim=-1)


def _mask_at(mask: Tensor, columns: Tensor) -> Tensor:
    """(batch, seq) bool of a (batch, length) mask at absolute columns; False beyond its length."""
    inside = columns < mask.shape[1]
    return mask.bool()[:, columns.clamp(max=mask.shape[1] - 1)] & inside


def counted_tokens(source: Tensor, attention_mask: Any, labels: Tensor | None) -> Tensor:
    """(batch, seq) float: the tokens over which SAE losses are averaged."""
    if labels is not None:
        counted = torch.zeros(labels.shape, device=labels.device)
        counted[:, :-1] = (labels[:, 1:] != -100).float()
        return counted
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -source.shape[1] :].float()
    return torch.ones(source.shape[:2], device=source.device)
