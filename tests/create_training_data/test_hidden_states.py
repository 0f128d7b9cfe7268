import pytest
import torch

from sae_transformers import SaeForCausalLM
from sae_transformers.create_training_data.hidden_states import harvest
from tests.tiny import tiny_base, tiny_sae


class LetterTokenizer:
    """One token a letter."""

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict:
        return {"input_ids": [[ord(c) - 90 for c in text][:max_length] for text in texts]}


@pytest.mark.parametrize("tokens_at_once", [1, 8, 1000])
def test_states_equal_one_text_at_a_time(tokens_at_once: int) -> None:
    base = tiny_base()
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)]).eval()
    texts, seen = ["abcdef", "gh", "ijklmnopq", "rst"], []
    got = harvest(
        model, LetterTokenizer(), texts, max_tokens=7, tokens_at_once=tokens_at_once, report=lambda *a: seen.append(a)
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
        harvest(model, LetterTokenizer(), ["ab", "a"])
