"""Continue prompts under many steerings at once, and tell how likely each continuation is without any."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from ...latents.context import context_length
from ...modeling import Steering
from ...modeling.base_arguments import cache_argument, cache_of, continues
from ...modeling.steering import without_receipt
from ..journal import Journal, result_of
from ..settings import GenerationSettings
from .fluency import continuation_mask, repetition

LOGIT_ROWS = 8  # whose logits are held at a time


class Continuations(NamedTuple):
    """Texts that follow prompts.

    texts: n of them, without the prompts and without special tokens.
    losses: (n,) float64, the negative log-likelihood of each one's tokens under the unsteered model, summed.
    tokens: (n,) int64, how many these are, the end of text included.
    ids: of each one its token ids, the end of text included; none where texts were given and not generated.
    """

    texts: list[str]
    losses: Tensor
    tokens: Tensor
    ids: Sequence[Sequence[int]] = ()

    @property
    def perplexity(self) -> float:
        """Of all, tokens counting alike."""
        return math.exp(min(700.0, float(self.losses.sum() / self.tokens.sum())))

    @property
    def perplexities(self) -> Tensor:
        """Of each, (n,) float64."""
        return (self.losses / self.tokens).clamp(max=700).exp()

    @property
    def repetition(self) -> float:
        """Share of word trigrams that repeat earlier ones of their text, mean over texts."""
        return repetition(self.texts)

    def take(self, rows: Sequence[int]) -> Continuations:
        """Some of them, in this order."""
        ids = [self.ids[row] for row in rows] if self.ids else ()
        return Continuations([self.texts[row] for row in rows], self.losses[list(rows)], self.tokens[list(rows)], ids)


def chat_prompts(tokenizer: Any, instructions: Sequence[str]) -> list[str]:
    """Each instruction in the tokenizer's chat template, with the beginning of an answer; as it is without one."""
    if not getattr(tokenizer, "chat_template", None):
        return list(instructions)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in instructions
    ]


@torch.no_grad()
def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    steerings: Sequence[Any] | None = None,
    settings: GenerationSettings | None = None,
    *,
    draws: Sequence[int] | None = None,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> Continuations:
    """Continue each prompt under a steering of its own.

    Sampling takes the token with the greatest log-probability / temperature plus Gumbel noise, which draws from the
    same distribution as sampling does (Gumbel 1954). The noise depends on the seed, the row's `draws` and the step,
    not on the batch: rows that share a draw differ by their steering only.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        prompts: n texts; special tokens are added unless a prompt begins with the beginning token.
        steerings: n, each a `Steering`, or None or False for none; None for none at all.
        settings: of which `chat` and `samples_per_prompt` do not count: the prompts are as the model reads them
            (see `chat_prompts`), and each is continued once.
        draws: (n,) numbers from 0 that tell the noise of rows apart; by default each row has its own.
        report: called with the number of rows done after each batch.
        journal: has the batches that were done, and gets the others.

    Raises:
        ValueError: lengths differ, a prompt without tokens, one that does not fit the model's context, or a steering
            that this model does not have.
    """
    n = len(prompts)
    plans = [steering or None for steering in (steerings if steerings is not None else [None] * n)]
    draws = list(range(n)) if draws is None else list(draws)
    if isinstance(prompts, str) or not n or len(plans) != n or len(draws) != n:
        raise ValueError(
            f"Expected a list of prompts, and a steering and a draw for each. "
            f"Received: {n} prompts, {len(plans)} steerings, {len(draws)} draws."
        )
    settings = settings or GenerationSettings()
    ids = prompt_ids(model, tokenizer, prompts, settings.max_new_tokens)
    order = sorted(range(n), key=lambda row: -len(ids[row]))
    texts, losses, tokens = [""] * n, torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    made: list[list[int]] = [[] for _ in range(n)]
    sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    told = {"new_tokens": settings.max_new_tokens, **sampled}
    for start in range(0, n, settings.batch_size):
        rows = order[start : start + settings.batch_size]
        batch = [ids[row] for row in rows], [plans[row] for row in rows], [draws[row] for row in rows]
        found = result_of(
            journal,
            lambda batch=batch: {"ids": batch[0], **steerings_told(batch[1]), "draws": batch[2], **told},
            lambda batch=batch: _continued(model, tokenizer, *batch, settings),
        )
        for row, text, loss, new in zip(rows, found["texts"], found["losses"], found["ids"], strict=True):
            texts[row], losses[row], tokens[row], made[row] = text, loss, len(new), new
        if report is not None:
            report(len(rows))
    return Continuations(texts, losses, tokens, made)


