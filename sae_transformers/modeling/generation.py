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

from .steered_tokens import GenerationState

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

    def _reorder_cache(self, past_key_values: Any, beam_idx: Tensor) -> Any:
        """Beams go on from other beams: what gates remember goes along."""
        self._state.memory.reorder(beam_idx)
        if hasattr(super(), "_reorder_cache"):
            return super()._reorder_cache(past_key_values, beam_idx)  # pyright: ignore
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

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
