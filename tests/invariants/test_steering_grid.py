"""Every op in every mode of `generate`, and every kind of position, against the naive reference.

Bases and SAEs are in fp64 unless a test says otherwise. `generate` itself rounds the scores it returns to float32, so
logits are recorded where they are made and compared there to 1e-12; tokens must be equal, returned scores to 1e-6.
The base is a GPT-2 where the numbers are the point: it computes in its own dtype throughout, while a Llama's norms
round to float32, which hides an error below 1e-8 or makes it larger. Positions are tried on a Llama too.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, FeatureReweighting, SaeForCausalLM, Steering
from sae_transformers.modeling.base_arguments import cache_of
from tests.covering import covering, fast
from tests.invariants.naive import (
    Generated,
    Hooks,
    Recorder,
    edited,
    latents_of,
    naive_forward,
    naive_generate,
    naive_guided,
    reconstruction_of,
)
from tests.tiny import VOCAB, prompt, tiny_base, tiny_sae

STEPS, D_SAE = 4, 64
# Some are among the 8 active ones of most tokens, some of few.
FEATURES = (0, 3, 7, 11, 19, 25, 31, 40, 42, 57)


def edits(op: str, value: float | None = None, unit: str = "absolute") -> list[FeatureEdit]:
    return [FeatureEdit(feature=f, op=op, value=value, unit=unit) for f in FEATURES]


def scores(seed: int = 5) -> list[float]:
    drawn = torch.rand(D_SAE, generator=torch.Generator().manual_seed(seed))
    return (drawn * (drawn > 0.2)).tolist()


OPS = {
    "add": Steering(edits("add", 1.7)),
    "add-max": Steering(edits("add", -0.6, "max")),
    "add-norm": Steering(edits("add", 0.2, "norm")),
    "scale": Steering(edits("scale", -2.5)),
    "set": Steering(edits("set", 1.3)),
    "set-max": Steering(edits("set", 0.8, "max")),
    "set-norm": Steering(edits("set", 0.1, "norm")),
    "ablate": Steering(edits("ablate")),
    "erase": Steering(edits("erase")),
    "erase-one": Steering([FeatureEdit(feature=7, op="erase")]),
    "erase-then-more": Steering(
        [*edits("erase"), FeatureEdit(feature=7, op="add", value=2.0), FeatureEdit(feature=5, op="set", value=1.0)]
    ),
    "erase-reweighted": Steering([FeatureReweighting(scores=scores(), mode="weight"), *edits("erase")]),
    "erase-replaced": Steering(edits("erase"), keep_error=False),
    "erase-balance": Steering(edits("erase"), balance=True),
    "at_least": Steering(edits("at_least", 0.9)),
    "at_least-norm": Steering(edits("at_least", 0.1, "norm")),
    "at_most": Steering(edits("at_most", 0.4)),
    "at_most-max": Steering(edits("at_most", 0.2, "max")),
    "shrink": Steering(edits("shrink", 0.7)),
    "shrink-max": Steering(edits("shrink", 0.3, "max")),
    "direction": Steering(edits("direction", -1.1)),
    "direction-max": Steering(edits("direction", 0.7, "max")),
    "direction-norm": Steering(edits("direction", 0.2, "norm")),
    "scale_magnitude": Steering(edits("scale_magnitude", -1.5)),
    "swap": Steering([FeatureReweighting(scores=scores(), mode="swap")]),
    "weight": Steering([FeatureReweighting(scores=scores(), mode="weight")]),
    "weight-replaced": Steering([FeatureReweighting(scores=scores(), mode="weight")], keep_error=False),
    "weight-legacy": Steering([FeatureReweighting(scores=scores(), mode="weight", legacy=True)], keep_error=False),
    "swap-then-edits": Steering([FeatureReweighting(scores=scores(), mode="swap"), *edits("scale", 3.0)]),
    "replaced": Steering(edits("scale", 2.0), keep_error=False),
    "replaced-direction": Steering(edits("direction", 0.8), keep_error=False),
    "reconstruct": Steering(reconstruct=(0,)),
    "balance": Steering(edits("scale", -3.0), balance=True),
    "balance-replaced": Steering(edits("set", 2.0), balance=True, keep_error=False),
    "legacy-then-norm": Steering(
        [
            FeatureReweighting(scores=scores(), mode="weight", legacy=True),
            *edits("add", 0.2, "norm"),
            FeatureEdit(feature=5, op="set", value=0.3, unit="norm"),
        ],
        keep_error=False,
    ),  # fmt: skip
    "balance-add": Steering(edits("add", 1.0), balance=True),
    "excluded": Steering(edits("set", 1.3), exclude_tokens=range(0, VOCAB, 2)),
    "excluded-replaced": Steering(edits("scale", 2.0), keep_error=False, exclude_tokens=range(1, VOCAB, 3)),
    "several-on-one": Steering(
        [*edits("add", 0.5), *edits("scale", 1.5), *edits("at_most", 2.0), *edits("direction", 0.3)]
    ),
    "different-ops": Steering(
        [
            FeatureEdit(feature=3, op="add", value=2.0),
            FeatureEdit(feature=7, op="direction", value=1.0),
            FeatureEdit(feature=7, op="add", value=0.2, unit="norm"),
            FeatureEdit(feature=19, op="set", value=0.5, unit="max"),
            FeatureEdit(feature=25, op="ablate"),
            FeatureEdit(feature=40, op="shrink", value=0.2),
            FeatureEdit(feature=40, op="at_least", value=0.3),
        ]
    ),
}


@functools.cache
def pair(
    architecture: str = "gpt2", dtype: torch.dtype = torch.float64, site: str = "resid_post", **settings
) -> tuple[SaeForCausalLM, Any, list]:
    """A model with an SAE, a bare base of its own with the same weights, and the SAEs as the reference reads them."""
    no_dropout: dict[str, Any] = (
        {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if architecture == "gpt2" else {}
    )
    base = tiny_base(architecture, dtype=dtype, **no_dropout)
    base.generation_config.eos_token_id = VOCAB  # an id that no token has: rows of one length
    sae_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    sae = tiny_sae(dtype=sae_dtype, **{"layer": 1, "site": site, "d_sae": D_SAE, **settings})
    bare, own_sae = copy.deepcopy(base), copy.deepcopy(sae)
    return SaeForCausalLM.from_base(base, saes=[sae]), bare, [own_sae]


DEFAULTS = {"do_sample": False, "max_new_tokens": STEPS, "output_scores": True, "return_dict_in_generate": True}


def ours(model: SaeForCausalLM, ids: Tensor | None, **options) -> Generated:
    defaults = {} if "generation_config" in options else DEFAULTS  # transformers wants one or the other
    with Recorder(model.lm) as logits:
        output = model.generate(ids, **{**defaults, **options})
    return Generated(output.sequences, torch.stack(output.scores), logits)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the largest value; infinities in the same places."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference, largest = (actual - expected)[finite].abs().max(), expected[finite].abs().max()
    assert difference <= tolerance * largest, f"{difference / largest:.3e} of the largest value"


def same(actual: Generated, expected: Generated, start: int | None, tolerance: float = 1e-12) -> None:
    """Equal tokens, returned scores and logits: those of the positions from `start` on, or of pass after pass."""
    assert torch.equal(actual.tokens, expected.tokens)
    close(actual.scores, expected.scores, 1e-6)
    if start is None:
        assert len(actual.logits.passes) == len(expected.logits.passes)
        close(torch.stack(actual.logits.passes), torch.stack(expected.logits.passes), tolerance)
    else:
        stop = expected.tokens.shape[1] - 1
        close(actual.logits.positions(start, stop), expected.logits.positions(start, stop), tolerance)


LENGTH = 9
LAST = LENGTH - 1  # the first position whose logits choose a token


@functools.cache
def naive_greedy(op: str, rows: int = 2) -> Generated:
    _, base, saes = pair()
    return naive_generate(base, saes, OPS[op], prompt(rows), max_new_tokens=STEPS)


def greedy(op: str) -> None:
    model, base, _ = pair()
    expected = naive_greedy(op)
    same(ours(model, prompt(), steering=OPS[op]), expected, LAST)
    plain = base.generate(prompt(), max_new_tokens=STEPS, do_sample=False, output_scores=True,
                          return_dict_in_generate=True)  # fmt: skip
    assert (expected.scores[0] - plain.scores[0]).abs().max() > 1e-3, "the op changes nothing: it tests nothing"


def sampling(op: str) -> None:
    model, base, saes = pair()
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 0.9, "max_new_tokens": STEPS}
    torch.manual_seed(7)
    expected = naive_generate(base, saes, OPS[op], prompt(), **options)
    torch.manual_seed(7)
    same(ours(model, prompt(), steering=OPS[op], **options), expected, LAST)


def sampling_several_sequences(op: str) -> None:
    model, base, saes = pair()
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": STEPS}
    torch.manual_seed(8)
    expected = naive_generate(base, saes, OPS[op], prompt(), **options)
    torch.manual_seed(8)
    same(ours(model, prompt(), steering=OPS[op], **options), expected, LAST)


def beams(op: str) -> None:
    model, base, saes = pair()
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": STEPS}
    expected = naive_generate(base, saes, OPS[op], prompt(), **options)
    same(ours(model, prompt(), steering=OPS[op], **options), expected, None)


def assisted_target(op: str) -> None:
    """Our model checks what a plain model proposes: the outcome is that of greedy search without it."""
    model, base, _ = pair()
    actual = ours(model, prompt(1), steering=OPS[op], assistant_model=base)
    same(actual, naive_greedy(op, rows=1), LAST)


def assisted_assistant(op: str) -> None:
    """A plain model checks what ours proposes under steering: the outcome is the plain model's, and the proposals are
    steered."""
    model, base, saes = pair()
    proposed = []
    original = model.generate

    def spy(*args, **kwargs):
        output = original(*args, **kwargs)
        start = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        proposed.append((start, output.sequences if hasattr(output, "sequences") else output))
        return output

    options = {"max_new_tokens": STEPS, "do_sample": False}
    plain = base.generate(prompt(1), **options)
    model.generate = spy
    try:
        with model.steered(OPS[op]):
            tokens = base.generate(prompt(1), assistant_model=model, **options)
    finally:
        del model.generate
    assert torch.equal(tokens, plain)
    assert proposed
    start, sequence = proposed[0]
    steps = sequence.shape[1] - start.shape[1]
    expected = naive_generate(base, saes, OPS[op], start, max_new_tokens=steps)
    assert steps > 0
    assert torch.equal(sequence, expected.tokens)


def prompt_lookup(op: str) -> None:
    model, base, saes = pair()
    ids = prompt(1, 5).repeat(1, 3)  # it repeats itself, so that the look-up finds candidates
    expected = naive_generate(base, saes, OPS[op], ids, max_new_tokens=STEPS)
    same(ours(model, ids, steering=OPS[op], prompt_lookup_num_tokens=3), expected, ids.shape[1] - 1)


def guidance(op: str) -> None:
    model, base, saes = pair()
    for use_cache, negative in ((True, None), (True, prompt(2, 4, seed=9)), (False, prompt(2, 4, seed=9))):
        options = {} if negative is None else {"negative_prompt_ids": negative}
        actual = ours(model, prompt(), steering=OPS[op], guidance_scale=1.6, use_cache=use_cache, **options)
        expected = naive_guided(base, saes, OPS[op], prompt(), 1.6, STEPS, negative)
        assert torch.equal(actual.tokens, expected.tokens)
        close(actual.scores, expected.scores, 1e-5)  # differences of float32 log probabilities
        close(torch.stack(actual.logits.passes), torch.stack(expected.logits.passes), 1e-12)


def static_cache(op: str) -> None:
    model, *_ = pair()
    same(ours(model, prompt(), steering=OPS[op], cache_implementation="static"), naive_greedy(op), LAST)


def no_cache(op: str) -> None:
    model, *_ = pair()
    same(ours(model, prompt(), steering=OPS[op], use_cache=False), naive_greedy(op), None)


def chunked_prefill(op: str) -> None:
    model, *_ = pair()
    for size in (1, 4):
        same(ours(model, prompt(), steering=OPS[op], prefill_chunk_size=size), naive_greedy(op), LAST)


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of 9 and 6 tokens, the second padded on the left."""
    ids, mask = prompt(), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def left_padding(op: str) -> None:
    """Also equal to the short prompt alone, and to leaving the mask to `generate`."""
    model, base, saes = pair()
    ids, mask = padded()
    expected = naive_generate(base, saes, OPS[op], ids, attention_mask=mask, max_new_tokens=STEPS)
    same(ours(model, ids, steering=OPS[op], attention_mask=mask), expected, LAST)
    same(ours(model, ids, steering=OPS[op]), expected, LAST)
    alone = naive_generate(base, saes, OPS[op], ids[1:, 3:], max_new_tokens=STEPS)
    assert torch.equal(alone.tokens, expected.tokens[1:, 3:])


