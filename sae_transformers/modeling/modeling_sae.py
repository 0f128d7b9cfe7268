"""What all heads share: the base model inside, the SAEs at their hook points, and one forward pass's record."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel

from .base_arguments import CACHE_ARGUMENTS, BaseArguments
from .base_classes import BodyContainer, base_from_config
from .call_options import CALL_OPTIONS, SaeCallOptions, feature_columns, source_of
from .call_output import call_output
from .call_record import CallRecord, CallRequest, RecordSlot, StopForward
from .compatibility import check_states, check_width
from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import LossWeights
from .feature_reading import detect, top_features
from .features_in_graph import feature_graph
from .hook_points import find_hook_point, hook_tensor
from .outputs import Detection, SaeModelOutput, TopFeatures, make_output_classes
from .penalised_model import PenaltyMixin
from .repository import RepositoryMixin
from .sae_bank import SaeBank, new_saes
from .sae_losses import loss_names, split_labels
from .sparse_autoencoder import SparseAutoencoder
from .steered_tokens import steered_tokens
from .steering_state import SteeringMixin
from .stored_claims import check_built
from .tested_releases import warn_if_untested

if TYPE_CHECKING:  # these two lines make every head travel with every other when code is published
    from .modeling_sae_causal_lm import SaeForCausalLM as SaeForCausalLM
    from .modeling_sae_sequence_classification import SaeForSequenceClassification as SaeForSequenceClassification


class SaePreTrainedModel(RepositoryMixin, SteeringMixin, PenaltyMixin, PreTrainedModel):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A base model with SAEs in its forward pass.

    `lm` is the base, untouched; `saes` the SAEs, by number. Without steering, features to report or losses to compute
    the SAEs do not run, and the outputs are the base's own, bit for bit.
    """

    config_class = SaeConfig
    config: SaeConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["saes"]
    _no_split_modules = ["SparseAutoencoder"]
    _skip_keys_device_placement = list(CACHE_ARGUMENTS)
    _auto_class: str | None = None
    auto_model: Any = AutoModel
    other_auto_models: tuple[Any, ...] = ()

    def __init__(
        self,
        config: SaeConfig,
        lm: nn.Module | None = None,
        saes: Sequence[SparseAutoencoder] | None = None,
    ) -> None:
        if config.text_config is None:
            raise ValueError("`config.text_config` must be the base model's config. Received: None.")
        warn_if_untested()
        attention = config._attn_implementation  # what was asked for; the parent fills in what this class supports
        super().__init__(config)
        self.lm = self._build_base(config, attention) if lm is None else lm
        inner = next(m for m in self.lm.modules() if isinstance(m, PreTrainedModel))
        make_output_classes(inner)
        self.base_arguments = BaseArguments(getattr(self.lm, getattr(self.lm, "body_name", ""), self.lm))
        config._attn_implementation_internal = inner.config._attn_implementation
        self.saes = SaeBank(new_saes(config.sae_configs) if saes is None else saes)
        config.sae_annotations = [sae.stored_annotations for sae in self.saes]  # names that edits may use
        check_built(self)
        given = ([] if lm is None else [lm]) + ([] if saes is None else [self.saes])
        for part in (p for module in given for p in module.modules()):
            # Or `post_init` would draw their weights anew.
            part._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        self._slot = RecordSlot()
        self._init_steering()
        self._init_penalties()
        self._install_hooks()
        self.post_init()
        if self._default:
            self.prepare_steering(self._default)

    @classmethod
    def _build_base(cls, config: SaeConfig, attention: str | None) -> nn.Module:
        options: dict[str, Any] = {"attn_implementation": attention} if attention is not None else {}
        try:
            options["dtype"] = torch.get_default_dtype()
            base = base_from_config((cls.auto_model, *cls.other_auto_models), config.text_config, options)
        except torch.OutOfMemoryError:  # a RuntimeError too, but not the config's fault
            raise
        except (KeyError, AttributeError, ArithmeticError, RuntimeError) as error:  # transformers checks few fields
            raise ValueError(
                f"`text_config` does not describe a model that can be built: {error!r}. "
                f"Received: model_type={getattr(config.text_config, 'model_type', None)!r}."
            ) from error
        return cls._wrap_base(base)

    @classmethod
    def _wrap_base(cls, base: PreTrainedModel) -> nn.Module:
        """How this head holds a base: as it is, unless it has no head of its own."""
        return base

    def initialize_weights(self) -> None:
        """After loading, as transformers initialises what no file held. In code of its own it treats remote code with
        care and skips modules whose own tensors are all there, where some families fill their children's buffers
        (Falcon-H1); so it is the base's word whether that is needed."""
        base = next(m for m in self.lm.modules() if isinstance(m, PreTrainedModel))
        answers = [name for name in ("is_custom_code", "is_remote_code") if hasattr(base, name)]
        self.__dict__.update((name, getattr(base, name)) for name in answers)
        try:
            super().initialize_weights()
        finally:
            for name in answers:
                del self.__dict__[name]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SparseAutoencoder):
            return super()._init_weights(module)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        loaded = {name: t for name, t in tensors if getattr(t, "_is_hf_initialized", False)}
        if len(loaded) < len(tensors):
            loaded = {name: t.clone() for name, t in loaded.items()}
            module.reset_parameters()
            for name, value in loaded.items():
                getattr(module, name).copy_(value)
        return None

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        self._handles = []
        self._entries = self.config.sae_configs
        self._widths = [(entry.d_in, (entry.d_out or 0) // len(entry.writes_at)) for entry in self._entries]
        base_config = self.config.get_text_config().get_text_config()  # of a multimodal base its text part
        width = getattr(base_config, "hidden_size", None)
        for number, entry in enumerate(self._entries):
            read = find_hook_point(self.lm, base_config, entry.read_at)
            writes = [find_hook_point(self.lm, base_config, place) for place in entry.writes_at]
            check_width(entry, number, read, width, writes)
            if entry.write_at != entry.read_at:
                self._handles.append(hook_tensor(read, functools.partial(self._note, number)))
            self._handles.append(hook_tensor(writes[0], functools.partial(self._visit, number)))
            later = [functools.partial(self._visit_again, number, place) for place in range(1, len(writes))]
            self._handles += map(hook_tensor, writes[1:], later)

    def unwrap(self) -> nn.Module:
        """Remove every hook and give the base model back, as it was before. Until `rewrap` this model gives the base's
        own outputs and refuses all that its SAEs would have to do."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.lm

    def rewrap(self) -> None:
        """Put the hooks back that `unwrap` removed."""
        self.unwrap()
        self._install_hooks()

    def _note(self, number: int, hidden: Tensor) -> Tensor:
        record = self._slot.get()
        if record is not None and record.request.concerns(number):
            record.read[number] = record.request.shaped(hidden)
        return hidden

    def _visit(self, number: int, hidden: Tensor) -> Tensor:
        record = self._slot.get()
        if record is None:
            self._check_not_passed_by()
        if self._kept_states is not None:
            self._kept_states[number] = hidden.detach()
        if record is None or not record.request.concerns(number):
            return hidden
        request = record.request
        here = request.shaped(hidden)
        seen = record.read.get(number, here)
        check_states(number, seen, here, self._widths[number], request.mask)
        if request.keep_inputs:
            record.inputs[number] = seen
        edited = hidden
        if request.works_at(number):
            places = len(self._entries[number].hooks_out)
            target = here if number in record.read and not places else None
            result = self.saes.serve(number, seen, request, target)
            if result.features is not None:
                record.features[number] = result.features
            if result.losses is not None:
                record.losses[number] = result.losses
            if result.linked is not None and number in record.inputs and number not in record.read:
                record.inputs[number] = result.linked  # what a feature head scores
            record.penalties.update(result.penalties or {})
            if places > 1:
                record.results[number], result = result, result.part(0, places)
            edited = request.edit(here, result).view_as(hidden)
        record.finished.add(number)
        if record.is_complete:
            raise StopForward
        return edited

    def _visit_again(self, number: int, place: int, hidden: Tensor) -> Tensor:
        """A place that an SAE writes to after its first one."""
        record = self._slot.get()
        result = None if record is None else record.results.get(number)
        if record is None or result is None:
            return hidden
        part = result.part(place, len(self._entries[number].writes_at))
        return record.request.edit(record.request.shaped(hidden), part).view_as(hidden)

    # -- a forward pass ----------------------------------------------------------------------------------------------

    def with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a forward pass of our own gives the base; see `BaseArguments.with_positions`."""
        return self.base_arguments.with_positions(inputs, self.config.get_text_config())

    def _open_record(
        self,
        options: SaeCallOptions,
        inputs: Mapping[str, Any],
        concept_targets: Tensor | None = None,
        *,
        with_losses: bool = False,
        penalties: Mapping[int, Any] | None = None,
    ) -> CallRecord | None:
        """The record of a pass over `inputs`, or None when there is nothing for the SAEs to do."""
        generation = self._scope.generation
        given = options.steering
        if given is None and generation is not None:
            given = generation.bound if generation.bound is not None else False
        steering = self._steering_of_call(given)
        losses: tuple[str, ...] = ()
        if with_losses:
            weights = LossWeights(**self.config.loss_weights)
            losses = loss_names(weights, with_concepts=concept_targets is not None)
        if steering is None and not losses and not options.reports and not penalties:
            return None
        source = source_of(inputs)
        every = range(len(self.config.saes))
        features: Mapping[int, Tensor | None] = dict.fromkeys(every) if options.output_features else {}
        if options.features is not None:
            # dynamo cannot trace the reading of a config.
            configs = self._entries if torch.compiler.is_compiling() else self.config.sae_configs
            features = feature_columns(options.features, configs, source.device)
        targets: dict[int, Tensor] = {}
        if losses and concept_targets is not None:
            targets = split_labels(concept_targets, self.config.sae_configs, source.shape[0], source.shape[1])
        steered = steered_tokens(steering, options, inputs, self.base_arguments.cache, generation)
        return CallRecord(
            CallRequest(
                batch_size=source.shape[0],
                length=source.shape[1],
                plan=steered.plan,
                rows=steered.rows,
                mask=steered.mask,
                gates=steered.gates,
                graph=feature_graph(options, features, steered.plan, self._entries),
                features=features,
                pre_activations=options.pre_activations,
                keep_inputs=bool(options.output_sae_inputs),
                losses=losses,
                detach=self.config.detach_hidden,
                concept_targets=targets,
                stop_after=options.last_needed(features, every, with_losses=bool(losses or penalties)),
                penalties=penalties or {},
            )
        )

    def _run(self, record: CallRecord | None, inputs: Mapping[str, Any]) -> Any:
        """Run the base with a record in place; None if a hook stopped it.

        Raises:
            RuntimeError: an SAE that had to work was not reached: the outputs would be the base's own.
        """
        previous = self._slot.swap(record)
        try:
            outputs = self.lm(**self.base_arguments.of_new_tokens(inputs))
        except StopForward:
            return None
        finally:
            self._slot.swap(previous)
        if record is not None:
            self._check_reached(record)
            if record.request.gates is not None:
                record.request.gates.remember()
        return outputs

    def _check_reached(self, record: CallRecord) -> None:
        missed = record.missed(range(len(self._entries)))
        drops_layers = self.training and getattr(self.config.get_text_config(), "layerdrop", 0)
        if missed and not drops_layers:
            raise RuntimeError(
                f"SAE {missed[0]} had work to do and was not reached. Expected the module that it writes to, "
                f"{self._entries[missed[0]].write_at!r}, to run with this model's hook. Either the base was taken "
                f"out by `unwrap` (`rewrap` puts the SAEs back), or compiled by itself (compile the whole model)."
            )

    # -- reading features --------------------------------------------------------------------------------------------

    def detect(
        self,
        inputs: Any,
        *,
        feature: int | str,
        sae: int = 0,
        pooling: str = "mean",
        pre_activations: bool = False,
        skip_first: int = 1,
    ) -> Detection:
        """How strongly a feature answers to texts, unsteered. Layers after its SAE do not run, nor do other encoder
        columns.

        Args:
            inputs: what a tokenizer returns, or input ids (batch, seq).
            feature: index of the latent, or name of a concept.
            sae: number of the SAE.
            pooling: of a text's tokens: `mean`, `max` or `last`.
            pre_activations: score by the pre-activation, by which concept latents are trained (SCAR,
                arXiv:2411.07122), and not by the activation.
            skip_first: leading real tokens that do not count: the first token of a text is an outlier.

        Returns:
            `Detection`; the score of a text without a token that counts is NaN.
        """
        return detect(self, inputs, feature, sae, pooling, pre_activations, skip_first)

    def top_features(self, inputs: Any, *, k: int = 10, sae: int = 0, skip_first: int = 1) -> TopFeatures:
        """The strongest features of each token, unsteered. Layers after the SAE do not run.

        Args:
            inputs: what a tokenizer returns, or input ids (batch, seq).
            k: features of a token, at most.
            sae: number of the SAE.
            skip_first: leading real tokens that are not read: the first token of a text is an outlier.
        """
        return top_features(self, inputs, k, sae, skip_first)

    # -- what transformers asks for ----------------------------------------------------------------------------------

    def enable_adapters(self) -> None:
        super().enable_adapters()
        for module in self.modules():  # transformers leaves the SAEs that PEFT copied (`modules_to_save`) disabled
            if hasattr(module, "modules_to_save"):
                module.enable_adapters(True)  # pyright: ignore[reportCallIssue]

    def _set_gradient_checkpointing(  # pyright: ignore[reportIncompatibleMethodOverride]
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

    _keys_to_ignore_on_load_unexpected = [r"^(lm\.)?(lm_head|embed_out|score)\."]

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SaeModelOutput | tuple:
        """As the base, with `SaeCallOptions` besides."""
        options, kwargs = SaeCallOptions.take(kwargs)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "use_cache": False if options.stop_at_last_sae else use_cache,
            **kwargs,
        }
        inputs = self.base_arguments.prepared(given, CALL_OPTIONS)
        record = self._open_record(options, inputs)
        out = self._run(record, {**inputs, "return_dict": True})
        return call_output(self, SaeModelOutput, out, record, options, return_dict=return_dict)
