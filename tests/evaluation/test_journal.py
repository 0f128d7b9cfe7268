"""Stopped at any place, a measurement goes on to the numbers of one that was not stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.generation.continuations import continue_prompts
from sae_transformers.evaluation.journal import Journal, Watch, quick_fingerprint
from sae_transformers.evaluation.settings import BootstrapSettings, FluencyBudget, GenerationSettings
from sae_transformers.evaluation.steering.axbench import OfflineJudge, SteeringMethod, evaluate_concept_steering
from sae_transformers.evaluation.steering.suite import compare_methods
from sae_transformers.evaluation.steering_methods import PreparedMethods
from sae_transformers.evaluation.steering_methods.over_strengths import latent_method, prompt_methods
from sae_transformers.evaluation.suites.settings import SteeringSuiteSettings
from tests.covering import fast

PARTS = {f"part {i}": [i / 3, [True, None, "ü\n"], math.nan if i == 1 else -math.inf] for i in range(4)}


def fill(path: Path, about: Any = "a model") -> tuple[list[str], dict[str, Any]]:
    """What had to be made, and the results."""
    made: list[str] = []

    def make(name: str) -> Any:
        made.append(name)
        return PARTS[name]

    journal = Journal(path, about)
    return made, {name: journal.result({"name": name}, lambda name=name: make(name)) for name in PARTS}


def test_a_file_cut_off_anywhere_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "journal"
    assert fill(path)[0] == list(PARTS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        made, results = fill(path)
        assert made == list(PARTS)[max(0, sum(end <= cut for end in ends) - 1) :]
        assert repr(results) == repr(PARTS) and path.read_bytes() == whole


def test_of_two_that_write_one_file_neither_takes_from_the_other(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first, second = Journal(path, "a model"), Journal(path, "a model")
    for number in range(6):
        (first, second)[number % 2].result(number, lambda number=number: number)
    with path.open("ab") as file:
        file.write(b'["cut o')  # the one is killed, the other goes on
    second.result(6, lambda: 6)
    third = Journal(path, "a model")
    assert third.found == 7
    assert [third.result(number, lambda: None) for number in range(7)] == list(range(7))


def test_damage_and_another_subject_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    fill(path)
    whole = path.read_bytes()
    assert fill(path, "another model")[0] == list(PARTS)
    for damaged in (b"", b"\n", b"{}\n", b"[1]\n" + whole, b"\xff\xfe\n" + whole, whole.replace(b"about", b"abuot")):
        path.write_bytes(damaged)
        made, results = fill(path)
        assert made == list(PARTS) and repr(results) == repr(PARTS) and path.read_bytes() == whole
    middle = whole.replace(b'"part', b'"').replace(b"0.333", b"0.3 33")  # the second part: the others stay
    path.write_bytes(middle)
    assert fill(path)[0] == list(PARTS)[1:2]


def test_a_part_that_fails_is_not_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", None)

    def broken() -> Any:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        journal.result("a", broken)
    assert journal.result("a", lambda: (1, 2)) == [1, 2] == journal.result("a", broken)
    again = Journal(tmp_path / "journal", None)
    assert again.found == 1 and again.result("a", broken) == [1, 2]
    again.remove()
    again.remove()
    assert not list(tmp_path.iterdir())


def test_tensors_lie_in_files_beside_it(tmp_path: Path) -> None:
    made: list[int] = []
    states = torch.randn(3, 4)

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
        found = {str(kind): states.to(kind) for kind in kinds}
        return {**found, "turned": states.T, "part": states[1:], "none": torch.empty(0, 5), "nan": states / 0}

    expected = make()
    for first in (True, False, False):  # two of them read what the first made
        found = Journal(tmp_path / "a.jsonl", "a model").tensors(["texts", 0], make)
        assert list(found) == list(expected) if first else sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name].nan_to_num(), tensor.nan_to_num())
    assert len(made) == 2
    (file,) = (tmp_path / "a.parts").iterdir()
    whole = file.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        before = len(made)
        assert torch.equal(Journal(tmp_path / "a.jsonl", "a model").tensors(["texts", 0], make)["turned"], states.T)
        assert len(made) == before + 1 and file.read_bytes() == whole
    Journal(tmp_path / "a.jsonl", "another model").tensors(["texts", 0], make)
    assert len(made) == before + 2
    Journal(tmp_path / "a.jsonl", "another model").remove()
    assert not list(tmp_path.iterdir())


def test_a_change_of_any_bit_is_another_base() -> None:
    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(4001).to(torch.bfloat16)
            self.register_buffer("odd", whole[1:])  # not where a word of 8 bytes begins
            self.register_buffer("turned", torch.arange(2006.0).view(2, 1003).T)
            self.register_buffer("bytes", torch.arange(13, dtype=torch.uint8))
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("none", torch.empty(0, 3))

    seen, weights = {quick_fingerprint(Weights())}, Weights()
    assert seen == {quick_fingerprint(weights)}
    for name, place in (("odd", 0), ("odd", 2222), ("odd", -1), ("turned", 1500), ("bytes", 12), ("flag", 0)):
        changed = Weights()
        bits = getattr(changed, name).contiguous().clone()
        bits.view(-1).view(torch.uint8)[place * bits.element_size()] ^= 1
        setattr(changed, name, bits)
        seen.add(quick_fingerprint(changed))
    assert len(seen) == 7
    weights.register_buffer("more", torch.zeros(1))
    assert quick_fingerprint(weights) not in seen


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


def stopping(after: int) -> Callable[[int], None]:
    calls = []

    def report(_: int) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Stop

    return report


def test_continuations_go_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w3", "w10"]
    plans = [
        Steering([FeatureEdit(feature=3, op="direction", value=v)]) if v else None for v in (2.0, 0, 2.0, -5.0, 0)
    ]

    def run(seed: int = 1, **options: Any) -> Any:
        return continue_prompts(
            model, tokenizer, prompts, plans, GenerationSettings(5, 0.8, batch_size=2, seed=seed), **options
        )

    expected = run()
    with pytest.raises(Stop):
        run(report=stopping(after=1), journal=Journal(tmp_path / "journal", None))
    journal, done = Journal(tmp_path / "journal", None), []
    found = run(journal=journal, report=done.append)
    assert journal.found == 2 and done == [2, 2, 1]  # the second batch was written before it was told
    assert found.texts == expected.texts and list(found.ids) == list(expected.ids)
    assert torch.equal(found.losses, expected.losses) and torch.equal(found.tokens, expected.tokens)
    assert run(seed=2, journal=journal).texts == run(seed=2).texts != expected.texts


def test_concept_steering_goes_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    asked = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w3"]
    plan = Steering([FeatureEdit(feature=3, op="direction", value=5.0)])
    methods = {"latent": SteeringMethod(["5"], [plan]), "prompt": SteeringMethod(["prompt"], [None], asked[::-1])}
    judge = OfflineJudge(["w1 w2"], ["w3 w4"], dict(zip(asked, asked, strict=True)))

    def run(**options: Any) -> Any:
        return evaluate_concept_steering(
            model, tokenizer, asked, methods, judge, GenerationSettings(5, 0.0, batch_size=5), **options
        )

    with pytest.raises(Stop):
        run(report=stopping(after=1), journal=Journal(tmp_path / "journal", None))
    journal = Journal(tmp_path / "journal", None)
    assert run(journal=journal) == run() and journal.found == 2


@pytest.mark.parametrize("after", fast([0, 4, 9, 13], 4, 13))
def test_the_steering_suite_goes_on(model: Any, tokenizer: Any, tmp_path: Path, after: int) -> None:
    prompts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w3"]
    methods = {"latent 3": latent_method(3, [-1.0, 1.0]), "prompt": prompt_methods(prompts, "w30 w31", "w1")}

    settings = SteeringSuiteSettings(
        samples=1, tokens_per_batch=20, generation=GenerationSettings(5, samples_per_prompt=2, batch_size=6),
        budget=FluencyBudget(3.0), bootstrap=BootstrapSettings(20),
    )  # fmt: skip

    def run(**options: Any) -> Any:
        made = PreparedMethods(model, tokenizer, prompts, methods)
        return compare_methods(made, lambda texts: [float(len(text)) for text in texts], settings, Watch(**options))

    expected = run()
    told: list[int] = []
    run(report=told.append)
    assert len(told) == 14
    with pytest.raises(Stop):
        run(report=stopping(after), journal=Journal(tmp_path / "journal", "a"))
    journal, again = Journal(tmp_path / "journal", "a"), []
    found = run(journal=journal, report=again.append)
    assert journal.found >= after + 1 and again == told  # likelihoods after plain prompts are parts that tell nothing
    assert found.measurements == expected.measurements and found.curves == expected.curves
    assert found.samples == expected.samples
    count = len((tmp_path / "journal").read_bytes().splitlines())
    run(journal=Journal(tmp_path / "journal", "a"))
    assert len((tmp_path / "journal").read_bytes().splitlines()) == count > len(told)
