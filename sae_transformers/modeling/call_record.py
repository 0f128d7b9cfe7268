"""State of one forward pass. It lives in a per-thread slot while that pass runs and nowhere else.

Hooks find it there. A state on the model itself gave wrong results as soon as two threads ran one model, and a state
left behind steered the next call of the bare base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .features_in_graph import FeatureGraph
from .gate_run import GateRun
from .outputs import SparseFeatures
from .penalty_costs import PenaltyOfCall
from .steering_plan import SteeringPlan


class SiteResult(NamedTuple):
    """What an SAE hands back to its hook; each field is None where there is nothing to do.

    delta: (batch or 1, seq or 1, d_out), to be added. replacement: (batch, seq, d_out), in place of the hidden state.
    replace_rows: (batch,) bool, the rows to be replaced; None for all. opened: (batch, seq) bool, the tokens that any
    gate lets through; None for all. linked: (batch, seq, d_out), the hidden state with latents in its graph, to be
    steered in place of the base's. penalties: number of each -> its cost at each token, (batch, seq).
    """

    delta: Tensor | None
    replacement: Tensor | None
    replace_rows: Tensor | None
    features: SparseFeatures | Tensor | None
    losses: dict[str, Tensor] | None
    opened: Tensor | None = None
    linked: Tensor | None = None
    penalties: dict[int, Tensor] | None = None

    def part(self, place: int, places: int) -> SiteResult:
        """Of an SAE that writes to so many places what it adds to one: (batch or 1, seq or 1, d_out / places)."""
        return self if self.delta is None else self._replace(delta=self.delta.chunk(places, -1)[place])

    def applied(self, hidden: Tensor) -> Tensor:
        """The hidden state (batch, length, d) that this makes of `hidden`, in the SAE's precision and then rounded
        once; `hidden` itself where nothing changes."""
        if self.delta is None and self.replacement is None:
            return hidden
        edited = hidden
        if self.replacement is not None:
            edited = self.replacement
            if self.replace_rows is not None:
                edited = torch.where(self.replace_rows[:, None, None], edited, hidden.to(edited.dtype))
        if self.delta is not None:
            edited = edited.to(self.delta.dtype) + self.delta
        return edited.to(device=hidden.device, dtype=hidden.dtype)


class StopForward(Exception):
    """Raised by the last needed hook to end the forward pass; always caught by the model that armed it."""


@dataclass(frozen=True, eq=False)
class CallRequest:
    """What the hooks of one forward pass are to do.

    batch_size, length: of the tokens at hand.
    plan, rows, mask: steering, (batch,) table rows or None for one row, (batch, length) bool or None for all tokens.
    features: SAE number -> None for all latents or (m,) indices; absent SAEs are not encoded.
    pre_activations: report pre-activations in place of activations.
    keep_inputs: whether the hidden states that SAEs read are kept.
    losses: names of the loss terms to compute; `detach`: without a gradient for the base.
    concept_targets: SAE number -> (batch, length, n_concepts).
    stop_after: the pass ends when these SAEs are done; empty: it does not.
    gates: on which the steering depends.
    graph: which latents are in the graph of the outputs.
    penalties: SAE number -> penalties on its features.
    """

    batch_size: int
    length: int
    plan: SteeringPlan | None = None
    rows: Tensor | None = None
    mask: Tensor | None = None
    features: Mapping[int, Tensor | None] = field(default_factory=dict)
    pre_activations: bool = False
    keep_inputs: bool = False
    losses: tuple[str, ...] = ()
    detach: bool = True
    concept_targets: Mapping[int, Tensor] = field(default_factory=dict)
    stop_after: frozenset[int] = frozenset()
    gates: GateRun | None = None
    graph: FeatureGraph | None = None
    penalties: Mapping[int, tuple[PenaltyOfCall, ...]] = field(default_factory=dict)

    def concerns(self, number: int) -> bool:
        """Whether SAE `number` has anything to do in this pass."""
        return self.keep_inputs or bool(self.stop_after) or self.works_at(number)

    def works_at(self, number: int) -> bool:
        """Whether SAE `number` has to run, and not only to be seen."""
        steered = self.plan is not None and number in self.plan.saes
        read = self.gates is not None and bool(self.gates.read_at(number))
        edited = self.graph is not None and self.graph.works_at(number, self.features)
        wanted = number in self.features or number in self.penalties or bool(self.losses)
        return steered or read or edited or wanted

    def steered_columns(self) -> Tensor | None:
        """The columns with a steered token, (c,) int64, where they are less than half of all; None for all columns."""
        if self.mask is None or self.length == 1 or torch.compiler.is_compiling():
            return None
        return self._columns if 2 * len(self._columns) < self.length else None

    @cached_property
    def _columns(self) -> Tensor:
        mask: Any = self.mask
        return mask.any(0).nonzero()[:, 0]

    def shaped(self, hidden: Tensor) -> Tensor:
        """(batch, length, d), whatever the module made of it (OPT flattens tokens before its MLP)."""
        return hidden if hidden.ndim == 3 else hidden.view(self.batch_size, self.length, hidden.shape[-1])

    def edit(self, hidden: Tensor, result: SiteResult) -> Tensor:
        """The hidden state (batch, length, d) that an SAE's result makes of `hidden`, where tokens are steered;
        `hidden` itself where nothing changes."""
        hidden = hidden if result.linked is None else result.linked
        edited = result.applied(hidden)
        for mask in (self.mask, result.opened):
            if edited is not hidden and mask is not None:
                edited = torch.where(mask.unsqueeze(-1).to(hidden.device), edited, hidden)
        return edited


class CallRecord:
    """What hooks have done and collected in one forward pass, by SAE number.

    request: what they are to do.
    read: hidden state where the SAE reads, if it writes elsewhere.
    features, inputs, losses: what was reported.
    penalties: number of each -> its cost at each token, (batch, seq).
    results: of SAEs that write to several places, for those after the first.
    finished: SAEs that are done.
    recomputing: whether gradient checkpointing runs a part of the pass again.
    """

    def __init__(self, request: CallRequest) -> None:
        self.request = request
        self.read: dict[int, Tensor] = {}
        self.features: dict[int, SparseFeatures | Tensor] = {}
        self.inputs: dict[int, Tensor] = {}
        self.losses: dict[int, dict[str, Tensor]] = {}
        self.penalties: dict[int, Tensor] = {}
        self.results: dict[int, SiteResult] = {}
        self.finished: set[int] = set()
        self.recomputing = False

    @property
    def is_complete(self) -> bool:
        """Whether the pass may end here."""
        stop_after = self.request.stop_after
        return bool(stop_after) and not self.recomputing and stop_after <= self.finished

    def missed(self, numbers: Iterable[int]) -> list[int]:
        """SAEs that were needed but whose hook never ran."""
        request = self.request
        return [n for n in numbers if (request.keep_inputs or request.works_at(n)) and n not in self.finished]


class RecordSlot:
    """Where the hooks of one model look for the record of the pass that is running."""

    def __init__(self) -> None:
        self.local = threading.local()
        # dynamo cannot trace a thread-local; a compiled model is traced and run with this one.
        self.shared: CallRecord | None = None

    def get(self) -> CallRecord | None:
        if torch.compiler.is_compiling():
            return self.shared
        return getattr(self.local, "record", None)

    def swap(self, record: CallRecord | None) -> CallRecord | None:
        """Put a record in place and return the one that was there."""
        if torch.compiler.is_compiling():
            previous, self.shared = self.shared, record
            return previous
        previous = getattr(self.local, "record", None)
        self.local.record = record
        return previous

    def recompute_contexts(self) -> tuple[Any, Any]:
        """`context_fn` of `torch.utils.checkpoint`: the recomputation sees the record of its own forward pass, in
        whichever thread autograd runs it."""
        return _nothing(), _Recompute(self, self.get())

    def __deepcopy__(self, memo: dict) -> RecordSlot:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


@contextmanager
def _nothing():
    yield


class _Recompute:
    """A context that can be entered any number of times: with `retain_graph` a region is recomputed repeatedly."""

    def __init__(self, slot: RecordSlot, record: CallRecord | None) -> None:
        self.slot, self.record = slot, record

    def __enter__(self) -> None:
        if self.record is not None:
            self.record.recomputing = True
        self.previous = self.slot.swap(self.record)

    def __exit__(self, *exc: object) -> None:
        self.slot.swap(self.previous)
