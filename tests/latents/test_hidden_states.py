import re
import threading
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_transformers import SaeForCausalLM
from sae_transformers.latents.hidden_states import HiddenStateReader, kept_positions, read_hidden_states
from sae_transformers.modeling.hook_points import find_hook_point
from tests.tiny import ARCHITECTURES, WIDTH, prompt, tiny_base, tiny_sae


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter: a is 7."""
    letters = Tokenizer(models.WordLevel({"?": 0} | {chr(code): code - 90 for code in range(97, 123)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")


@pytest.mark.parametrize("tokens_at_once", [1, 8, 1000])
def test_states_equal_one_text_at_a_time(tokens_at_once: int) -> None:
    base = tiny_base()
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)]).eval()
    texts, seen = ["abcdef", "gh", "ijklmnopq", "rst"], []
    got = read_hidden_states(
        model, letter_tokenizer(), texts, max_tokens=7, tokens_at_once=tokens_at_once, report=lambda *a: seen.append(a)
    )
    assert torch.bincount(got.text_index).tolist() == [5, 1, 6, 2]  # without each first token, cut at seven
    for number, text in enumerate(texts):
        ids = torch.tensor([[ord(c) - 90 for c in text][:7]])
        expected = base(ids, output_hidden_states=True).hidden_states[2][0, 1:]  # the output of layer 1
        torch.testing.assert_close(got.hidden[got.text_index == number], expected, atol=1e-5, rtol=1e-5)
    assert not got.hidden.requires_grad and not got.hidden.is_inference()
    assert seen[-1] == (4, 4)


def test_a_text_of_one_token_is_refused() -> None:
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1)])
    with pytest.raises(ValueError, match="1 shorter ones, 'a'"):
        read_hidden_states(model, letter_tokenizer(), ["ab", "a"])


# -- the reader ------------------------------------------------------------------------------------------------------

SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")


def recorded(base: Any, places: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a full pass over one row shows at each place, (length, width)."""
    found: dict[str, torch.Tensor] = {}

    def note(place: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        found[place] = tensor.detach().clone().view(ids.shape[1], -1)

    handles = []
    for place in places:
        module, side, _ = find_hook_point(base, base.config, place)
        if side == "input":
            hook = module.register_forward_pre_hook(
                lambda m, args, kwargs, p=place: note(p, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            hook = module.register_forward_hook(lambda m, args, out, p=place: note(p, out))
        handles.append(hook)
    with torch.no_grad():
        base(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_places_of_every_family_equal_a_full_pass(architecture: str) -> None:
    base = tiny_base(architecture)
    places = [f"layers.{layer}.{site}" for layer in (0, 1) for site in SITES]
    ids = prompt(1, 9)
    got = HiddenStateReader(base, places).read([ids[0]], [torch.arange(9)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    expected = recorded(base, places, ids)
    for place in places:
        assert torch.equal(got[place], expected[place]), place  # the same sums in the same order: bit for bit
    with torch.no_grad():
        states = base(ids, output_hidden_states=True).hidden_states
    assert torch.equal(got["layers.0.resid_post"], states[1][0])
    assert torch.equal(got["layers.1.resid_pre"], states[1][0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "qwen2_moe", "gemma2"])
@pytest.mark.parametrize("tokens_at_once", [1, 24, 10_000])
def test_batches_and_padding_change_nothing(architecture: str, tokens_at_once: int) -> None:
    base = tiny_base(architecture)
    sequences = [prompt(1, length, seed=length)[0] for length in (5, 11, 2, 8, 11)]
    keep = [kept_positions(ids) for ids in sequences]
    places = ["layers.1.resid_post", "layers.0.mlp_out"]
    got = HiddenStateReader(base, places).read(sequences, keep, tokens_at_once=tokens_at_once)
    for place in places:
        alone = [recorded(base, [place], ids[None])[place][1:] for ids in sequences]
        torch.testing.assert_close(got[place], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_network_stops_after_the_last_place_that_runs() -> None:
    base, calls = tiny_base(), []
    for name, module in base.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    reader = HiddenStateReader(base, ["layers.1.mlp_out", "model.layers.0.self_attn"])
    assert reader.widths() == {"layers.1.mlp_out": WIDTH, "model.layers.0.self_attn": WIDTH}
    calls.clear()
    reader.read([prompt(1, 4)[0]], [torch.tensor([1])])
    # Hooks of a module run in order of registration: the one above saw layer 1's MLP before ours stopped the pass.
    assert calls[-1] == "model.layers.1.mlp"
    assert not {"model.layers.1", "model.layers.2", "model.norm", "lm_head"} & set(calls)


def test_a_model_with_saes_is_read_as_its_base_is() -> None:
    base, ids = tiny_base(), prompt()
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    rows, kept, place = list(ids), [torch.arange(ids.shape[1])] * len(ids), "layers.1.resid_post"
    alone = HiddenStateReader(base, [place]).read(rows, kept)[place]
    assert torch.equal(HiddenStateReader(model, [place]).read(rows, kept)[place], alone)


def test_the_result_has_the_asked_dtype_and_can_be_trained_on() -> None:
    base = tiny_base()
    reader = HiddenStateReader(base, ["layers.1.resid_post"])
    ids, keep = prompt(1, 6), [torch.arange(6)]
    full = reader.read([ids[0]], keep)["layers.1.resid_post"]
    half = reader.read([ids[0]], keep, dtype=torch.bfloat16)["layers.1.resid_post"]
    assert torch.equal(half, full.bfloat16())
    (full @ torch.ones(WIDTH, requires_grad=True)).sum().backward()
    none = reader.read([ids[0]], [torch.arange(0)], dtype=torch.float16)["layers.1.resid_post"]
    assert none.shape == (0, WIDTH) and none.dtype == torch.float16


def test_a_training_model_is_read_without_dropout() -> None:
    base = tiny_base("gpt2", resid_pdrop=0.5).train()
    base.transformer.h[0].eval()
    reader = HiddenStateReader(base, ["layers.1.resid_post"])
    first, second = (reader.read([prompt(1, 6)[0]], [torch.arange(6)])["layers.1.resid_post"] for _ in range(2))
    assert torch.equal(first, second)
    assert base.training and base.transformer.h[1].training and not base.transformer.h[0].training


def test_another_thread_may_use_the_model_meanwhile() -> None:
    base, ids = tiny_base(), prompt(1, 5)
    expected, got = base(ids).logits, []

    class Interrupted(HiddenStateReader):
        def _run(self, inputs: Any, take: Any) -> None:
            def take_and_wait(place: str, hidden: torch.Tensor) -> None:
                thread = threading.Thread(target=lambda: got.append(base(prompt(1, 5)).logits))
                thread.start()
                thread.join()
                take(place, hidden)

            super()._run(inputs, take_and_wait)

    Interrupted(base, ["layers.0.resid_post"]).read([ids[0]], [torch.arange(5)])
    assert torch.equal(got[0], expected)


def test_kept_positions() -> None:
    ids = torch.tensor([1, 9, 2, 8, 7])
    assert kept_positions(ids).tolist() == [1, 2, 3, 4]
    assert kept_positions(ids, skip_first=False).tolist() == [0, 1, 2, 3, 4]
    assert kept_positions(ids, positions="last").tolist() == [4]
    assert kept_positions(ids[:1], positions="last").tolist() == []
    assert kept_positions(ids[:1], positions="last", skip_first=False).tolist() == [0]
    assert kept_positions(ids, positions="after_prefix", prefix_tokens=3).tolist() == [3, 4]
    assert kept_positions(ids, skip_first=False, dropped_ids=[1, 2]).tolist() == [1, 3, 4]


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    base = tiny_base()
    reader = HiddenStateReader(base, ["layers.0.mlp_out"])
    row, keep = prompt(1, 4)[0], [torch.arange(4)]
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    peak = reader.read([row], keep)["layers.0.mlp_out"].abs().max().item()
    with pytest.raises(
        ValueError, match=f"at most 65504 to be torch.float16. Received: {re.escape(f'{peak:.6g}')} at"
    ):
        reader.read([row], keep, dtype=torch.float16)
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite .* Received: nan at 'layers.0.mlp_out'"):
        reader.read([row], keep)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], r"places=\[\]"),
        ("layers.0.resid_post", "places='layers.0.resid_post'"),
        (["layers.0.resid_post"] * 2, "list of different places"),
        (["layers.7.resid_post"], "layer=7"),
        (["model.nowhere"], "hook='model.nowhere'"),
    ],
)
def test_wrong_places_are_refused(places: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiddenStateReader(tiny_base(), places)


def test_places_that_never_run_or_are_not_per_token_are_refused() -> None:
    base = tiny_base()
    base.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="not reached when the model runs. Received: spare"):
        HiddenStateReader(base, ["layers.0.resid_post", "spare"]).widths()
    with pytest.raises(ValueError, match="a vector for each of 8 tokens. Received: 4 at 'model.rotary_emb'"):
        HiddenStateReader(base, ["model.rotary_emb"]).read([prompt(2, 4)[0]] * 2, [torch.arange(4)] * 2)
