"""A sparse code that is trained through a frozen model: values of chosen latents, at the place of a steering's.

Forms, with v the trained values and W_dec the decoder rows of the chosen latents:

    direction    h' = h + sum_i v_i W_dec[i]
    code         h' = h + sum_i (max(z_i + v_i, 0) - z_i) W_dec[i]

`code` is that of "YaPO" (https://huggingface.co/papers/2601.08441), which keeps what the SAE does not reconstruct.
`direction` reads nothing, so it needs no encoder. The trained values stand in the tables of a compiled `Steering`, so
that what is trained is what a saved `Steering` of the same values does, to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling import FeatureEdit, Steering, SteeringPlan
from ...modeling.feature_edits import UNITS
from ...modeling.modeling_sae import SaePreTrainedModel
from .preference_losses import response_log_probs


class LearntCode(nn.Module):
    """Values of chosen latents; the only parameter is `values`, (m,), at first 0. The model is no part of it.

    Args:
        model: a `SaeForCausalLM`.
        features: (number of the SAE, index of the latent) pairs, all different.
        form: `direction` or `code`.
        unit: of the values, as of a `FeatureEdit`.
        scope: a `Steering` without edits: positions, gate and excluded tokens.
    """

    is_parallelizable = model_parallel = True  # Trainer leaves it where the model is, on one device

    def __init__(
        self,
        model: SaePreTrainedModel,
        features: Sequence[tuple[int, int]],
        form: str = "direction",
        unit: str = "norm",
        scope: Steering | None = None,
    ) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple it is no part of this module: neither saved nor trained
        self.features, self.form, self.unit = list(features), form, unit
        self.scope = Steering() if scope is None else scope  # one without edits is not true
        weights = model.saes[0].W_dec
        dtype = torch.promote_types(weights.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(len(self.features), dtype=dtype, device=model.device))
        plan = model.prepare_steering(self._steering([0.0] * len(self.features), range(len(self.features))))
        self._plan = copy.deepcopy(plan)  # the model keeps its own
        self._columns = {  # of each SAE the numbers of the values, in the order of its table: by latent
            number: torch.tensor(sorted(self._members(number), key=lambda i: self.features[i][1]))
            for number in sorted({sae for sae, _ in self.features})
        }

    @property
    def steered_model(self) -> SaePreTrainedModel:
        return self._held[0]

    def _members(self, number: int) -> list[int]:
        return [i for i, (sae, _) in enumerate(self.features) if sae == number]

    def _steering(self, values: Sequence[float], which: Sequence[int]) -> Steering:
        edits = []
        for i in which:
            sae, feature = self.features[i]
            op = "direction" if self.form == "direction" else "add"
            edits.append(FeatureEdit(sae, feature, op, values[i], self.unit))
            if self.form == "code":
                edits.append(FeatureEdit(sae, feature, "at_least", 0.0))
        return replace(self.scope, edits=edits)

    def steering(self) -> Steering:
        """The values as a plain `Steering`, without those that are 0."""
        numbers = self.values.tolist()
        return self._steering(numbers, [i for i, number in enumerate(numbers) if number != 0])

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Set all values to 0 but for so many that write most (`lengths`)."""
        least = self.lengths(self.values).argsort(descending=True, stable=True)[count:]
        self.values[least] = 0.0

    def lengths(self, values: Tensor) -> Tensor:
        """(m,): the length of what each value writes, of latents that were 0: in norms of the hidden state, or in the
        units of what the SAE decodes."""
        if self.unit == "norm":
            return values.abs()
        each = []
        for sae, feature in self.features:
            module = self.steered_model.saes[sae]
            length = module.W_dec[feature].detach().norm()
            each.append(length * module.feature_max[feature] if self.unit == "max" else length)
        return values.abs() * torch.stack(each).to(values)

    def plan(self, sign: float = 1.0) -> SteeringPlan:
        """The steering of `sign` times the values, compiled; gradients reach the values. Good until the next call."""
        unit = UNITS.index(self.unit)
        for number, columns in self._columns.items():
            own = self._plan.saes[number]
            table = own.direct_values if self.form == "direction" else own.stages[0].shift
            row = sign * self.values[columns.to(self.values.device)]
            row = row.to(table.values.dtype).to(table.values.device)[None]  # (1, m of this SAE)
            table.values = torch.stack([row if n == unit else torch.zeros_like(row) for n in range(len(UNITS))])
        return self._plan

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response: Tensor,
        prompt_lengths: Tensor,
        sign: float | None = 1.0,
    ) -> Tensor:
        """Log-probabilities of responses under the steered model, (batch,), as `response_log_probs`.

        Args:
            input_ids, attention_mask: (batch, seq), padded on the right.
            response: (batch, seq) bool.
            prompt_lengths: (batch,) int64 tokens before the response.
            sign: of the values; None for the unsteered model.
        """
        device = self.steered_model.device
        ids, mask = input_ids.to(device), attention_mask.to(device)
        options: dict[str, Any] = {"steering": False}
        if sign is not None:
            zeros = torch.zeros_like(prompt_lengths)
            rows = torch.stack([zeros, zeros, prompt_lengths], -1).to(device)
            options = {"steering": self.plan(sign), "steering_rows": rows}
        logits = self.steered_model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        return response_log_probs(logits, ids, response.to(device))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient, and no module drops anything; afterwards all is as it was."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in asked:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
