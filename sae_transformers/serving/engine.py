"""The thread that writes all answers: requests join and leave one running batch between two tokens."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modeling import Steering
from .answer_text import StopTexts, TokensToText
from .errors import RequestError
from .memory import HEADROOM, SHARE, CacheBudget, free_bytes, give_back, is_out_of_memory, no_memory
from .running_batch import RunningBatch
from .sampling import Sampling, TokenChoice, choose_tokens, stop_tokens

logger = logging.getLogger(__name__)

PROMPT_TOKENS_AT_ONCE = 4096  # of prompts that are read together, padding included
MAX_WAITING = 1024

Report = Callable[["Answer", str, "str | None"], object]


class Answer:
    """A text that is being written.

    Args:
        prompt: token ids, one at least.
        report: called in the engine's thread with the answer, the next piece of text and, at its end, why it ended:
            `stop`, `length` or `error`.
        number: of the answers to one request.

    `tokens` are those written so far, `error` what went wrong.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        steering: Steering,
        sampling: Sampling,
        tokenizer: Any,
        report: Report,
        number: int = 0,
    ) -> None:
        self.prompt, self.steering, self.sampling, self.number = list(prompt), steering, sampling, number
        self.choice = TokenChoice(sampling, prompt, number)
        self.tokens: list[int] = []
        self.cancelled = self.has_ended = False
        self.error: RequestError | None = None
        self._report = report
        self._text = TokensToText(tokenizer)
        self._stop = StopTexts(sampling.stop)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what is written."""
        return len(self.prompt) + len(self.tokens)

    def cancel(self) -> None:
        """No more is wanted: the engine drops the answer before the next token."""
        self.cancelled = True

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token and report the text that it makes certain; whether the answer ended."""
        self.tokens.append(token)
        reason = "stop" if token in ends else None
        piece = self._stop.push("" if reason else self._text.push(token))
        if reason is None and not self._stop.found and len(self.tokens) >= self.sampling.max_tokens:
            reason = "length"
        if self._stop.found:
            reason = "stop"
        elif reason is not None:
            piece += self._stop.push(self._text.finish()) + self._stop.finish()
            reason = "stop" if self._stop.found else reason
        self.has_ended = reason is not None
        if piece or reason:
            self._report(self, piece, reason)
        return self.has_ended

    def fail(self, error: RequestError) -> None:
        self.error, self.has_ended = error, True
        self._report(self, "", "error")


