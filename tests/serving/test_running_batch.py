"""Texts that join and leave a running batch are those that `generate` writes alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Gate, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.modeling.steering_plan import SteeringPlan
from sae_transformers.serving.running_batch import RunningBatch
from tests.architectures import tiny_bases
from tests.covering import fast
from tests.serving.running import STEERINGS
from tests.tiny import ARCHITECTURES, prompt, tiny_model, tiny_sae

FAST = ("gemma2", "gpt2")  # sliding windows and rotary, learnt positions
PUSH = FeatureEdit(feature=2, op="direction", value=6.0)
READS = {"feature": 11, "pre_activations": True}
GATES = {
    "prompt": Gate(**READS, over="prompt", above=0.5),
    "mean of the prompt": Gate(**READS, over="prompt", pool="mean", above=-0.1),
    "last of the prompt, shut": ~Gate(**READS, over="last", above=-1.0),
    "last of the prompt": Gate(**READS, over="last", above=-0.4),
    "so far": Gate(**READS, over="so_far", above=1.0),
    "mean so far": Gate(**READS, over="so_far", pool="mean", above=0.0),
    "hysteresis": Gate(**READS, above=0.4, until=-0.4),
    "two": Gate(**READS, over="prompt", above=0.5) | Gate(feature=5, over="so_far", pool="mean", above=0.05),
    "token": Gate(**READS, above=0.3),
}
GATED = [Steering([PUSH], when=gate) for gate in GATES.values()]
MIXED = [*GATED, STEERINGS[1], Steering(), Steering([PUSH], "prompt", when=GATES["so far"])]


def jobs(seed: int = 0, steerings: Any = STEERINGS[:6], count: int = 9) -> list[tuple[list[int], Steering, int, int]]:
    """Prompts, steerings, tokens to write and steps to wait before."""
    draw = random.Random(seed)
    return [
        (
            prompt(1, draw.randint(1, 22), seed=i)[0].tolist(),
            steerings[i % len(steerings)],
            draw.randint(1, 12),
            draw.randint(0, 9),
        )
        for i in range(count)
    ]


def alone(model: Any, ids: list[int], steering: Steering, count: int) -> list[int]:
    rows = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(rows), "max_new_tokens": count, "do_sample": False}
    return model.generate(rows, steering=steering if steering else False, **options)[0, len(ids) :].tolist()


def together(model: Any, todo: list[tuple[list[int], Steering, int, int]]) -> list[list[int]]:
    batch, written = RunningBatch(model), [[] for _ in todo]
    waiting, rows, now = list(range(len(todo))), [], 0
    while waiting or rows:
        logits = batch.step([written[i][-1] for i in rows]) if rows else torch.zeros(0, 0)
        new = [i for i in waiting if todo[i][3] <= now]
        parts = list(logits)
        if new:
            assert batch.fits([todo[i][1] for i in new])
            parts += list(batch.join([todo[i][0] for i in new], [todo[i][1] for i in new]))
        waiting, rows, now = [i for i in waiting if i not in new], rows + new, now + 1
        for i, row in zip(rows, parts, strict=True):
            written[i].append(int(row.argmax()))
        keep = [place for place, i in enumerate(rows) if len(written[i]) < todo[i][2]]
        rows = [rows[place] for place in keep]
        batch.keep(keep)
        assert len(batch) == len(rows)
        if rows:  # nothing is held that no row needs
            assert batch.mask.shape[1] == max(len(todo[i][0]) + len(written[i]) - 1 for i in rows)
            assert set(batch.steerings) == {todo[i][1] for i in rows}
            assert int(batch.mask[:, 0].max()) == 1
    assert batch.cache is None
    return written


@pytest.mark.parametrize(
    "architecture",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_texts_of_a_batch_are_those_written_alone(architecture: str) -> None:
    model = tiny_model(architecture, concepts={"sea": 9}).eval()
    model.generation_config.eos_token_id = None
    todo = jobs()
    expected = [alone(model, ids, steering, count) for ids, steering, count, _ in todo]
    assert len({tuple(e) for e in expected}) > 5
    assert together(model, todo) == expected


@pytest.mark.parametrize(
    "architecture",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_a_text_that_was_set_aside_goes_on_where_it_was(architecture: str) -> None:
    model = tiny_model(architecture, concepts={"sea": 9}).eval()
    model.generation_config.eos_token_id = None
    ids = prompt(1, 7)[0].tolist()
    for steering in STEERINGS:
        expected, batch = alone(model, ids, steering, 14), RunningBatch(model)
        batch.join([[5, 6]], [STEERINGS[1]])
        logits = batch.join([ids, ids], [steering] * 2, [(), expected[:6]])
        assert int(logits[0].argmax()) == expected[0]
        written = expected[:6]
        for _ in range(8):
            written.append(int(logits[-1].argmax()))
            logits = batch.step([7, 8, written[-1]])
        assert written == expected, steering


@pytest.mark.parametrize(
    "architecture",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
@pytest.mark.parametrize("seed", fast(range(3), 0))
def test_gates_remember_the_texts_of_rows_that_come_and_go(architecture: str, seed: int) -> None:
    model = tiny_model(architecture, activation="relu").eval()
    model.generation_config.eos_token_id = None
    todo = jobs(seed, MIXED, 3 * len(MIXED))
    expected = [alone(model, ids, steering, count) for ids, steering, count, _ in todo]
    assert together(model, todo) == expected
    plain = [alone(model, ids, Steering(), count) for ids, _, count, _ in todo]
    always = [alone(model, ids, Steering([PUSH]), count) for ids, _, count, _ in todo]
    gated = [i for i, (_, steering, _, _) in enumerate(todo) if steering in GATED]
    assert sum(expected[i] != plain[i] for i in gated) > 3 and sum(expected[i] != always[i] for i in gated) > 3


@pytest.mark.parametrize("kind", GATES)
def test_a_gated_text_that_was_set_aside_goes_on_where_it_was(kind: str) -> None:
    model = tiny_model("gpt2", activation="relu").eval()
    model.generation_config.eos_token_id = None
    steering = Steering([PUSH], when=GATES[kind])
    for seed in range(4):
        ids = prompt(1, 7, seed=seed)[0].tolist()
        expected, batch = alone(model, ids, steering, 14), RunningBatch(model)
        batch.join([[5, 6, 9, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]], [GATED[seed]])
        written = expected[:6]
        logits = batch.join([ids], [steering], [written])
        for step in range(8):
            written.append(int(logits[-1].argmax()))
            if step == 3:  # the widest row leaves, and its columns go
                batch.keep([1])
            logits = batch.step([7, written[-1]][-len(batch) :])
        assert written == expected


def test_what_the_prompt_has_decided_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", activation="relu").eval()
    batch, reads = RunningBatch(model), []
    whole = SparseAutoencoder.pre_acts_of

    def counted(self: Any, *args: Any) -> Any:
        reads.append(1)
        return whole(self, *args)

    monkeypatch.setattr(SparseAutoencoder, "pre_acts_of", counted)
    batch.join([[5, 6, 7], [8, 9]], [GATED[0], GATED[1]])
    assert len(reads) == 1
    for _ in range(4):
        batch.step([3, 4])
    assert len(reads) <= 2
    batch.join([[5, 6, 7]], [GATED[4]])  # so far: all are read from now on
    before = len(reads)
    batch.step([3, 4, 5])
    assert len(reads) > before


def test_steerings_that_exclude_each_other_do_not_fit() -> None:
    model = tiny_model().eval()
    batch = RunningBatch(model)
    one, other = (Steering([FeatureReweighting(scores=[1.0] * 64, mode=mode)]) for mode in ("swap", "weight"))
    batch.join([[5, 6]], [one])
    assert not batch.fits([other]) and batch.fits([one]) and batch.fits(STEERINGS[:1])
    assert not RunningBatch(model).fits([one, other])
    batch.keep([])
    assert batch.fits([other]) and not len(batch)


def test_equal_steerings_are_one_row_of_tables() -> None:
    model = tiny_model().eval()
    batch = RunningBatch(model)
    twice = [Steering([FeatureEdit(feature=3, op="add", value=6.0)]) for _ in range(2)]
    batch.join([[5, 6], [7]], [*twice])
    assert batch.steerings == twice[:1] and batch.places[:, 0].tolist() == [0, 0]


def test_plans_in_use_are_compiled_once_whatever_others_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = tiny_model(concepts={"sea": 9}).eval(), []

    class Counted(SteeringPlan):
        def __init__(self, plans: Any, *rest: Any) -> None:
            compiled.append(tuple(plans))
            super().__init__(plans, *rest)

    monkeypatch.setattr("sae_transformers.modeling.steering_state.SteeringPlan", Counted)
    batch = RunningBatch(model)
    batch.join([[5, 6], [7]], STEERINGS[1:3])
    assert compiled == [tuple(STEERINGS[1:3])]
    for number in range(20):
        model.prepare_steering(Steering([FeatureEdit(feature=number, op="add", value=1.0)]))
        batch.step([5, 6])
    assert compiled.count(tuple(STEERINGS[1:3])) == 1 and len(compiled) == 21
    batch.keep([1])
    for _ in range(3):
        batch.step([5])
    assert compiled[21:] == [tuple(STEERINGS[2:3])]


def test_plans_are_forgotten_by_use() -> None:
    model = tiny_model().eval()
    first = model.prepare_steering(STEERINGS[1])
    for number in range(20):
        model.prepare_steering(Steering([FeatureEdit(feature=number, op="add", value=1.0)]))
        assert model.prepare_steering(STEERINGS[1]) is first


@pytest.mark.parametrize("part", ["_joined", "_drop_columns"])
def test_a_batch_that_breaks_half_way_holds_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = RunningBatch(tiny_model().eval())
    batch.join([[5], [5, 6, 7]], [Steering()] * 2)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(f"sae_transformers.serving.running_batch.{part}", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        if part == "_joined":
            batch.join([[7]], [Steering()])
        else:
            batch.keep([0])
    assert batch.cache is None and not len(batch)


@pytest.mark.parametrize("family", ["mamba", "jamba", "gemma3", "qwen3_next"])
def test_bases_with_other_states_write_as_alone(family: str) -> None:
    model = SaeForCausalLM.from_base(tiny_bases.tiny_base(family), saes=[tiny_sae(layer=1)]).eval()
    steering = Steering([FeatureEdit(feature=3, op="direction", value=6.0)], positions="generated")
    ids = prompt(1, 7)[0].tolist()
    batch, written = RunningBatch(model), []
    logits = batch.join([ids], [steering])
    for _ in range(6):
        written.append(int(logits[0].argmax()))
        logits = batch.step([written[-1]])
    assert written == alone(model, ids, steering, 6)


@pytest.mark.parametrize("family", ["rwkv", "minimax"])
def test_a_state_that_rows_cannot_share_is_refused(family: str) -> None:
    model = SaeForCausalLM.from_base(tiny_bases.tiny_base(family), saes=[tiny_sae(layer=1)]).eval()
    with pytest.raises(ValueError, match=f"model_type='{family}'.*generate"):
        RunningBatch(model)
