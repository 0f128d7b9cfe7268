"""The README's Python code runs as it stands, with a tiny model under the id it names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.modeling.conversion.families import FAMILIES, D
from tests.tiny import tiny_base

README = Path(__file__).parents[1] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def save_tiny_model(folder: Path) -> None:
    """A random model of SmolLM2's width and depth with a small vocabulary, and a tokenizer for it."""
    words = ["<pad>", "<eos>", "The", "film", "was", *(f"w{i}" for i in range(59))]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=9,
        num_key_value_heads=3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_code(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    save_tiny_model(tmp_path / "base")
    tiny_base("gemma3_text", hidden_size=D).save_pretrained(tmp_path / "gemma-3-270m")
    stand_ins = {
        MODEL: str(tmp_path / "base"),
        "gemma-scope-2-270m-pt/resid_post/12/16k/medium": str(FAMILIES["gemma_scope_2"](tmp_path / "sae")),
        "google/gemma-3-270m": str(tmp_path / "gemma-3-270m"),
    }
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        for name, path in stand_ins.items():
            block = block.replace(f'"{name}"', repr(path))
        exec(block, names)  # noqa: S102 (our own README)
    shape, _ = capsys.readouterr().out.split("\n", 1)
    assert shape == "torch.Size([1, 3, 32])"
    assert names["scores"].shape == (1,)
    assert (tmp_path / "my-steerable-model" / "modeling_sae_causal_lm.py").is_file()


def test_links_and_tree():
    text = README.read_text(encoding="utf-8")
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (root / target).exists(), target
    tree = text.split("sae_transformers/\n", 1)[1].split("```", 1)[0]
    for folder in re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE):
        assert (root / "sae_transformers" / folder).is_dir(), folder
