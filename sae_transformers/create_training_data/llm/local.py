"""A chat model in our own process, asked in the same way as one behind a server."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...modeling.base_arguments import cache_argument, cache_of, continues
from ..annotation.parsing import decisions_of, read_judgement
from .budget import Budget, TokenCount
from .requests import REJECTED, Answer, Chat, ChatRequest
from .usage import Account, Estimate, Tokens


class LocalChat(Chat):
    """Answers with `generate`: greedy, in batches of requests of like length, with the tokenizer's chat template.

    Where a request asks for a `decision` among labels (see `answers.decision_format`) and the text that comes has none
    of them, the label that the model finds most likely after it is added: small models do not keep to a format.
    `temperature`, `top_p` and `seed` of requests are not used.

    Args:
        model: a folder or a Hub id.
        batch_size: requests in a forward pass.
        device: None for the first CUDA device, or the CPU.
        dtype: "auto" as published, and float32 on a CPU.
        cache: folder of the answers.
        loaded: model and tokenizer, where they are loaded already.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str = "auto",
        cache: str | Path | None = None,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size!r}.")
        super().__init__(model, _endpoint(model, revision), cache)
        self.revision, self.batch_size, self.device, self.dtype = revision, batch_size, device, dtype
        self.budget = Budget()
        self._loaded = loaded

    def __repr__(self) -> str:
        return f"LocalChat(model={self.model!r})"

    @property
    def account(self) -> Account:
        """What was used so far; no money."""
        return self.budget.account()

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """Tokens to read and at most to write."""
        return self.budget.estimate(self.missing(requests).values(), TokenCount(), len(requests))

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = "float32" if self.dtype == "auto" and device == "cpu" else self.dtype
            tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision)
            base: Any = AutoModelForCausalLM.from_pretrained(self.model, revision=self.revision, dtype=dtype)
            self._loaded = base.to(device).eval(), tokenizer
        return self._loaded

    def _send(self, requests: Mapping[str, ChatRequest]) -> Iterator[tuple[str, Answer]]:
        if not requests:
            return
        import torch

        base, tokenizer = self._load()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        longest = getattr(base.config, "max_position_embeddings", None) or 10**9
        waiting = []
        for key, request in requests.items():
            ids = self._tokens(tokenizer, request)
            if len(ids) + request.max_tokens > longest:
                detail = f"{len(ids)} tokens and {request.max_tokens} of an answer; the model reads {longest}"
                yield key, Answer(failure=REJECTED, detail=detail)
            else:
                waiting.append((ids, key, request.max_tokens, decisions_of(request.response_format)))
        waiting.sort(key=lambda entry: (entry[2], len(entry[0])))
        while waiting:
            batch = [entry for entry in waiting[-self.batch_size :] if entry[2] == waiting[-1][2]]
            del waiting[-len(batch) :]
            width = max(len(ids) for ids, *_ in batch)
            rows = torch.tensor([[pad or 0] * (width - len(ids)) + ids for ids, *_ in batch])  # (batch, width)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, *_ in batch])
            with torch.inference_mode():
                output = base.generate(
                    rows.to(base.device),
                    attention_mask=mask.to(base.device),
                    max_new_tokens=batch[-1][2],
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                )
            for (ids, key, _, labels), new in zip(batch, output[:, width:].tolist(), strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True)
                if labels and read_judgement(text)[0] not in labels:
                    text = self._decided(base, tokenizer, ids, text.strip(), labels)
                answer = Answer(text, None, "", len(ids), sum(token != pad for token in new))
                self.budget.count_one(Tokens(answer.prompt_tokens, answer.completion_tokens))
                self.cache.put(key, answer)
                yield key, answer

    @staticmethod
    def _decided(base: Any, tokenizer: Any, ids: list[int], text: str, labels: Sequence[str]) -> str:
        """The text with the decision that is most likely after it: of the labels' tokens the mean log-probability."""
        import torch

        text = f"{text}\nFinal Decision: [["
        before = ids + tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = []
        with torch.inference_mode():
            read = base(torch.tensor([before], device=base.device), use_cache=True, logits_to_keep=1)
            for label in labels:
                option = torch.tensor(
                    tokenizer(f" {label}", add_special_tokens=False)["input_ids"], device=base.device
                )
                logits = read.logits[0]  # (1, vocabulary), of the label's first token
                if len(option) > 1 and continues(cache_of(read)):
                    again = {cache_argument(base): copy.deepcopy(cache_of(read))}
                    logits = torch.cat([logits, base(option[None, :-1], **again, use_cache=True).logits[0]])
                elif len(option) > 1:  # the text again, with the label behind it
                    whole = torch.cat([torch.tensor(before, device=base.device), option[:-1]])
                    logits = base(whole[None], use_cache=False).logits[0, -len(option) :]
                scores.append(float(logits.float().log_softmax(-1).gather(1, option[:, None]).mean()))
        return f"{text} {labels[max(range(len(labels)), key=scores.__getitem__)]} ]]"

    @staticmethod
    def _tokens(tokenizer: Any, request: ChatRequest) -> list[int]:
        messages = [dict(message) for message in request.messages]
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        text = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
        return tokenizer(f"{text}\n\nAssistant:")["input_ids"]


def _endpoint(model: str, revision: str | None) -> str:
    """Tells a folder's weights apart from those that replace them later."""
    files = list(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    written = max((file.stat().st_mtime_ns for file in files), default=None)
    return f"local@{revision or written}"
