"""Time and memory of the calls of a model, of its bare base, and of both in turn."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..latents.context import context_length
from ..modeling.base_arguments import cache_argument, cache_of
from .journal import Watch, result_of
from .suites.settings import SpeedSettings

if TYPE_CHECKING:
    from ..modeling import SaeForCausalLM, Steering

BASE, WRAPPED, STEERED, FEATURES = "base", "wrapped", "steered", "output_features"


def model_calls(
    model: SaeForCausalLM, settings: SpeedSettings, steering: Steering | None
) -> dict[str, dict[str, Callable[[], object]]]:
    """`forward`, `generate` and `decode` -> what is called for each method that can do it, on random tokens.

    Raises:
        ValueError: more tokens than the model's context holds.
    """
    prompt_tokens, new_tokens = settings.prompt_tokens, settings.generated_tokens
    limit = context_length(model)
    if limit and prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"Prompt and new tokens must fit the model's context of {limit}. "
            f"Received: prompt_tokens={prompt_tokens!r}, generated_tokens={new_tokens!r}."
        )
    draw, size = torch.Generator().manual_seed(settings.seed), (settings.batch_size, prompt_tokens)
    ids = torch.randint(model.config.get_text_config().vocab_size, size, generator=draw).to(model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, dict[str, Any]] = {BASE: {}, WRAPPED: {"steering": False}}
    if steering:
        options[STEERED] = {"steering": steering}
    options[FEATURES] = {"steering": False, "output_features": True}
    calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "generate": {}, "decode": {}}
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    for name, extra in options.items():
        runner = model.lm if name == BASE else model
        calls["forward"][name] = partial(runner, **given, use_cache=False, **extra)
        if name != FEATURES:
            calls["generate"][name] = partial(_generate, runner, {**given, **lengths, **extra})
        if name in (BASE, FEATURES):
            calls["decode"][name] = partial(_decode, runner, given, new_tokens, extra)
    return calls


class Time(NamedTuple):
    """seconds: by the clock. cost: what is compared, the process's own CPU time on a CPU, else the seconds."""

    seconds: float
    cost: float


def timed(
    model: Any, calls: Mapping[str, Callable[[], object]], repeats: int, watch: Watch, what: Any
) -> dict[str, list[Time]]:
    """Time of each repeat of each call.

    Args:
        watch: is told of each repeat; keeps the times of all calls together, since they are of one process.
        what: the times depend on beside the journal's subject, as JSON.
    """
    known = True

    def measure() -> dict[str, list[Time]]:
        nonlocal known
        known = False
        return _times(model, calls, repeats, watch)

    found = result_of(watch.journal, lambda: [*machine(model), what], measure)
    if known:
        watch.done(repeats)
    return {name: [Time(*one) for one in spent] for name, spent in found.items()}


def _times(model: Any, calls: Mapping[str, Callable[[], object]], repeats: int, watch: Watch) -> dict[str, list[Time]]:
    times: dict[str, list[Time]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-1, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with _bare(model, name == BASE):
                _wait(model)
                begun, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                _wait(model)
                seconds = time.perf_counter() - begun
                spent = Time(seconds, time.process_time() - cpu if model.device.type == "cpu" else seconds)
            if turn >= 0:  # the first one warms up
                times[name].append(spent)
        if turn >= 0:
            watch.done(1)
    return times


@contextmanager
def _bare(model: Any, wanted: bool) -> Iterator[None]:
    """The base without the model's hooks, as `unwrap` leaves it, and then with them again."""
    if wanted:
        model.unwrap()
    try:
        yield
    finally:
        if wanted:
            model.rewrap()


def _generate(runner: Any, given: Mapping[str, Any]) -> None:
    pad = runner.generation_config.pad_token_id
    runner.generate(**given, pad_token_id=0 if pad is None else pad)


def _decode(model: Any, given: Mapping[str, Any], steps: int, options: Mapping[str, Any]) -> None:
    ids, mask, past = given["input_ids"], given["attention_mask"], None
    for _ in range(steps):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): past},
            **options,
        )
        ids, past = out.logits[:, -1:].argmax(-1), cache_of(out)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def size_in_bytes(module: Any) -> int:
    """Of the parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_memory(model: Any, calls: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """Bytes that each call takes beyond what is loaded, on a GPU; elsewhere nothing."""
    if model.device.type != "cuda":
        return {}
    found = {}
    for name, call in calls.items():
        with _bare(model, name == BASE):
            before = torch.cuda.memory_allocated(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
            call()
            found[name] = torch.cuda.max_memory_allocated(model.device) - before
    return found


def machine(model: Any) -> list[Any]:
    """What times depend on beside the model."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor()
    return [platform.node(), str(model.device), device, torch.get_num_threads()]
