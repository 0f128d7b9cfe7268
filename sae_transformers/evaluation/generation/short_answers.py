"""Greedy short answers to prompts, in batches, steered or not; a beginning that all prompts share is read once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from ...latents.batches import length_batches, right_padded
from ...latents.context import context_length
from ...modeling.base_arguments import cache_argument, cache_of, continues
from ...modeling.steered_tokens import steering_rows_for
from ...modeling.steering_plan import BoundSteering
from .layer_contrast import LayerContrast, contrasting
from .log_likelihood import token_scores


class Contrast(NamedTuple):
    """Context-aware decoding (https://huggingface.co/papers/2305.14739): a second prompt for each.

    (1 + a) log p(y | prompt) - a log p(y | contrast)

    prompts: n texts. weight: a; a negative one favours what the contrast says.
    """

    prompts: Sequence[str]
    weight: float


@torch.no_grad()
def short_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    steering: Any = False,
    contrast: Contrast | LayerContrast | None = None,
    max_new_tokens: int = 12,
    tokens_at_once: int = 8192,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """The line that a model writes after each prompt, stripped; empty where it begins with a line break.

    Prompts are batched by length. What all begin with (demonstrations) is read once, unless the steering concerns
    tokens there.

    Args:
        model: a `SaeForCausalLM`, or any causal language model with `steering=False`.
        tokenizer: of it.
        prompts: not empty.
        steering: as `generate` takes it, for all prompts; False for none.
        contrast: other prompts, or earlier layers, whose next-token log-probabilities are subtracted.
        max_new_tokens: of an answer.
        tokens_at_once: of a batch, padding counted.
        progress: called with (prompts done, prompts) after each batch.

    Raises:
        ValueError: a prompt is empty or longer than the model's context with its answer, or `contrast` has another
            length or a layer that is not there.
    """
    other = contrast if isinstance(contrast, Contrast) else None
    if other is not None and len(other.prompts) != len(prompts):
        raise ValueError(f"Expected a contrast for each of {len(prompts)} prompts. Received: {len(other.prompts)}.")
    ids = [_ids(tokenizer, text) for text in prompts]
    others = None if other is None else [_ids(tokenizer, text) for text in other.prompts]
    _check_lengths(model, [*ids, *(others or [])], max_new_tokens)
    shared, prefix = _shared_prefix(model, ids, steering)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = _line_ends(tokenizer)
    answers = [""] * len(ids)
    options = {} if steering is False and not hasattr(model, "saes") else {"steering": steering}
    done = 0
    with ExitStack() as block:
        if isinstance(contrast, LayerContrast):
            options["logits_processor"] = block.enter_context(contrasting(model, contrast))
        for members in length_batches([len(row) + max_new_tokens for row in ids], tokens_at_once):
            rows, mask = _padded([ids[i] for i in members], shared, pad, model.device)
            if other is not None and others is not None:
                negative, negative_mask = _padded([others[i] for i in members], 0, pad, model.device)
                options |= {
                    "guidance_scale": 1 + other.weight,
                    "negative_prompt_ids": negative,
                    "negative_prompt_attention_mask": negative_mask,
                }
            if prefix is not None:
                options[cache_argument(model)] = _repeated(prefix, len(members))
            output = model.generate(
                rows,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=ends,
                **options,
            )
            for i, new in zip(members, output[:, rows.shape[1] :].tolist(), strict=True):
                answers[i] = tokenizer.decode(new, skip_special_tokens=True).partition("\n")[0].strip()
            done += len(members)
            if progress is not None:
                progress(done, len(ids))
    return answers


@torch.no_grad()
def answer_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    steering: Any = False,
    tokens_at_once: int = 8192,
    progress: Callable[[int, int], object] | None = None,
) -> torch.Tensor:
    """Mean log-probability of an answer's tokens after its prompt, in nats, (n, m) float32: of m answers to a prompt.

    A prompt is read once for all its answers, and what all prompts begin with once, as in `short_answers`.

    Args:
        answers: (n, m) texts; each follows its prompt after a space.

    Raises:
        ValueError: an answer or prompt is empty or too long, or the numbers of answers differ.
    """
    ids = [_ids(tokenizer, text) for text in prompts]
    if len(answers) != len(ids) or len({len(row) for row in answers}) > 1:
        raise ValueError(
            f"Expected as many answers to each of {len(ids)} prompts. Received: {[len(row) for row in answers]}."
        )
    told = [[tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in row] for row in answers]
    if any(not option for row in told for option in row):
        raise ValueError("Every answer needs a token. Received: an empty one.")
    longest = max((len(option) for row in told for option in row), default=0)
    _check_lengths(model, ids, longest)
    shared, prefix = _shared_prefix(model, ids, steering)
    plan = model.prepare_steering(steering) if steering is not False else None
    options: dict[str, Any] = {"steering": False} if hasattr(model, "saes") else {}
    result = torch.zeros(len(ids), len(answers[0]) if ids else 0)
    done = 0
    for members in length_batches([len(row) + longest for row in ids], tokens_at_once):
        rows, mask = _padded([ids[i] for i in members], shared, 0, model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        past = None if prefix is None else _repeated(prefix, len(members))
        if plan is not None:  # as `generate` does: tokens before are prompt, though they are in the cache
            length = rows.shape[1]
            options["steering"] = BoundSteering(plan, length)
            options["steering_rows"] = steering_rows_for(rows, mask, 0, length, count=plan.count)
        read = model(
            input_ids=rows[:, shared:],
            attention_mask=mask,
            position_ids=positions[:, shared:],
            **{cache_argument(model): past},
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        for column in range(result.shape[1]):
            after = [told[i][column] for i in members]
            tail, counted = right_padded(after, model.device)
            width, logits = tail.shape[1], read.logits[:, -1:]
            if width > 1:
                after_prompt = positions[:, -1:] + torch.arange(1, width, device=model.device)
                both = torch.cat([mask, counted[:, :-1]], 1)
                if continues(cache_of(read)):
                    rest = model(
                        input_ids=tail[:, :-1],
                        attention_mask=both,
                        position_ids=after_prompt,
                        **{cache_argument(model): copy.deepcopy(cache_of(read))},
                        use_cache=True,
                        **options,
                    )
                    logits = torch.cat([logits, rest.logits], 1)
                else:  # the prompt again, with the answer behind it
                    logits = model(
                        input_ids=torch.cat([rows, tail[:, :-1]], 1),
                        attention_mask=both,
                        position_ids=torch.cat([positions, after_prompt], 1),
                        use_cache=False,
                        logits_to_keep=width,
                        **options,
                    ).logits[:, -width:]
            found = logits.float().log_softmax(-1).gather(-1, tail[..., None])[..., 0]
            result[members, column] = ((found * counted).sum(-1) / counted.sum(-1)).cpu()
        done += len(members)
        if progress is not None:
            progress(done, len(ids))
    return result


def text_losses(model: Any, tokenizer: Any, texts: Sequence[str], *, tokens_at_once: int = 8192) -> torch.Tensor:
    """Mean cross-entropy of each text's tokens but the first, in nats, (n,) float64; without steering.

    Raises:
        ValueError: a text has fewer than two tokens or is longer than the model's context.
    """
    ids = [_ids(tokenizer, text) for text in texts]
    found = token_scores(model, ids, [1] * len(ids), steering=False, tokens_at_once=tokens_at_once)
    return torch.tensor([-float(scores.mean()) for scores in found.log_p], dtype=torch.float64)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer(text)["input_ids"]
    if not found:
        raise ValueError(f"Every prompt needs a token. Received: {text!r}.")
    return found


def _line_ends(tokenizer: Any) -> list[int]:
    """Tokens that end a line or the text."""
    found = {tokenizer.eos_token_id}
    for end in ("\n", "\n\n"):
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        found |= {ids[0]} if len(ids) == 1 else set()
    return sorted(token for token in found if token is not None)


def _check_lengths(model: Any, rows: Sequence[Sequence[int]], new: int) -> None:
    limit = context_length(model)
    longest = max(map(len, rows), default=0) + new
    if limit is not None and longest > limit:
        raise ValueError(
            f"Prompts must leave room for {new} new tokens in a context of {limit}. "
            f"Received: {longest} tokens with the answer. Use fewer demonstrations or shorter contexts."
        )


def _shared_prefix(model: Any, rows: list[list[int]], steering: Any) -> tuple[int, Any]:
    """How many tokens all rows begin with, and the cache after them; 0 and None where reading them once would not do:
    steering reaches them, the base cannot go on from a cache by several tokens, or it looks back over a window, in
    which the padding behind the beginning would count."""
    shared = _shared_beginning(rows) if _edits_last_token_only(steering) else 0
    prefix = _read_prefix(model, rows[0][:shared]) if shared else None
    window = any(getattr(layer, "is_sliding", False) for layer in getattr(prefix, "layers", ()))
    return (0, None) if window or not continues(prefix) else (shared, prefix)


def _edits_last_token_only(steering: Any) -> bool:
    return steering is False or getattr(steering, "positions", None) in ("last_prompt", "generated")


def _shared_beginning(rows: list[list[int]]) -> int:
    """Tokens that all rows begin with, less one: a prompt's last token is read with it."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # the two that are furthest apart
    shortest = min(map(len, rows))
    same = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    return min(same, shortest - 1)


def _read_prefix(model: Any, ids: Sequence[int]) -> Any:
    options = {"steering": False} if hasattr(model, "saes") else {}
    rows = torch.tensor([ids], device=model.device)
    return cache_of(model(input_ids=rows, use_cache=True, logits_to_keep=1, **options))


def _repeated(cache: Any, count: int) -> Any:
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(count)
    return cache


def _padded(
    rows: Sequence[Sequence[int]], shared: int, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (batch, width): each row's padding stands after the beginning that all share."""
    width = max(map(len, rows))
    ids = [[*row[:shared], *[pad] * (width - len(row)), *row[shared:]] for row in rows]
    mask = [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
