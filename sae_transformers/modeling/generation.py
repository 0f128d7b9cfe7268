"""`generate` as the base does it: which cache, which positions, which masks and inputs are the base's to decide.

transformers asks the model's class for all of this, and by its name for some. So `generate` runs on a *view* of the
base: an object of a subclass of the base's class, of the same name and with the base's own attributes, whose forward
pass is the model's with the SAEs in it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from .base_arguments import cached_tokens
from .forward_pass import steering_rows_for
from .steering_plan import BoundSteering

STEERING_INPUTS = ("steering", "steering_rows", "steering_mask", "steering_past")


class GenerationView:
    """What a view changes in the base's class. `_model` is the model with SAEs, `_state` this call's steering."""

    __slots__ = ()
    _model: Any
    _state: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        return self._model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._model.generation_config = value

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.get_compiled_call(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = self._model.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self._state.bound is not None:
            seen = self._state.seen_before(input_ids, prepared, self._model.base_arguments.cache)
            if seen is not None:
                prepared["steering_past"] = seen
        return prepared

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Here the base has settled the prompt and its mask, and each row is about to be repeated for its beams.
        self._state.place(input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(  # pyright: ignore
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant proposes with steering of its own, if any: it does not take this model's arguments."""
        if "model_kwargs" in kwargs:
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in STEERING_INPUTS}
        return super()._get_candidate_generator(*args, **kwargs)  # pyright: ignore


@functools.lru_cache(maxsize=64)
def _view_class(base: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    prepare: Any = GenerationView.prepare_inputs_for_generation
    return type(
        base.__name__,
        (GenerationView, base),
        {
            "__slots__": ("_model", "_state"),
            "__module__": base.__module__,
            # `generate` reads both signatures to know what the base takes.
            "forward": functools.wraps(base.forward)(forward),  # pyright: ignore[reportAttributeAccessIssue]
            "prepare_inputs_for_generation": functools.wraps(base.prepare_inputs_for_generation)(  # pyright: ignore
                lambda self, *args, **kwargs: prepare(self, *args, **kwargs)
            ),
        },
    )


def generation_view(model: Any, state: GenerationState) -> Any:
    """The base of `model` for one `generate`: its own attributes, with the forward pass of `model`."""
    base = model.lm
    if not isinstance(base, GenerationMixin) and hasattr(base, "get_base_model"):
        base = base.get_base_model()  # inside PEFT's wrapper
    if not isinstance(base, GenerationMixin):
        raise TypeError(
            f"Expected a base that can generate. Received: {type(base).__name__}, which has no `generate` of "
            f"transformers."
        )
    kind = _view_class(type(base))
    view: Any = object.__new__(kind)
    # The dict itself and not a copy: what is set on the base later, and what `generate` notes there, is one.
    object.__setattr__(view, "__dict__", base.__dict__)
    kind._model.__set__(view, model)  # pyright: ignore[reportAttributeAccessIssue]
    kind._state.__set__(view, state)  # pyright: ignore[reportAttributeAccessIssue]
    return view


class GenerationState:
    """The steering of one `generate`, from the call to its forward passes.

    Passes of the unconditional branch of classifier-free guidance do not carry it and find it here; that branch has a
    prompt of its own, whose length its first pass shows.
    """

    def __init__(self, plan: Any, mask: Tensor | None = None, given_length: int = 0) -> None:
        """
        Args:
            plan: of `prepare_steering`, or None.
            mask: `steering_mask`, (batch, prompt length) bool.
            given_length: columns of the attention mask that the caller gave, which may reach over a cache.
        """
        self.plan = plan
        self.mask = mask
        self.given_length = given_length
        self.bound: BoundSteering | None = None
        self.rows: Tensor | None = None
        self.own_prompt_length: int | None = None
        self._ids_at_start = 0

    @property
    def masked(self) -> bool:
        return self.mask is not None  # names tokens of the prompt, so none of the unconditional branch's prompt

    def place(self, input_ids: Any, model_kwargs: dict[str, Any]) -> None:
        """Bind the steering to the prompt that the base has settled on: its length, and each row's first real
        token."""
        if self.plan is None:
            return
        source = model_kwargs.get("inputs_embeds")
        if source is None or (input_ids is not None and input_ids.shape[1]):
            source = input_ids
        attention = model_kwargs.get("attention_mask")
        length = max(source.shape[1], self.given_length)
        if isinstance(attention, Tensor) and attention.ndim == 2:
            length = max(length, attention.shape[1])
        self.bound = BoundSteering(self.plan, length)
        self.rows = steering_rows_for(source, attention, 0, length, count=self.plan.count)
        self._ids_at_start = 0 if input_ids is None else input_ids.shape[1]
        model_kwargs.update(steering=self.bound, steering_rows=self.rows)
        if self.mask is not None:
            model_kwargs["steering_mask"] = self.mask

    def seen_before(self, input_ids: Tensor, prepared: dict[str, Any], cache: str) -> int | None:
        """How many columns came before those of a pass, where the cache cannot tell; None where it can."""
        if self.bound is None or cached_tokens(prepared.get(cache)) is not None and "state" not in prepared:
            return None
        step = prepared.get("input_ids")
        step = prepared["inputs_embeds"] if step is None else step
        return self.bound.prompt_length + input_ids.shape[1] - self._ids_at_start - step.shape[1]
