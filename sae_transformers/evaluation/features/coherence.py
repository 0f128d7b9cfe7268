"""How alike the top tokens of a feature are: one number a feature, from any embeddings of tokens or words.

    score = sum_{i<j} w_i w_j cos(e_i, e_j) / (sum_{i<j} w_i w_j + 1e-8)        0 with fewer than two embeddings

w are the tokens' logit weights, e their embeddings. The formula of seansica/sae-vector-steering, whose paper takes
GloVe vectors of lower-cased words; a score may be negative. Case variants of one word count as two words that agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
KINDS = ("input", "output")


def coherence(embeddings: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Coherence of n features.

    No pair is looped over: sum_{i<j} w_i w_j cos(e_i, e_j) = (|sum_i w_i u_i|^2 - sum_i w_i^2) / 2, u of length 1.

    Args:
        embeddings: (n, k, d), any float dtype.
        weights: (n, k), of the tokens.
        valid: (n, k) bool, which tokens have an embedding; all by default. One of length 0 has none.

    Returns:
        (n,) float64.

    Raises:
        ValueError: shapes that do not fit.
    """
    if embeddings.ndim != 3 or weights.shape != embeddings.shape[:2] or (
        valid is not None and valid.shape != weights.shape
    ):  # fmt: skip
        raise ValueError(
            f"Expected embeddings (n, k, d) with weights and valid (n, k). Received: {tuple(embeddings.shape)}, "
            f"{tuple(weights.shape)}, {None if valid is None else tuple(valid.shape)}."
        )
    vectors = embeddings.double()
    lengths = vectors.norm(dim=-1)
    known = lengths > 0 if valid is None else (lengths > 0) & valid
    w = torch.where(known, weights.double(), 0.0)
    units = vectors / torch.where(known, lengths, 1.0)[..., None]
    squares = w.square().sum(-1)
    agreeing = ((w[..., None] * units).sum(-2).square().sum(-1) - squares) / 2
    total = (w.sum(-1).square() - squares) / 2
    return torch.where(known.sum(-1) >= 2, agreeing / (total + EPS), 0.0)


def token_coherence(
    model: Any, ids: Tensor, weights: Tensor, *, embedding: str = "input", rows_at_once: int = 1024
) -> Tensor:
    """Coherence by the model's own embeddings of the tokens, so that nothing else is needed; every token has one.

    They are not GloVe vectors: " Word" and "word" are two tokens with a cosine below 1, and fragments of words count.
    Scores compare features of one model, not models, and not with published scores.

    Args:
        ids, weights: (n, k), see `LogitWeights`.
        embedding: `input` or `output`, the rows of the unembedding; tied models have one for both. The mean over the
            vocabulary is taken out first: it is most of every row, and would make all tokens alike.

    Returns:
        (n,) float64.

    Raises:
        ValueError: another embedding, or the model does not have it.
    """
    if embedding not in KINDS:
        raise ValueError(f"`embedding` must be one of {', '.join(KINDS)}. Received: embedding={embedding!r}.")
    base = getattr(model, "lm", model)
    module = base.get_input_embeddings() if embedding == "input" else base.get_output_embeddings()
    if getattr(module, "weight", None) is None:
        raise ValueError(f"{type(base).__name__} must have an {embedding} embedding. Received: none.")
    table = module.weight.detach()
    mean = table.float().mean(0)
    parts = [
        coherence(table[some.to(table.device)].float() - mean, w.to(table.device)).cpu()
        for some, w in zip(ids.split(rows_at_once), weights.split(rows_at_once), strict=True)
    ]
    return torch.cat(parts)


def word_coherence(tokens: Sequence[Sequence[str]], weights: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
    """Coherence by vectors of words: tokens are lower-cased and only their letters a to z kept; those that leave
    nothing, or are no word of `vectors`, do not count.

    Args:
        tokens: of n features, k each.
        weights: (n, k).
        vectors: word -> (d,), such as `read_vectors` gives.

    Returns:
        (n,) float64.
    """
    if not vectors:
        raise ValueError("Expected vectors of one word or more. Received: none.")
    words = [[letters(token) for token in row] for row in tokens]
    found = {word: place for place, word in enumerate(dict.fromkeys(w for row in words for w in row if w in vectors))}
    width = len(next(iter(vectors.values())))
    table = torch.zeros(len(found) + 1, width, dtype=torch.float64)
    for word, place in found.items():
        table[place] = vectors[word]
    place = torch.tensor([[found.get(word, len(found)) for word in row] for row in words])
    parts = [
        coherence(table[rows], w, rows < len(found))
        for rows, w in zip(place.split(1024), weights.split(1024), strict=True)
    ]
    return torch.cat(parts)


def letters(token: str) -> str:
    """A token in lower case, its letters a to z alone."""
    return re.sub("[^a-z]", "", token.lower())


def read_vectors(path: str | Path, words: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Word vectors from a text file, `word n1 n2 ...` to a line, as GloVe's; a first line of two numbers is skipped.

    Args:
        words: only these are kept; all by default.

    Returns:
        word -> (d,) float32.

    Raises:
        ValueError: a line has another number of values than the first, or a value that is no number.
        OSError: it cannot be read.
    """
    wanted, found, width = None if words is None else set(words), {}, 0
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1 and word.isdecimal():  # word2vec's text form
                continue
            if not values:
                continue
            width = width or len(values)
            if len(values) != width:
                raise ValueError(
                    f"Each line must be a word and {width} numbers, as the first. Received: {len(values)} numbers in "
                    f"line {number} of {Path(path).name}."
                )
            if wanted is None or word in wanted:
                try:
                    found[word] = torch.tensor([float(value) for value in values])
                except ValueError as error:
                    raise ValueError(f"Line {number} of {Path(path).name} must hold numbers: {error}.") from None
    return found
