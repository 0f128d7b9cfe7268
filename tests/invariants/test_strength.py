"""Strengths that follow the token, against the naive reference of `test_gates`: a full forward pass for every token,
each factor by hand, each edit by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, Gate, SaeForCausalLM, Steering, Strength
from tests.covering import covering, fast
from tests.invariants.test_gates import (
    COMPILED_STEPS,
    GATE_MODES,
    LENGTH,
    NEW,
    OPS,
    as_without_a_cache,
    compiled_as_eager,
    logits_of,
    model,
    naive_generate,
    naive_logits,
    over_a_static_cache,
    saes,
)
from tests.invariants.test_threads import together
from tests.tiny import prompt, tiny_base

DTYPE = torch.float64
STRENGTHS = {
    "detector": Strength(feature=3, high=1.5),
    "another SAE": Strength(feature="sea", sae=1, low=0.1, high=0.6, least=-0.5, most=2.0),
    "less where there is more": Strength(feature=3, low=0.1, high=1.0, least=1.0, most=0.0),
    "pre-activation": Strength(feature=3, low=-1.0, high=1.0, pre_activations=True),
    "of the maximum": Strength(feature=3, low=0.1, high=0.9, unit="max"),
    "first": Strength(first=3),
    "linear": Strength(decay="linear", over=4),
    "exponential": Strength(decay="exponential", over=1.5),
    "all of it": Strength(feature=3, high=1.0, first=4, decay="exponential", over=3),
}
CHANGED = {name: edits for name, edits in OPS.items() if name not in ("magnitude", "erase")}


def at(edits: Any, strength: Any, when: Any = None) -> list[FeatureEdit]:
    return [FeatureEdit(e.sae, e.feature, e.op, e.value, e.unit, when, strength) for e in edits]


def cases() -> dict[str, Steering]:
    gate, found = Gate(feature=8, above=0.1), {}
    for number, (name, strength) in enumerate(STRENGTHS.items()):
        for shift in (0, 3):
            op = list(CHANGED)[(number + shift) % len(CHANGED)]
            found[f"{name}: {op}"] = Steering(at(CHANGED[op], strength))
        found[f"{name}, gated"] = Steering(at(OPS["set"], strength, gate))
    found["adaptive"] = Steering(at(OPS["scale"], "adaptive"))
    found["beside a whole one"] = Steering([*at(OPS["set"], STRENGTHS["first"]), *OPS["direction"], *OPS["add"]])
    found["two on one latent"] = Steering([*at(OPS["add"], STRENGTHS["first"]), *at(OPS["add"], STRENGTHS["linear"])])
    found["stages"] = Steering([*at(OPS["scale"], STRENGTHS["detector"]), *at(OPS["set"], STRENGTHS["exponential"])])
    found["without the error"] = Steering(at(OPS["set"], STRENGTHS["first"]), keep_error=False)
    found["beside erase"] = Steering([*at(OPS["add"], STRENGTHS["detector"]), *OPS["erase"][8:12]])
    found["under a whole gate"] = Steering(at(OPS["set"], STRENGTHS["detector"]), when=Gate(feature=5, over="so_far"))
    for name in ("detector", "of the maximum", "first", "all of it"):
        found[f"of the whole, {name}"] = Steering([*OPS["set"], *OPS["direction"]], strength=STRENGTHS[name])
    found["of the whole and of edits"] = Steering(
        [*at(OPS["set"], STRENGTHS["exponential"]), *at(OPS["add"], STRENGTHS["detector"], gate), *OPS["direction"]],
        strength=STRENGTHS["another SAE"],
    )
    found["of the whole, gated"] = Steering(
        OPS["scale"], when=Gate(feature=5, over="so_far"), strength=STRENGTHS["linear"]
    )
    found["tokens of an edit"] = Steering(
        [replace(edit, exclude_tokens=range(0, 99, 3)) for edit in at(OPS["set"], STRENGTHS["detector"], gate)]
    )
    found["positions and tokens"] = Steering(at(OPS["direction"], STRENGTHS["exponential"]), "generated",
                                             exclude_tokens=range(0, 99, 5))  # fmt: skip
    return found


CASES = cases()


# Of each strength one of its two ops, and every second with a gate; all that are put together.
FAST_CASES = [
    name
    for number, name in enumerate(CASES)
    if number >= 3 * len(STRENGTHS) or number % 3 == number // 3 % 2 or number % 6 == 2
]


@pytest.mark.parametrize("name", fast(CASES, *FAST_CASES))
def test_generation_is_the_naive_one(name: str):
    steering, ours = CASES[name], model()
    base, bank = tiny_base("gpt2", dtype=DTYPE), saes()
    acted = 0
    for seed in range(2):
        ids = prompt(1, LENGTH, seed=seed)
        wanted, count = naive_generate(base, bank, ids[0], steering)
        acted += count
        found: Any = ours.generate(ids, steering=steering, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                                   return_dict_in_generate=True, output_logits=True)  # fmt: skip
        assert torch.equal(found.sequences[0], wanted)
        logits, _ = naive_logits(base, bank, wanted, steering, LENGTH)
        assert torch.allclose(torch.stack(found.logits, 1)[0].double(), logits[LENGTH - 1 : -1], atol=1e-5)
        logits, _ = naive_logits(base, bank, wanted, steering, len(wanted))  # a text by itself is all prompt
        assert torch.allclose(ours(wanted[None], steering=steering).logits[0], logits, atol=1e-9)
    assert acted > 0


MODES: dict[str, dict[str, Any]] = {**GATE_MODES, "samples": {"num_return_sequences": 2, "do_sample": True}}


@pytest.mark.parametrize(("strength", "mode"), covering(STRENGTHS, MODES, times=3))
def test_every_mode_of_generate_is_the_one_without_a_cache(strength: str, mode: str):
    """That one sees the whole text in every pass, as the naive reference does."""
    as_without_a_cache(Steering(at(OPS["direction"], STRENGTHS[strength])), MODES[mode])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_assisted_decoding(strength: str):
    ours, steering = model(), Steering(at(OPS["direction"], STRENGTHS[strength]))
    options: dict[str, Any] = {"max_new_tokens": 2 * NEW, "do_sample": False, "eos_token_id": None}
    ids = prompt(1, LENGTH, seed=6)
    wanted = ours.generate(ids, steering=steering, **options)
    assistant = tiny_base("gpt2", dtype=DTYPE, seed=4)
    assert torch.equal(ours.generate(ids, steering=steering, assistant_model=assistant, **options), wanted)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_rows_and_padding(strength: str):
    ours = model()
    steerings = [
        Steering(at(OPS["direction"], STRENGTHS[strength])),
        None,
        Steering(at(OPS["set"], STRENGTHS[strength])),
        Steering(OPS["add"]),
    ]
    texts = [prompt(1, length, seed=9 + length)[0] for length in (LENGTH, 4, LENGTH - 1, 5)]
    ids = torch.zeros(4, LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    found = logits_of(ours, ids, steerings, attention_mask=mask)
    for row, (text, steering) in enumerate(zip(texts, steerings, strict=True)):
        alone = logits_of(ours, text[None], steering if steering else False)
        assert torch.allclose(found[row], alone[0], atol=1e-6), row


def test_none_of_an_edit_is_the_base_bit_for_bit_and_all_of_it_the_edit():
    ours, ids = model().float(), prompt(2, LENGTH)
    for edits in CHANGED.values():
        for most, same in ((0.0, False), (1.0, Steering(edits))):
            found = Steering(at(edits, Strength(feature=3, high=1.0, least=most, most=most)))
            logits, wanted = ours(ids, steering=found).logits, ours(ids, steering=same).logits
            assert torch.allclose(logits, wanted, atol=1e-5) if same else torch.equal(logits, wanted)
    ended = Steering(at(OPS["set"], Strength(first=1)), keep_error=False)
    found, last = logits_of(ours, ids, ended), logits_of(ours, ids, Steering(OPS["set"], "all", keep_error=False))
    assert torch.equal(found[:, 0], last[:, 0]) and not torch.equal(found[:, 1:], last[:, 1:])


COMPILED = {name: at(OPS["set"], strength) for name, strength in STRENGTHS.items()}
COMPILED["one of each"] = [edit for one in COMPILED.values() for edit in one]


@pytest.mark.parametrize("name", fast(COMPILED, "one of each"))
def test_compiled_whole(name: str):
    compiled_as_eager(Steering(COMPILED[name]))


@pytest.mark.parametrize("name", fast(STRENGTHS, "exponential"))
def test_compiled_steps_over_a_static_cache(name: str):
    assert over_a_static_cache(Steering(at(OPS["direction"], STRENGTHS[name])), model(), **COMPILED_STEPS) == 1


def test_two_threads():
    ours = model()
    steerings = [Steering(at(OPS["set"], STRENGTHS[name])) for name in ("detector", "exponential")]

    def job(steering: Steering) -> Tensor:
        return logits_of(ours, prompt(2, LENGTH), steering)

    alone = [job(one) for one in steerings]
    assert not torch.equal(*alone)
    for _ in range(4):
        found = together([lambda s=s: job(s) for s in steerings])
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_plain_steering_has_nothing_of_it():
    assert model().prepare_steering(Steering(OPS["set"])).gates is None


def test_json_there_and_back():
    for steering in CASES.values():
        again = Steering.from_json(steering.to_json())
        assert again == steering and hash(again) == hash(steering)
    assert "strength" not in json.dumps(Steering(OPS["set"]).to_dict())
    whole = Steering(OPS["set"], strength=STRENGTHS["first"])
    assert whole.to_dict()["strength"] == {"first": 3} and whole != Steering(OPS["set"])
    assert model().prepare_steering(whole) is not model().prepare_steering(Steering(OPS["set"]))
    edit = FeatureEdit(1, 7, "set", 2.0, strength="adaptive")
    assert edit.strength == Strength(7, 1, high=1.0, unit="max")
    assert FeatureEdit(**Steering([edit]).to_dict()["edits"][0]) == edit


MAKE: Any = Strength
EDIT: Any = FeatureEdit


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MAKE(), "Received: none of these"),
        (lambda: MAKE(feature=1), "`high` must be a finite number. Received: high=None"),
        (lambda: MAKE(feature=1, low=2, high=1), "low=2.0, high=1.0"),
        (lambda: MAKE(feature=1, high=float("nan")), "Received: high=nan"),
        (lambda: MAKE(feature=1, high=10**400), "`high` must be a finite number"),
        (lambda: MAKE(feature=1, high=1, most=float("inf")), "Received: most=inf"),
        (lambda: MAKE(feature=1, high=1, unit="norm"), "Received: unit='norm'"),
        (lambda: MAKE(feature=-1, high=1), "Received: feature=-1"),
        (lambda: MAKE(feature=1, sae=-1, high=1), "Received: sae=-1"),
        (lambda: MAKE(first=0), "Received: first=0"),
        (lambda: MAKE(first=2, high=3), "`high` is of a detector"),
        (lambda: MAKE(decay="cosine", over=3), "Received: decay='cosine'"),
        (lambda: MAKE(decay="linear"), "go together"),
        (lambda: MAKE(first=2, over=3), "go together"),
        (lambda: MAKE(decay="linear", over=0), "Received: over=0.0"),
        (lambda: EDIT(feature=1, op="add", value=1, strength="strong"), "Received: 'strong'"),
        (lambda: EDIT(feature=1, op="add", value=1, strength={"hi": 1}), "Unknown fields"),
        (lambda: EDIT(feature=1, op="erase", strength="adaptive"), "`erase` is done or not"),
        (lambda: EDIT(feature=1, op="scale_magnitude", value=1, strength="adaptive"), "takes no strength"),
        (lambda: Steering([EDIT(feature=1, op="ablate", strength="adaptive")], balance=True), "`strength` of an edit"),
        (lambda: Steering(OPS["set"], strength="adaptive"), "'adaptive' follows an edit's own latent"),  # pyright: ignore[reportArgumentType]
        (lambda: Steering(OPS["set"], strength=Strength(first=1), balance=True), "`balance` is done or not"),
        (lambda: Steering(reconstruct=(0,), strength=Strength(first=1)), "`reconstruct` is done or not"),
        (lambda: Steering([{"scores": [1.0]}], strength={"first": 1}), "`reweightings` is done or not"),  # pyright: ignore[reportArgumentType]
        (lambda: Steering(OPS["erase"], strength=Strength(first=1)), "`erase` is done or not"),
        (lambda: Steering(OPS["magnitude"], strength=Strength(first=1)), "`scale_magnitude` is done or not"),
        (lambda: Steering(OPS["set"], strength={"last": 1}), "Unknown fields"),
    ],
)
def test_wrong_strengths(make: Any, told: str):
    with pytest.raises((ValueError, TypeError), match=told):
        make()


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (EDIT(feature=1, op="set", value=1.0, strength=Strength(feature=1, sae=1, high=1)), "runs before the edit"),
        (EDIT(sae=1, feature=1, op="set", value=1.0, strength=Strength(feature=1, sae=7, high=1)), "has 2 SAE"),
        (EDIT(feature=1, op="set", value=1.0, strength=Strength(feature=999, high=1)), "an integer in"),
    ],
)
def test_strengths_that_this_model_does_not_have(edit: FeatureEdit, told: str):
    with pytest.raises(ValueError, match=told):
        model().prepare_steering(edit)


def test_a_maximum_that_nobody_measured():
    ours = model()
    ours.saes[0].feature_max.zero_()
    with pytest.raises(ValueError, match="measure_feature_max"):
        ours.prepare_steering(Steering(at(OPS["set"], STRENGTHS["of the maximum"])))


def test_a_continuation_of_ones_own_does_not_say_where_the_prompt_ended():
    ours, ids = model(), prompt(1, LENGTH)
    cache = ours(ids, use_cache=True, steering=False).past_key_values
    options = {"past_key_values": cache, "attention_mask": torch.ones(1, LENGTH + 1)}
    with pytest.raises(ValueError, match=f"where the prompt ended.*{LENGTH} cached tokens"):
        ours(ids[:, :1], steering=Steering(at(OPS["set"], STRENGTHS["first"])), **options)
    ours(ids[:, :1], steering=Steering(at(OPS["set"], STRENGTHS["detector"])), **options)  # says what it is itself


def test_an_sae_of_directions_is_a_detector():
    from sae_transformers import direction_sae

    bank = saes()
    direction = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    ours = SaeForCausalLM.from_base(tiny_base("gpt2", dtype=DTYPE), [*bank, direction_sae(direction, bank[0].config)])
    edit = FeatureEdit(1, 4, "direction", 6.0, strength=Strength(feature=0, sae=2, high=3.0))
    ids = prompt(1, LENGTH)
    states = ours(ids, steering=False, output_hidden_states=True).hidden_states[1][0]
    along = (states.float() @ (direction[0] / direction.norm())).clamp(min=0)
    per_token = [float(f) for f in (along / 3.0).clamp(max=1)]
    assert len({round(f, 6) for f in per_token}) > 2
    for token in range(LENGTH):
        here = [(token, token + 1)]
        by_hand = Steering([FeatureEdit(1, 4, "direction", 6.0 * per_token[token])], here)
        found = ours(ids, steering=Steering([edit], here)).logits
        assert torch.allclose(found, ours(ids, steering=by_hand).logits, atol=1e-5)
