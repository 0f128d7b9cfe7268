"""Does steering with a feature bring a text nearer to the feature's words? The test of seansica/sae-vector-steering.

Each feature's decoder row is added while a prompt is continued, and the continuation is compared with the feature's
top tokens by a cosine; the paper takes mean-pooled BERT vectors and counts a feature as passed where the steered text
is nearer than the unsteered one. Steering of any kind moves a text somewhere, so every feature's words are compared
with the texts that the *other* features made too: what a random feature of the same SAE does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .coherence import KINDS, letters, read_vectors
from .table import decoder_rows, logit_weights
from .unembedding import matching_tokens, output_weight, token_texts, unembedding

WORDS, SENTENCES = "words", "sentences"
PRINCIPAL_ROWS = 1 << 14  # of the vocabulary, evenly spaced, that principal directions are of
Embed = Callable[[Sequence[str]], Tensor]  # texts -> (n, d)


class FeatureWords(NamedTuple):
    """A feature and what it writes: its SAE and latent, and the tokens of its k largest logit weights, best first.

    tokens: their texts. ids: (k,) int64. weights: (k,) float32.
    """

    sae: int
    feature: int
    tokens: list[str]
    ids: Tensor
    weights: Tensor


@torch.no_grad()
def feature_words(model: Any, tokenizer: Any, features: Sequence[tuple[int, int]], top_k: int) -> list[FeatureWords]:
    """The top tokens of some features, from weights alone; see `feature_table`.

    Args:
        model: `SaeForCausalLM`.
        features: SAE and latent of each.

    Raises:
        ValueError: an SAE does not write into the residual stream.
    """
    base = model.lm
    vocabulary = matching_tokens(tokenizer, None, len(output_weight(base)))
    W_U = unembedding(base, vocabulary=vocabulary)
    width = base.config.get_text_config().hidden_size
    decoders = {sae: decoder_rows(model.saes[sae], width)[0] for sae in {sae for sae, _ in features}}
    rows = torch.stack([decoders[sae][feature] for sae, feature in features])
    found = logit_weights(rows, W_U, top_k=top_k, vocabulary=vocabulary)
    return [
        FeatureWords(sae, feature, token_texts(tokenizer, ids.tolist()), ids, weights)
        for (sae, feature), ids, weights in zip(features, found.top_ids, found.top_weights, strict=True)
    ]


def similarities(
    kind: str,
    texts: Sequence[str],
    words: Sequence[FeatureWords],
    model: Any,
    tokenizer: Any,
    embed: Embed | None = None,
) -> Tensor:
    """How near each text is to the words of each feature.

    Args:
        kind: `input` or `output`: cosine of the mean of the model's own embeddings of the text's tokens and the mean
            of the feature's tokens, weighted by their logit weights; of every embedding see `spread_embeddings`.
            `words`: share of the text's words that are among the feature's, both by their letters alone. `sentences`:
            cosine of `embed` of the text and of the feature's words in one line. Any other: a file of word vectors,
            as GloVe's.
        embed: for `sentences`.

    Returns:
        (n_texts, n_features) float64; 0 for a text without a token, or without a word that has a vector.

    Raises:
        ValueError: `sentences` without `embed`, or a file that holds no vectors.
        OSError: there is no such file.
    """
    unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    if kind == WORDS:
        found = _shared_words(list(unique), words)
    elif kind == SENTENCES:
        if embed is None:
            raise ValueError("similarity='sentences' needs `embed`, texts to vectors. Received: none.")
        found = _cosine(_embedded(list(unique), embed), embed([" ".join(one.tokens) for one in words]))
    elif kind in KINDS:
        found = _cosine(*_by_tokens(kind, list(unique), words, model, tokenizer))
    else:
        spoken = [[letters(word) for word in text.split()] for text in unique]
        named = [[letters(token) for token in one.tokens] for one in words]
        vectors = read_vectors(kind, sorted({word for row in (*spoken, *named) for word in row if word}))
        found = _cosine(_by_words(spoken, None, vectors), _by_words(named, [one.weights for one in words], vectors))
    return found[torch.tensor([unique[text] for text in texts], dtype=torch.long)]


class InterventionScores(NamedTuple):
    """Of n features, (n,) float64 each: similarity of the feature's words to the texts of this feature (`steered`), of
    no feature (`unsteered`) and of the others (`random`); share of this feature's texts that are nearer than the
    unsteered ones (`passed`), and of the others' texts (`passed_random`)."""

    steered: Tensor
    unsteered: Tensor
    random: Tensor
    passed: Tensor
    passed_random: Tensor