def batch_against_single(op: str) -> None:
    model, *_ = pair()
    ids = prompt(4)
    together = ours(model, ids, steering=OPS[op])
    for row in range(4):
        single = ours(model, ids[row : row + 1], steering=OPS[op])
        assert torch.equal(single.tokens[0], together.tokens[row])
        stop = single.tokens.shape[1] - 1
        close(single.logits.positions(LAST, stop)[:, 0], together.logits.positions(LAST, stop)[:, row], 1e-12)


def whole_pass(op: str) -> None:
    model, base, saes = pair(dtype=torch.float32)
    with torch.no_grad():
        close(model(prompt(), steering=OPS[op]).logits, naive_forward(base, saes, OPS[op], prompt()), 1e-5)
        model, base, saes = pair("llama", dtype=torch.float32)
        close(model(prompt(), steering=OPS[op]).logits, naive_forward(base, saes, OPS[op], prompt()), 1e-5)
        model, base, saes = pair()
        close(model(prompt(), steering=OPS[op]).logits, naive_forward(base, saes, OPS[op], prompt()), 1e-12)


def bf16_base(op: str) -> None:
    """The SAE works in float32 and its result is rounded to bfloat16 once. Both sides round numbers that agree to
    about 1e-6, so they differ where those lie beside the middle of two bfloat16 numbers, and then by one unit in the
    last place (2^-8 of the value): in the steered state nearly nowhere, in the logits a few units."""
    model, base, saes = pair(dtype=torch.bfloat16)
    assert next(model.saes.parameters()).dtype == torch.float32
    steered = []
    handles = [m.get_submodule("transformer.h.2").register_forward_pre_hook(
        lambda module, args: steered.append(args[0])) for m in (model.lm, base)]  # fmt: skip
    with torch.no_grad():
        actual = model(prompt(), steering=OPS[op]).logits
        expected = naive_forward(base, saes, OPS[op], prompt())
    for handle in handles:
        handle.remove()
    assert actual.dtype == steered[0].dtype == torch.bfloat16
    state, reference = steered[0].float(), steered[1].float()
    different = state != reference
    assert different.float().mean() < 0.02
    # one unit in the last place of the larger; of a value near 0, of the sum's terms
    assert ((state - reference).abs() <= 2**-7 * reference.abs().clamp(min=1e-2))[different].all()
    close(actual.float(), expected.float(), 2**-6)
    if not different.any():
        assert torch.equal(actual, expected)


