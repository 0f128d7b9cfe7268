"""How the next token is chosen from logits: what a request asks for, else what the model's repository publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from .drawing import draw, keep_top_k

# Settings of a published generation config that change what `generate` returns and are not known here.
NOT_APPLIED = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "min_length",
    "min_new_tokens", "no_repeat_ngram_size", "num_beams", "penalty_alpha", "sequence_bias", "suppress_tokens",
    "top_h", "typical_p", "watermarking_config",
)  # fmt: skip

# Below it a temperature is 0, since a division by it may leave the range of float32; scores divided by it stay there.
COLDEST, LARGEST_SCORE = 1e-6, 1e30
SCORES_AT_ONCE = 2**18  # on a CPU, in whose cache they stay
SMALLEST_PENALTY = 1e-30  # smaller ones are 0 in float32, and 0 / 0 is no score


@dataclass(frozen=True)
class Sampling:
    """Settings of one request.

    max_tokens: of an answer. temperature: 0 is greedy, as is what lies below `COLDEST`. top_k, top_p, min_p,
    repetition_penalty: as in transformers; 0, 1, 0 and 1 do nothing. presence_penalty, frequency_penalty: as OpenAI
    defines them, taken from the logits of tokens that the answer holds, once or for each time. logit_bias: token id ->
    added to its logit. seed: of the random choices; None for another one each time. stop: texts that end the answer
    and are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()


def published_sampling(config: GenerationConfig, max_tokens: int) -> Sampling:
    """What a model's own generation config asks for, where a request says nothing."""

    def value(name: str, neutral: float) -> Any:
        found = getattr(config, name, None)
        return neutral if found is None else found

    return Sampling(
        max_tokens=max_tokens,
        temperature=value("temperature", 1.0) if config.do_sample else 0.0,
        top_k=value("top_k", 0),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        repetition_penalty=value("repetition_penalty", 1.0),
    )


def settings_not_applied(config: GenerationConfig) -> list[str]:
    """Names of published settings that change what `generate` returns, and that the server does not know."""
    return [name for name in NOT_APPLIED if getattr(config, name, None) not in (None, False, 0, 1, 1.0, [], {}, ())]


def stop_tokens(config: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    found = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, (list, tuple)) else [found])


class TokenChoice:
    """Chooses the tokens of one text; random numbers are its own, so they depend on no other text of the batch.

    Args:
        number: of the answer, where a request asks for several.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], number: int = 0) -> None:
        self.sampling = sampling
        self.prompt = list(prompt)
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed((sampling.seed + number) % 2**63)
        penalty = sampling.repetition_penalty
        self.is_greedy = sampling.temperature < COLDEST
        self.penalty = RepetitionPenaltyLogitsProcessor(max(penalty, SMALLEST_PENALTY)) if penalty != 1 else None

    @property
    def keeps_logits(self) -> bool:
        """Whether logits count as the model gives them, whatever came before."""
        s = self.sampling
        return not (self.penalty or s.presence_penalty or s.frequency_penalty or s.logit_bias)

    def scores(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        """Logits with biases and penalties, (vocabulary,), before any temperature.

        Args:
            logits: (vocabulary,) float32; left unchanged.
            written: the answer's tokens so far.
        """
        if self.keeps_logits:
            return logits
        s = self.sampling
        scores = logits.clone()
        if s.logit_bias:
            index = torch.tensor(list(s.logit_bias), device=scores.device)
            scores.index_add_(0, index, torch.tensor(list(s.logit_bias.values()), device=scores.device))
        if written and (s.presence_penalty or s.frequency_penalty):
            tokens, counts = torch.tensor(written, device=scores.device).unique(return_counts=True)
            scores.index_add_(0, tokens, -s.presence_penalty - s.frequency_penalty * counts.to(scores))
        if self.penalty is not None:
            ids = torch.tensor([[*self.prompt, *written]], device=scores.device)
            scores = self.penalty(ids, scores[None])[0]  # pyright: ignore[reportArgumentType]
        return scores

    def random_number(self) -> float:
        """The next one, in [0, 1), drawn on the CPU: the same on every device."""
        return float(torch.rand((), generator=self.random, dtype=torch.float64))


def choose_tokens(
    logits: Tensor, best: Sequence[int], choices: Sequence[TokenChoice], written: Sequence[Sequence[int]]
) -> list[int | Exception]:
    """The next token of each text, or what went wrong with its settings.

    Args:
        logits: (n, vocabulary) float32, none infinite but downwards; left unchanged.
        best: of each row the token of the largest.
        choices, written: of each row, with the answer's tokens so far.
    """
    chosen: list[int | Exception] = list(best)
    drawing: list[int] = []
    changed: dict[int, Tensor] = {}
    for row, (choice, tokens) in enumerate(zip(choices, written, strict=True)):
        try:
            given = logits[row]
            scores = choice.scores(given, tokens)
            if scores is not given:
                changed[row] = scores
            if not choice.is_greedy:
                drawing.append(row)
            elif row in changed:
                chosen[row] = int(changed[row].argmax())
        except Exception as error:  # of this answer's settings: the others go on
            chosen[row] = error
    at_once = max(1, SCORES_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(drawing))
    for start in range(0, len(drawing), at_once):
        rows = drawing[start : start + at_once]
        for row, token in zip(rows, _drawn(logits, changed, rows, [choices[row] for row in rows]), strict=True):
            chosen[row] = token
    return chosen


def _drawn(
    logits: Tensor, changed: Mapping[int, Tensor], rows: Sequence[int], choices: Sequence[TokenChoice]
) -> list[int]:
    """Tokens drawn for some rows of logits (n, vocabulary), of which penalties changed some."""
    settings = [choice.sampling for choice in choices]
    temperature, top_p, min_p = (
        torch.tensor([getattr(s, name) for s in settings]) for name in ("temperature", "top_p", "min_p")
    )
    scores = logits.index_select(0, torch.tensor(rows, device=logits.device))
    for place, row in enumerate(rows):
        if row in changed:
            scores[place] = changed[row]
    scores.clamp_(-LARGEST_SCORE, LARGEST_SCORE).div_(temperature.to(scores.device)[:, None])
    for row_scores, s in zip(scores, settings, strict=True):
        if s.top_k > 0:
            keep_top_k(row_scores, s.top_k)
    return draw(scores, top_p, min_p, [choice.random_number for choice in choices])