def intervention_scores(steered: Tensor, unsteered: Tensor) -> InterventionScores:
    """Scores from the similarities of all texts to the words of all features.

    Args:
        steered: (n, rows, n): texts steered with each feature, `rows` of them, against the words of each.
        unsteered: (rows, n): the same prompts and random numbers without steering.

    Raises:
        ValueError: fewer than two features, of which none would be another's control, or shapes that do not fit.
    """
    n = len(steered)
    if n < 2 or steered.shape != (n, *unsteered.shape) or unsteered.shape[1] != n:
        raise ValueError(
            f"Expected similarities (n, rows, n) and (rows, n) of 2 features or more. "
            f"Received: {tuple(steered.shape)} and {tuple(unsteered.shape)}."
        )
    near, nearer = steered.double().mean(1), (steered > unsteered).double().mean(1)  # (n texts, n words)

    def others(values: Tensor) -> Tensor:
        return values.masked_fill(torch.eye(n, dtype=torch.bool), 0).sum(0) / (n - 1)

    return InterventionScores(
        near.diagonal().clone(), unsteered.double().mean(0), others(near), nearer.diagonal().clone(), others(nearer)
    )


def _cosine(texts: Tensor, words: Tensor) -> Tensor:
    return F.normalize(texts.double(), dim=-1) @ F.normalize(words.double(), dim=-1).T


def _by_tokens(
    kind: str, texts: Sequence[str], words: Sequence[FeatureWords], model: Any, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    base = model.lm
    module = base.get_input_embeddings() if kind == "input" else base.get_output_embeddings()
    table = module.weight.detach()
    spread = spread_embeddings(table)
    spoken = torch.zeros(len(texts), table.shape[1], dtype=torch.float64)
    for place, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if ids:
            spoken[place] = spread(torch.tensor(ids)).mean(0)
    named = [(spread(one.ids) * one.weights.clamp(min=0)[:, None]).sum(0) for one in words]
    return spoken, torch.stack(named)


def spread_embeddings(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Embeddings of tokens without what nearly all of them share: the mean, and the first d / 100 principal
    directions, one at least, which tell frequent tokens from rare ones and little else.

    "All-but-the-Top" (https://arxiv.org/abs/1702.01417), section 3.

    Args:
        table: (vocab, d).

    Returns:
        A function from ids (n,) to (n, d) float64, on the CPU.
    """
    rows = table[:: max(1, len(table) // PRINCIPAL_ROWS)].double()
    mean = rows.mean(0)
    _, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean))  # by rising variance
    top = directions[:, -max(1, table.shape[1] // 100) :]

    def spread(ids: Tensor) -> Tensor:
        rest = table[ids.to(table.device)].double() - mean
        return (rest - rest @ top @ top.T).cpu()

    return spread


def _by_words(
    rows: Sequence[Sequence[str]], weights: Sequence[Tensor] | None, vectors: Mapping[str, Tensor]
) -> Tensor:
    """Mean vector of each row's words; rows of words that have none are 0."""
    if not vectors:
        raise ValueError("Word vectors must hold a word of the texts or of the features. Received: none.")
    found = torch.zeros(len(rows), len(next(iter(vectors.values()))), dtype=torch.float64)
    for place, row in enumerate(rows):
        given = [1.0] * len(row) if weights is None else weights[place].clamp(min=0).tolist()
        for word, weight in zip(row, given, strict=True):
            if word in vectors:
                found[place] += weight * vectors[word].double()
    return found


def _shared_words(texts: Sequence[str], words: Sequence[FeatureWords]) -> Tensor:
    named = [{word for token in one.tokens if (word := letters(token))} for one in words]
    found = torch.zeros(len(texts), len(words), dtype=torch.float64)
    for place, text in enumerate(texts):
        spoken = [word for part in text.split() if (word := letters(part))]
        for number, some in enumerate(named):
            found[place, number] = sum(word in some for word in spoken) / max(1, len(spoken))
    return found


def _embedded(texts: Sequence[str], embed: Embed) -> Tensor:
    """Vectors of texts; of one without a word 0."""
    places = [place for place, text in enumerate(texts) if text.strip()]
    if not places:
        return torch.zeros(len(texts), 1)
    some = embed([texts[place] for place in places])
    return torch.zeros(len(texts), some.shape[1], dtype=some.dtype).index_copy_(0, torch.tensor(places), some.cpu())