def gradients(model, op: str, checkpointing: bool) -> dict[str, Tensor]:
    """Gradients of the SAE's parameters and of the input embeddings, in training mode."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    handle = model.get_submodule("lm.transformer.h.1.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        embeds = model.get_input_embeddings()(prompt()).detach().requires_grad_()
        output = model(inputs_embeds=embeds, labels=prompt(), steering=OPS[op], use_cache=False)
        output.loss.backward()
        assert len(runs) == (2 if checkpointing else 1)  # the block really was computed again
        found = {name: p.grad.clone() for name, p in model.saes.named_parameters() if p.grad is not None}
        found["embeddings"], found["loss"] = embeds.grad, output.loss.detach()
    finally:
        handle.remove()
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    return found


def naive_gradients(base, saes, op: str) -> dict[str, Tensor]:
    for sae in saes:
        sae.zero_grad()
    embeds = base.get_input_embeddings()(prompt()).detach().requires_grad_()
    logits = naive_forward(base, saes, OPS[op], prompt(), inputs_embeds=embeds)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), prompt()[:, 1:].flatten())
    loss.backward()
    found = {f"0.{name}": p.grad.clone() for name, p in saes[0].named_parameters() if p.grad is not None}
    return {**found, "embeddings": embeds.grad, "loss": loss.detach()}


def gradient_checkpointing(op: str) -> None:
    if OPS[op].exclude_tokens:  # embeddings, whose gradients are compared, do not say what the tokens are
        with pytest.raises(ValueError, match="Expected `input_ids`"):
            gradients(pair()[0], op, False)
        return
    for site in ("resid_post", "mlp_out"):
        model, base, saes = pair(site=site)
        plain, checkpointed = gradients(model, op, False), gradients(model, op, True)
        assert plain.keys() == checkpointed.keys() >= {"embeddings", "0.W_dec"}
        for name, value in plain.items():
            assert torch.equal(value, checkpointed[name]), name
        expected = naive_gradients(base, saes, op)
        for name, reference in expected.items():
            # What cancels in the reference (the decoder's bias) leaves rounding errors there. transformers computes
            # the loss in float32.
            value = plain.get(name, torch.zeros_like(reference))
            largest = max(reference.abs().max().item(), 1e-3)
            assert (value - reference).abs().max() <= 1e-6 * largest, (site, name)


MODES = {
    f.__name__.replace("_", "-"): f
    for f in (
        greedy,
        sampling,
        sampling_several_sequences,
        beams,
        assisted_target,
        assisted_assistant,
        prompt_lookup,
        guidance,
        static_cache,
        no_cache,
        chunked_prefill,
        left_padding,
        batch_against_single,
        whole_pass,
        bf16_base,
        gradient_checkpointing,
    )
}


@pytest.mark.parametrize(("mode", "op"), covering(MODES, OPS, times=2))
def test_op_in_mode(mode, op):
    MODES[mode](op)


# -- where ---------------------------------------------------------------------------------------------------------

POSITIONS = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last_prompt": "last_prompt",
    "from-the-last": [(-1, None)],
    "first-three": [(0, 3)],
    "two-ranges": [(2, 5), (7, 10)],
    "ends-before-the-last": [(-3, -1)],
    "last-two-and-on": [(-2, None)],
    "all-but-four": [(None, -4)],
    "from-four": [(4, None)],
    "mixed-bounds": [(1, -2)],
    "beyond-both-ends": [(-100, 2), (11, 100)],
    "generated-only": [(9, None)],
    "empty": [(3, 3)],
}
MASK = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 0, 1, 0]]).bool()
# Known without encoding, encoded, and replaced: three ways through the SAE.
KINDS = ("add", "set", "replaced")


def at(op: str, positions) -> Steering:
    s = OPS[op]
    return Steering(s.edits, positions, s.keep_error, s.reconstruct, s.balance)


CACHES = {
    "cache": {},
    "no-cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize(("where", "masked"), covering(POSITIONS, [False, True]))
def test_positions(where, masked):
    model, base, saes = pair("llama")
    mask = MASK if masked else None
    options = {"steering_mask": MASK} if masked else {}
    for op in KINDS:
        steering = at(op, POSITIONS[where])
        expected = naive_generate(base, saes, steering, prompt(), mask, max_new_tokens=STEPS)
        for name, cache in CACHES.items():
            # `passes` of a chunked prefill and of a cache differ in number, positions do not.
            start = None if name == "no-cache" else LAST
            same(ours(model, prompt(), steering=steering, **cache, **options), expected, start)


@pytest.mark.parametrize(("where", "masked"), covering(POSITIONS, [False, True]))
def test_positions_with_left_padding(where, masked):
    """Positions count from each row's first real token; a mask has the columns of the padded prompt."""
    model, base, saes = pair("llama")
    ids, attention = padded()
    mask = MASK if masked else None
    options = {"steering_mask": MASK} if masked else {}
    for op in KINDS:
        steering = at(op, POSITIONS[where])
        expected = naive_generate(base, saes, steering, ids, mask, attention_mask=attention, max_new_tokens=STEPS)
        for cache in CACHES.values():
            actual = ours(model, ids, steering=steering, attention_mask=attention, **cache, **options)
            same(actual, expected, LAST)
        if not masked:
            alone = naive_generate(base, saes, steering, ids[1:, 3:], max_new_tokens=STEPS)
            assert torch.equal(alone.tokens, expected.tokens[1:, 3:])


