"""Tiny encoders over the words of `words`: a sentence-transformers model and a classifier of three labels."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from tests.create_training_data.words import word_tokenizer


def save_tiny_embedder(folder: Path, max_tokens: int = 16, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """One layer of weak attention over random word vectors of width 24; the mean over tokens, of unit length. Texts
    that share words are near."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    torch.manual_seed(0)
    tokenizer = tokenizer or word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_()
    base = folder / "bert"
    model.save_pretrained(base)
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(base)
    layer = Transformer(str(base))
    whole = SentenceTransformer(modules=[layer, Pooling(24), Normalize()], device="cpu")
    whole.save(str(folder / "embedder"))
    return str(folder / "embedder")


def save_tiny_classifier(folder: Path) -> str:
    """Random, with labels unacceptable, acceptable and unclear, and 24 positions."""
    torch.manual_seed(0)
    names = {0: "unacceptable", 1: "acceptable", 2: "unclear"}
    config = BertConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    BertForSequenceClassification(config).save_pretrained(folder / "classifier")
    word_tokenizer().save_pretrained(folder / "classifier")
    return str(folder / "classifier")
