"""What a few tokens of a few prompts tell of a steering before its texts are generated, and what its data tell.

The first tokens: "When is your LLM steerable?" (https://huggingface.co/papers/2606.11599). How far the training
differences agree: https://huggingface.co/papers/2602.17881. All of it costs some forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.batches import length_batches, right_padded
from ...latents.diffmean import fit_diffmean
from ...modeling import Steering
from ..generation.continuations import chat_prompts, continue_prompts, prompt_ids
from ..generation.first_divergent_token import first_divergent_token
from ..settings import GenerationSettings
from .dose import measure_dose
from .kl_divergence import kl_divergence

FIRST_TOKENS = GenerationSettings(max_new_tokens=6, temperature=0.0)
LEAST = 1e-6  # of what is put on a logarithmic scale
DIFFERENCES = ("agreement", "separation")


class _Seen(NamedTuple):
    """At the positions of the unsteered model's first tokens, (n, tokens) each: KL, change of the entropy, whether the
    most likely token is another; and the cosine of the last hidden states (n,) at the last prompt token."""

    kl: Tensor
    entropy: Tensor
    other: Tensor
    cosine: Tensor


@torch.no_grad()
def early_signs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    steering: Any,
    settings: GenerationSettings = FIRST_TOKENS,
    *,
    tokens_at_once: int = 1024,
) -> dict[str, float]:
    """Numbers from the first tokens of prompts, with a steering and without, mean over prompts.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        prompts: a few are enough.
        steering: a `Steering`, its dict or its JSON.
        settings: how the first tokens are generated; greedy by default.
        tokens_at_once: of a forward pass, padding counted.

    Returns:
        log_dose: logarithm of the change's length in norms of the hidden state.
        log_kl: of KL(unsteered || steered), nats a token.
        entropy_change: of the next-token distribution, nats.
        other_token: share of positions whose most likely token is another.
        state_cosine: of the last layer's hidden states at the last prompt token.
        first_divergent: first token that differs, as a share of the tokens.
        loss_change: nats a token of what the steered model writes, under the unsteered one, less its own text's.
        distinct_change: different tokens as a share of those written, less the unsteered model's.

    Raises:
        ValueError: no prompt, no steering, or as `continue_prompts`.
    """
    steering = Steering.coerce(steering)
    if not steering or isinstance(prompts, str) or not len(prompts):
        raise ValueError(
            f"Expected a steering that does something, and prompts. Received: {steering!r} and {len(prompts)} prompts."
        )
    read = chat_prompts(tokenizer, prompts) if settings.chat else list(prompts)
    n = len(read)
    made = continue_prompts(
        model, tokenizer, [*read, *read], [None] * n + [steering] * n, settings, draws=list(range(n)) * 2
    )
    base, steered = made.take(range(n)), made.take(range(n, 2 * n))
    before = prompt_ids(model, tokenizer, read, 0)
    dose = measure_dose(model, before, base.ids, steering, tokens_at_once=tokens_at_once)
    seen = _compared(model, before, base.ids, steering, tokens_at_once)
    lengths = float(dose.lengths.sum() / dose.changed.sum().clamp(min=1))
    firsts = [first_divergent_token(a, b) / max(len(a), len(b)) for a, b in zip(steered.ids, base.ids, strict=True)]
    return {
        "log_dose": math.log(max(lengths, LEAST)),
        "log_kl": math.log(max(float(seen.kl.mean()), LEAST)),
        "entropy_change": float(seen.entropy.mean()),
        "other_token": float(seen.other.mean()),
        "state_cosine": float(seen.cosine.mean()),
        "first_divergent": sum(firsts) / n,
        "loss_change": float((steered.losses / steered.tokens - base.losses / base.tokens).mean()),
        "distinct_change": _distinct(steered.ids) - _distinct(base.ids),
    }


def difference_agreement(means: Tensor, labels: Tensor) -> dict[str, float]:
    """How far the data of a concept speak for one direction.

    Args:
        means: (n, d), of each text its mean hidden state where the steering acts, such as `text_means` gives.
        labels: (n,), 1 with the concept and 0 without; both must occur.

    Returns:
        agreement: mean cosine of each positive text's difference to the negatives' mean with the difference of means.
        separation: distance of the means along that direction, in standard deviations within the labels.

    Raises:
        ValueError: as `fit_diffmean`.
    """
    direction = fit_diffmean(means, labels).double()
    with_it, without = (means[labels == side].double() for side in (1, 0))
    unit = direction / direction.norm().clamp(min=1e-12)
    spread = torch.cat([(side - side.mean(0)) @ unit for side in (with_it, without)]).square().mean().sqrt()
    differences = with_it - without.mean(0)
    return {
        "agreement": float(torch.cosine_similarity(differences, direction[None], dim=-1).mean()),
        "separation": float(direction.norm() / spread.clamp(min=1e-12)),
    }


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    return sum(len(set(row)) / len(row) for row in rows) / len(rows)


def _compared(
    model: Any, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], steering: Steering, tokens: int
) -> _Seen:
    rows = [[*a, *b] for a, b in zip(before, after, strict=True)]
    found: list[_Seen] = []
    for members in length_batches([len(row) for row in rows], tokens):
        ids, mask = right_padded([rows[i] for i in members], model.device)
        ends = torch.tensor([[0, 0, len(before[i])] for i in members], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
        plain = model(**inputs, steering=False)
        moved = model(**inputs, steering=model.prepare_steering(steering), steering_rows=ends)
        for line, i in enumerate(members):
            last, end = len(before[i]) - 1, len(rows[i]) - 1
            log_p, log_q = (one.logits[line, last:end].float().log_softmax(-1).cpu() for one in (plain, moved))
            entropies = [-(one.exp() * one).nan_to_num(0.0).sum(-1).double() for one in (log_p, log_q)]
            states = [one.hidden_states[-1][line, last].float().cpu() for one in (plain, moved)]
            found.append(_Seen(
                kl_divergence(log_p, log_q), entropies[1] - entropies[0],
                (log_p.argmax(-1) != log_q.argmax(-1)).double(),
                torch.cosine_similarity(states[0], states[1], dim=0).double()[None],
            ))  # fmt: skip
    return _Seen(*(torch.cat(values) for values in zip(*found, strict=True)))
