"""Whose tokens a pass holds: against one request after the other, steered by the model's own hooks."""

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Steering
from sae_transformers.modeling.sae_bank import SaeBank
from sae_transformers.vllm import ops
from sae_transformers.vllm import steps as steps_module
from sae_transformers.vllm.asked import NOTHING, Asked, Reading, asked_of, digest
from sae_transformers.vllm.steps import Part, Steps
from tests.tiny import WIDTH, tiny_sae

KINDS = [
    Steering(),
    Steering([FeatureEdit(feature=3, op="direction", value=6.0)]),
    Steering([FeatureEdit(feature=5, op="set", value=8.0), FeatureEdit(sae=1, feature=1, op="add", value=2.0)]),
    Steering([FeatureEdit(feature=9, op="add", value=6.0)], positions="prompt"),
    Steering([FeatureEdit(feature=2, op="scale", value=-3.0)], positions=[(1, 5), (-2, None)]),
    Steering([FeatureEdit(feature=6, op="ablate")], positions="last_prompt", keep_error=False),
    Steering([FeatureEdit(feature=7, op="set", value=1.0, unit="max")], positions="generated"),
    Steering([FeatureEdit(feature=f, op="erase") for f in (6, 7, 8)]),
    Steering([FeatureEdit(feature=5, op="set", value=8.0)], balance=True),
    Steering([FeatureReweighting(sae=1, scores=[0.5, 2.0] * 32, mode="weight")]),
    Steering(reconstruct=(1,)),
]


def bank() -> SaeBank:
    return SaeBank([tiny_sae(activation="jumprelu", layer=1), tiny_sae(seed=2, activation="topk", layer=1)])


def steered_alone(saes: SaeBank, number: int, hidden: torch.Tensor, steering: Steering, prompt: int) -> torch.Tensor:
    """A whole text (T, d) with one steering, token by token, by the definition of positions."""
    steps, rows = Steps(saes), []
    for position in range(len(hidden)):
        inside = any(start <= position < stop for start, stop in steering.ranges(prompt))
        token = hidden[position : position + 1]
        if inside:
            everywhere = Steering(
                steering.edits, keep_error=steering.keep_error, reconstruct=steering.reconstruct,
                balance=steering.balance,
            )  # fmt: skip
            steps.begin([Part(Asked(everywhere), 1, 0, 1)])
            token = steps.apply(number, token)
        rows.append(token)
    return torch.cat(rows)


@pytest.mark.parametrize("number", [0, 1])
def test_chunks_and_answers_of_many_requests_in_one_pass(number):
    saes, generator = bank(), torch.Generator().manual_seed(0)
    texts = [torch.randn(12, WIDTH, generator=generator) for _ in KINDS]
    prompts = [4 + row % 5 for row in range(len(KINDS))]
    wanted = [
        steered_alone(saes, number, text, steering, prompt)
        for text, steering, prompt in zip(texts, KINDS, prompts, strict=True)
    ]
    # A chunk, the rest of the prompt or a part of it, then single tokens: each request at a point of its own.
    done, steps = [0] * len(KINDS), Steps(saes)
    found: list[list[torch.Tensor]] = [[] for _ in KINDS]
    sizes = [3, 2, 1, 1, 4, 1]
    for turn in range(40):
        parts, tokens = [], []
        for row, steering in enumerate(KINDS):
            size = min(sizes[(turn + row) % len(sizes)], 12 - done[row]) if (turn + row) % 4 else 0
            if size:
                parts.append((row, Part(Asked(steering), prompts[row], done[row], size)))
                tokens.append(texts[row][done[row] : done[row] + size])
        steps.begin(part for _, part in parts)
        flat = torch.cat(tokens) if tokens else torch.zeros(0, WIDTH)
        edited = steps.apply(number, torch.cat([flat, torch.ones(3, WIDTH)]))  # three tokens of padding
        offset = 0
        for row, part in parts:
            found[row].append(edited[offset : offset + part.scheduled])
            offset += part.scheduled
            done[row] += part.scheduled
    assert done == [12] * len(KINDS)
    for row, parts in enumerate(found):
        torch.testing.assert_close(torch.cat(parts), wanted[row], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(text, steered) for text, steered in zip(texts, wanted, strict=True))


def test_nothing_runs_where_nobody_is_steered():
    steps = Steps(bank())
    hidden = torch.randn(5, WIDTH)
    steps.begin([Part(NOTHING, 3, 0, 3), Part(Asked(KINDS[3]), 2, 2, 2)])  # behind its prompt
    assert not steps.works_at(0)
    assert steps.apply(0, hidden) is hidden
    steps.begin([Part(Asked(KINDS[1]), 3, 0, 3)])
    assert steps.works_at(0)
    assert not steps.works_at(1)
    steps.end()
    assert steps.apply(0, hidden) is hidden


