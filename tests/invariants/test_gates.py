"""Gates against a naive reference: a full forward pass for every token, each gate by hand, each edit by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from sae_transformers import FeatureEdit, FeatureReweighting, Gate, SaeForCausalLM, Steering
from tests.covering import covering, fast
from tests.invariants.naive import edited, latents_of, pre_activations, site_module
from tests.tiny import VOCAB, prompt, tiny_base, tiny_sae

NEW, LENGTH = 6, 7
DTYPE = torch.float64
PLACES = (0, 1)  # layer of each SAE, behind its block


def saes() -> list[Any]:
    return [
        tiny_sae(dtype=DTYPE, activation="relu", layer=0, site="resid_post"),
        tiny_sae(seed=2, dtype=DTYPE, activation="topk", layer=1, site="resid_post", concepts={"sea": 9}),
    ]


def model(seed: int = 0) -> SaeForCausalLM:
    return SaeForCausalLM.from_base(tiny_base("gpt2", dtype=DTYPE, seed=seed), saes()).eval()


# -- the reference -----------------------------------------------------------------------------------------------


def holds(gate: Any, values: dict[tuple, Tensor], token: int, end: int) -> bool:
    """Whether a gate is open at a token, by the definition. values: of each condition, at all tokens."""
    if gate.every or gate.some:
        parts = [holds(one, values, token, end) for one in (gate.every or gate.some)]
        found = all(parts) if gate.every else any(parts)
        return found != gate.negate
    series = values[gate.sae, gate.feature, gate.pre_activations].tolist()
    series[: gate.skip_first] = [-math.inf] * min(gate.skip_first, len(series))
    if gate.until is not None:
        found = False
        for value in series[: token + 1]:
            found = value > gate.above or (found and value > gate.until)
    elif gate.over == "token":
        found = series[token] > gate.above
    elif token < end - 1 and gate.over in ("prompt", "last"):
        found = False
    else:
        counted = {"last": series[end - 1 : end], "prompt": series[:end], "so_far": series[: token + 1]}[gate.over]
        read = [value for value in counted if value > -math.inf] or [-math.inf]
        pooled = max(read) if gate.pool == "max" or gate.over == "last" else sum(read) / len(read)
        found = pooled > gate.above
    return found != gate.negate


class Naive:
    """A bare base with hooks that steer a text of one row."""

    def __init__(self, saes: Sequence[Any], steering: Steering, end: int, ids: Tensor) -> None:
        self.saes, self.steering, self.end, self.ids = saes, steering, end, ids.tolist()
        self.values: dict[tuple, Tensor] = {}
        self.opened = 0

    def __call__(self, number: int, hidden: Tensor) -> Tensor:
        sae, state = self.saes[number], hidden[0]
        strengths: list[Any] = [self.steering.strength, *(edit.strength for edit in self.steering.feature_edits)]
        read_by = [one for gate in self.gates() for one in gate.conditions]
        for one in (*read_by, *(strength for strength in strengths if strength and strength.feature is not None)):
            if one.sae == number:
                read = pre_activations if one.pre_activations else latents_of
                feature = sae.config.resolve_feature(one.feature)
                self.values[one.sae, one.feature, one.pre_activations] = read(sae, state)[:, feature]
        rows = []
        for token in range(len(state)):
            inside = any(a <= token < b for a, b in self.steering.ranges(self.end))
            inside = inside and self.ids[token] not in self.steering.exclude_tokens
            rows.append(self.steered(number, state, token) if inside else state[token])
        return torch.stack(rows)[None]

    def gates(self) -> list[Any]:
        found = [self.steering.when, *(getattr(edit, "when", None) for edit in self.steering.edits)]
        return [gate for gate in found if gate is not None]

    def steered(self, number: int, state: Tensor, token: int) -> Tensor:
        own = [edit for edit in self.steering.edits if edit.sae == number]
        if not own and number not in self.steering.reconstruct:
            return state[token]
        if self.steering.when is not None and not holds(self.steering.when, self.values, token, self.end):
            return state[token]
        active = [
            edit
            for edit in own
            if (gate := getattr(edit, "when", None)) is None or holds(gate, self.values, token, self.end)
            if self.ids[token] not in getattr(edit, "exclude_tokens", ())
        ]
        reconstruct = tuple(n for n in self.steering.reconstruct if n == number)
        self.opened += len(active) + len(reconstruct)
        if not active and not reconstruct:
            return state[token]
        now = Steering(active, keep_error=self.steering.keep_error, reconstruct=reconstruct,
                       balance=self.steering.balance)  # fmt: skip
        one = state[token : token + 1]
        factors = [self.factor(edit, token) for edit in active]
        if any(factors) or reconstruct:
            return edited(self.saes[number], number, one, one, now, factors)[0]
        return state[token]

    def factor(self, edit: Any, token: int) -> float:
        """How far an edit goes at a token."""
        return self.share(getattr(edit, "strength", None), token) * self.share(self.steering.strength, token)

    def share(self, strength: Any, token: int) -> float:
        """By the definition of `Strength`."""
        if strength is None:
            return 1.0
        found, written = 1.0, max(0, token - (self.end - 1))
        if strength.feature is not None:
            value = float(self.values[strength.sae, strength.feature, strength.pre_activations][token])
            sae = self.saes[strength.sae]
            if strength.unit == "max":
                value /= float(sae.feature_max[sae.config.resolve_feature(strength.feature)])
            part = (value - strength.low) / (strength.high - strength.low)
            found = strength.least + (strength.most - strength.least) * min(max(part, 0.0), 1.0)
        if strength.first is not None and written >= strength.first:
            return 0.0
        if strength.decay == "linear":
            found *= max(0.0, 1 - written / strength.over)
        elif strength.decay == "exponential":
            found *= 2 ** (-written / strength.over)
        return found


@torch.no_grad()
def naive_logits(base: Any, saes: Sequence[Any], ids: Tensor, steering: Steering, end: int) -> tuple[Tensor, int]:
    """(T, vocab), and how many edits acted."""
    work = Naive(saes, steering, end, ids)
    with ExitStack() as stack:
        for number, layer in enumerate(PLACES):

            def hook(module: Any, args: Any, output: Any, number: int = number) -> Any:
                state = output[0] if isinstance(output, tuple) else output
                new = work(number, state)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = site_module(base, layer, "resid_post").register_forward_hook(hook)
            stack.callback(handle.remove)
        return base(ids[None], use_cache=False).logits[0], work.opened


@torch.no_grad()
def naive_generate(
    base: Any, saes: Sequence[Any], ids: Tensor, steering: Steering, new: int = NEW
) -> tuple[Tensor, int]:
    end, acted = len(ids), 0
    for _ in range(new):
        logits, count = naive_logits(base, saes, ids, steering, end)
        acted += count
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    return ids, acted


# -- what is compared --------------------------------------------------------------------------------------------

GATES = {
    "token": Gate(feature=3, above=0.4),
    "token, another SAE": Gate(feature="sea", sae=1, above=0.05),
    "active": Gate(feature=5),
    "pre-activation": Gate(feature=3, above=-0.5, pre_activations=True),
    "hysteresis": Gate(feature=3, above=0.9, until=0.1),
    "last": Gate(feature=3, above=0.2, over="last"),
    "prompt": Gate(feature=3, above=1.0, over="prompt"),
    "prompt, mean": Gate(feature=3, above=0.3, over="prompt", pool="mean"),
    "so far": Gate(feature=11, above=0.8, over="so_far"),
    "so far, mean": Gate(feature=11, above=0.35, over="so_far", pool="mean"),
    "not": ~Gate(feature=3, above=0.4),
    "token, but the first five": Gate(feature=3, above=0.2, skip_first=5),
    "prompt, but the first two": Gate(feature=3, above=0.3, over="prompt", pool="mean", skip_first=2),
    "so far, but the first nine": Gate(feature=11, above=-2.0, over="so_far", pool="mean", pre_activations=True,
                                       skip_first=9),
    "hysteresis, but the first three": Gate(feature=3, above=0.9, until=0.1, skip_first=3),
    "last, of a prompt that is skipped": ~Gate(feature=3, above=-9.0, over="last", pre_activations=True, skip_first=7),
    "and, or, not": (Gate(feature=3, above=0.3) | Gate(feature=8, above=0.3))
    & ~Gate(feature=11, over="so_far", above=2.0),
}  # fmt: skip
OPS = {
    "set": [FeatureEdit(sae=1, feature=f, op="set", value=4.0) for f in (1, 2, 9)],
    "add": [FeatureEdit(sae=1, feature=f, op="add", value=5.0) for f in (1, 2)],
    "direction": [FeatureEdit(sae=1, feature=4, op="direction", value=6.0)],
    "scale": [FeatureEdit(sae=1, feature=f, op="scale", value=-3.0) for f in range(24)],
    "ablate": [FeatureEdit(sae=1, feature=f, op="ablate") for f in range(32)],
    "erase": [FeatureEdit(sae=1, feature=f, op="erase") for f in range(1, 28)],
    "clamps": [FeatureEdit(sae=1, feature=1, op="at_least", value=3.0),
               FeatureEdit(sae=1, feature=2, op="shrink", value=1.0)],
    "magnitude": [FeatureEdit(sae=1, feature=f, op="scale_magnitude", value=2.0) for f in (1, 2)],
    "units": [FeatureEdit(sae=1, feature=1, op="set", value=2.0, unit="max"),
              FeatureEdit(sae=1, feature=2, op="direction", value=0.5, unit="norm")],
}  # fmt: skip


def gated(edits: Sequence[Any], gate: Gate) -> list[FeatureEdit]:
    return [FeatureEdit(e.sae, e.feature, e.op, e.value, e.unit, when=gate) for e in edits]


def cases() -> dict[str, Steering]:
    found = {}
    for (name, gate), (op, edits) in zip(GATES.items(), list(OPS.items()) * 2, strict=False):
        found[f"{name}: {op}"] = Steering(edits, when=gate)
        found[f"{name}, on edits: {op}"] = Steering(gated(edits, gate))
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    found["one gated beside one that is not"] = Steering([*gated(OPS["set"], GATES["token"]), *OPS["direction"]])
    found["different gates on one latent"] = Steering(
        [*gated(OPS["add"], GATES["token"]), *gated(OPS["add"], GATES["active"]), *OPS["add"]]
    )
    found["erased apart"] = Steering(
        [*gated(OPS["erase"][:2], GATES["token"]), *gated(OPS["erase"][1:4], GATES["not"]), *OPS["erase"][5:6]]
    )
    found["erased together"] = Steering(gated(OPS["erase"], GATES["token"]))
    found["several stages"] = Steering([*gated(OPS["scale"], GATES["token"]), *gated(OPS["set"], GATES["active"])])
    found["without the error"] = Steering(gated(OPS["scale"], GATES["token"]), keep_error=False)
    found["reconstruct"] = Steering(reconstruct=(1,), when=GATES["token"])
    found["balance"] = Steering(OPS["set"], balance=True, when=GATES["token"])
    found["re-weighted"] = Steering([FeatureReweighting(sae=1, scores=scores, mode="weight")], when=GATES["token"])
    found["a gate of its own SAE"] = Steering([FeatureEdit(feature=3, op="scale", value=4.0, when="active")])
    found["two SAEs"] = Steering([*gated(OPS["set"], GATES["token"]), FeatureEdit(feature=6, op="set", value=2.0)])
    found["positions too"] = Steering(OPS["direction"], positions="generated", when=GATES["token"])
    found["excluded tokens too"] = Steering(OPS["set"], exclude_tokens=range(0, VOCAB, 2), when=GATES["token"])
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_generation_is_the_naive_one(name):
    steering, ours = CASES[name], model()
    base, bank = tiny_base("gpt2", dtype=DTYPE), saes()
    acted = 0
    for seed in range(2):
        ids = prompt(1, LENGTH, seed=seed)
        wanted, count = naive_generate(base, bank, ids[0], steering)
        acted += count
        found = ours.generate(ids, steering=steering, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(found[0], wanted)
        logits, _ = naive_logits(base, bank, wanted, steering, len(wanted))
        assert torch.allclose(ours(wanted[None], steering=steering).logits[0], logits, atol=1e-9)
    assert acted > 0  # somewhere a gate was open


HISTORY = [
    "prompt, but the first two",
    "token, but the first five",
    "hysteresis",
    "last",
    "prompt",
    "prompt, mean",
    "so far",
    "so far, mean",
    "token",
    "and, or, not",
]


def logits_of(ours: SaeForCausalLM, ids: Tensor, steering: Any, **options: Any) -> Tensor:
    out: Any = ours.generate(
        ids, steering=steering, max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True, **{"do_sample": False, **options},
    )  # fmt: skip
    return torch.stack(out.logits, 1)


GATE_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "sampling": {"do_sample": True},
    "guidance": {"guidance_scale": 1.7},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static beams": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}


def as_without_a_cache(steering: Steering, mode: dict[str, Any]) -> None:
    """`generate` in this mode writes what it writes without a cache."""
    ours, ids = model(), prompt(2, LENGTH, seed=5)
    common: dict[str, Any] = {"steering": steering, "max_new_tokens": NEW, "eos_token_id": None}
    plain = {k: v for k, v in mode.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(0)
    wanted = ours.generate(ids, use_cache=False, **common, **{"do_sample": False, **plain})
    torch.manual_seed(0)
    found = ours.generate(ids, **common, **{"do_sample": False, **mode})
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("gate", "mode"), covering(HISTORY, GATE_MODES, times=3))
def test_every_mode_of_generate_is_the_one_without_a_cache(gate, mode):
    """That one sees the whole text in every pass, as the naive reference does."""
    as_without_a_cache(Steering(OPS["direction"], when=GATES[gate]), GATE_MODES[mode])


@pytest.mark.parametrize("gate", HISTORY)
def test_assisted_decoding_forgets_rejected_drafts(gate):
    ours, steering = model(), Steering(OPS["direction"], when=GATES[gate])
    assistant = tiny_base("gpt2", dtype=DTYPE, seed=4)
    ids = prompt(1, LENGTH, seed=6)
    options: dict[str, Any] = {"max_new_tokens": 2 * NEW, "do_sample": False, "eos_token_id": None}
    wanted = ours.generate(ids, steering=steering, **options)
    assert torch.equal(ours.generate(ids, steering=steering, assistant_model=assistant, **options), wanted)


@pytest.mark.parametrize("gate", HISTORY)
def test_rows_and_padding(gate):
    """Each row as alone: padded on the left, steered in its own way or not."""
    ours = model()
    steerings = [
        Steering(OPS["direction"], when=GATES[gate]),
        None,
        Steering(OPS["set"], when=~GATES[gate]),
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
        assert torch.allclose(found[row], alone[0], atol=1e-6), (gate, row)


def test_a_shut_gate_is_the_base_bit_for_bit():
    ours = model().float()
    ids = prompt(2, LENGTH)
    passed, written = ours(ids, steering=False).logits, logits_of(ours, ids, False)
    for over in ("token", "last", "prompt", "so_far"):
        for edits in OPS.values():
            shut = Steering(edits, when=Gate(feature=3, above=1e9, over=over))
            assert torch.equal(ours(ids, steering=shut).logits, passed)
            assert torch.equal(logits_of(ours, ids, shut), written)
    replaced = Steering(OPS["set"], keep_error=False, reconstruct=(1,), when=Gate(feature=3, above=1e9))
    assert torch.equal(ours(ids, steering=replaced).logits, ours(ids, steering=False).logits)


def test_a_gate_that_the_prompt_has_shut_costs_nothing_more(monkeypatch):
    ours, served = model(), []
    original = type(ours.saes).serve
    monkeypatch.setattr(
        type(ours.saes), "serve", lambda bank, number, *args: served.append(number) or original(bank, number, *args)
    )
    shut = Steering(OPS["set"], when=Gate(feature=3, above=1e9, over="prompt"))
    ours.generate(prompt(2, LENGTH), steering=shut, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert served == [0, 1]  # in the pass over the prompt
    served.clear()
    open_ = Steering(OPS["set"], when=Gate(feature=3, above=-1.0, over="prompt"))
    ours.generate(prompt(2, LENGTH), steering=open_, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert served == [0, 1, *[1] * (NEW - 1)]  # what decided is not read again


def compiled_as_eager(steering: Steering) -> None:
    base = tiny_base("gpt2", dtype=DTYPE, n_layer=2)
    ours = SaeForCausalLM.from_base(base, saes()).eval().float()
    plan, ids = ours.prepare_steering(steering), prompt(2, LENGTH)
    wanted = ours(ids, steering=plan).logits
    assert not torch.equal(wanted, ours(ids, steering=False).logits)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(ids, steering=plan).logits, wanted, atol=1e-4)
    torch.compiler.reset()


COMPILED = {name: Steering(OPS["set"], when=GATES[name]) for name in ("token", "active", "not", "prompt")}
COMPILED["each on its edits"] = Steering([edit for gate in GATES.values() for edit in gated(OPS["set"], gate)])


@pytest.mark.parametrize("name", fast(COMPILED, "each on its edits"))
def test_compiled_whole(name):
    compiled_as_eager(COMPILED[name])


# What transformers does by itself on a GPU.
STEPS: Any = CompileConfig(fullgraph=True, backend="eager", mode="default")
STEPS._compile_all_devices = True
COMPILED_STEPS = {"compile_config": STEPS}


def over_a_static_cache(steering: Steering, ours: SaeForCausalLM, **options: Any) -> int:
    """`generate` over a static cache writes, twice, what it writes over a growing one; the graphs that it compiled."""
    ids, mask = prompt(2, LENGTH, seed=5), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    common: dict[str, Any] = {
        "steering": steering, "attention_mask": mask, "max_new_tokens": 2 * NEW, "do_sample": False,
        "eos_token_id": None, "num_beams": options.pop("num_beams", 1),
    }  # fmt: skip
    wanted = model().generate(ids, **common)
    assert not torch.equal(wanted, ours.generate(ids, **{**common, "steering": False}))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert torch.equal(ours.generate(ids, cache_implementation="static", **common, **options), wanted)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    return graphs


@pytest.mark.parametrize("gate", fast(HISTORY, "so far, mean", "hysteresis"))
def test_compiled_steps_over_a_static_cache(gate):
    """The second `generate` compiles nothing."""
    assert over_a_static_cache(Steering(OPS["direction"], when=GATES[gate]), model(), **COMPILED_STEPS) == 1


@pytest.mark.slow
def test_compiled_beams_over_a_static_cache():
    ours = model()
    whole, step = ours.forward, torch.compile(ours.forward, fullgraph=True, backend="eager")
    ours.forward = lambda *args, **given: (step if given["input_ids"].shape[1] == 1 else whole)(*args, **given)
    assert over_a_static_cache(Steering(OPS["direction"], when=GATES["so far"]), ours, num_beams=2) >= 1


def test_a_compiled_pass_that_cannot_know_the_tokens_before():
    ours, ids = model(), prompt(1, LENGTH)
    cache = StaticCache(ours.lm.config, max_cache_len=LENGTH + NEW)
    plan = ours.prepare_steering(Steering(OPS["set"], when=GATES["so far"]))
    with torch.no_grad():
        ours(ids, past_key_values=cache, steering=False)
        with pytest.raises(
            Exception, match="not compiled, or the whole text in one pass. Received: a pass over those"
        ):
            torch.compile(ours, fullgraph=True, backend="eager")(ids[:, :1], past_key_values=cache, steering=plan)
    torch.compiler.reset()


def test_json_there_and_back():
    for steering in CASES.values():
        again = Steering.from_json(steering.to_json())
        assert again == steering and hash(again) == hash(steering)
        assert json.loads(steering.to_json()) == steering.to_dict()
    assert "when" not in json.dumps(Steering(OPS["set"]).to_dict())  # files from before gates are as they were


ANY_GATE: Any = Gate
ANY_EDIT: Any = FeatureEdit


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ANY_GATE(), "0 of these"),
        (lambda: ANY_GATE(feature=1, every=[ANY_GATE(feature=2)]), "2 of these"),
        (lambda: ANY_GATE(feature=1, above=float("nan")), "`above` must be a finite number"),
        (lambda: ANY_GATE(feature=1, above=10**400), "`above` must be a finite number"),
        (lambda: ANY_GATE(feature=1, above="high"), "`above` must be a finite number"),
        (lambda: ANY_GATE(feature=1, over="text"), "`over` must be one of"),
        (lambda: ANY_GATE(feature=1, pool="median"), "`pool` must be one of"),
        (lambda: ANY_GATE(feature=-1), "`feature` must be"),
        (lambda: ANY_GATE(feature=1, sae=-1), "`sae` must be"),
        (lambda: ANY_GATE(feature=1, skip_first=-1), "`skip_first` must be a number of tokens"),
        (lambda: ANY_GATE(feature=1, skip_first=2**70), "`skip_first` must be a number of tokens"),
        (lambda: ANY_GATE(feature=1, skip_first=True), "`skip_first` must be a number of tokens"),
        (lambda: ANY_GATE(feature=1, above=1.0, until=2.0), "at most `above`"),
        (lambda: ANY_GATE(feature=1, above=1.0, until=0.5, over="prompt"), "goes with over='token'"),
        (lambda: ANY_EDIT(feature=1, op="ablate", when={"featur": 1}), "Unknown fields"),
        (lambda: Steering([ANY_EDIT(feature=1, op="ablate", when="active")], balance=True), "about a whole code"),
    ],
)  # fmt: skip
def test_wrong_gates(make, told):
    with pytest.raises((ValueError, TypeError), match=told):
        make()


@pytest.mark.parametrize(
    ("steering", "told"),
    [
        (Steering([FeatureEdit(feature=1, op="set", value=1.0)], when=Gate(feature=1, sae=1)), "runs before the edit"),
        (Steering(OPS["set"], when=Gate(feature=1, sae=7)), "The model has 2 SAE"),
        (Steering(OPS["set"], when=Gate(feature=999)), "an integer in"),
        (Steering(OPS["set"], when=Gate(feature="lake")), "lake"),
    ],
)
def test_gates_that_this_model_does_not_have(steering, told):
    with pytest.raises(ValueError, match=told):
        model().prepare_steering(steering)


def test_a_cache_without_a_memory_is_an_error():
    ours, ids = model(), prompt(1, LENGTH)
    for name, refused in (("so far", True), ("token", False)):
        cache = ours(ids, use_cache=True, steering=False).past_key_values
        options = {"past_key_values": cache, "attention_mask": torch.ones(1, LENGTH + 1)}
        steering = Steering(OPS["set"], when=GATES[name])
        if not refused:
            ours(ids[:, :1], steering=steering, **options)
            continue
        with pytest.raises(ValueError, match="has to have seen the tokens before"):
            ours(ids[:, :1], steering=steering, **options)
