"""Every suite, stopped at any of its parts, goes on to the result of an undisturbed run and runs no part twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.fairness.stereotypes import SentencePair
from sae_transformers.evaluation.journal import Journal
from sae_transformers.evaluation.results import SuiteResult
from sae_transformers.evaluation.settings import BootstrapSettings, GenerationSettings
from sae_transformers.evaluation.steering.scar import PromptRow
from sae_transformers.evaluation.steering_methods import DiffMean, Latents, Prompting
from sae_transformers.evaluation.suites import (
    SUITES,
    CapabilitySuite,
    DetectionSuite,
    FairnessSuite,
    InterventionSuite,
    ReceiptSuite,
    ReconstructionSuite,
    ScarSuite,
    SpeedSuite,
    SteeringSuite,
    Suite,
)
from sae_transformers.evaluation.suites.settings import (
    CapabilitySettings,
    DetectionSettings,
    FairnessSettings,
    InterventionSettings,
    ReceiptSettings,
    ScarSettings,
    SpeedSettings,
    SteeringSuiteSettings,
)
from sae_transformers.latents.settings import ReadingSettings
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_model, tiny_sae

TEXTS = word_texts(10, shortest=4)
READING, FEW = ReadingSettings(16, tokens_per_batch=40), BootstrapSettings(5)
GENERATION = GenerationSettings(3, batch_size=6, samples_per_prompt=2)


def lengths(texts: Any) -> list[float]:
    return [float(len(text)) for text in texts]


def capability() -> Suite:
    pytest.importorskip("lm_eval")
    return CapabilitySuite(TEXTS[:4], settings=CapabilitySettings(batch_size=2, bootstrap=FEW))


def detection() -> Suite:
    labels = [number % 2 for number in range(40)]
    texts = [f"{'w1 w2' if label else 'w5 w6'} w{20 + i} w9" for i, label in enumerate(labels)]
    settings = DetectionSettings((0, 1), (1, 3), reading=READING, bootstrap=FEW)
    return DetectionSuite(texts, labels, [(0, "sea"), (0, 5)], settings)


def fairness() -> Suite:
    pairs = [SentencePair(f"{text} w1 w5", f"{text} w2 w5") for text in TEXTS]
    settings = FairnessSettings(reading=READING, bootstrap=FEW)
    return FairnessSuite({"pairs": pairs}, TEXTS, (TEXTS, TEXTS[::-1]), settings)


def intervention() -> Suite:
    settings = InterventionSettings(3, intervention_samples=1, top_words=2, generation=GENERATION, bootstrap=FEW)
    return InterventionSuite(["w1 w2", "w9"], settings=settings)


def receipt() -> Suite:
    settings = ReceiptSettings(tokens_per_batch=40, generation=GENERATION)
    return ReceiptSuite(TEXTS[:6], TEXTS, lengths, TEXTS[6:], settings)


def scar() -> Suite:
    rows = [PromptRow("w1 w2", 0.1, "w3 w4"), PromptRow("w4", 0.97, "w6 w7")]
    settings = ScarSettings(
        (1.0,), continuation_tokens=2, stride=20, window=50, fdt_texts=1, rows_per_batch=1, bootstrap=FEW
    )
    return ScarSuite(rows, "sea", lengths, word_texts(2, 50, 55), settings)


def steering() -> Suite:
    methods = [Latents(strengths=(1.0,)), DiffMean(TEXTS[:4], TEXTS[4:8], (1.0,)), Prompting("w1")]
    settings = SteeringSuiteSettings(samples=1, tokens_per_batch=40, generation=GENERATION, bootstrap=FEW)
    return SteeringSuite(TEXTS[:4], methods, lengths, settings)


MADE: dict[str, Callable[[], Suite]] = {
    "reconstruction": lambda: ReconstructionSuite(TEXTS, READING, FEW),
    "detection": detection,
    "steering": steering,
    "receipt": receipt,
    "scar": scar,
    "intervention": intervention,
    "fairness": fairness,
    "capability": capability,
    "speed": lambda: SpeedSuite(SpeedSettings(4, 2, 2)),
}
# A task of lm-eval and the repeats of a call are parts of several reports.
OF_SEVERAL = ("capability", "speed")


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


def model() -> SaeForCausalLM:
    saes = [tiny_sae(layer=1, site="resid_post", concepts={"sea": 9}), tiny_sae(seed=3, layer=2, site="resid_post")]
    made = tiny_model(saes=saes, vocab_size=94).eval()
    made.steering = Steering([FeatureEdit(0, "sea", "direction", 1.0)])
    return made


@contextmanager
def counted(made: Any, most: int | None = None) -> Iterator[list[int]]:
    """Forward passes of the base, one a number; more than `most` are refused."""
    passes: list[int] = []

    def note(*_: Any) -> None:
        if most is not None and len(passes) >= most:
            raise AssertionError("a pass that was done before")
        passes.append(1)

    handle = made.lm.register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


def stopping(after: int) -> Callable[[int], None]:
    """Ends the run at the report that comes after so many."""
    calls: list[int] = []

    def report(_: int) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Stop

    return report


def without_times(result: SuiteResult) -> Any:
    """What two runs have in common; the suite `speed` only what it measured."""
    told = replace(result, seconds=0.0)
    if result.name == "speed":
        names = [(one.metric, one.method, one.n) for one in told.measurements]
        return replace(told, measurements=names, curves={})  # pyright: ignore[reportArgumentType]
    return told


SHARES = [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.0, 0.2, 0.8, 1.0))]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SUITES)
def test_a_stopped_suite_goes_on(name: str, share: float, tmp_path: Path) -> None:
    made, tokenizer = model(), word_tokenizer()
    tokenizer.padding_side = "left"
    suite = MADE[name]()
    told: list[int] = []
    with counted(made) as undisturbed:
        expected = suite(made, tokenizer, report=told.append)
    assert len(undisturbed) >= 4 and len(told) > 2
    after, path, again = round(share * (len(told) - 1)), tmp_path / "results.suite.partial.jsonl", list[int]()
    with counted(made) as first, pytest.raises(Stop):
        suite(made, tokenizer, report=stopping(after), journal=Journal(path, name))
    with counted(made) as second:
        found = suite(made, tokenizer, report=again.append, journal=Journal(path, name))
    assert suite.steps(made) is None or sum(again) == sum(told) == suite.steps(made)
    assert without_times(found) == without_times(expected)
    if name in OF_SEVERAL:
        assert len(second) <= len(undisturbed) and (share < 1 or len(second) < len(undisturbed))
    else:
        assert len(first) + len(second) == len(undisturbed)
    whole = Journal(path, name)
    with counted(made, most=0):
        assert replace(suite(made, tokenizer, journal=whole), seconds=found.seconds) == found
    whole.remove()
    assert not list(tmp_path.iterdir())
