"""Tokens that steering leaves alone: against the naive reference in every mode, and by name.

Greedy, sampling, beams, drafts, guidance, caches, chunks and padding: `test_steering_grid`, ops `excluded`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AddedToken

from sae_transformers import FeatureEdit, Gate, SaeForCausalLM, Steering
from tests.covering import fast
from tests.create_training_data.words import word_tokenizer
from tests.invariants.naive import naive_generate, naive_guided
from tests.invariants.test_gates import model as gated_model
from tests.invariants.test_gates import naive_generate as naive_by_token
from tests.invariants.test_gates import naive_logits
from tests.invariants.test_gates import saes as gated_saes
from tests.invariants.test_steering_grid import CACHES, LAST, STEPS, close, edits, ours, padded, pair, same
from tests.invariants.test_threads import together
from tests.tiny import VOCAB, prompt, tiny_base, tiny_sae

ODD, SOME = tuple(range(1, VOCAB, 2)), tuple(range(0, VOCAB, 3))
SET = edits("set", 1.3)
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
)


@pytest.mark.parametrize("positions", ["generated", "prompt", [(2, 5), (-2, None)]])
def test_with_positions_in_every_cache_padded_or_not(positions):
    model, base, saes = pair("llama")
    steering = Steering(SET, positions, exclude_tokens=SOME)
    ids, mask = padded()
    for tokens, options in ((prompt(), {}), (ids, {"attention_mask": mask})):
        expected = naive_generate(base, saes, steering, tokens, max_new_tokens=STEPS, **options)
        for name, cache in CACHES.items():
            start = None if name == "no-cache" else LAST
            same(ours(model, tokens, steering=steering, **cache, **options), expected, start)


def test_each_row_has_its_own():
    model, base, saes = pair()
    rows: list[Any] = [Steering(SET, exclude_tokens=ODD), None, Steering(SET), Steering(SET, exclude_tokens=SOME)]
    ids = prompt(4)
    expected = naive_generate(base, saes, rows, ids, max_new_tokens=STEPS)
    for cache in CACHES.values():
        same(ours(model, ids, steering=rows, **cache), expected, LAST)
    for row, steering in enumerate(rows):
        single = ours(model, ids[row : row + 1], steering=steering if steering is not None else False)
        assert torch.equal(single.tokens[0], expected.tokens[row])
    options: dict[str, Any]
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 0}):
        torch.manual_seed(3)
        expected = naive_generate(base, saes, rows, ids, **options, max_new_tokens=STEPS)
        torch.manual_seed(3)
        same(ours(model, ids, steering=rows, **options), expected, None)
    negative = prompt(4, 3, seed=12)
    actual = ours(model, ids, steering=rows, guidance_scale=1.4, negative_prompt_ids=negative)
    expected = naive_guided(base, saes, rows, ids, 1.4, STEPS, negative)
    assert torch.equal(actual.tokens, expected.tokens)
    close(torch.stack(actual.logits.passes), torch.stack(expected.logits.passes), 1e-12)


def test_what_is_excluded_is_the_base_bit_for_bit():
    model, base, _ = pair(dtype=torch.float32)
    ids = prompt()
    all_of_them = Steering(SET, exclude_tokens=range(VOCAB))
    with torch.no_grad():
        plain = base(ids).logits
        assert torch.equal(model(ids, steering=all_of_them).logits, plain)
        # Up to the first token that is steered: the last of each row.
        last = Steering(SET, exclude_tokens=sorted(set(ids[:, :-1].flatten().tolist()) - set(ids[:, -1].tolist())))
        steered = model(ids, steering=last).logits
    untouched = [[token in last.exclude_tokens for token in row] for row in ids.tolist()]
    until = [row.index(False) for row in untouched]
    assert all(torch.equal(steered[r, :n], plain[r, :n]) and n > 0 for r, n in enumerate(until))
    assert not torch.equal(steered, plain)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(model.generate(ids, steering=all_of_them, **options), base.generate(ids, **options))


def test_a_steering_mask_and_the_tokens_both_count():
    model, *_ = pair()
    ids, mask = prompt(), torch.arange(9).expand(2, 9) % 2 == 0
    both = mask & torch.tensor([[token not in ODD for token in row] for row in ids.tolist()])
    with torch.no_grad():
        found = model(ids, steering=Steering(SET, exclude_tokens=ODD), steering_mask=mask).logits
        expected = model(ids, steering=Steering(SET), steering_mask=both).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", fast([False, True], True))
def test_compiled_whole(rows):
    model = SaeForCausalLM.from_base(tiny_base(num_hidden_layers=2), saes=[tiny_sae(layer=1)])
    excluded = Steering(SET, exclude_tokens=ODD)
    plan = model.prepare_steering([excluded, Steering(SET, exclude_tokens=SOME)] if rows else excluded)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ids in (prompt(), prompt(seed=8)):
            assert torch.equal(compiled(ids, steering=plan).logits, model(ids, steering=plan).logits)
    torch._dynamo.reset()


def test_two_threads():
    model, *_ = pair(dtype=torch.float32)
    steerings = [Steering(SET, exclude_tokens=ODD), Steering(SET, exclude_tokens=SOME)]

    def job(steering: Steering) -> Tensor:
        with torch.no_grad():
            return model(prompt(), steering=steering).logits

    alone = [job(one) for one in steerings]
    assert not torch.equal(*alone)
    for _ in range(8):
        found = together([lambda s=s: job(s) for s in steerings])
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_json_there_and_back():
    for tokens in ([], [3, 1, 3], ["chat", 7, "bos"]):
        steering = Steering(SET, exclude_tokens=tokens)
        again = Steering.from_json(steering.to_json())
        assert again == steering and hash(again) == hash(steering)
    assert Steering(SET, exclude_tokens=["chat", 7, 3, 7]).to_dict()["exclude_tokens"] == [3, 7, "chat"]
    assert "exclude_tokens" not in json.dumps(Steering(SET).to_dict())  # files from before are as they were


# -- of an edit --------------------------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    {"feature": 1, "op": "set", "value": 4.0}, {"feature": 2, "op": "add", "value": 5.0},
    {"feature": 4, "op": "direction", "value": 6.0}, {"feature": 9, "op": "at_least", "value": 3.0},
    {"feature": 5, "op": "direction", "value": 0.5, "unit": "norm"},
    *({"feature": feature, "op": "erase"} for feature in range(10, 20)),
    *({"feature": feature, "op": "scale_magnitude", "value": 2.0} for feature in (30, 31)),
]  # fmt: skip
OWN = {
    "each alike": Steering([FeatureEdit(1, **one, exclude_tokens=SOME) for one in CHANGES]),
    "each its own": Steering(
        [FeatureEdit(1, **one, exclude_tokens=range(n, VOCAB, 4)) for n, one in enumerate(CHANGES[:5])]
    ),
    "one beside others": Steering(
        [FeatureEdit(1, **CHANGES[0], exclude_tokens=ODD), *(FeatureEdit(1, **one) for one in CHANGES[1:4])]
    ),
    "two of one latent": Steering(
        [FeatureEdit(1, feature=3, op="add", value=v, exclude_tokens=t) for v, t in ((5.0, ODD), (-3.0, SOME))]
    ),
    "beside the whole's": Steering([FeatureEdit(1, **one, exclude_tokens=ODD) for one in CHANGES[:3]], "generated",
                                   exclude_tokens=SOME),
    "gated": Steering(
        [FeatureEdit(1, **one, when=Gate(feature=3, above=0.2), exclude_tokens=ODD) for one in CHANGES[:3]],
        when=Gate(feature=11, over="so_far", above=0.3),
    ),
    "erased apart": Steering(
        [FeatureEdit(1, feature=f, op="erase", exclude_tokens=range(f % 2, VOCAB, 2)) for f in range(1, 28)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_an_edit_leaves_its_own_tokens_alone(name):
    steering, ours = OWN[name], gated_model()
    base, bank = tiny_base("gpt2", dtype=torch.float64), gated_saes()
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    for seed in range(2):
        ids = prompt(1, 7, seed=seed)
        wanted, acted = naive_by_token(base, bank, ids[0], steering, 6)
        found: Any = ours.generate(ids, steering=steering, do_sample=False, return_dict_in_generate=True,
                                   output_logits=True, **options)  # fmt: skip
        assert acted > 0 and torch.equal(found.sequences[0], wanted)
        logits, _ = naive_logits(base, bank, wanted, steering, 7)
        assert torch.allclose(torch.stack(found.logits, 1)[0].double(), logits[6:-1], atol=1e-5)
    modes: list[dict[str, Any]] = [
        {"prefill_chunk_size": 3}, {"num_beams": 3}, {"do_sample": True}, {"guidance_scale": 1.7},
        {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
        {"num_return_sequences": 2, "do_sample": True},
    ]  # fmt: skip
    for mode in modes:
        plain = {k: v for k, v in mode.items() if k not in ("cache_implementation", "prefill_chunk_size")}
        torch.manual_seed(0)
        wanted = ours.generate(
            prompt(2, 7), steering=steering, use_cache=False, **options, **{"do_sample": False, **plain}
        )
        torch.manual_seed(0)
        assert torch.equal(
            ours.generate(prompt(2, 7), steering=steering, **options, **{"do_sample": False, **mode}), wanted
        ), mode


@pytest.mark.slow
def test_rows_compiling_and_bits_of_an_edits_own_tokens():
    ours, ids = gated_model().float(), prompt(3, 7)
    rows = [OWN["each its own"], None, OWN["gated"]]
    with torch.no_grad():
        found, plain = ours(ids, steering=rows).logits, ours(ids, steering=False).logits
        for row, steering in enumerate(rows):
            alone = ours(ids[row : row + 1], steering=steering or False).logits
            assert torch.allclose(found[row], alone[0], atol=1e-5)
        nothing = Steering([FeatureEdit(1, **one, exclude_tokens=range(VOCAB)) for one in CHANGES])
        assert torch.equal(ours(ids, steering=nothing).logits, plain)
        plan = ours.prepare_steering(OWN["each its own"])
        wanted = ours(ids, steering=plan).logits
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(ids, steering=plan).logits, wanted, atol=1e-5)
        torch._dynamo.reset()
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        ours(inputs_embeds=ours.get_input_embeddings()(ids), steering=OWN["each its own"])


def test_an_edits_own_tokens_as_json_and_by_name():
    for steering in OWN.values():
        again = Steering.from_json(steering.to_json())
        assert again == steering and hash(again) == hash(steering)
    named = Steering(
        [FeatureEdit(feature=1, op="ablate", exclude_tokens=["bos", 9]), *SET], exclude_tokens=["special"]
    )
    known = named.with_tokenizer(chat_tokenizer())
    assert known.feature_edits[0].exclude_tokens == (1, 9) and known.exclude_tokens[:3] == (0, 1, 2)
    assert known.edits[1:] == named.edits[1:] and known.with_tokenizer(None) is known
    with pytest.raises(ValueError, match="with_tokenizer.*'bos'"):
        gated_model().prepare_steering(named)
    with pytest.raises(ValueError, match="tokens of their own.*`exclude_tokens` of an edit"):
        Steering([FeatureEdit(feature=1, op="ablate", exclude_tokens=[3])], balance=True)
    with pytest.raises(ValueError, match="exclude_tokens"):
        FeatureEdit(feature=1, op="ablate", exclude_tokens=["eos"])


# -- by name -----------------------------------------------------------------------------------------------------


def chat_tokenizer() -> Any:
    tokenizer = word_tokenizer(begins=True)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|end|>", special=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_names_become_ids():
    tokenizer = chat_tokenizer()
    turn, end = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    ids = {"bos": [1], "special": [0, 1, 2, 3, turn], "chat": sorted([turn, end])}
    for name, wanted in ids.items():
        assert Steering(SET, exclude_tokens=[name]).with_tokenizer(tokenizer).exclude_tokens == tuple(wanted)
    several = Steering(SET, exclude_tokens=["bos", 50, "chat"]).with_tokenizer(tokenizer)
    assert several.exclude_tokens == tuple(sorted([1, 50, turn, end]))
    assert several.with_tokenizer(None) is several  # nothing is left to be looked up


def test_a_template_without_a_system_message():
    tokenizer = chat_tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATE
    plain = Steering(SET, exclude_tokens="chat").with_tokenizer(chat_tokenizer())
    assert Steering(SET, exclude_tokens="chat").with_tokenizer(tokenizer) == plain


def test_the_markers_of_a_chat_are_left_alone():
    tokenizer = chat_tokenizer()
    model = SaeForCausalLM.from_base(tiny_base(dtype=torch.float64, vocab_size=len(tokenizer)), saes=[
        tiny_sae(layer=1, dtype=torch.float64)])  # fmt: skip
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    steering = Steering(SET, exclude_tokens="chat").with_tokenizer(tokenizer)
    ranges = [(place, place + 1) for place, token in enumerate(ids[0].tolist()) if token not in (94, 95)]
    assert 0 < len(ranges) < ids.shape[1]
    with torch.no_grad():
        assert torch.equal(model(ids, steering=steering).logits, model(ids, steering=Steering(SET, ranges)).logits)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([-1], "Received: -1"), ([True], "Received: True"), ([2**31], "Received: 2147483648"),
        ([1.5], "Received: 1.5"), (["user"], "'special', 'bos', 'chat'. Received: 'user'"), (None, "must be a list"),
        ({"bos": 1}, "must be a list"),
    ],
)  # fmt: skip
def test_wrong_tokens(tokens: Any, told: str):
    with pytest.raises((ValueError, TypeError), match=told):
        Steering(SET, exclude_tokens=tokens)


def test_names_that_nobody_looked_up_are_told():
    model, *_ = pair()
    for take in (
        model.prepare_steering,
        lambda s: model(prompt(), steering=s),
        lambda s: setattr(model, "steering", s),
    ):
        with pytest.raises(ValueError, match=r"with_tokenizer\(tokenizer\).*\['special'\]"):
            take(Steering(SET, exclude_tokens=["special", 3]))


@pytest.mark.parametrize(
    ("name", "attribute", "told"),
    [
        ("bos", "bos_token", "the token that texts begin with"),
        ("chat", "chat_template", "has no chat template"),
    ],
)
def test_a_tokenizer_without_such_a_token(name: str, attribute: str, told: str):
    tokenizer = chat_tokenizer()
    setattr(tokenizer, attribute, None)
    with pytest.raises(ValueError, match=f"{told}.*{name}"):
        Steering(SET, exclude_tokens=name).with_tokenizer(tokenizer)


def test_a_template_that_refuses_every_chat_and_one_without_markers():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="refuses a user's"):
        Steering(SET, exclude_tokens="chat").with_tokenizer(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="knows no such token"):
        Steering(SET, exclude_tokens="chat").with_tokenizer(tokenizer)


def test_embeddings_do_not_say_what_the_tokens_are():
    model, *_ = pair()
    steering = Steering(SET, exclude_tokens=ODD)
    embeds = model.get_input_embeddings()(prompt())
    with pytest.raises(ValueError, match="Expected `input_ids`"):
        model(inputs_embeds=embeds, steering=steering)
    with pytest.raises(ValueError, match="Expected `input_ids`"):
        model(inputs_embeds=embeds, steering=Steering(SET, "generated", exclude_tokens=ODD))


def test_gates_read_what_is_left_alone():
    """They see a text, and `exclude_tokens` says where it is changed."""
    model, *_ = pair()
    gate = Gate(feature=3, over="so_far")
    with torch.no_grad():
        opened = model(prompt(), steering=Steering([FeatureEdit(feature=9, op="direction", value=3.0)], when=gate,
                                                   exclude_tokens=ODD)).logits  # fmt: skip
        kept = torch.tensor([[token not in ODD for token in row] for row in prompt().tolist()])
        masked = model(prompt(), steering=Steering([FeatureEdit(feature=9, op="direction", value=3.0)], when=gate),
                       steering_mask=kept).logits  # fmt: skip
    assert torch.equal(opened, masked)
