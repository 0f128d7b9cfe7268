"""A causal language model with SAEs in its forward pass, steered in `generate`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin

from .base_arguments import CACHE_ARGUMENTS
from .call_options import CALL_OPTIONS, SaeCallOptions, source_of
from .call_output import call_output
from .generation import STEERING_INPUTS, generation_view
from .modeling_sae import SaePreTrainedModel
from .outputs import SaeCausalLMOutput
from .sae_losses import SAE_LOSSES, at_least_one, counted_tokens, mean_losses
from .self_check import CheckReport, check_model
from .steered_tokens import GenerationState

# Options of `forward` that report or end a pass, which a loop over passes cannot hand back.
FORWARD_ONLY = ("output_features", "features", "pre_activations", "output_sae_inputs", "stop_at_last_sae")
FORWARD_ONLY += ("features_require_grad", "edit_features")
# What `generate` asks of a model's class is the base's to answer.
BASE_TRAITS = ("_can_compile_fullgraph", "_is_stateful", "_supports_cache_class", "_supports_static_cache")


class SaeForCausalLM(SaePreTrainedModel, GenerationMixin):
    """Any Hugging Face causal language model with sparse autoencoders inside.

    model = SaeForCausalLM.from_base("org/base", saes=[sae])
    model.generate(**inputs, steering=Steering([FeatureEdit(feature=7, op="add", value=4.0)]))
    """

    auto_model = AutoModelForCausalLM
    other_auto_models = (AutoModelForImageTextToText,)  # wrappers that are no language models by that name
    _keys_to_ignore_on_load_unexpected = [r"^(lm\.)?score\."]
    _losses = ("lm", *SAE_LOSSES)
    _penalised_tokens = ("all", "answer", "mask")

    def __init__(self, config: Any, lm: Any = None, saes: Any = None) -> None:
        super().__init__(config, lm, saes)
        for trait in BASE_TRAITS:
            if hasattr(self.lm, trait):
                setattr(self, trait, getattr(self.lm, trait))

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
        concept_targets: Tensor | None = None,
        penalty_mask: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SaeCausalLMOutput | tuple:
        """As the base's forward, with `SaeCallOptions` besides.

        Args:
            labels: (batch, seq) as for the base. The loss is the weighted sum of `config.loss_weights`.
            concept_targets: (batch, n_concepts) per text or (batch, seq, n_concepts) per token, 0 to 1, -100 where
                unknown; an unknown label adds nothing. All SAE terms are means over the tokens that carry an LM label
                (all real tokens without `labels`), so accumulated micro-batches add up to the large batch's loss.
            penalty_mask: (batch, seq), 1 at the tokens of penalties with over='mask'; see `FeaturePenalty`.
            num_items_in_batch: set by `Trainer`: LM labels in the whole accumulated batch.
        """
        options, kwargs = SaeCallOptions.take(kwargs)
        learns = labels is not None and (self.training or position_ids is not None)
        if options.stop_at_last_sae or (learns and use_cache is None and past_key_values is None):
            use_cache = False  # with a new cache packed texts would attend to each other
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        inputs = self.base_arguments.prepared(given, CALL_OPTIONS)
        with_losses = labels is not None or concept_targets is not None or self.training
        penalties = self._penalties_of_call(inputs, labels, penalty_mask, with_labels=labels is not None)
        record = self._open_record(options, inputs, concept_targets, with_losses=with_losses, penalties=penalties)
        if labels is not None and not options.stop_at_last_sae:
            inputs["labels"] = labels
            if num_items_in_batch is not None and self.base_arguments.open:
                inputs["num_items_in_batch"] = at_least_one(num_items_in_batch)
        if "logits_to_keep" in self.base_arguments.named:
            inputs["logits_to_keep"] = logits_to_keep
        inputs["return_dict"] = True
        out = self._run(record, inputs)
        count, terms = num_items_in_batch if labels is not None else None, {}
        if record is not None and record.request.losses:
            weights = counted_tokens(source_of(inputs), inputs.get("attention_mask"), labels)
            terms = mean_losses(record.request.losses, record.losses, weights, at_least_one(count))
        terms |= self._penalty_terms(record, inputs, labels, penalty_mask, count)
        return call_output(self, SaeCausalLMOutput, out, record, options, terms=terms, return_dict=return_dict)

    def check(self, *, tolerance: float | None = None, seed: int = 0) -> CheckReport:
        """Whether what must hold for any base holds for this one and this release of transformers, in seconds: idle
        as the base bit for bit; steered alike with and without the cache at each kind of position; a padded text as
        the text alone, steered and detected; saved and loaded.

        Args:
            tolerance: largest difference, relative to the largest value; by default 1e-4 for a base in float32, 1e-9
                in float64, 0.05 in half precision.
            seed: of the random token ids that are run.

        Returns:
            A report that is true if nothing failed, and prints as a table.
        """
        return check_model(self, tolerance=tolerance, seed=seed)

    def get_output_embeddings(self) -> Any:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm.set_output_embeddings(new_embeddings)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """As the base's own `generate`, which is what runs, with this model's forward pass in it.

        Keyword Args:
            steering (Steering | list | bool): a `Steering`, or a list with one (or None) for each prompt; it repeats
                itself over beams and return sequences. Without it: `sae_steering` (JSON) of a generation config that
                is passed in this call, an enclosing `model.steered(...)`, `sae_steering` of the model's own
                generation config, the model's default. False: none. A cache that was made under other steering holds
                that steering.
            steering_mask (Tensor): (batch, prompt length) bool, prompt tokens that may be steered.

        Raises:
            TypeError: an option of `forward` that `generate` has no place for.
        """
        if refused := [name for name in FORWARD_ONLY if kwargs.get(name)]:
            raise TypeError(
                f"`generate` returns tokens and reports no features. Received: {refused[0]}={kwargs[refused[0]]!r}. "
                f"Call the model on what was generated: `model(tokens, {refused[0]}=...)`."
            )
        for name in CACHE_ARGUMENTS:
            if name in kwargs:
                kwargs[self.base_arguments.cache] = kwargs.pop(name)
        mask = kwargs.get("attention_mask")
        given = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0
        plan = self._steering_of_generation(
            kwargs.pop("steering", None), kwargs.pop("sae_steering", None), generation_config
        )
        state = GenerationState(plan, kwargs.pop("steering_mask", None), given)
        view = generation_view(self, state)
        with self._scope.generating(state):
            if generation_config is not None:  # by name: some families have another order, and `inputs` nowhere
                kwargs["generation_config"] = generation_config
            found = view.generate(*(() if inputs is None else (inputs,)), **kwargs)
        if plan is not None and state.bound is None:
            raise RuntimeError(
                f"{type(self.lm).__name__} has a `generate` of its own that runs its language model by itself, so "
                f"nothing was steered. Expected a base that generates by its own forward pass. Received: steering for "
                f"model_type={self.lm.config.model_type!r}. Steer its language model alone."
            )
        return found

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore
        carried = {name: kwargs.pop(name) for name in STEERING_INPUTS if name in kwargs}
        prepared = self.lm.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        prepared.update((name, value) for name, value in carried.items() if value is not None)
        return prepared
