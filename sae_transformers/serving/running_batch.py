"""Texts that are being written together: one cache, one row a text, each with a steering of its own.

Rows join and leave between two tokens. All are aligned at the right, so a row that joins, and a batch that is shorter
than it, are padded on the left; the mask hides the padding, positions count from a row's first real token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ..modeling import Steering
from ..modeling.base_arguments import continues
from ..modeling.gate_plan import Condition
from ..modeling.gate_run import GateMemory
from ..modeling.steering_plan import BoundSteering, SteeringPlan


class RunningBatch:
    """The state of a model that writes several texts.

    Args:
        model: a `SaeForCausalLM` in eval mode.

    Raises:
        ValueError: a base whose state is no `DynamicCache` (RWKV, MiniMax).

    Between calls with n rows and L columns: `mask` is (n, L) int64, 0 at padding; `places` (n, 3) int64 as
    `steering_rows_for` makes them: row of the steering's tables, first real column, end of the prompt.
    """

    def __init__(self, model: Any) -> None:
        if not model.lm._supports_default_dynamic_cache():  # a state of its own, which rows would not share
            raise ValueError(
                f"Texts are written together in a `DynamicCache` of transformers. Received: {type(model.lm).__name__} "
                f"(model_type={model.lm.config.model_type!r}), which keeps a state of its own. Use `generate`."
            )
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        # Whether rows can join others: always, but for models whose cache is more than keys and values.
        self.joins = continues(self._empty_cache())
        self.clear()

    def _empty_cache(self) -> Any:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def clear(self) -> None:
        """Forget all rows, and what they hold in memory."""
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.places = torch.zeros(0, 3, dtype=torch.long, device=self.device)
        self.steerings: list[Steering] = []  # different ones; `places[:, 0]` are indices of it
        self._plan: SteeringPlan | None = None  # theirs, held here: the model keeps those of its last calls only
        self._gates = GateRows()

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        """Columns of each row, padding included."""
        return self.mask.shape[1]

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values."""
        layers = () if self.cache is None else self.cache.layers
        tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def fits(self, steerings: Sequence[Steering]) -> bool:
        """Whether rows of these steerings can be in one batch with those that are there."""
        if len(self) and not self.joins:
            return False
        together = list(dict.fromkeys([*self.steerings, *steerings]))
        try:
            self.model.prepare_steering(together)
        except (ValueError, RuntimeError):  # each was checked alone: they cannot be combined, as two re-weightings
            return False
        return True

    @torch.no_grad()
    def join(
        self,
        prompts: Sequence[Sequence[int]],
        steerings: Sequence[Steering],
        written: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Read prompts, one new row each, after the rows that are there.

        Args:
            prompts: token ids of each.
            steerings: of each.
            written: tokens that follow each prompt, of rows that were here before; by default none.

        Returns:
            logits, (n_new, vocabulary) float32, of each prompt's next token.
        """
        rows = [[*prompt, *more] for prompt, more in zip(prompts, written or [()] * len(prompts), strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        first = torch.tensor([width - len(row) for row in rows], device=self.device)
        ends = first + torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = (torch.arange(width, device=self.device) >= first[:, None]).long()
        known = list(dict.fromkeys([*self.steerings, *steerings]))
        table = torch.tensor([known.index(steering) for steering in steerings], device=self.device)
        places = torch.stack([table, first, ends], dim=-1)
        cache = self._empty_cache()
        plan = self.model.prepare_steering(known) if any(known) else None
        gates = GateRows()
        logits = self._run(ids, mask, cache, plan, places, gates)
        if self.cache is None:
            self._gates = gates
            self.cache, self.mask, self.places = cache, mask, places
            self.steerings, self._plan = known, plan
            return logits
        try:
            shifts = max(0, width - self.mask.shape[1]), max(0, self.mask.shape[1] - width)
            rows_of = len(self), len(prompts)
            self._gates = self._gates.joined(gates, rows_of, shifts, max(width, self.mask.shape[1]))
            self.cache = _joined(self.cache, cache)
            self.mask = torch.cat([F.pad(m, (by, 0)) for m, by in zip((self.mask, mask), shifts, strict=True)])
            moved = [p + p.new_tensor([0, by, by]) for p, by in zip((self.places, places), shifts, strict=True)]
            self.places = torch.cat(moved)
        except BaseException:  # out of memory half way: what is left fits nothing
            self.clear()
            raise
        self.steerings, self._plan = known, plan
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; logits (n, vocabulary) float32 of the next ones."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        self.mask = F.pad(self.mask, (0, 1), value=1)
        if self._plan is None and any(self.steerings):
            self._plan = self.model.prepare_steering(self.steerings)
        return self._run(ids, self.mask, self.cache, self._plan, self.places, self._gates)

    def _run(
        self, ids: Tensor, mask: Tensor, cache: Any, plan: SteeringPlan | None, places: Tensor, gates: GateRows
    ) -> Tensor:
        options: dict[str, Any] = {"steering": False}
        memory = gates.memory(plan, len(ids), mask.shape[1] - ids.shape[1])
        if plan is not None:
            options = {"steering": BoundSteering(plan, int(places[:, 2].max()), memory), "steering_rows": places}
        if "position_ids" in self.model.base_arguments.named:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
        )
        gates.take()
        return output.logits[:, -1].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows at once, and the columns that none of the kept ones uses."""
        if not rows:
            return self.clear()
        try:
            self._select(torch.tensor(rows, device=self.device))
        except BaseException:  # out of memory half way: what is left fits nothing
            self.clear()
            raise
        return None

    def _select(self, index: Tensor) -> None:
        self.mask, self.places = self.mask[index], self.places[index]
        unused = int(self.mask.argmax(-1).min()) if self.joins else 0
        self.mask, self.places = self.mask[:, unused:], self.places - self.places.new_tensor([0, unused, unused])
        for layer in self.cache.layers:
            layer.batch_select_indices(index)
            if unused and layer.is_initialized:
                _drop_columns(layer, unused)
        self._gates.select(index, unused)
        used = sorted(set(self.places[:, 0].tolist()))
        if len(used) < len(self.steerings):
            self._plan = None
        self.steerings = [self.steerings[number] for number in used]
        self.places[:, 0] = torch.tensor([used.index(n) for n in self.places[:, 0].tolist()], device=self.device)


def _joined(cache: Any, other: Any) -> Any:
    """One cache of the rows of both. Layers are (rows, heads, columns, d), the last columns of all rows aligned."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        if not added.is_initialized:
            continue
        width = max(layer.keys.shape[-2], added.keys.shape[-2])
        for name in ("keys", "values"):
            parts = [F.pad(t, (0, 0, width - t.shape[-2], 0)) for t in (getattr(layer, name), getattr(added, name))]
            setattr(layer, name, torch.cat(parts))
        if hasattr(layer, "cumulative_length"):  # a sliding window keeps the last of so many columns
            layer.cumulative_length = max(layer.cumulative_length, added.cumulative_length)
    return cache


def _drop_columns(layer: Any, count: int) -> None:
    """Forget the first `count` columns that the layer has seen."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length -= count
        stays = min(layer.cumulative_length, layer.keys.shape[-2])
    else:
        stays = layer.keys.shape[-2] - count
    layer.keys, layer.values = layer.keys[..., -stays:, :].clone(), layer.values[..., -stays:, :].clone()


class GateRows:
    """What gates remember of rows that come and go: the values they compare at every column, whatever the plan is.

    seen: condition -> (n, columns or fewer) values; those of a row whose steering has no such condition do not matter,
    nor do columns after the prompt where the prompt decides.
    """

    def __init__(self) -> None:
        self.seen: dict[Condition, Tensor] = {}
        self._memory: GateMemory | None = None  # of the last pass, as long as rows and plan are the same
        self._plan: SteeringPlan | None = None

    def memory(self, plan: SteeringPlan | None, rows: int, past: int) -> GateMemory | None:
        """For a pass of `rows` rows over `past` columns; None where no gate remembers anything."""
        if plan is None or plan.gates is None or not plan.gates.remembers:
            self._memory = self._plan = None
            return None
        if plan is not self._plan or self._memory is None:
            self._memory, self._plan = GateMemory(), plan
            for number, condition in enumerate(plan.gates.conditions):
                if condition.remembers and past:
                    known = self.seen.get(condition)
                    self._memory.values[number] = torch.zeros(rows, past) if known is None else _as_wide(known, past)
        return self._memory

    def take(self) -> None:
        """After a pass: keep what it has read."""
        if self._memory is None or self._plan is None or self._plan.gates is None:
            self.seen = {}
            return
        conditions = self._plan.gates.conditions
        self.seen = {conditions[number]: values for number, values in self._memory.values.items()}

    def select(self, rows: Tensor, unused: int) -> None:
        """Keep some rows, without their first `unused` columns."""
        self._memory = self._plan = None
        self.seen = {name: known[rows.to(known.device)][:, unused:] for name, known in self.seen.items()}

    def joined(self, other: GateRows, rows: tuple[int, int], shifts: tuple[int, int], width: int) -> GateRows:
        """The rows of both, of which there are `rows`, each after so many columns of padding, `width` together."""
        found = GateRows()
        for name in {*self.seen, *other.seen}:
            parts = []
            for one, count, by in zip((self, other), rows, shifts, strict=True):
                known = one.seen.get(name)
                if known is None:
                    known = next(s.seen[name] for s in (self, other) if name in s.seen).new_zeros(count, 0)
                parts.append(_as_wide(F.pad(known, (by, 0)), width))
            found.seen[name] = torch.cat(parts)
        return found


def _as_wide(values: Tensor, width: int) -> Tensor:
    return F.pad(values, (0, width - values.shape[1]))
