"""Which steering is in force: of a call, of a `generate`, of a `with model.steered(...)`, or the model's default."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .sae_bank import SaeBank
from .scar_hook import ScarHook
from .steering import Steering
from .steering_plan import BoundSteering, SteeringPlan
from .steering_scope import SteeringScope

PLANS_KEPT = 16


class SteeringMixin:
    """The steering half of a model's public interface."""

    config: SaeConfig
    generation_config: Any
    saes: SaeBank

    def _init_steering(self) -> None:
        self._scope = SteeringScope()
        self._plans: OrderedDict[Any, SteeringPlan] = OrderedDict()
        self._default: Steering = Steering.coerce(self.config.steering)
        self._default_source: Any = self.config.steering
        self._scar_hook: ScarHook | None = None
        self._kept_states: dict[int, Tensor] | None = None  # what SCAR's `hook.pop` gives, by SAE

    @property
    def steering(self) -> Steering:
        """The model's default steering; saved with the model. Assign a `Steering`, its dict, or None."""
        if self.config.steering is not self._default_source:  # it was set there
            self.steering = self.config.steering
        return self._default

    @steering.setter
    def steering(self, value: Any) -> None:
        steering = Steering.coerce(value)
        self.prepare_steering(steering)  # every error is raised here, where the value was given
        self._default = steering
        self.config.steering = self._default_source = steering.to_dict() if steering else None

    @property
    def hook(self) -> ScarHook:
        """SCAR's interface, see `ScarHook`."""
        if self._scar_hook is None:
            self._scar_hook, self._kept_states = ScarHook(self), {}
        return self._scar_hook

    def prepare_steering(self, steering: Any) -> SteeringPlan:
        """Check steering against this model and compile it. The result may be given wherever steering is taken.

        Args:
            steering: a `Steering` for all rows, or a list with one `Steering` or None for each row of the batch. A
                list of edits is one `Steering`.

        Raises:
            ValueError: an SAE, latent or concept that this model does not have.
        """
        if getattr(steering, "is_plan", False):
            if torch.compiler.is_compiling() or steering.fits(self._sae_like(n) for n in steering.saes):
                return steering
            steering = list(steering.rows)  # the model has another dtype or device since
        rows = _rows_of(steering)
        likes = [self._sae_like(number) for number in range(len(self.config.saes))]
        if not likes and any(rows):
            raise ValueError("This model has no SAE to steer. Build it with `saes=[...]`.")
        key = (tuple(rows), tuple((like.dtype, like.device) for like in likes))
        plan = self._plans.get(key)
        if plan is not None:
            with suppress(KeyError):  # another thread dropped it
                self._plans.move_to_end(key)
        else:
            plan = SteeringPlan(rows, self.config.sae_configs, likes or [torch.empty(0)])
            maxima = {number: self._maxima_of(number) for number in range(len(likes))}
            check_maxima(rows, self.config.sae_configs, {n: m for n, m in maxima.items() if m is not None})
            self._plans[key] = plan
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        return plan

    @property
    def plans_kept(self) -> int:
        """How many compiled steerings are kept for calls to come."""
        return len(self._plans)

    def _sae_like(self, number: int) -> Tensor:
        """An empty tensor with the dtype of an SAE, on the device it runs on (which an offloaded one is not stored
        on)."""
        module = getattr(self.saes, str(number))
        parameter = next(p for p in module.parameters() if p.is_floating_point())
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is None:
            device = parameter.device if parameter.device.type != "meta" else "cpu"
        return torch.empty(0, dtype=parameter.dtype, device=device)

    def _maxima_of(self, number: int) -> Tensor | None:
        maxima = getattr(getattr(self.saes, str(number)), "feature_max", None)
        return None if maxima is None or maxima.device.type == "meta" else maxima

    @contextmanager
    def steered(self, steering: Any) -> Iterator[Any]:
        """Steer every call inside the block, in this thread and in worker threads without a block of their own.

        with model.steered(Steering([FeatureEdit(feature=7, op="add", value=4.0)])):
            model.generate(**inputs)
        """
        plan = self.prepare_steering(steering)
        with self._scope.block(plan if plan.saes else False):
            yield self

    def _steering_of_call(self, steering: Any) -> SteeringPlan | BoundSteering | None:
        """What applies to a call that was given `steering`: it, or the innermost block, or the default. None:
        nothing."""
        if steering is None:
            steering = self._scope.current()
            if steering is None:
                steering = self._default if torch.compiler.is_compiling() else self.steering
        if steering is False or (getattr(steering, "is_steering", False) and not steering):
            return None
        return steering if getattr(steering, "is_bound", False) else self.prepare_steering(steering)

    def _steering_of_generation(
        self, steering: Any, in_call: Any, generation_config: Any
    ) -> SteeringPlan | BoundSteering | None:
        """What applies to a `generate`: the argument, a generation config's `sae_steering` that is passed in this
        call, the innermost block, that of the model's own generation config, the default."""
        own = getattr(self.generation_config, "sae_steering", None)
        if steering is None:
            steering = in_call
        if steering is None:
            passed = getattr(generation_config, "sae_steering", None)
            # Pipelines pass a copy of the model's own.
            steering = None if passed is None or own is not None and _same(passed, own) else passed
        if steering is None and self._scope.current() is None:
            steering = own
        if isinstance(steering, (str, dict)):
            steering = Steering.coerce(steering)
        return self._steering_of_call(steering)


def _same(one: Any, other: Any) -> bool:
    return one is other or Steering.coerce(one).to_dict() == Steering.coerce(other).to_dict()


def _rows_of(steering: Any) -> list[Steering]:
    if isinstance(steering, (list, tuple)) and not any(_is_edit(item) for item in steering) and len(steering):
        return [Steering.coerce(item) for item in steering]
    return [Steering.coerce(steering)]


def _is_edit(item: Any) -> bool:
    if isinstance(item, dict):
        return "feature" in item or "scores" in item
    return hasattr(item, "op") or hasattr(item, "scores")


def check_maxima(
    rows: Sequence[Steering], configs: Sequence[SparseAutoencoderConfig], maxima: Mapping[int, Tensor]
) -> None:
    """Raises ValueError where an edit in units of a latent's typical maximum finds none.

    Args:
        maxima: (d_sae,) of each SAE whose maxima are at hand.
    """
    every = [one for steering in rows for one in (*steering.feature_edits, *steering.strengths)]
    for one in (one for one in every if one.unit == "max" and one.sae in maxima):
        feature = configs[one.sae].resolve_feature(one.feature)
        if not float(maxima[one.sae][feature]) > 0:
            raise ValueError(
                f"`unit='max'` needs the latent's typical maximum, which SAE {one.sae} does not hold for "
                f"feature {feature}: it was never active where that was measured, or nothing was. Call "
                f"`model.saes[{one.sae}].measure_feature_max(hidden)`, or give an absolute value. Received: "
                f"{one!r}."
            )