class Engine:
    """Writes answers with one model.

    Args:
        model: a `SaeForCausalLM` in eval mode.
        tokenizer: the model's.
        max_concurrent: answers that are written together; the others wait.
        cache_bytes: memory for their keys and values; by default four fifths of what is free now.

    A row joins where there is room for it. Where the batch has grown out of its room, or a pass runs out of memory all
    the same, the youngest rows are set aside: they wait as the first, and go on, with what they have written read
    again, when others have ended. Only what has no room even alone fails.
    """

    def __init__(self, model: Any, tokenizer: Any, max_concurrent: int = 32, cache_bytes: int | None = None) -> None:
        if max_concurrent < 1:
            raise ValueError(f"`max_concurrent` must be at least 1. Received: max_concurrent={max_concurrent!r}.")
        self.batch = RunningBatch(model)
        self.max_concurrent = max_concurrent
        self.most_rows = max_concurrent  # fewer after running out of memory; one more for each row that leaves
        free = free_bytes(self.batch.device) if cache_bytes is None else None
        self.budget = CacheBudget(cache_bytes if free is None else int(SHARE * free))
        self.ends = stop_tokens(model.generation_config, tokenizer)
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.steps = 0  # forward passes so far
        self._pass_began: float | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def blocked_s(self) -> float:
        """Seconds since the pass that is at work began; 0 where none is."""
        began = self._pass_began
        return 0.0 if began is None else time.monotonic() - began

    def stop_soon(self) -> None:
        """End after the token that is being written; takes no lock, so that a signal's handler may call it."""
        self._stopping = True

    def stop(self) -> None:
        """Give up all answers and end the thread."""
        self.stop_soon()
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Write these as soon as there is room.

        Raises:
            RequestError: too many wait already, or the engine has ended.
        """
        with self._changed:
            if self._stopping or not self.is_alive:
                raise RequestError("The server is stopping.", code="stopping", status=503)
            if self.waiting and len(self.waiting) + len(answers) > MAX_WAITING:
                raise RequestError(f"{len(self.waiting)} answers wait already.", code="queue_full", status=429)
            self.waiting.extend(answers)
            self._changed.notify()

    def _run(self) -> None:
        told = RequestError("The server is stopping.", code="stopping", status=503)
        try:
            self._write()
        except Exception as error:  # a fault of the engine itself: nobody may wait for it for ever
            told = _told(error)
        with self._changed:
            self._stopping = True
            left, self.waiting = [*self.running, *self.waiting], deque()
        self.running = []
        self.batch.clear()
        for answer in left:
            answer.fail(told)

    def _write(self) -> None:
        """Write answers until the engine is stopped."""
        while True:
            with self._changed:
                while not (self.waiting or self.running or self._stopping):
                    self._pass_began = None
                    self._changed.wait()
                if self._stopping:
                    return
                self.waiting = deque(answer for answer in self.waiting if not answer.cancelled)
            self._pass_began = time.monotonic()
            self._guarded(self._step)
            self._pass_began = time.monotonic()
            if joining := self._joining():
                self._guarded(lambda joining=joining: self._join(joining), joining)

    def _joining(self) -> list[Answer]:
        """The first of those that wait, as many as there is room for; one that does not fit waits for an empty
        batch, and those behind it wait with it."""
        with self._changed:
            first = list(itertools.islice(self.waiting, max(0, self.most_rows - len(self.running))))
        if not first:
            return []
        widths = list(itertools.accumulate((answer.length for answer in first), max))
        room = sum(width * count <= PROMPT_TOKENS_AT_ONCE for count, width in enumerate(widths, 1))
        first = first[: max(1, room) if self.batch.joins else 1]
        held = sum(self._is_room(count, width) for count, width in enumerate(widths[: len(first)], 1))
        first = first[: held if self.running else max(1, held)]
        if not first:
            return []
        if not self.batch.fits([answer.steering for answer in first]):
            ends = range(1, len(first) + 1)
            fitting = itertools.takewhile(lambda end: self.batch.fits([a.steering for a in first[:end]]), ends)
            first = first[: max(fitting, default=0)]
            if not first and not self.running:  # not even alone
                with self._changed:
                    alone = self.waiting.popleft()
                alone.fail(RequestError("The steering does not fit the model.", "steering"))
        with self._changed:  # others may have come behind them
            for _ in first:
                self.waiting.popleft()
        return first

    def _is_room(self, count: int, width: int) -> bool:
        """Whether so many rows of that width can join those that are there."""
        return self.budget.holds(len(self.running) + count, max(self.batch.columns, width) + HEADROOM)

    def _make_room(self) -> None:
        """Set the youngest rows aside until there is room for one more token of each that stays."""
        stay = len(self.running)
        while stay > 1 and not self.budget.holds(stay, self.batch.columns + 1):
            stay -= 1
        if stay < len(self.running):
            self._set_aside(self.running[stay:])
            self._keep(list(range(stay)))
        if stay == 1 and not self.budget.holds(1, self.batch.columns + 1):
            (alone,) = self.running
            self._keep([])
            alone.fail(no_memory(f"{alone.length} tokens have no room"))

    def _set_aside(self, answers: Sequence[Answer]) -> None:
        with self._changed:
            self.waiting.extendleft(reversed(answers))

    def _guarded(self, action: Callable[[], None], joining: Sequence[Answer] = ()) -> None:
        """Run one pass; if it fails, so do the answers it was for: all of the batch, if that is no longer whole.

        For want of memory, they are set aside instead, and fewer are tried; but the last one fails.
        """
        rows = len(self.running) + len(joining)
        try:
            action()
            return
        except Exception as error:
            lacks_memory = is_out_of_memory(error)
            told = None if lacks_memory and rows > 1 else _told(error)
        failed = list(joining)
        if not joining or len(self.batch) != len(self.running) or any(answer in self.running for answer in joining):
            left = (answer for answer in joining if answer not in self.running and not answer.has_ended)
            failed = [*self.running, *left]
            self.running = []
            self.batch.clear()
        if lacks_memory:
            give_back(self.batch.device)
        if told is None:
            self.most_rows = max(1, len(self.running) + len(failed) // 2)
            logger.warning("No memory for %d answers together; for now there are %d at most", rows, self.most_rows)
            self._set_aside(failed)
            return
        for answer in failed:
            answer.fail(told)

    def _step(self) -> None:
        self._keep([row for row, answer in enumerate(self.running) if not answer.cancelled])
        self._make_room()
        if self.running:
            self.steps += 1
            logits = self.batch.step([answer.tokens[-1] for answer in self.running])
            self.budget.measure(self.batch)
            self._take(logits, self.running, first=0)

    def _join(self, joining: list[Answer]) -> None:
        self.steps += 1
        tokens = [answer.tokens for answer in joining]
        logits = self.batch.join([a.prompt for a in joining], [a.steering for a in joining], tokens)
        self.budget.measure(self.batch)
        first = len(self.running)
        self.running.extend(joining)
        self._take(logits, joining, first)

    def _take(self, logits: Tensor, answers: list[Answer], first: int) -> None:
        """Choose a token for each of `answers`, which are the rows of the batch from `first` on."""
        best = logits.argmax(-1, keepdim=True)
        is_sound = (logits.gather(-1, best) < torch.inf)[:, 0].tolist()  # NaN and infinity count as the largest
        sound = [row for row, fine in enumerate(is_sound) if fine]
        ended = {first + row for row, fine in enumerate(is_sound) if not fine}
        for answer in (answer for answer, fine in zip(answers, is_sound, strict=True) if not fine):
            told = f"The logits are not finite. Received: steering={answer.steering.to_json()[:300]}."
            answer.fail(RequestError(f"Is the steering too strong? {told}", "steering", "not_finite"))
        left = [answers[row] for row in sound]
        chosen = choose_tokens(
            logits[sound] if ended else logits,
            best[sound, 0].tolist(),
            [a.choice for a in left],
            [a.tokens for a in left],
        )
        for row, answer, token in zip(sound, left, chosen, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                if answer.take(token, self.ends):
                    ended.add(first + row)
            except Exception as error:  # of this answer's settings or text: the others go on
                answer.fail(_told(error))
                ended.add(first + row)
        self._keep([row for row in range(len(self.running)) if row not in ended])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self.running):
            self.most_rows = min(self.max_concurrent, self.most_rows + len(self.running) - len(rows))
            self.running = [self.running[row] for row in rows]
            self.batch.keep(rows)


def _told(error: Exception) -> RequestError:
    """What a client is told of a failure, which the log has in full."""
    logger.error("An answer failed", exc_info=error)
    if is_out_of_memory(error):
        return no_memory("it ran out")
    return RequestError("The model failed on this request.", code="model_failed", status=500)