@torch.no_grad()
def stream_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    steering: Any = None,
    settings: GenerationSettings | None = None,
    *,
    take: Callable[[str], object],
) -> Continuations:
    """Continue one prompt as `continue_prompts` does, and hand on its text as it grows.

    Args:
        take: called with each piece of text, as far as its end cannot change any more.

    Raises:
        ValueError: as `continue_prompts`.
    """
    settings = settings or GenerationSettings()
    ids = prompt_ids(model, tokenizer, [prompt], settings.max_new_tokens)
    found = _continued(model, tokenizer, ids, [steering or None], [0], settings, _Pieces(tokenizer, take))
    new = found["ids"]
    return Continuations(found["texts"], torch.tensor(found["losses"]).double(), torch.tensor([len(new[0])]), new)


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: Any, take: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.take(text)


def _continued(
    model: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    plans: Sequence[Any],
    draws: Sequence[int],
    settings: GenerationSettings,
    streamer: TextStreamer | None = None,
) -> dict[str, Any]:
    """Of one batch texts, losses and the new tokens' ids, row by row, as JSON."""
    given, mask = (t.to(model.device) for t in _left_padded(ids, tokenizer.pad_token_id or 0))
    noise = LogitsProcessorList()
    if settings.temperature > 0:
        noise.append(_Draws(draws, settings.seed, settings.temperature, settings.top_p))
    found = model.generate(
        input_ids=given,
        attention_mask=mask,
        steering=list(plans) if any(plans) else False,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        logits_processor=noise,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    length = given.shape[1]
    counted = continuation_mask(found[:, length:], model.generation_config.eos_token_id)
    with model.steered(False):
        losses = _losses_after(model, found, torch.cat([mask, counted.long()], dim=1), length)
    new = zip(found[:, length:].cpu(), counted.cpu(), strict=True)
    return {
        "texts": tokenizer.batch_decode(found[:, length:], skip_special_tokens=True),
        "losses": losses.tolist(),
        "ids": [row[keep].tolist() for row, keep in new],
    }


def steerings_told(plans: Sequence[Any]) -> dict[str, Any]:
    """Steerings of a batch as JSON: the different ones, and which of them each row has."""
    different = list(dict.fromkeys(plan for plan in plans if plan))
    which = [different.index(plan) if plan else None for plan in plans]
    return {"steerings": [without_receipt(Steering.coerce(plan)) for plan in different], "which": which}


@torch.no_grad()
def likelihood(
    model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], *, rows_at_once: int = 32
) -> Continuations:
    """Texts as if they were continuations of these prompts; one without a token counts as one of likelihood 1."""
    before = prompt_ids(model, tokenizer, prompts, 0)
    after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = context_length(model)
    after = [row[: longest and max(0, longest - len(given))] for given, row in zip(before, after, strict=True)]
    losses = []
    for start in range(0, len(before), min(rows_at_once, LOGIT_ROWS)):
        rows = slice(start, start + min(rows_at_once, LOGIT_ROWS))
        ids, mask = _left_padded(before[rows], tokenizer.pad_token_id or 0)
        width = max(1, *(len(row) for row in after[rows]))
        right = torch.tensor([[*row, *[0] * (width - len(row))] for row in after[rows]])
        counted = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in after[rows]])
        ids, mask = torch.cat([ids, right], 1).to(model.device), torch.cat([mask, counted], 1).to(model.device)
        with model.steered(False):
            losses.append(_losses(model, ids, mask, ids.shape[1] - width))
    return Continuations(list(texts), torch.cat(losses), torch.tensor([max(1, len(row)) for row in after]))