def test_what_is_read_differs_from_what_is_changed():
    """A transcoder reads at one place and writes at another."""
    sae = tiny_sae(activation="relu", d_out=16, apply_b_dec_to_input=False, layer=1, hook_out="layers.1.attn_out")
    steering = Steering([FeatureEdit(feature=3, op="set", value=5.0)])
    steps = Steps(SaeBank([sae]))
    steps.begin([Part(Asked(steering), 2, 0, 2), Part(NOTHING, 2, 0, 1)])
    hidden, target = torch.randn(3, WIDTH), torch.randn(3, 16)
    latents = sae.encode(hidden)[:, 3:4]
    wanted = target + (5.0 - latents) * sae.W_dec[3]
    wanted[2] = target[2]
    torch.testing.assert_close(steps.apply(0, hidden, target), wanted, rtol=1e-5, atol=1e-5)


def test_a_plan_is_compiled_when_a_steering_joins_or_leaves():
    steps = Steps(bank())
    part = Part(Asked(KINDS[2]), 4, 0, 4)
    other = Part(Asked(KINDS[1]), 4, 0, 4)
    steps.begin([part, other])
    plan = steps.groups[0].plan
    steps.begin([other._replace(computed=4, scheduled=1), part._replace(computed=4, scheduled=1)])
    assert steps.groups[0].plan is plan
    steps.begin([part])
    assert steps.groups[0].plan is not plan


def test_tables_are_bounded(monkeypatch):
    monkeypatch.setattr(steps_module, "MAX_TABLE", 8)
    saes = bank()
    kinds = [Steering([FeatureEdit(feature=f, op="set", value=4.0)]) for f in range(6)]
    steps = Steps(saes)
    steps.begin([Part(Asked(kind), 2, 0, 2) for kind in kinds])
    assert [group.plan.count for group in steps.groups] == [2, 2, 2]
    hidden = torch.randn(12, WIDTH)
    wanted = torch.cat([steered_alone(saes, 0, hidden[2 * i : 2 * i + 2], kind, 2) for i, kind in enumerate(kinds)])
    torch.testing.assert_close(steps.apply(0, hidden), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_activations", [False, True])
def test_values_are_read_over_chunks_once(pre_activations):
    saes = bank()
    steps, hidden = Steps(saes), torch.randn(7, WIDTH)
    asked = Asked(Steering(), Reading("key", 1, 4, pre_activations))
    for computed, stop in ((0, 3), (0, 3), (3, 7)):  # the first chunk twice: the request was preempted
        steps.begin([Part(NOTHING, 2, 0, 1), Part(asked, 7, computed, stop - computed)])
        steps.apply(1, torch.cat([torch.zeros(1, WIDTH), hidden[computed:stop]]))
    steps.begin([Part(asked, 7, 7, 1)])  # an answer's token is not the prompt's
    assert not steps.reads_at(1)
    values = steps.collected("key")
    read = saes[1].encode_pre_acts if pre_activations else saes[1].encode
    assert values == pytest.approx(read(hidden)[:, 4].tolist(), abs=1e-5)
    assert steps.collected("key") is None


def test_the_operator_finds_its_model_by_a_name_that_the_next_start_gives_too(monkeypatch):
    names = []
    for _ in range(2):  # two processes, of two models each
        monkeypatch.setattr(ops, "STEPS", {})
        first, second = Steps(bank()), Steps(bank())
        names.append([ops.register_steps(first, ""), ops.register_steps(second, "")])
        second.begin([Part(Asked(KINDS[1]), 2, 0, 2)])
        hidden = torch.randn(2, WIDTH)
        assert torch.equal(ops.steer(hidden, hidden, names[-1][0], 0), hidden)
        assert torch.equal(ops.steer(hidden, hidden, names[-1][1], 0), second.apply(0, hidden))
        assert not torch.equal(second.apply(0, hidden), hidden)
    assert names[0] == names[1] and names[0][0] != names[0][1]


def test_what_travels_is_what_was_asked():
    steering = KINDS[4]
    assert asked_of({"steering": steering.to_dict()}) == Asked(steering)
    assert asked_of(None) is asked_of({}) is asked_of({"steering": False}) is NOTHING
    reading = {"key": "k", "sae": 0, "feature": 3, "pre_activations": True}
    assert asked_of({"sae_read": reading}) == Asked(Steering(), Reading("k", 0, 3, True))
    assert digest(steering) == digest(Steering(steering.edits, positions="all"))
    assert digest(steering) != digest(KINDS[3])
