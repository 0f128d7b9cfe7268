"""Which steering is in force: of a call, of a `generate`, of a `with model.steered(...)`, or the model's default."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .steering import FeatureEdit, Steering
from .steering_plan import BoundSteering, SteeringPlan

PLANS_KEPT = 16


class GenerationState:
    """The steering of one `generate` call, for forward passes that do not carry it (the unconditional branch of
    classifier-free guidance). Such a pass has a prompt of its own, whose length its first call shows."""

    def __init__(self, bound: BoundSteering | None, rows: Tensor | None, masked: bool = False) -> None:
        self.bound = bound
        self.rows = rows
        self.masked = masked  # a `steering_mask` names tokens of the prompt, so none of that other prompt
        self.own_prompt_length: int | None = None


class SteeringScope:
    """Steering set by `with` blocks and by `generate`, thread by thread.

    A block belongs to the thread that entered it. A thread without one of its own (a worker of continuous batching)
    sees the block of the only thread that has one; with several it is an error, never a guess.
    """

    def __init__(self) -> None:
        # (thread, plan) of every open block, in the order of entering; replaced whole, so that readers need no lock.
        self.blocks: tuple[tuple[int, Any], ...] = ()
        self.latest: Any = None  # what a compiled forward pass sees
        self.lock = threading.Lock()
        self.local = threading.local()

    def current(self) -> Any:
        if torch.compiler.is_compiling():
            return self.latest
        blocks = self.blocks
        if not blocks:
            return None
        own = threading.get_ident()
        for thread, plan in reversed(blocks):
            if thread == own:
                return plan
        if len(threads := {thread for thread, _ in blocks}) > 1:
            raise RuntimeError(
                f"{len(threads)} threads steer this model with `with model.steered(...)` and this thread is none of "
                f"them. "
                f"Pass `steering=` to the call."
            )
        return blocks[-1][1]

    @contextmanager
    def block(self, plan: Any) -> Iterator[None]:
        entry = (threading.get_ident(), plan)
        with self.lock:
            self.blocks, self.latest = (*self.blocks, entry), plan
        try:
            yield
        finally:
            with self.lock:
                self.blocks = tuple(other for other in self.blocks if other is not entry)
                self.latest = self.blocks[-1][1] if self.blocks else None

    @property
    def generation(self) -> GenerationState | None:
        return None if torch.compiler.is_compiling() else getattr(self.local, "generation", None)

    @contextmanager
    def generating(self, state: GenerationState) -> Iterator[None]:
        previous = getattr(self.local, "generation", None)
        self.local.generation = state
        try:
            yield
        finally:
            self.local.generation = previous

    def __deepcopy__(self, memo: dict) -> SteeringScope:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class ScarHook:
    """SCAR's `model.hook`: setting `mod_features` and `mod_scaling` steers every call of the process.

    https://huggingface.co/papers/2411.07122. Priority is that of the original: replacement, scaling, vector. The
    reconstruction error is dropped as soon as `mod_features` is set. `mod_threshold` is stored and, as there, has no
    effect.
    """

    mod_features: Any
    mod_threshold: Any
    mod_replacement: Any
    mod_scaling: Any
    mod_balance: Any
    mod_vector: Any
    mod_vec_factor: Any
    _model: Any
    _sae: int

    FIELDS = {
        "mod_features": None,
        "mod_threshold": None,
        "mod_replacement": None,
        "mod_scaling": None,
        "mod_balance": False,
        "mod_vector": None,
        "mod_vec_factor": 1.0,
    }

    def __init__(self, model: Any, sae: int = 0) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_sae", sae)
        self.__dict__.update(self.FIELDS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.FIELDS:
            raise AttributeError(f"`hook` has {', '.join(self.FIELDS)}. Received: {name!r}.")
        previous = self.__dict__[name]
        self.__dict__[name] = value
        try:
            self._model.steering = self.steering()
        except Exception:
            self.__dict__[name] = previous
            raise

    def steering(self) -> Steering:
        """The fields as a `Steering`; a list of features is steered as a whole, where the original ignores it."""
        if self.mod_features is None:
            return Steering()
        features = self.mod_features if isinstance(self.mod_features, (list, tuple)) else [self.mod_features]
        configs = self._model.config.sae_configs
        if self._sae >= len(configs):
            raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={self._sae!r}.")
        for feature in features:
            configs[self._sae].resolve_feature(feature)
        jump = configs[self._sae].activation == "jumprelu"
        edits: list[FeatureEdit] = []
        if self.mod_replacement is not None:
            edits = [FeatureEdit(self._sae, f, "set", self.mod_replacement) for f in features]
        elif self.mod_scaling is not None:
            op = "scale_magnitude" if jump else "scale"
            edits = [FeatureEdit(self._sae, f, op, self.mod_scaling) for f in features]
        elif self.mod_vector is not None:
            vector = torch.as_tensor(self.mod_vector, dtype=torch.float64) * self.mod_vec_factor
            edits = [FeatureEdit(self._sae, int(i), "add", float(vector[i])) for i in vector.nonzero().flatten()]
        balance = bool(self.mod_balance) and self.mod_replacement is None and self.mod_scaling is not None
        return Steering(edits, keep_error=False, reconstruct=(self._sae,), balance=balance)


class SteeringMixin:
    """The steering half of a model's public interface."""

    config: Any
    saes: Any

    def _init_steering(self) -> None:
        self._scope = SteeringScope()
        self._plans: OrderedDict[Any, SteeringPlan] = OrderedDict()
        self._default: Steering = Steering.coerce(self.config.steering)
        self._scar_hook: ScarHook | None = None

    @property
    def steering(self) -> Steering:
        """The model's default steering; saved with the model. Assign a `Steering`, its dict, or None."""
        return self._default

    @steering.setter
    def steering(self, value: Any) -> None:
        steering = Steering.coerce(value)
        self.prepare_steering(steering)  # every error is raised here, where the value was given
        self._default = steering
        self.config.steering = steering.to_dict() if steering else None

    @property
    def hook(self) -> ScarHook:
        """SCAR's interface, see `ScarHook`."""
        if self._scar_hook is None:
            self._scar_hook = ScarHook(self)
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
            return steering
        rows = _rows_of(steering)
        likes = [self._sae_like(number) for number in range(len(self.config.saes))]
        if not likes and any(rows):
            raise ValueError("This model has no SAE to steer. Build it with `saes=[...]`.")
        key = (tuple(rows), tuple((like.dtype, like.device) for like in likes))
        plan = self._plans.get(key)
        if plan is None:
            plan = SteeringPlan(rows, self.config.sae_configs, likes or [torch.empty(0)])
            self._check_maxima(rows)
            self._plans[key] = plan
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        return plan

    def _sae_like(self, number: int) -> Tensor:
        """An empty tensor with the dtype of an SAE, on the device it runs on (which an offloaded one is not stored
        on)."""
        module = getattr(self.saes, str(number))
        parameter = next(p for p in module.parameters() if p.is_floating_point())
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is None:
            device = parameter.device if parameter.device.type != "meta" else "cpu"
        return torch.empty(0, dtype=parameter.dtype, device=device)

    def _check_maxima(self, rows: Sequence[Steering]) -> None:
        configs = self.config.sae_configs
        for edit in (e for s in rows for e in s.feature_edits if e.unit == "max"):
            maxima = getattr(getattr(self.saes, str(edit.sae)), "feature_max", None)
            feature = configs[edit.sae].resolve_feature(edit.feature)
            if maxima is not None and maxima.device.type != "meta" and not float(maxima[feature]) > 0:
                raise ValueError(
                    f"`unit='max'` needs the latent's typical maximum, which SAE {edit.sae} does not hold for "
                    f"feature {feature}; "
                    f"set `model.saes[{edit.sae}].feature_max` or give an absolute value. Received: {edit!r}."
                )

    @contextmanager
    def steered(self, steering: Any) -> Iterator[Any]:
        """Steer every call inside the block, in this thread and in worker threads without a block of their own.

        with model.steered(Steering([FeatureEdit(feature=7, op="add", value=4.0)])):
            model.generate(**inputs)
        """
        plan = self.prepare_steering(steering)
        with self._scope.block(plan):
            yield self

    def _steering_of_call(self, steering: Any) -> Any:
        """What applies to a call that was given `steering`: it, or the innermost block, or the default. None:
        nothing."""
        if steering is None:
            steering = self._scope.current()
            if steering is None:
                steering = self._default
        if steering is False or (getattr(steering, "is_steering", False) and not steering):
            return None
        return steering if getattr(steering, "is_bound", False) else self.prepare_steering(steering)


def _rows_of(steering: Any) -> list[Steering]:
    if isinstance(steering, (list, tuple)) and not any(_is_edit(item) for item in steering) and len(steering):
        return [Steering.coerce(item) for item in steering]
    return [Steering.coerce(steering)]


def _is_edit(item: Any) -> bool:
    if isinstance(item, dict):
        return "feature" in item or "scores" in item
    return hasattr(item, "op") or hasattr(item, "scores")
