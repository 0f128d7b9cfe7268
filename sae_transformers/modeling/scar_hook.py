"""SCAR's own interface to steering: `model.hook`."""

from __future__ import annotations

from typing import Any

import torch

from .steering import FeatureEdit, Steering


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
