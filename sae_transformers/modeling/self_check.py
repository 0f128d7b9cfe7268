"""Identities that hold whatever the weights are, run on a user's own base: a release or a family that breaks one would
steer wrongly without a word."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .feature_edits import FeatureEdit
from .steering import Steering

POSITIONS: tuple[Any, ...] = ("all", "prompt", "generated", "last_prompt", [(1, 3), (-2, None)])
LENGTH, NEW = 6, 4


class CheckResult(NamedTuple):
    """One identity: whether it held, or why it was not looked at.

    name: what was compared. difference: the largest, relative to the largest value; None where nothing was compared.
    passed: None where it does not apply, for the reason in `note`.
    """

    name: str
    passed: bool | None
    difference: float | None
    note: str = ""


class CheckReport(NamedTuple):
    """What `model.check()` found; true if nothing failed."""

    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> list[CheckResult]:
        return [result for result in self.results if result.passed is False]

    def __bool__(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        words = {True: "yes", False: "NO", None: "-"}
        lines = []
        for result in self.results:
            size = "" if result.difference is None else f"{result.difference:.1e}"
            lines.append(f"{words[result.passed]:<4}{result.name:<44}{size:>8}  {result.note}".rstrip())
        return "\n".join(lines)


@torch.no_grad()
def check_model(model: Any, *, tolerance: float | None = None, seed: int = 0) -> CheckReport:
    """Run every identity on `model`, with random ids of its vocabulary; see `SaeForCausalLM.check`."""
    with _quiet(model):
        return CheckReport(tuple(_results(model, tolerance or _tolerance(model), seed)))


def _tolerance(model: Any) -> float:
    dtype = next((p.dtype for p in model.lm.parameters() if p.is_floating_point()), torch.float32)
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Evaluation mode, and no end token: all comparisons are of one length."""
    training, configs = model.training, [model.generation_config, model.lm.generation_config]
    ends = [config.eos_token_id for config in configs]
    model.eval()
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        for config, end in zip(configs, ends, strict=True):
            config.eos_token_id = end
        model.train(training)


def _results(model: Any, tolerance: float, seed: int) -> Iterator[CheckResult]:
    text = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    low = min(10, vocabulary // 2)
    ids = torch.randint(low, vocabulary, (2, LENGTH), generator=generator).to(model.device)
    if not len(model.saes):
        yield CheckResult("an SAE to check", None, None, "this model has none")
        return

    def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], allowed: float) -> CheckResult:
        try:
            one, other = ours().float(), theirs().float()
        except Exception as error:  # noqa: BLE001, whatever a base or a release raises is the finding
            return CheckResult(name, False, None, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        if one.shape != other.shape:
            return CheckResult(name, False, None, f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
        difference = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
        return CheckResult(name, difference <= allowed, difference)

    yield compare(
        "idle: the base's own logits, bit for bit",
        lambda: model(ids, steering=False).logits,
        lambda: model.lm(ids).logits,
        0.0,
    )
    plain = {"max_new_tokens": NEW, "do_sample": False}
    yield compare(
        "idle: the base's own tokens",
        lambda: model.generate(ids, steering=False, **plain),
        lambda: model.lm.generate(ids, **plain),
        0.0,
    )
    edits = [FeatureEdit(feature=0, op="direction", value=0.5, unit="norm"), FeatureEdit(feature=1, op="ablate")]

    def tokens_and_logits(**options: Any) -> Tensor:
        out = model.generate(ids, **plain, return_dict_in_generate=True, output_logits=True, **options)
        return torch.stack(out.logits)

    bare = compare(
        "", lambda: tokens_and_logits(steering=False), lambda: tokens_and_logits(steering=False, use_cache=False),
        tolerance,
    )  # fmt: skip
    for positions in POSITIONS:
        name = f"cached = uncached, positions={positions!r}"
        if not bare.passed:
            yield _unjudged(name, bare, "the base alone differs with its cache")
            continue
        steering = Steering(edits, positions=positions)

        def run(use_cache: bool, steering: Steering = steering) -> Tensor:
            return tokens_and_logits(steering=steering, use_cache=use_cache)

        yield compare(name, lambda run=run: run(True), lambda run=run: run(False), tolerance)
    pad = text.pad_token_id if isinstance(getattr(text, "pad_token_id", None), int) else 0
    padded = torch.cat([torch.full_like(ids[:, :3], max(pad, 0)), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], 1)

    def last(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True,
                             do_sample=False, **options)  # fmt: skip
        return out.logits[0]

    left, whole = {"input_ids": padded, "attention_mask": mask}, {"input_ids": ids}
    alone = compare("", lambda: last(left, steering=False), lambda: last(whole, steering=False), tolerance)
    for name, ours, theirs in (
        (
            "left padding = alone, steered",
            lambda: last(left, steering=Steering(edits, positions=[(1, None)])),
            lambda: last(whole, steering=Steering(edits, positions=[(1, None)])),
        ),
        (
            "left padding = alone, detect",
            lambda: model.detect(left, feature=0, pre_activations=True, skip_first=0).per_text,
            lambda: model.detect(ids, feature=0, pre_activations=True, skip_first=0).per_text,
        ),
    ):
        if alone.passed:
            yield compare(name, ours, theirs, tolerance)
        else:
            yield _unjudged(name, alone, "the base alone differs under padding")
    yield compare(
        "saved and loaded", lambda: _reloaded(model, ids), lambda: model(ids, steering=False).logits, tolerance
    )


def _unjudged(name: str, bare: CheckResult, why: str) -> CheckResult:
    """What an identity comes to that the base alone breaks; a base that raises is a failure."""
    if bare.difference is None:
        return CheckResult(name, False, None, bare.note)
    return CheckResult(name, None, bare.difference, why)


def _reloaded(model: Any, ids: Tensor) -> Tensor:
    """Unsteered logits of the model after its SAEs went to a file and back, on the same base."""
    trained = [(p, p.requires_grad) for p in model.lm.parameters()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base is not saved, and may have no name, is meant here
        scope, model.config.weights_scope = model.config.weights_scope, "sae"
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, base_model=model.lm)
            try:
                return loaded(ids, steering=False).logits
            finally:
                loaded.unwrap()
        finally:
            model.config.weights_scope = scope
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