def prompt_ids(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, after which so many more fit the model's context.

    Raises:
        ValueError: a prompt has no token, or is too long.
    """
    begin = tokenizer.bos_token
    rows = [
        tokenizer(prompt, add_special_tokens=not (begin and prompt.startswith(begin)))["input_ids"]
        for prompt in prompts
    ]
    longest = context_length(model) or math.inf
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"A prompt needs a token. Received: prompt {number}, {prompts[number]!r}.")
        if len(row) + new_tokens > longest:
            raise ValueError(
                f"A prompt and its continuation must fit the model's context of {longest} tokens; shorten it or lower "
                f"`max_new_tokens`. Received: prompt {number} of {len(row)} tokens and max_new_tokens={new_tokens!r}."
            )
    return rows


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask (batch, width)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _losses_after(model: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Negative log-likelihood of each row's tokens from column `length` on, summed, (rows,) float64 on the CPU.

    Rows with the same prompt share the pass over it, where the model's cache can be repeated.
    """
    prompts = torch.cat([ids[:, :length], mask[:, :length]], 1)
    _, members, counts = prompts.unique(dim=0, return_inverse=True, return_counts=True)
    found = torch.zeros(len(ids), dtype=torch.float64)
    alone = counts[members] == 1
    groups = [(members == number).nonzero()[:, 0] for number in (counts > 1).nonzero()[:, 0].tolist()]
    for rows in [*groups, alone.nonzero()[:, 0]]:
        start, cache, first = 0, None, None
        if len(rows) and not alone[rows[0]]:
            start = length - int(mask[rows[0], :length].sum())  # the first real token
            out = model(input_ids=ids[rows[:1], start:length], use_cache=True, logits_to_keep=1)
            if continues(cache_of(out)):
                cache, first = cache_of(out), out.logits[:, -1:]
        for part in rows.split(LOGIT_ROWS) if len(rows) else ():
            found[part.cpu()] = _losses(model, ids[part, start:], mask[part, start:], length - start, cache, first)
    return found


def _losses(
    model: Any, ids: Tensor, mask: Tensor, length: int, cache: Any = None, first: Tensor | None = None
) -> Tensor:
    """The same of a few rows; `cache` is one row's, of their prompt, with the logits (1, 1, vocab) after it."""
    new = ids.shape[1] - length
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if cache is None or first is None:
        out = model(input_ids=ids, position_ids=positions, logits_to_keep=new + 1, **inputs)
        logits = out.logits[:, -new - 1 : -1].float()  # (rows, new, vocab)
    else:
        logits = first.float().expand(len(ids), -1, -1)
        if new > 1:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(ids))
            inputs = {"attention_mask": mask[:, :-1], cache_argument(model): past, "use_cache": True}
            out = model(input_ids=ids[:, length:-1], position_ids=positions[:, length:-1], **inputs)
            logits = torch.cat([logits, out.logits.float()], 1)
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, length:], reduction="none")
    return (losses * mask[:, length:]).double().sum(1).cpu()


class _Draws(LogitsProcessor):
    """Logits whose greatest entry is a sample, and the only one that is finite."""

    def __init__(self, draws: Sequence[int], seed: int, temperature: float, top_p: float) -> None:
        self.names = sorted(set(draws))
        self.places = torch.tensor([self.names.index(draw) for draw in draws])
        self.sources = [torch.Generator().manual_seed((seed * 1_000_003 + name) % 2**63) for name in self.names]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.float() / self.temperature
        noise = torch.stack([-torch.empty(scores.shape[1]).exponential_(generator=g).log() for g in self.sources])
        tokens = greatest_of_top_p(scores, noise[self.places].to(scores.device), self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def greatest_of_top_p(scores: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """The token with the greatest score + noise among those whose more likely ones have less than `top_p` together.

    As from transformers' `TopPLogitsWarper`, but no vocabulary is sorted: a token that is out goes with all that are
    no more likely, and the greatest of the rest is looked at. Of equally likely tokens all stay or all go.

    Args:
        scores, noise: (n, vocabulary) float; the scores are logits.

    Returns:
        (n,) int64.
    """
    noisy = scores + noise
    tokens = noisy.argmax(-1)
    if top_p >= 1:
        return tokens
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    limits, rows = top_p * weights.sum(-1), torch.arange(len(scores), device=scores.device)
    while len(rows):
        chosen = weights.gather(1, tokens[rows, None])
        # A product with a mask: ten times as fast on a CPU as `torch.where`.
        above = torch.gt(weights, chosen, out=torch.empty_like(weights)).mul_(weights).sum(-1)
        out = above >= limits
        rows, limits, weights = rows[out], limits[out], weights[out]
        noisy = noisy[out].masked_fill_(weights <= chosen[out], -torch.inf)
        tokens[rows] = noisy.argmax(-1)
    return tokens