@pytest.mark.parametrize("where", fast(POSITIONS, "two-ranges"))
def test_positions_in_other_modes(where):
    model, base, saes = pair("llama")
    for op in KINDS:
        steering = at(op, POSITIONS[where])
        one = naive_generate(base, saes, steering, prompt(1), max_new_tokens=STEPS)
        same(ours(model, prompt(1), steering=steering, assistant_model=base), one, LAST)
        same(ours(model, prompt(1), steering=steering, prompt_lookup_num_tokens=2), one, LAST)
        for mask in (None, MASK):
            options = {} if mask is None else {"steering_mask": mask}
            expected = naive_generate(base, saes, steering, prompt(), mask, num_beams=3, max_new_tokens=STEPS)
            same(ours(model, prompt(), steering=steering, num_beams=3, **options), expected, None)
            negative = prompt(2, 4, seed=9)
            for use_cache in (True, False):
                actual = ours(
                    model, prompt(), steering=steering, guidance_scale=1.6, negative_prompt_ids=negative,
                    use_cache=use_cache, **options,
                )  # fmt: skip
                expected = naive_guided(base, saes, steering, prompt(), 1.6, STEPS, negative, mask)
                assert torch.equal(actual.tokens, expected.tokens)
                close(torch.stack(actual.logits.passes), torch.stack(expected.logits.passes), 1e-12)


