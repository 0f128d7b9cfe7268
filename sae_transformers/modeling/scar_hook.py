"""SCAR's own interface to steering: `model.hook`."""

from __future__ import annotations

from typing import Any

import torch

from .feature_edits import FeatureEdit
from .steering import Steering


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

    def set(self, **fields: Any) -> None:
        """Set several fields at once, as `from_pretrained(..., mod_features=0, mod_scaling=-1.0)` does.

        Raises:
            AttributeError: a field that SCAR does not have.
            ValueError: a latent or an SAE that the model does not have, or a value that is no finite number.
        """
        for name in sorted(fields, key=lambda name: name == "mod_features"):  # it alone makes the others count
            setattr(self, name, fields[name])

    def pop(self) -> torch.Tensor:
        """The hidden state at the SAE, (batch, length, d_in), of the last forward pass, before any edit; once.

        It is kept, without a gradient, from the first use of `model.hook` on.

        Raises:
            ValueError: there was no forward pass since then, or since the last `pop`.
        """
        kept = self._model._kept_states.pop(self._sae, None)
        if kept is None:
            raise ValueError(
                "`hook.pop()` gives the hidden state of the last forward pass, once. Expected a pass since the first "
                "use of `model.hook` and since the last `pop`. Received: none. `model(..., output_sae_inputs=True)` "
                "gives it with the output."
            )
        return kept

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
