"""Roles of a chat as positions: against texts written by hand, and in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering, chat_tokens
from tests.tiny import tiny_base, tiny_sae

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MARKERS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
MESSAGE = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + MESSAGE + "{% endfor %}" + PROMPT
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML
)  # as SmolLM2's
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('roles') }}{% endif %}"
    "{% endfor %}"
)
MERGED = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<|im_start|>{{ m['role'] }}\n{% if loop.first %}{{ first }}{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}" + PROMPT
)  # as Gemma's: the system's message is in the user's
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think></think>{{ m['content'] }}<|im_end|>\n{% else %}" + MESSAGE + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if quick %}<think></think>{% endif %}"
    "{% endif %}"
)  # as Qwen3's: thoughts are in the last answer only
MARKED = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}" + MESSAGE + "{% endif %}{% endfor %}" + PROMPT
)
SYSTEM, USER, ANSWER = (
    {"role": r, "content": c} for r, c in (("system", "Be"), ("user", "Hi w"), ("assistant", "Yo"))
)
MORE = {"role": "user", "content": "Bye"}
IM_USER, IM_MORE = "<|im_start|>user\nHi w<|im_end|>\n", "<|im_start|>user\nBye<|im_end|>\n"
IM_SYSTEM = "<|im_start|>system\nBe<|im_end|>\n"


def tokenizer_with(template: str | None, merges: tuple[str, ...] = (), bos: str = "<s>") -> Any:
    """A token for each byte, the markers, and some texts that are one token."""
    raw = Tokenizer(models.BPE({letter: place for place, letter in enumerate(ALPHABET)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(one, special=True) for one in MARKERS])
    tokenizer.add_tokens(list(merges))
    tokenizer.chat_template = template
    return tokenizer


def told(tokenizer: Any, chat: Any, role: str) -> list[str]:
    """The texts at the positions of a role, without what is to be generated."""
    ids = chat.input_ids[0]
    spans = [ids[start:stop] for start, stop in chat.positions(role)]
    return [tokenizer.decode(span, clean_up_tokenization_spaces=False) for span in spans if len(span)]


CASES = {
    "chatml": (CHATML, [SYSTEM, USER, ANSWER, MORE],
               {"system": [IM_SYSTEM], "user": [IM_USER, IM_MORE], "assistant": ["Yo<|im_end|>\n"]}),
    "an answer at the end": (CHATML, [USER, ANSWER], {"user": [IM_USER], "assistant": ["Yo<|im_end|>\n"]}),
    "two answers": (CHATML, [USER, ANSWER, MORE, ANSWER],
                    {"user": [IM_USER, IM_MORE], "assistant": ["Yo<|im_end|>\n"] * 2}),
    "a system of the template's own": (DEFAULT_SYSTEM, [USER, ANSWER],
                                       {"user": [IM_USER], "assistant": ["Yo<|im_end|>\n"]}),
    "the same, said": (DEFAULT_SYSTEM, [SYSTEM, USER], {"system": [IM_SYSTEM], "user": [IM_USER]}),
    "a first token of texts": ("<s>" + CHATML, [SYSTEM, USER], {"system": [IM_SYSTEM], "user": [IM_USER]}),
    "no prompt to write": (MISTRAL, [USER, ANSWER, MORE],
                           {"user": ["[INST] Hi w[/INST]", "[INST] Bye[/INST]"], "assistant": [" Yo</s>"]}),
    "merged, without a system": (MERGED, [USER, ANSWER, MORE],
                                 {"user": [IM_USER, IM_MORE], "assistant": ["Yo<|im_end|>\n"]}),
    "thoughts": (THINKING, [USER, ANSWER, MORE],
                 {"user": [IM_USER, IM_MORE], "assistant": ["Yo<|im_end|>\n"]}),
    "thoughts at the end": (THINKING, [USER, ANSWER, MORE, ANSWER],
                            {"user": [IM_USER, IM_MORE],
                             "assistant": ["Yo<|im_end|>\n", "<think></think>Yo<|im_end|>\n"]}),
    "generation": (MARKED, [SYSTEM, USER, ANSWER, MORE, ANSWER],
                   {"system": [IM_SYSTEM], "user": [IM_USER, IM_MORE], "assistant": ["Yo<|im_end|>"] * 2}),
    "another role": (CHATML, [USER, {"role": "tool", "content": "4"}],
                     {"user": [IM_USER], "tool": ["<|im_start|>tool\n4<|im_end|>\n"]}),
}  # fmt: skip


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_roles_of(name: str, prompt: bool) -> None:
    template, messages, expected = CASES[name]
    tokenizer = tokenizer_with(template)
    chat = chat_tokens(messages, tokenizer, add_generation_prompt=prompt)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
    assert chat.input_ids.tolist() == [whole["input_ids"]] and chat.input_ids.dtype == torch.int64
    assert len(chat.roles) == chat.input_ids.shape[1]
    assert {role for role in chat.roles if role} == set(expected)
    for role, texts in expected.items():
        assert told(tokenizer, chat, role) == texts
        ends = [stop for _, stop in chat.positions(role)]
        assert ends[-1] is None if prompt and role == "assistant" else None not in ends
    covered = sum(role is not None for role in chat.roles)
    assert covered == sum(
        len(tokenizer(t, add_special_tokens=False).input_ids) for ts in expected.values() for t in ts
    )


def test_a_marker_that_is_the_first_token_of_texts_too() -> None:
    tokenizer = tokenizer_with(CHATML, bos="<|im_start|>")  # as SmolLM2's
    for messages in ([SYSTEM, USER], [SYSTEM]):
        chat = chat_tokens(messages, tokenizer, add_generation_prompt=False)
        assert told(tokenizer, chat, "system") == [IM_SYSTEM]


def test_several_roles_what_is_generated_and_neighbours() -> None:
    tokenizer = tokenizer_with(CHATML)
    chat = chat_tokens([SYSTEM, USER], tokenizer)
    length, system = chat.input_ids.shape[1], len(tokenizer(IM_SYSTEM).input_ids)
    user = system + len(tokenizer(IM_USER).input_ids)
    assert chat.positions("system", "user") == ((0, user),)  # one range, for they are side by side
    assert chat.positions("user") == ((system, user),)
    assert chat.positions("assistant") == ((length, None),)
    assert chat.positions("user", "assistant") == ((system, user), (length, None))
    answered = chat_tokens([USER, ANSWER], tokenizer, add_generation_prompt=False)
    assert answered.positions("assistant")[-1][1] == answered.input_ids.shape[1]


def test_variables_of_the_template() -> None:
    tokenizer = tokenizer_with(THINKING)
    quick = chat_tokens([USER], tokenizer, variables={"quick": True})
    assert tokenizer.decode(quick.input_ids[0]).endswith("<think></think>")
    assert told(tokenizer, quick, "user") == [IM_USER]


def model_of(tokenizer: Any) -> SaeForCausalLM:
    base = tiny_base(dtype=torch.float64, vocab_size=len(tokenizer))
    base.generation_config.eos_token_id = None
    return SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1, dtype=torch.float64)])


EDIT = [FeatureEdit(feature=7, op="set", value=3.0)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_scores": True}


@torch.no_grad()
def test_a_model_is_steered_at_a_role() -> None:
    tokenizer = tokenizer_with(DEFAULT_SYSTEM)
    model, chat = model_of(tokenizer), chat_tokens([USER, ANSWER, MORE], tokenizer)
    ids = chat.input_ids
    plain = model(ids).logits
    for role in ("user", "assistant"):
        mask = torch.tensor([[one == role for one in chat.roles]])
        found = model(ids, steering=Steering(EDIT, chat.positions(role))).logits
        assert torch.equal(found, model(ids, steering=Steering(EDIT), steering_mask=mask).logits)
        first = chat.roles.index(role)
        assert torch.equal(found[:, :first], plain[:, :first]) and not torch.equal(found[:, first], plain[:, first])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_the_assistant_goes_on_to_write_is_its_own(use_cache: bool) -> None:
    tokenizer = tokenizer_with(CHATML)
    model, chat = model_of(tokenizer), chat_tokens([USER], tokenizer)
    written = model.generate(
        chat.input_ids, attention_mask=torch.ones_like(chat.input_ids), use_cache=use_cache,
        steering=Steering(EDIT, chat.positions("assistant")), **OPTIONS, return_dict_in_generate=True,
    )  # fmt: skip
    text, length = written.sequences, chat.input_ids.shape[1]
    mask = torch.arange(text.shape[1])[None] >= length  # each token by hand, in one pass over the whole
    whole = model(text, steering=Steering(EDIT), steering_mask=mask).logits[0, length - 1 : -1]
    assert (torch.stack(written.scores)[:, 0] - whole).abs().max() < 1e-5
    assert torch.equal(whole.argmax(-1), text[0, length:])


@torch.no_grad()
def test_chats_of_several_lengths_in_one_batch() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.padding_side = "left"
    model = model_of(tokenizer)
    chats = [chat_tokens(messages, tokenizer) for messages in ([SYSTEM, USER], [USER, ANSWER, MORE])]
    steerings = [Steering(EDIT, chat.positions("user")) for chat in chats]
    batch = tokenizer.pad({"input_ids": [chat.input_ids[0].tolist() for chat in chats]}, return_tensors="pt")
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, steering=steerings, **OPTIONS)
    for row, (chat, steering) in enumerate(zip(chats, steerings, strict=True)):
        alone = model.generate(
            chat.input_ids, attention_mask=torch.ones_like(chat.input_ids), steering=steering, **OPTIONS
        )
        assert torch.equal(together[row, -5:], alone[0, -5:])


# -- what cannot be told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [(), ("assistant",), ("user", "sytem")])
def test_a_role_that_the_chat_does_not_have(roles: tuple[str, ...]) -> None:
    chat = chat_tokens([USER], tokenizer_with(CHATML), add_generation_prompt=False)
    with pytest.raises(ValueError, match=r"'user'\. Received: \(") as caught:
        chat.positions(*roles)
    assert repr(roles) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, [USER], "with a chat template"),
        (CHATML, [], "at least one"),
        (CHATML, [{"content": "Hi"}], "dicts with a role"),
        (MISTRAL, [SYSTEM, USER], r"refuses these messages. Received: roles \['system', 'user'\]"),
        (MERGED, [SYSTEM, USER], "message 0 of role 'system'"),
        (DEFAULT_SYSTEM, [ANSWER, USER], "message 0 of role 'assistant' where it begins"),
        (CHATML + "{% if not add_generation_prompt %}</s>{% endif %}", [USER], "rewrites them for an answer"),
        ("{{ messages | length }}" + CHATML, [USER, ANSWER], "message 0 of role 'user'"),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>").replace(
            "{{ m['content'] }}{% endgen", "{% endgen"), [USER, ANSWER], "marks 0 texts.*Expected 1"),
    ],
)  # fmt: skip
def test_a_chat_whose_roles_are_not_known(template: str | None, messages: list[Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        chat_tokens(messages, tokenizer_with(template))


def test_a_token_over_the_border() -> None:
    tokenizer = tokenizer_with(CHATML, merges=("\n\n",))
    chat_tokens([USER, {"role": "assistant", "content": "Yo\n\n"}], tokenizer)
    with pytest.raises(ValueError, match="reaches over the border"):
        chat_tokens([USER, {"role": "assistant", "content": "\nYo"}], tokenizer)