@pytest.mark.parametrize(
    "architecture",
    ["gemma3_text", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mistral", "opt"))],
)
def test_positions_beyond_a_sliding_window_and_with_learned_positions(architecture):
    """gemma2 and gemma3 keep 16 columns in the first layer's cache, mistral 8 here; the texts have 9 + 16."""
    base = tiny_base(architecture, dtype=torch.float64, **({"sliding_window": 8} if architecture == "mistral" else {}))
    base.generation_config.eos_token_id = VOCAB
    sae = tiny_sae(layer=0, dtype=torch.float64)
    bare, own = copy.deepcopy(base), [copy.deepcopy(sae)]
    model = SaeForCausalLM.from_base(base, saes=[sae])
    ids, attention = padded()
    # Attention of gemma2 (soft-capped) is computed in float32, in another order with and without a cache.
    tolerance = 1e-6 if architecture == "gemma2" else 1e-12
    for positions in ("all", "generated", "prompt", [(18, 22)], [(2, 4), (14, None)]):
        steering = at("set", positions)
        options = {"attention_mask": attention, "max_new_tokens": 16}
        expected = naive_generate(bare, own, steering, ids, **options)
        for cache in CACHES.values():
            same(ours(model, ids, steering=steering, **options, **cache), expected, LAST, tolerance)


@pytest.mark.parametrize("where", POSITIONS)
def test_positions_of_a_whole_pass(where):
    """Without `generate` the text is the prompt, padding on either side; a continuation of a cache is generated."""
    model, base, saes = pair("llama")
    ids, left = padded()
    right_ids, right = ids.clone(), left.flip(-1)
    right_ids[1] = ids[1].roll(-3)
    for op in KINDS:
        steering = at(op, POSITIONS[where])
        for tokens, attention in ((ids, None), (ids, left), (right_ids, right)):
            inputs = {} if attention is None else {"attention_mask": attention}
            real = torch.ones_like(tokens).bool() if attention is None else attention.bool()
            for mask in (None, MASK):
                with torch.no_grad():
                    actual = model(tokens, steering=steering, steering_mask=mask, **inputs).logits
                    expected = naive_forward(base, saes, steering, tokens, mask, **inputs)
                close(actual[real], expected[real], 1e-12)


def test_a_continuation_without_generate_is_generated_text():
    model, base, saes = pair("llama")
    ids = prompt(2, 12)
    for positions in ("all", "generated", "prompt", [(0, 3), (10, 11)]):
        steering = at("set", positions)
        # Nothing is steered in the first pass but what lies in its own prompt; the naive reference is told so.
        with torch.no_grad():
            first = model(ids[:, :9], steering=steering, use_cache=True)
            second = model(ids[:, 9:], steering=steering, past_key_values=cache_of(first))
            with Hooks(base, saes, steering, (0, 9)).installed():
                expected = base(ids, use_cache=False).logits
        close(torch.cat([first.logits, second.logits], 1), expected, 1e-12)


# -- per row -------------------------------------------------------------------------------------------------------

ROWS = {
    "one-op": [OPS["set"], None, at("set", "generated"), OPS["set"]],
    "values": [Steering(edits("add", v)) if v else None for v in (1.0, -1.0, 0, 2.5)],
    "ops": [OPS["ablate"], OPS["add-norm"], OPS["direction"], OPS["at_least-norm"]],
    "features": [
        Steering([FeatureEdit(feature=3, op="set", value=3.0)]),
        Steering([FeatureEdit(feature=7, op="scale", value=-4.0), FeatureEdit(feature=9, op="add", value=1.0)]),
        None,
        Steering([FeatureEdit(feature=3, op="add", value=-2.0)], positions=[(2, -1)]),
    ],
    "replaced-and-not": [OPS["replaced"], OPS["set"], None, OPS["reconstruct"]],
    "reweighted-and-not": [OPS["swap"], OPS["scale"], None, at("swap", "prompt")],
    "reweighted-replaced": [OPS["weight-replaced"], OPS["weight"], OPS["replaced"], None],
    "legacy": [
        Steering([FeatureReweighting(scores=scores(n), mode="weight", legacy=True)], keep_error=False)
        for n in range(4)
    ],
    "balance": [
        Steering([FeatureEdit(feature=3, op="scale", value=-3.0)], balance=True),
        Steering([FeatureEdit(feature=f, op="set", value=2.0) for f in (7, 11)], balance=True),
        None,
        OPS["balance-replaced"],
    ],
    "erased-and-not": [OPS["erase"], OPS["erase-one"], None, OPS["erase-replaced"]],
    "magnitude-and-not": [OPS["scale_magnitude"], OPS["several-on-one"], None, OPS["shrink-max"]],
    "positions": [at("set", p) for p in ("all", "last_prompt", [(0, 2), (-2, None)], [(-3, -1)])],
}


@pytest.mark.parametrize(("rows", "activation"), covering(ROWS, ["topk", "topk-sigmoid", "jumprelu"]))
def test_rows(rows, activation):
    model, base, saes = pair(activation=activation)
    rows, ids = ROWS[rows], prompt(4)
    expected = naive_generate(base, saes, rows, ids, max_new_tokens=STEPS)
    for cache in CACHES.values():
        same(ours(model, ids, steering=rows, **cache), expected, LAST)
    for row, steering in enumerate(rows):  # each as if it were alone
        single = ours(model, ids[row : row + 1], steering=steering if steering is not None else False)
        assert torch.equal(single.tokens[0], expected.tokens[row])
    options: dict[str, Any]
    for options in (
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
    ):
        torch.manual_seed(11)
        expected = naive_generate(base, saes, rows, ids, **options, max_new_tokens=4)
        torch.manual_seed(11)
        same(ours(model, ids, steering=rows, **options, max_new_tokens=4), expected, None)
    negative = prompt(4, 3, seed=12)
    actual = ours(model, ids, steering=rows, guidance_scale=1.4, negative_prompt_ids=negative)
    expected = naive_guided(base, saes, rows, ids, 1.4, STEPS, negative)
    assert torch.equal(actual.tokens, expected.tokens)
    close(torch.stack(actual.logits.passes), torch.stack(expected.logits.passes), 1e-12)


def test_rows_with_left_padding_and_mask():
    model, base, saes = pair()
    ids, attention = padded()
    for rows in ([at("set", "last_prompt"), at("add", [(0, 2), (-1, None)])], [None, OPS["replaced"]]):
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            expected = naive_generate(
                base, saes, rows, ids, MASK, attention_mask=attention, max_new_tokens=STEPS, **options
            )
            actual = ours(model, ids, steering=rows, steering_mask=MASK, attention_mask=attention, **options)
            same(actual, expected, None)


def test_a_balance_without_a_latent_to_spread_on_is_refused():
    model, *_ = pair(d_sae=2, k=1)
    with pytest.raises(ValueError, match="not edited. Received: edits of all 2"):
        model(prompt(), steering=Steering([FeatureEdit(feature=f, value=2.0) for f in (0, 1)], balance=True))


def test_the_number_of_rows_is_checked():
    with pytest.raises(ValueError, match="2 rows. Received: 3 steerings"):
        pair()[0].generate(prompt(2), steering=[None, OPS["add"], None], max_new_tokens=2)


# -- how it is said ------------------------------------------------------------------------------------------------


def test_every_way_to_steer_generate_says_the_same():
    model, base, saes = pair()
    steering, other = at("set", "generated"), OPS["ablate"]
    expected = naive_generate(base, saes, steering, prompt(), max_new_tokens=STEPS)
    plain = naive_generate(base, saes, None, prompt(), max_new_tokens=STEPS)
    assert not torch.equal(expected.tokens, plain.tokens)

    for said in (steering, steering.to_dict(), steering.to_json(), model.prepare_steering(steering)):
        same(ours(model, prompt(), steering=said), expected, LAST)
    config = copy.deepcopy(model.generation_config)
    config.update(**DEFAULTS)
    for said in (steering.to_dict(), steering.to_json(), json.loads(steering.to_json())):
        setattr(config, "sae_steering", said)  # noqa: B010, not a field that transformers knows
        same(ours(model, prompt(), generation_config=config), expected, LAST)
        with model.steered(other):
            same(ours(model, prompt(), generation_config=config), expected, LAST)
        same(ours(model, prompt(), generation_config=config, steering=False), plain, LAST)
    with model.steered(other), model.steered(steering):
        same(ours(model, prompt()), expected, LAST)
        same(ours(model, prompt(), steering=False), plain, LAST)
    same(ours(model, prompt()), plain, LAST)
    try:
        model.steering = steering
        same(ours(model, prompt()), expected, LAST)
        same(ours(model, prompt(), steering=False), plain, LAST)
        with model.steered(None):
            same(ours(model, prompt()), plain, LAST)
        with model.steered(other):
            same(ours(model, prompt(), steering=steering), expected, LAST)
    finally:
        model.steering = None
    same(ours(model, prompt()), plain, LAST)


@pytest.mark.parametrize("source", ["default", "generation_config"])
def test_saved_steering_is_loaded(tmp_path, source):
    base = tiny_base()
    base.generation_config.eos_token_id = VOCAB
    sae = tiny_sae(layer=1)
    bare, own = copy.deepcopy(base), [copy.deepcopy(sae)]
    model = SaeForCausalLM.from_base(base, saes=[sae], weights_scope="full")
    if source == "default":
        model.steering = OPS["set"]
    else:
        model.generation_config.sae_steering = OPS["set"].to_dict()
    model.save_pretrained(tmp_path)
    loaded = SaeForCausalLM.from_pretrained(tmp_path)
    expected = naive_generate(bare, own, OPS["set"], prompt(), max_new_tokens=STEPS)
    same(ours(loaded, prompt()), expected, LAST, tolerance=1e-5)
    plain = naive_generate(bare, own, None, prompt(), max_new_tokens=STEPS)
    same(ours(loaded, prompt(), steering=False), plain, LAST, tolerance=1e-5)


def test_scar_facade_says_the_same():
    model, base, saes = pair(activation="topk", normalization="layer_norm", site="mlp_out")
    jump = pair(activation="jumprelu", normalization="layer_norm", site="mlp_out")
    cases = [
        ({"mod_features": 7, "mod_scaling": -6.0}, [FeatureEdit(feature=7, op="scale", value=-6.0)], False),
        ({"mod_features": [7, 3], "mod_replacement": 2.0, "mod_scaling": 9.0},
         [FeatureEdit(feature=f, op="set", value=2.0) for f in (7, 3)], False),
        ({"mod_features": 7, "mod_scaling": 5.0, "mod_balance": True},
         [FeatureEdit(feature=7, op="scale", value=5.0)], True),
        ({"mod_features": 0}, [], False),
        ({"mod_features": 0, "mod_vector": [0.5, 0.0, -1.0] + [0.0] * 61, "mod_vec_factor": 2.0},
         [FeatureEdit(feature=0, op="add", value=1.0), FeatureEdit(feature=2, op="add", value=-2.0)], False),
    ]  # fmt: skip
    for fields, meant, balance in cases:
        steering = Steering(meant, keep_error=False, reconstruct=(0,), balance=balance)
        expected = naive_generate(base, saes, steering, prompt(), max_new_tokens=STEPS)
        for name, value in fields.items():
            setattr(model.hook, name, value)
        same(ours(model, prompt()), expected, LAST)
        for name in fields:
            setattr(model.hook, name, type(model.hook).FIELDS[name])
    same(ours(model, prompt()), naive_generate(base, saes, None, prompt(), max_new_tokens=STEPS), LAST)
    model, base, saes = jump
    model.hook.mod_features, model.hook.mod_scaling = 7, -3.0
    steering = Steering([FeatureEdit(feature=7, op="scale_magnitude", value=-3.0)], keep_error=False)
    same(ours(model, prompt()), naive_generate(base, saes, steering, prompt(), max_new_tokens=STEPS), LAST)
    model.hook.mod_features = None
    same(ours(model, prompt()), naive_generate(base, saes, None, prompt(), max_new_tokens=STEPS), LAST)


# -- which SAE -----------------------------------------------------------------------------------------------------

ACTIVATIONS = ("relu", "topk", "topk-sigmoid", "topk-tanh", "batch_topk", "jumprelu", "gated", "identity")
NORMALIZATIONS = {
    "none": {},
    "layer_norm": {"normalization": "layer_norm"},
    "constant_norm": {"normalization": "constant_norm"},
    "scalar": {"normalization": "scalar", "input_scale": 1.7},
}
UPSTREAM = {"layer": None, "site": None, "apply_b_dec_to_input": False}
SHAPES = {
    "no-b_dec": {"apply_b_dec_to_input": False},
    "tied": {"tied": True},
    "skip": {"skip_connection": True},
    "output_scale": {"normalization": "scalar", "input_scale": 1.7, "output_scale": 0.6},
    "transcoder": {**UPSTREAM, "hook": "transformer.h.1.mlp.input", "hook_out": "transformer.h.1.mlp.output"},
    "wide-transcoder": {
        **UPSTREAM, "d_in": 128, "d_out": 32, "hook": "transformer.h.1.mlp.c_proj.input",
        "hook_out": "transformer.h.1.mlp", "normalization": "constant_norm",
    },
    "wide-skip-transcoder": {
        **UPSTREAM, "d_in": 128, "d_out": 32, "hook": "h.1.mlp.c_fc", "hook_out": "h.1.mlp.output",
        "skip_connection": True, "normalization": "scalar", "input_scale": 0.5, "output_scale": 2.0,
    },
    "across-layers": {**UPSTREAM, "hook": "transformer.h.0.input", "hook_out": "transformer.h.2.output"},
}  # fmt: skip
REFUSED_BY_GATED = ("scale_magnitude", "swap", "weight", "weight-replaced", "weight-legacy", "legacy-then-norm",
                    "swap-then-edits",
                    "erase-reweighted")  # fmt: skip


PRECISIONS = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 1e-5)}


