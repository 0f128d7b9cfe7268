"""The suite `speed`: what the SAEs of a model cost in time and memory, against the bare base, within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..modeling.base_arguments import cache_argument, cache_of
from .method_ids import MethodId, baseline_method
from .results import Measurement, SuiteResult, with_methods
from .suites.settings import SpeedSettings

if TYPE_CHECKING:
    from ..modeling import SaeForCausalLM, Steering

BASE, WRAPPED, STEERED, FEATURES = "base", "wrapped", "steered", "output_features"


@torch.no_grad()
def speed_suite(
    model: SaeForCausalLM,
    settings: SpeedSettings | None = None,
    *,
    steering: Steering | None = None,
    report: Callable[[int], object] | None = None,
) -> SuiteResult:
    """Time forward passes and generation of the bare base, the wrapped model, the steered one and one that reports
    its features.

    Methods are `base` (the base model with every hook removed), `wrapped` (no steering), `steered`, `output_features`.
    All of them run once in every repeat, in turn, so that a busy neighbour hits all alike; the fastest repeat of each
    counts.

    forward_, generate_, decode_tokens_per_s   of the fastest repeat; all of them are in the curve `repeats`
    forward_, generate_, decode_time_ratio     of the fastest repeats, over the base's: of the process's CPU time on a
                                               CPU, where a neighbour's load moves the clock, else by the clock
    sae_bytes, base_bytes                      of the parameters and buffers
    peak_bytes                                 that a forward pass takes beyond what is loaded, on a GPU

    `forward` passes a prompt without a cache. `decode` is greedy generation step by step, which `output_features`
    needs, since `generate` does not report features.

    Args:
        model: a `SaeForCausalLM`.
        settings: prompts are random tokens, whose texts do not matter.
        steering: the model's default by default. Without any, `steered` is left out.
        report: called with 1 after each repeat of all methods.

    Raises:
        ValueError: more tokens than the model's context holds.
    """
    start, settings = time.perf_counter(), settings or SpeedSettings()
    batch_size, prompt_tokens, repeats = settings.batch_size, settings.prompt_tokens, settings.repeats
    new_tokens, seed = settings.generated_tokens, settings.seed
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"Prompt and new tokens must fit the model's context of {limit}. "
            f"Received: prompt_tokens={prompt_tokens!r}, generated_tokens={new_tokens!r}."
        )
    steering = model.steering if steering is None else steering
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch_size, prompt_tokens), generator=draw).to(model.device)
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
    found: list[Measurement] = []
    rows: list[dict[str, Any]] = []
    for kind, some in calls.items():
        times = _timed(model, some, repeats, report)
        tokens = batch_size * (prompt_tokens if kind == "forward" else new_tokens)
        for name, spent in times.items():
            rows += [{"call": kind, "method": name, "repeat": i, **one._asdict()} for i, one in enumerate(spent)]
            speed = tokens / min(one.seconds for one in spent)
            found.append(Measurement(f"{kind}_tokens_per_s", speed, name, n=repeats, better="higher"))
        for name in [name for name in times if name != BASE]:
            ratio = min(one.cost for one in times[name]) / min(one.cost for one in times[BASE])
            found.append(Measurement(f"{kind}_time_ratio", ratio, name, n=repeats, better="lower"))
    saes = sum(_bytes(sae) for sae in model.saes)
    found += [
        Measurement("sae_bytes", saes, f"{len(model.saes)} SAEs", better="lower"),
        Measurement("base_bytes", _bytes(model.lm), BASE, better="lower"),
        *_peaks(model, calls["forward"]),
    ]
    record = {
        "batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
        "seed": seed, "steering": steering.to_dict() if steering else None, "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip
    notes = [
        "Speeds are of this machine, under whatever else ran on it; ratios within one run can be compared. On a CPU "
        "they are of the process's CPU time.",
        "Speeds of `generate` and `decode` count new tokens; the time includes the pass over the prompt.",
    ]
    if not steering:
        notes.append("No steering with an edit, the model's default or a given one: `steered` is not measured.")
    seconds = time.perf_counter() - start
    weights = MethodId("saes", f"{len(model.saes)} SAEs")
    methods = [baseline_method("base", BASE), weights, *(MethodId(name, name) for name in options if name != BASE)]
    found = with_methods(found, methods)
    return SuiteResult("speed", record, found, curves={"repeats": rows}, notes=notes, seconds=seconds)


class _Time(NamedTuple):
    """seconds: by the clock. cost: what is compared, the process's own CPU time on a CPU, else the seconds."""

    seconds: float
    cost: float


def _timed(
    model: Any, calls: Mapping[str, Callable[[], object]], repeats: int, report: Callable[[int], object] | None
) -> dict[str, list[_Time]]:
    """Time of each repeat of each call."""
    times: dict[str, list[_Time]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-1, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with _bare(model, name == BASE):
                _wait(model)
                begun, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                _wait(model)
                seconds = time.perf_counter() - begun
                spent = _Time(seconds, time.process_time() - cpu if model.device.type == "cpu" else seconds)
            if turn >= 0:  # the first one warms up
                times[name].append(spent)
        if report is not None and turn >= 0:
            report(1)
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


def _bytes(module: Any) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peaks(model: Any, calls: Mapping[str, Callable[[], object]]) -> Sequence[Measurement]:
    if model.device.type != "cuda":
        return ()
    found = []
    for name, call in calls.items():
        with _bare(model, name == BASE):
            before = torch.cuda.memory_allocated(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
            call()
            peak = torch.cuda.max_memory_allocated(model.device) - before
        found.append(Measurement("peak_bytes", peak, name, better="lower"))
    return found
