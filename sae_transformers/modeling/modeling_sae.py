"""What all heads share: the base model inside, the SAEs at their hook points, and one forward pass's record."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .call_record import CallRecord, RecordSlot, StopForward
from .configuration_sae import LossWeights, SaeConfig
from .hook_points import find_hook_point
from .outputs import Detection, SaeModelOutput
from .repository import RepositoryMixin
from .sparse_autoencoder import SparseAutoencoder
from .steering_plan import BoundSteering
from .steering_state import SteeringMixin

if TYPE_CHECKING:  # these two lines make every head travel with every other when code is published
    from .modeling_sae_causal_lm import SaeForCausalLM as SaeForCausalLM
    from .modeling_sae_sequence_classification import SaeForSequenceClassification as SaeForSequenceClassification


class SaeBank(nn.Module):
    """The SAEs of a model under numbered names. Hooks call it by number, so that whatever replaces a child (PEFT's
    `modules_to_save`) is what runs. Not a ModuleList: PEFT refuses those."""

    def __init__(self, saes: Sequence[SparseAutoencoder]) -> None:
        super().__init__()
        for number, sae in enumerate(saes):
            self.add_module(str(number), sae)

    def forward(self, index: int, hidden: Tensor, task: Any, **options: Any) -> Any:
        return getattr(self, str(index))(hidden, task, **options)

    def __getitem__(self, number: int) -> SparseAutoencoder:
        return getattr(self, str(range(len(self))[number]))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self):
        return iter(self._modules.values())


class BodyContainer(nn.Module):
    """A base without a head, under the name it has inside its own heads: all heads share their weights' names."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body_name = body.base_model_prefix
        self.base_model_prefix = body.base_model_prefix
        self.add_module(self.body_name, body)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.body_name)(*args, **kwargs)


