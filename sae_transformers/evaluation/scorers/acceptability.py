"""Linguistic acceptability of texts: by a classifier, or by a language model and word frequencies alone.

Both scorers have `name`, `unit` and `score(texts) -> (n,)`; more is better, NaN is a text too short to be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .text_classifier import ClassifierScorer


def unigram_log_probs(sequences: Sequence[Tensor], vocab_size: int) -> Tensor:
    """log p(token) with add-one smoothing, (vocab_size,) float64: log((count + 1) / (n + vocab_size)).

    Args:
        sequences: (length,) int64 token ids each, of texts that stand for the language.

    Raises:
        ValueError: no token, or one outside the vocabulary.
    """
    ids = torch.cat([torch.as_tensor(ids, dtype=torch.long).cpu() for ids in sequences]) if sequences else None
    if ids is None or not len(ids) or not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(
            f"Expected tokens in [0, {vocab_size}). Received: {0 if ids is None else len(ids)} tokens"
            + (f", the largest {int(ids.max())}." if ids is not None and len(ids) else ".")
        )
    return ((torch.bincount(ids, minlength=vocab_size) + 1).double() / (len(ids) + vocab_size)).log()


class SlorScorer:
    """Syntactic log-odds ratio: what a language model gives a text beyond the frequency of its tokens, per token.

    SLOR(x) = (sum_t log p(x_t | x_<t) - sum_t log p(x_t)) / #t

    "Grammaticality, acceptability, and probability" (Lau, Clark and Lappin 2017, https://doi.org/10.1111/cogs.12414),
    after Pauls and Klein (2012, https://aclanthology.org/P12-1101). In nats a token.

    Args:
        model: a causal language model; called as it is, so switch its steering off before.
        tokenizer: of the model. A text's first token is predicted from the beginning token where texts start with
            one, and is not counted otherwise.
        log_unigrams: (vocab_size,), as `unigram_log_probs` gives them.
        rows_at_once: texts of a forward pass.
        max_tokens: longer texts are cut.
    """

    name, unit = "SLOR", "nats a token"

    def __init__(
        self, model: Any, tokenizer: Any, log_unigrams: Tensor, *, rows_at_once: int = 16, max_tokens: int = 512
    ) -> None:
        if rows_at_once < 1 or max_tokens < 2:
            raise ValueError(
                f"`rows_at_once` must be 1 or more and `max_tokens` 2 or more. "
                f"Received: rows_at_once={rows_at_once!r}, max_tokens={max_tokens!r}."
            )
        self.model, self.tokenizer, self.log_unigrams = model, tokenizer, log_unigrams.double()
        self.rows_at_once, self.max_tokens = rows_at_once, max_tokens

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Tensor:
        """SLOR of each text, (n,) float64; NaN below two tokens."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"] if texts else []
        found = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.rows_at_once):
            members = order[start : start + self.rows_at_once]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in members], batch_first=True)
            real = torch.arange(ids.shape[1]) < torch.tensor([len(rows[i]) for i in members])[:, None]
            logits = self.model(
                input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
            ).logits[:, :-1]
            losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:].to(device), reduction="none")
            odds = (-losses.double().cpu() - self.log_unigrams[ids[:, 1:]]) * real[:, 1:]
            found[members] = odds.sum(-1) / real[:, 1:].sum(-1)
        return found


class AcceptabilityClassifier:
    """The probability of "acceptable" under any text classifier, e.g. one that was trained on CoLA
    (https://huggingface.co/papers/1805.12471).

    Args:
        name: a folder or a Hub id.
        label: name or number of the label that means acceptable. By default the one named `acceptable`, or the
            second of two, as in CoLA.
        device: by default a GPU where there is one.
        rows_at_once: texts of a forward pass; the tokenizer's limit cuts them.

    Raises:
        OSError: there is no such classifier.
        ValueError: it has no such label, or it is not clear which is meant.
    """

    unit = "probability"

    def __init__(
        self,
        name: str,
        *,
        label: str | int | None = None,
        device: str | torch.device | None = None,
        rows_at_once: int = 32,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForSequenceClassification.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{name!r} could not be read as a text classifier: {reason}") from error
        self.name, self.model, self.label = name, model, _label_number(model.config, label)
        self.probability = ClassifierScorer(
            model, self.label, tokenizer=tokenizer, batch_size=rows_at_once, device=device
        )

    def score(self, texts: Sequence[str]) -> Tensor:
        """Probability of each text, (n,) float64; NaN of an empty one."""
        found = self.probability(texts)
        return found.where(torch.tensor([bool(text.strip()) for text in texts], dtype=torch.bool), torch.nan)


def _label_number(config: Any, label: str | int | None) -> int:
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None:
        named = [i for i, name in enumerate(names) if name.lower() == "acceptable"]
        if named or len(names) < 3:
            return named[0] if named else len(names) - 1
    elif str(label) in names:
        return names.index(str(label))
    elif str(label).isdecimal() and int(label) < len(names):
        return int(label)
    raise ValueError(f"Which label means acceptable? Labels: {', '.join(names)}. Received: label={label!r}.")
