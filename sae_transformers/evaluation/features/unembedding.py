"""How a model's residual stream becomes logits, as one matrix, and how its tokens look to people."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.hook_points import find_blocks

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")


@torch.no_grad()
def unembedding(
    model: Any, *, fold_norm: bool = True, centre: bool = True, vocabulary: Tensor | None = None
) -> Tensor:
    """The matrix from the residual stream to the logits.

    With `fold_norm` its rows carry the gain of the final norm, and where that norm subtracts the mean of the stream
    (layer norm) so does the matrix; the norm's division by the stream's length is left out, it differs from token to
    token. With `centre` the mean over the vocabulary is taken out of each row: a softmax does not see it. Both
    together are what TransformerLens does to a model when it loads it.

    Args:
        model: a causal language model, with SAEs or without; its unembedding may be tied to the input embedding.
        vocabulary: (n,) int64, the tokens that are wanted, all by default.

    Returns:
        W_U, (d_model, n), at least float32, on the model's device.

    Raises:
        ValueError: no unembedding or no final norm, a width that is not the stream's, or no token.
    """
    base = getattr(model, "lm", model)
    weight = output_weight(base)
    width = base.config.get_text_config().hidden_size
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"The unembedding must read the residual stream, {width} wide; a projection before it is not supported. "
            f"Received: weight {tuple(weight.shape)}."
        )
    if vocabulary is not None:
        if not len(vocabulary):
            raise ValueError("At least one token of the vocabulary must be chosen. Received: none.")
        if int(vocabulary.min()) < 0 or int(vocabulary.max()) >= len(weight):
            raise ValueError(
                f"Tokens must be in [0, {len(weight)}). Received: {int(vocabulary.min())} to {int(vocabulary.max())}."
            )
        weight = weight[vocabulary.to(weight.device)]
    W_U = weight.T.to(torch.promote_types(weight.dtype, torch.float32), copy=True)  # (d_model, n)
    if fold_norm:
        gain, subtracts_mean = norm_gain(final_norm(base))
        W_U *= gain.to(W_U)[:, None]
        if subtracts_mean:
            W_U -= W_U.mean(0)
    if centre:
        W_U -= W_U.mean(1, keepdim=True)
    return W_U


def output_weight(base: Any) -> Tensor:
    """The weight (vocab, width) of a model's unembedding, tied or not.

    Raises:
        ValueError: it has none.
    """
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"Logit weights need a model with an unembedding, such as AutoModelForCausalLM gives. "
            f"Received: {type(base).__name__}, which has none."
        )
    return weight.detach()


def final_norm(base: Any) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        ValueError: none under any of the names that the families use.
    """
    blocks, path = find_blocks(base, base.config.get_text_config())
    body = base.get_submodule(path.rpartition(".")[0])
    found = next(
        (getattr(body, name) for name in FINAL_NORMS if isinstance(getattr(body, name, None), nn.Module)), None
    )
    if found is None:
        raise ValueError(
            f"`fold_norm` needs the norm after the {len(blocks)} blocks, named one of {', '.join(FINAL_NORMS)}. "
            f"Received: {', '.join(name for name, _ in body.named_children())}. Use fold_norm=False."
        )
    return found


@torch.no_grad()
def norm_gain(norm: nn.Module) -> tuple[Tensor, bool]:
    """The gain (d,) float64 of a norm, and whether it subtracts the mean, found by trying: families write the gain as
    `weight`, `1 + weight` or not at all."""
    like = next(iter(norm.parameters()), None)
    trial = copy.deepcopy(norm).to("cpu", torch.float64)
    width = like.shape[-1] if like is not None else int(getattr(norm, "normalized_shape", (0,))[0])
    ones = torch.full((1, width), 1e4, dtype=torch.float64)  # large: the epsilon of the norm drowns
    signs = ones * (1 - 2 * (torch.arange(width) % 2))

    def odd(x: Tensor) -> Tensor:
        return ((trial(x) - trial(-x)) / 2)[0].double()  # without a bias

    subtracts_mean = float(odd(ones).abs().max()) < 1e-3 * float(odd(signs).abs().max())
    plain = signs - signs.mean() if subtracts_mean else signs
    return odd(signs) / (plain / plain.square().mean().sqrt())[0], subtracts_mean


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as people write them: a leading space is a space, and not a marker such as `Ġ`.

    A token that is part of a character is written as its bytes, `<0xE2><0x80>`; one that the tokenizer does not have,
    as `<id 50000>`.
    """
    known, names = len(tokenizer), tokenizer.convert_ids_to_tokens([i for i in ids if i < len(tokenizer)])
    named = dict(zip([i for i in ids if i < known], names, strict=True))
    spaced = any(name is not None and name.startswith("▁") for name in named.values())
    decoded = tokenizer.batch_decode([[i] for i in named], clean_up_tokenization_spaces=False)
    plain = dict(zip(named, decoded, strict=True))
    texts = []
    for i in ids:
        name = named.get(i)
        if name is None:
            texts.append(f"<id {i}>")
        elif "\ufffd" in plain[i]:
            texts.append(_bytes_of(name))
        elif spaced and name.startswith("▁"):  # SentencePiece drops the space of a text's first token
            texts.append(name.replace("▁", " "))
        else:
            texts.append(plain[i])
    return texts


def matching_tokens(tokenizer: Any, pattern: str | None, size: int) -> Tensor:
    """Ids (n,) of the tokens whose text matches a regular expression somewhere; without one, of all.

    Rows of the unembedding that no token has (it is often padded to a round number) are not among them.

    Args:
        size: rows of the unembedding.

    Raises:
        ValueError: the expression is none, or no token matches.
    """
    ids = list(range(min(size, len(tokenizer))))
    if pattern is None:
        return torch.tensor(ids)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"Expected a regular expression ({error}). Received: {pattern!r}.") from None
    texts = token_texts(tokenizer, ids)
    found = [i for i, text in zip(ids, texts, strict=True) if compiled.search(text)]
    if not found:
        raise ValueError(f"At least one of {len(ids):,} tokens must match. Received: {pattern!r}, which none does.")
    return torch.tensor(found)


def _bytes_of(name: str) -> str:
    """A token of a byte-level vocabulary as `<0x..>`; its own name where that is no byte-level one."""
    if not all(character in BYTES for character in name):
        return name
    return "".join(f"<0x{BYTES[character]:02X}>" for character in name)


def _byte_characters() -> Iterable[tuple[str, int]]:
    """The character that stands for each byte in byte-level vocabularies: printable ones for themselves, the others in
    order from U+0100 on (GPT-2, https://github.com/openai/gpt-2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    yield from ((chr(byte), byte) for byte in own)
    yield from ((chr(0x100 + place), byte) for place, byte in enumerate(others))


BYTES = dict(_byte_characters())