class SaePreTrainedModel(RepositoryMixin, SteeringMixin, PreTrainedModel):
    """A base model with SAEs in its forward pass.

    `lm` is the base, untouched; `saes` the SAEs, by number. Without steering, features to report or losses to compute the
    SAEs do not run, and the outputs are the base's own, bit for bit.
    """

    config_class = SaeConfig
    config: SaeConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["saes"]
    _no_split_modules = ["SparseAutoencoder"]
    _auto_class: str | None = None
    auto_model: Any = AutoModel

    def __init__(
        self,
        config: SaeConfig,
        lm: nn.Module | None = None,
        saes: Sequence[SparseAutoencoder] | None = None,
    ) -> None:
        if config.text_config is None:
            raise ValueError("`config.text_config` must be the base model's config. Received: None.")
        super().__init__(config)
        self.lm = self._build_base(config) if lm is None else lm
        self.saes = SaeBank([SparseAutoencoder(c) for c in config.sae_configs] if saes is None else saes)
        self._slot = RecordSlot()
        self._init_steering()
        self._install_hooks()
        self.post_init()
        if self._default:
            self.prepare_steering(self._default)

    @classmethod
    def _build_base(cls, config: SaeConfig) -> nn.Module:
        attention = config._attn_implementation
        options = {"attn_implementation": attention} if attention is not None else {}
        return cls._wrap_base(
            cls.auto_model.from_config(config.text_config, dtype=torch.get_default_dtype(), **options)
        )

    @classmethod
    def _wrap_base(cls, base: PreTrainedModel) -> nn.Module:
        """How this head holds a base: as it is, unless it has no head of its own."""
        return base

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SparseAutoencoder):
            return super()._init_weights(module)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        loaded = {name: t.clone() for name, t in tensors if getattr(t, "_is_hf_initialized", False)}
        if len(loaded) < len(tensors):
            module.reset_parameters()
            for name, value in loaded.items():
                getattr(module, name).copy_(value)
        return None

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        self._handles = []
        width = getattr(self.config.text_config, "hidden_size", None)
        for number, entry in enumerate(self.config.sae_configs):
            read = find_hook_point(self.lm, self.config.text_config, entry.read_at)
            write = find_hook_point(self.lm, self.config.text_config, entry.write_at)
            if entry.hook is None and width is not None and entry.d_in != width:
                raise ValueError(
                    f"SAE {number} reads {entry.d_in} values at {entry.read_at}, where this base has a hidden size of {width}. "
                    f"It was made for another base."
                )
            if entry.hook_out is not None:
                self._hook(read, functools.partial(self._note, number))
            self._hook(write, functools.partial(self._visit, number))

    def _hook(self, point: Any, action: Any) -> None:
        if point.side == "input":
            handle = point.module.register_forward_pre_hook(functools.partial(_on_input, action), with_kwargs=True)
        else:
            handle = point.module.register_forward_hook(functools.partial(_on_output, action))
        self._handles.append(handle)

    def unwrap(self) -> nn.Module:
        """Remove every hook and give the base model back, as it was before. This model must not be used afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.lm

    def _note(self, number: int, hidden: Tensor) -> Tensor:
        record = self._slot.get()
        if record is not None and record.concerns(number):
            record.read[number] = record.shaped(hidden)
        return hidden

    def _visit(self, number: int, hidden: Tensor) -> Tensor:
        record = self._slot.get()
        if record is None or not record.concerns(number):
            return hidden
        here = record.shaped(hidden)
        seen = record.read.get(number, here)
        expected = self.config.saes[number]["d_in"]
        if seen.shape[-1] != expected:
            raise ValueError(
                f"SAE {number} reads {expected} values and the module it is hooked to gives {seen.shape[-1]}. "
                f"Place it elsewhere with `layer`, `site` or `hook`."
            )
        if record.inputs:
            record.found_inputs[number] = seen
        edited = hidden
        if record.works_at(number):
            target = here if number in record.read else None
            result = self.saes(number, seen, record, number=number, target=target)
            if result.features is not None:
                record.found_features[number] = result.features
            if result.losses is not None:
                record.found_losses[number] = result.losses
            edited = record.edit(here, result).view_as(hidden)
        record.finished.add(number)
        if record.stop_after and not record.recomputing and record.stop_after <= record.finished:
            raise StopForward
        return edited

    # -- one forward pass --------------------------------------------------------------------------------------------

    def _open_record(
        self,
        inputs: Mapping[str, Any],
        *,
        steering: Any = None,
        steering_rows: Tensor | None = None,
        steering_mask: Tensor | None = None,
        output_features: bool | None = None,
        features: Any = None,
        pre_activations: bool = False,
        output_sae_inputs: bool | None = None,
        stop_at_last_sae: bool = False,
        concept_labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        with_losses: bool = False,
    ) -> CallRecord | None:
        """The record of a pass over `inputs`, or None when there is nothing for the SAEs to do."""
        generation = self._scope.generation
        if steering is None and generation is not None:
            steering = generation.bound if generation.bound is not None else False
        plan = self._steering_of_call(steering)
        weights = LossWeights(**self.config.loss_weights)
        losses = tuple(
            name
            for name in ("reconstruction", "sparsity", "conditioning")
            if with_losses and getattr(weights, name) and (name != "conditioning" or concept_labels is not None)
        )
        wanted = output_features or features is not None or output_sae_inputs or stop_at_last_sae
        if plan is None and not losses and not wanted:
            return None
        source = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
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
            record.token_weights = token_weights
            if concept_labels is not None:
                record.concept_labels = self._split_labels(concept_labels, record)
        if plan is not None:
            self._place_steering(record, plan, inputs, source, steering_rows, steering_mask)
        return record

    def _place_steering(
        self,
        record: CallRecord,
        steering: Any,
        inputs: Mapping[str, Any],
        source: Tensor,
        steering_rows: Tensor | None,
        steering_mask: Tensor | None,
    ) -> None:
        bound: BoundSteering | None = steering if getattr(steering, "is_bound", False) else None
        plan = steering if bound is None else bound.plan
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if bound is not None and steering_rows is not None and isinstance(past, int) and bound.is_over(past):
            return
        record.plan = plan
        generation = self._scope.generation
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

    def _feature_columns(self, features: Any, device: torch.device) -> dict[int, Tensor]:
        if not isinstance(features, Mapping):
            features = {0: features}
        configs = self.config.sae_configs
        columns = {}
        for number, wanted in features.items():
            if not isinstance(number, int) or not 0 <= number < len(configs):
                raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={number!r}.")
            wanted = [wanted] if isinstance(wanted, (int, str)) else list(wanted)
            columns[number] = torch.tensor([configs[number].resolve_feature(f) for f in wanted], device=device)
        return columns

    def _split_labels(self, labels: Tensor, record: CallRecord) -> dict[int, Tensor]:
        """`concept_labels` by SAE, (batch, length, n_concepts); labels per text hold for all its tokens."""
        counts = [len(c.concepts) for c in self.config.sae_configs]
        if labels.ndim == 1:
            labels = labels[:, None]
        if labels.ndim == 2:
            labels = labels[:, None, :].expand(-1, record.length, -1)
        expected = (record.batch_size, record.length, sum(counts))
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"`concept_labels` must be (batch, {expected[2]}) per text or {expected} per token, one column for each "
                f"concept of each SAE in order. Received: shape {tuple(labels.shape)}."
            )
        return {n: part for n, part in enumerate(labels.split(counts, dim=-1)) if counts[n]}

    def _run(self, record: CallRecord | None, inputs: Mapping[str, Any]) -> Any:
        """Run the base with a record in place; None if a hook stopped it."""
        previous = self._slot.swap(record)
        try:
            return self.lm(**inputs)
        except StopForward:
            return None
        finally:
            self._slot.swap(previous)

    def _collected(self, record: CallRecord | None) -> dict[str, Any]:
        """The output fields that a record fills."""
        if record is None:
            return {}
        numbers = range(len(self.config.saes))
        fields: dict[str, Any] = {}
        if record.features:
            fields["sae_features"] = tuple(record.found_features.get(n) for n in numbers)
        if record.inputs:
            fields["sae_inputs"] = tuple(record.found_inputs.get(n) for n in numbers)
        return fields

    def _sae_losses(self, record: CallRecord | None, count: Any = None) -> dict[str, Tensor]:
        """Each loss term as the mean over counted tokens and over SAEs.

        Args:
            count: number of counted tokens in the whole accumulated batch, so that micro-batches add up to its mean.
        """
        if record is None or not record.losses:
            return {}
        weights = record.token_weights
        total = weights.sum().clamp(min=1) if count is None else count
        terms = {}
        for name in record.losses:
            per_sae = [found[name] for found in record.found_losses.values()]
            terms[name] = sum((loss * weights.to(loss)).sum() for loss in per_sae) / (total * len(per_sae))
        return terms

    def _weighted(self, lm_loss: Tensor | None, terms: Mapping[str, Tensor]) -> Tensor | None:
        weights = LossWeights(**self.config.loss_weights)
        loss = None if lm_loss is None else (lm_loss if weights.lm == 1 else weights.lm * lm_loss)
        for name, value in terms.items():
            value = getattr(weights, name) * value
            loss = value if loss is None else loss + value.to(loss.device)
        return loss

    # -- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(
        self,
        inputs: Any,
        *,
        feature: int | str,
        sae: int = 0,
        pooling: str = "mean",
        pre_activations: bool = True,
        skip_first: int = 0,
    ) -> Detection:
        """How strongly a feature answers to texts. Layers after its SAE do not run, nor do other encoder columns.

        Args:
            inputs: what a tokenizer returns, or input ids (batch, seq).
            feature: index of the latent, or name of a concept.
            sae: number of the SAE.
            pooling: of a text's tokens: `mean`, `max` or `last`.
            pre_activations: score by the pre-activation, as concept latents are trained (SCAR), or by the activation.
            skip_first: leading real tokens left out of the pooling (the first token of a text is an outlier).
        """
        if pooling not in ("mean", "max", "last"):
            raise ValueError(f"`pooling` must be 'mean', 'max' or 'last'. Received: pooling={pooling!r}.")
        inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        inputs = {
            k: v.to(self.device) for k, v in inputs.items() if k in ("input_ids", "inputs_embeds", "attention_mask")
        }
        output = self(**inputs, features={sae: [feature]}, pre_activations=pre_activations, stop_at_last_sae=True)
        scores = output.sae_features[sae][..., 0]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.to(scores.device).bool()
        mask = mask & (mask.cumsum(-1) > skip_first)
        if not bool(mask.any(-1).all()):
            raise ValueError(f"Every text needs a token after the first {skip_first}. Received: one without.")
        if pooling == "mean":
            pooled = (scores * mask).sum(-1) / mask.sum(-1)
        elif pooling == "max":
            pooled = scores.masked_fill(~mask, -torch.inf).amax(-1)
        else:
            last = scores.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
            pooled = scores.gather(-1, last[:, None])[:, 0]
        return Detection(scores.masked_fill(~mask, 0.0), pooled)

    # -- what transformers asks for ----------------------------------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs
    ):
        if enable:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    "Reentrant checkpointing gives an SAE inside a block no gradient. Expected "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}. Received: use_reentrant=True."
                )
            gradient_checkpointing_func = functools.partial(
                gradient_checkpointing_func, context_fn=self._slot.recompute_contexts
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class SaeModel(SaePreTrainedModel):
    """A base without a head, with SAEs: what `AutoModel` loads."""

    @classmethod
    def _wrap_base(cls, base: PreTrainedModel) -> nn.Module:
        return BodyContainer(base)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        steering: Any = None,
        steering_rows: Tensor | None = None,
        steering_mask: Tensor | None = None,
        output_features: bool | None = None,
        features: Any = None,
        pre_activations: bool = False,
        output_sae_inputs: bool | None = None,
        stop_at_last_sae: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SaeModelOutput | tuple:
        """As the base, with the SAE options of `SaeForCausalLM.forward`."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "use_cache": False if stop_at_last_sae else use_cache,
        }
        inputs = {k: v for k, v in {**given, **kwargs}.items() if v is not None}
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
        )
        out = self._run(record, {**inputs, "return_dict": True}) or {}
        names = ("last_hidden_state", "past_key_values", "hidden_states", "attentions")
        output = SaeModelOutput(**{n: out.get(n) for n in names}, **self._collected(record))
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def steering_rows_for(
    source: Tensor,
    attention_mask: Any,
    past: Any,
    prompt_length: int | None,
    rows: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """(batch, 3) int64: row of the steering's tables, first real column, end of the prompt.

    Without a prompt length the tokens at hand are the prompt if nothing came before them, and generated if something did.

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


def _wants_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    return config.return_dict is not False if return_dict is None else return_dict


def _on_input(action: Any, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    if args:
        edited = action(args[0])
        return None if edited is args[0] else ((edited, *args[1:]), kwargs)
    edited = action(kwargs["hidden_states"])
    return None if edited is kwargs["hidden_states"] else (args, {**kwargs, "hidden_states": edited})


def _on_output(action: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        edited = action(output[0])
        return None if edited is output[0] else type(output)((edited, *output[1:]))
    edited = action(output)
    return None if edited is output else edited
