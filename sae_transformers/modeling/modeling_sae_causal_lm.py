"""A causal language model with SAEs in its forward pass, steered in `generate`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin

from .forward_pass import steering_rows_for
from .modeling_sae import SaePreTrainedModel
from .outputs import SaeCausalLMOutput
from .steering_plan import BoundSteering
from .steering_state import GenerationState

STEERING_INPUTS = ("steering", "steering_rows", "steering_mask")
# What `generate` asks of a model's class is the base's to answer.
BASE_TRAITS = ("_can_compile_fullgraph", "_is_stateful", "_supports_cache_class", "_supports_static_cache")


class SaeForCausalLM(SaePreTrainedModel, GenerationMixin):
    """Any Hugging Face causal language model with sparse autoencoders inside.

    model = SaeForCausalLM.from_base("org/base", saes=[sae])
    model.generate(**inputs, steering=Steering([FeatureEdit(feature=7, op="add", value=4.0)]))
    """

    auto_model = AutoModelForCausalLM
    _keys_to_ignore_on_load_unexpected = [r"^(lm\.)?score\."]

    def __init__(self, config: Any, lm: Any = None, saes: Any = None) -> None:
        super().__init__(config, lm, saes)
        for trait in BASE_TRAITS:
            if hasattr(self.lm, trait):
                setattr(self, trait, getattr(self.lm, trait))
        self._base_arguments = frozenset(inspect.signature(self.lm.forward).parameters)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        steering: Any = None,
        steering_rows: Tensor | None = None,
        steering_mask: Tensor | None = None,
        output_features: bool | None = None,
        features: Any = None,
        pre_activations: bool = False,
        output_sae_inputs: bool | None = None,
        stop_at_last_sae: bool = False,
        concept_targets: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SaeCausalLMOutput | tuple:
        """As the base's forward; what is added:

        Args:
            steering: a `Steering`, a list with one (or None) for each row, or a plan of `prepare_steering`. False:
                none, whatever the default.
            steering_rows: (batch, 3), set by `generate`; see `steering_rows_for`.
            steering_mask: (batch, length) bool, absolute columns that may be steered; those beyond its length are not.
            output_features: report the active latents of every SAE, as `SparseFeatures`.
            features: report only these latents: indices or concept names of SAE 0, or a dict by SAE number.
            pre_activations: report pre-activations.
            output_sae_inputs: report the hidden states that the SAEs read.
            stop_at_last_sae: end the pass after the last SAE that is needed; `logits` is None.
            labels: (batch, seq) as for the base. The loss is the weighted sum of `config.loss_weights`.
            concept_targets: (batch, n_concepts) per text or (batch, seq, n_concepts) per token, 0 to 1, -100 where
                unknown; an unknown label adds nothing. All SAE terms are means over the tokens that carry an LM label
                (all real tokens without `labels`), so accumulated micro-batches add up to the large batch's loss.
            num_items_in_batch: set by `Trainer`: LM labels in the whole accumulated batch.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": False if stop_at_last_sae else use_cache,
            **kwargs,
        }
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
            concept_targets=concept_targets,
            token_labels=labels,
            with_losses=labels is not None or concept_targets is not None or self.training,
        )
        if labels is not None and not stop_at_last_sae:
            inputs["labels"] = labels
            if num_items_in_batch is not None and "kwargs" in self._base_arguments:
                inputs["num_items_in_batch"] = num_items_in_batch
        if "logits_to_keep" in self._base_arguments:
            inputs["logits_to_keep"] = logits_to_keep
        inputs["return_dict"] = True
        out = self._run(record, inputs) or {}
        terms = self._sae_losses(record, num_items_in_batch if labels is not None else None)
        lm_loss = out.get("loss")
        return self._output(SaeCausalLMOutput, out, record, terms, lm_loss, return_dict=return_dict)

    def get_output_embeddings(self) -> Any:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm.set_output_embeddings(new_embeddings)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`.

        Keyword Args:
            steering (Steering | list | bool): a `Steering`, or a list with one (or None) for each prompt; it repeats
                itself over beams and return sequences. Without it: the generation config's `sae_steering` (JSON), an
                enclosing `model.steered(...)`, the model's default. False: none. A cache that was made under other
                steering holds that steering.
            steering_mask (Tensor): (batch, prompt length) bool, prompt tokens that may be steered.
        """
        steering = kwargs.pop("steering", None)
        if steering is None:
            for source in (generation_config, self.generation_config):
                steering = getattr(source, "sae_steering", None) if steering is None else steering
        if isinstance(steering, (str, dict)):
            steering = _steering_from(steering)
        plan = self._steering_of_call(steering)
        bound = rows = None
        if plan is not None:
            bound, rows = self._bind(plan, inputs, kwargs)
            kwargs.update(steering=bound, steering_rows=rows)
        with self._scope.generating(GenerationState(bound, rows, kwargs.get("steering_mask") is not None)):
            return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore

    def _bind(self, plan: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[BoundSteering, Tensor]:
        """The plan with the prompt's length, and each row's place in it."""
        source = kwargs.get("inputs_embeds")
        if source is None:
            source = inputs if inputs is not None else kwargs.get("input_ids")
        if source is None:
            source = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # generate starts from the BOS token
        mask = kwargs.get("attention_mask")
        length = source.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            length = max(length, mask.shape[1])
        pad = getattr(self.generation_config, "pad_token_id", None)
        if mask is None and source.ndim == 2 and pad is not None and bool((source == pad).any()):
            mask = self._inferred_mask(source, pad)
        return BoundSteering(plan, length), steering_rows_for(source, mask, 0, length, count=plan.count)

    def _inferred_mask(self, ids: Tensor, pad: int) -> Tensor | None:
        """The attention mask that `generate` will infer, None where it will not."""
        ends = self.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        return None if pad in ends else (ids != pad).long()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore
        prepared = self.lm.prepare_inputs_for_generation(input_ids, **kwargs)
        for name in STEERING_INPUTS:
            if kwargs.get(name) is not None:
                prepared[name] = kwargs[name]
        return prepared

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # pyright: ignore
            {k: v for k, v in model_kwargs.items() if k not in self._base_arguments}
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant proposes with steering of its own, if any: it does not take this model's arguments."""
        if kwargs.get("assistant_model") is not None and "model_kwargs" in kwargs:
            model_kwargs = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {k: v for k, v in model_kwargs.items() if k not in STEERING_INPUTS}
        return super()._get_candidate_generator(*args, **kwargs)  # pyright: ignore


def _steering_from(value: Any) -> Any:
    from .steering import Steering

    return Steering.coerce(value)
