"""Scores of texts by any text classifier of Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ClassifierScorer:
    """Probability of one label.

    Softmax over the labels; sigmoid of the label's logit where the classifier has a single one, or says that its
    problem is `multi_label_classification`.

    Args:
        model: folder or Hub id of a sequence classifier with its tokenizer, or a loaded classifier.
        label: name or number of the label that is read; None for the only one, or the second of two.
        tokenizer: of a loaded classifier.
        batch_size: texts of a pass.
        max_tokens: of a text, what is beyond is cut; None for as many as the classifier takes.
        device: of the classifier; None for a GPU, if there is one, for one loaded here.

    Attributes:
        tokens: tokens read so far, without padding.
        cut: texts so far that were cut.

    Raises:
        ValueError: a label that the classifier has not, or none where it has several; a loaded classifier without a
            tokenizer.
        OSError: there is no such classifier.
    """

    def __init__(
        self,
        model: Any,
        label: str | int | None = None,
        *,
        tokenizer: Any = None,
        batch_size: int = 32,
        max_tokens: int | None = None,
        device: Any = None,
    ) -> None:
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(
                f"`batch_size` and `max_tokens` must be 1 or more. "
                f"Received: batch_size={batch_size!r}, max_tokens={max_tokens!r}."
            )
        if isinstance(model, str):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
            model = AutoModelForSequenceClassification.from_pretrained(model)
            device = device or ("cuda" if torch.cuda.is_available() else None)
        if tokenizer is None:
            raise ValueError("A loaded classifier needs its tokenizer. Received: tokenizer=None.")
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.label = self._place(label)
        config = model.config
        self.alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
        self.max_tokens = min(max_tokens or longest, longest, tokenizer.model_max_length)
        self.tokens = self.cut = 0

    def _place(self, label: str | int | None) -> int:
        names = {int(number): str(name) for number, name in self.model.config.id2label.items()}
        if label is None and len(names) <= 2:
            return len(names) - 1
        wanted = str(label).strip().lower()
        places = [number for number, name in names.items() if wanted in (name.lower(), str(number))]
        if label is None or len(places) != 1:
            raise ValueError(
                f"`label` must be one of {', '.join(map(repr, names.values()))}. Received: label={label!r}."
            )
        return places[0]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n,) float64 in [0, 1]; a text without a word scores 0, as in SCAR."""
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of texts. Received: one text.")
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"] if len(texts) else []
        lengths = [len(row) for row in rows]
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -lengths[i])
        found = torch.zeros(len(texts), dtype=torch.float64)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in members], return_tensors="pt", padding=True, truncation=True,
                max_length=self.max_tokens,
            ).to(self.model.device)  # fmt: skip
            logits = self.model(**batch).logits.double()  # (batch, labels)
            probabilities = logits.sigmoid() if self.alone else logits.softmax(-1)
            found[members] = probabilities[:, self.label].cpu()
            self.tokens += int(batch["attention_mask"].sum())
            self.cut += sum(lengths[i] > self.max_tokens for i in members)
        return found
