"""Whose steering is in force: `with model.steered(...)` blocks, by context and by thread, and running `generate`s."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .steered_tokens import GenerationState

# Blocks of this context (a thread, or a task of an event loop), (scope, block), in the order of entering.
_OPEN: ContextVar[tuple[tuple[Any, Block], ...]] = ContextVar("sae_steering_blocks", default=())
_GENERATOR = 0x20 | 0x200  # CO_GENERATOR, CO_ASYNC_GENERATOR


class Block:
    """A `with model.steered(...)` that is being executed."""

    def __init__(self, plan: Any, around: tuple[Block, ...]) -> None:
        self.plan = plan
        self.around = around
        self.thread = threading.get_ident()
        self.is_open = True
        # A generator has no context of its own: while it is suspended its block is not in force.
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__") in _OWN_MODULES:
            frame = frame.f_back
        self.frame = frame if frame.f_code.co_flags & _GENERATOR else None

    @property
    def in_force(self) -> bool:
        return self.is_open and (self.frame is None or self.frame.f_back is not None)


_OWN_MODULES = ("contextlib", __name__, __name__.replace("steering_scope", "steering_state"))


class SteeringScope:
    """Steering set by `with` blocks and by `generate`.

    A block belongs to the context that entered it: its thread, or its task where an event loop runs several. A thread
    without a block of its own (a worker of continuous batching) sees the block of the only other thread that has one;
    with several it is an error, never a guess.
    """

    def __init__(self) -> None:
        # Every open block, in the order of entering; replaced whole, so that readers need no lock.
        self.blocks: tuple[Block, ...] = ()
        self.latest: Any = None  # what a compiled forward pass sees
        self.lock = threading.Lock()
        self.local = threading.local()

    def current(self) -> Any:
        """The plan of the innermost block in force; None without one."""
        if torch.compiler.is_compiling():
            return self.latest
        if not self.blocks:
            return None
        if own := self._own():
            return own[-1].plan
        thread = threading.get_ident()
        others = [block for block in self.blocks if block.thread != thread and block.in_force]
        if not others:
            return None
        innermost = others[-1]
        strangers = [block for block in others[:-1] if block not in innermost.around]
        if strangers:
            threads = len({block.thread for block in others})
            who = f"{threads} threads steer" if threads > 1 else f"{len(strangers) + 1} tasks of another thread steer"
            raise RuntimeError(
                f"{who} this model with `with model.steered(...)` and this thread is none of them. Pass `steering=` "
                f"to the call."
            )
        return innermost.plan

    def _own(self) -> tuple[Block, ...]:
        return tuple(block for scope, block in _OPEN.get() if scope is self and block.in_force)

    @contextmanager
    def block(self, plan: Any) -> Iterator[None]:
        block = Block(plan, self._own())
        entry = (self, block)
        _OPEN.set((*_OPEN.get(), entry))
        with self.lock:
            self.blocks, self.latest = (*self.blocks, block), plan
        try:
            yield
        finally:
            block.is_open = False
            block.frame = None
            _OPEN.set(tuple(other for other in _OPEN.get() if other is not entry))
            with self.lock:
                self.blocks = tuple(other for other in self.blocks if other is not block)
                self.latest = self.blocks[-1].plan if self.blocks else None

    @property
    def generation(self) -> GenerationState | None:
        """The `GenerationState` of the `generate` that this thread is in."""
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