def every_op(settings: dict, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    model, base, saes = pair(dtype=dtype, **settings)
    if "hook" in settings:  # the reference takes whole paths
        for name in ("hook", "hook_out"):
            path = getattr(saes[0].config, name)
            setattr(saes[0].config, name, path if path.startswith("transformer.") else f"transformer.{path}")
    for name, steering in OPS.items():
        if settings.get("activation") == "gated" and name in REFUSED_BY_GATED:
            with pytest.raises(ValueError, match="gated"):
                model(prompt(), steering=steering)
            continue
        with torch.no_grad():
            expected = naive_forward(base, saes, steering, prompt())
            close(model(prompt(), steering=steering).logits, expected, tolerance)


@pytest.mark.parametrize(
    ("activation", "normalization", "precision"), covering(ACTIVATIONS, NORMALIZATIONS, PRECISIONS)
)
def test_every_op_with(activation, normalization, precision):
    every_op({"activation": activation, **NORMALIZATIONS[normalization]}, precision)


@pytest.mark.parametrize(("shape", "activation", "precision"), covering(SHAPES, ["topk", "jumprelu"], PRECISIONS))
def test_every_op_with_shape(shape, activation, precision):
    every_op({"activation": activation, **SHAPES[shape]}, precision)


ENCODERS: dict[str, dict[str, Any]] = {
    "batch_topk": {},
    "topk": {},
    "abs_topk": {},
    "groupmax": {"normalization": "layer_norm", "normalize_output": False},
    "topk-identity": {"scaled_selection": True},
    "jumprelu": {"glu": True},
}


@pytest.mark.parametrize(("op", "kind"), covering(OPS, ENCODERS))
def test_op_in_llama_at_the_mlp(op, kind):
    """Another family, site and kind of encoder, cached, padded and in chunks."""
    model, base, saes = pair("llama", site="mlp_out", activation=kind, **ENCODERS[kind])
    ids, attention = padded()
    steering = at(op, [(1, 3), (-1, None)])
    expected = naive_generate(base, saes, steering, ids, attention_mask=attention, max_new_tokens=STEPS)
    for cache in CACHES.values():
        same(ours(model, ids, steering=steering, attention_mask=attention, **cache), expected, LAST)


def test_several_saes_steered_together():
    base = tiny_base(dtype=torch.float64)
    base.generation_config.eos_token_id = VOCAB
    places = [(0, "mlp_out"), (1, "resid_post"), (1, "resid_post"), (2, "attn_out"), (2, "resid_pre")]
    kinds = ["topk", "jumprelu", "relu", "gated", "topk-sigmoid"]
    saes = [
        tiny_sae(seed=n, layer=layer, site=site, activation=kind, dtype=torch.float64)
        for n, ((layer, site), kind) in enumerate(zip(places, kinds, strict=True))
    ]
    bare, own = copy.deepcopy(base), copy.deepcopy(saes)
    model = SaeForCausalLM.from_base(base, saes=saes)
    mixed = [FeatureEdit(sae=n, feature=f, op="set", value=1.0 + n) for n in range(5) for f in (3, 7)]
    rows = [
        Steering(mixed, positions="generated"),
        Steering(mixed[:4], keep_error=False, reconstruct=(3,)),
        None,
        Steering([*mixed[4:6], FeatureReweighting(sae=4, scores=scores())], positions=[(2, None)]),
    ]
    options: dict[str, Any]
    for options in ({}, {"num_beams": 2}):
        expected = naive_generate(bare, own, rows, prompt(4), max_new_tokens=STEPS, **options)
        same(ours(model, prompt(4), steering=rows, **options), expected, None)


def test_the_reference_agrees_with_the_saes_own_mathematics():
    """`naive.py` and `SparseAutoencoder` give the same latents and reconstructions."""
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for activation in ACTIVATIONS:
        for settings in NORMALIZATIONS.values():
            sae = tiny_sae(activation=activation, dtype=torch.float64, **settings)
            output = sae(x)
            close(output.latents, latents_of(sae, x), 1e-12)
            close(output.reconstruction, reconstruction_of(sae, x), 1e-12)
            close(sae.decode(sae.encode(x), x), reconstruction_of(sae, x), 1e-12)
            nothing = Steering([FeatureEdit(feature=3, op="scale", value=1.0)])
            close(edited(sae, 0, x, x, nothing), x, 1e-12)
