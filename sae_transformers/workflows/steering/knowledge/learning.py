"""Learn from a pool of questions which features go with answering from the context, and which with memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ....create_training_data.knowledge_conflict import STYLES
from ....evaluation.generation.short_answers import text_losses
from ....latents.sparse_codes import encode_texts
from ....training.steering.functional_features import FunctionalFeatures, functional_features, loss_weights
from ...settings.select_knowledge import SIDES
from ..functional import last_states
from .answers import AskedModel

FEW = 20  # prompts of a behaviour, below which `auto` asks which answer is likelier
VARIANTS = 4  # choices of demonstrations to learn from; they come from questions that are not asked


class LearntFeatures(NamedTuple):
    """What was learnt from the pool.

    features: of each SAE. means: (d_in,) each, the mean last hidden state of both behaviours at the first SAE.
    prompts: how many were asked. answered, learnt_from: side -> prompts with that answer, and prompts that were learnt
    from. by_likelihood: whether the likelier answer decided, and not the one given.
    """

    features: list[FunctionalFeatures]
    means: tuple[Tensor, Tensor]
    prompts: int
    answered: dict[str, int]
    learnt_from: dict[str, int]
    by_likelihood: bool


def learn_features(asked: AskedModel, rows: Sequence[int]) -> LearntFeatures:
    """Group prompts by what the model answers, and learn from both groups' last hidden states.

    Raises:
        ValueError: a behaviour has fewer than two prompts.
    """
    selection = asked.settings.selection
    prompts, prompt_rows, answers = [], [], []
    for style, variant in itertools.product(STYLES, range(VARIANTS)):
        part = rows[variant::VARIANTS]
        made = asked.prompts(part, asked.settings.questions.split_seed + variant, style)
        prompt_rows += part
        prompts += made
        answers += asked.answers(made)
    groups = _by_answer(asked, prompt_rows, answers)
    answered = dict(zip(SIDES, map(len, groups), strict=True))
    by_likelihood = selection.grouping == "likelihood" or (
        selection.grouping == "auto" and min(answered.values()) < FEW
    )
    if by_likelihood:
        asked.count.total += len(prompts)
        memory = asked.prefers_memory(prompt_rows, prompts)
        groups = [[i for i, yes in enumerate(memory) if yes == side] for side in (False, True)]
    learnt_from = dict(zip(SIDES, map(len, groups), strict=True))
    if min(learnt_from.values()) < 2:
        raise ValueError(
            f"Each behaviour needs two prompts or more to learn from. Received: {learnt_from}. Use a larger `pool`, "
            f"more `shots`, `grouping` likelihood or a model that knows more."
        )
    weights = [None, None]
    if selection.weighting == "loss":
        weights = [_loss_weights(asked, group, prompts, prompt_rows, side) for side, group in enumerate(groups)]
    texts = [[prompts[i] for i in group] for group in groups]
    per_batch = asked.settings.tokens_per_batch
    hidden = [last_states(asked.model, asked.tokenizer, group, tokens_per_batch=per_batch) for group in texts]
    features = [
        functional_features(
            *(encode_texts(sae, states[number]) for states in hidden),
            weights_a=weights[0],
            weights_b=weights[1],
            dead=selection.legacy,
        )
        for number, sae in enumerate(asked.model.saes)
    ]
    means = hidden[0][0].mean(0), hidden[1][0].mean(0)
    return LearntFeatures(features, means, len(prompts), answered, learnt_from, by_likelihood)


def _by_answer(asked: AskedModel, rows: Sequence[int], answers: Sequence[str]) -> list[list[int]]:
    """Numbers of the prompts of each side. An answer that is both tells nothing."""
    scored = asked.behaviours(rows, answers)
    pairs = list(zip(scored.context, scored.memory, strict=True))
    return [[i for i, pair in enumerate(pairs) if pair == side] for side in ((True, False), (False, True))]


def _loss_weights(
    asked: AskedModel, group: Sequence[int], prompts: Sequence[str], rows: Sequence[int], side: int
) -> Tensor:
    losses = []
    for which in (("sub", "org"), ("org", "sub"))[side]:
        texts = [f"{prompts[i]} {asked.questions[rows[i]].answers(which)[0]}\n\n" for i in group]
        per_batch = asked.settings.tokens_per_batch
        losses.append(text_losses(asked.model, asked.tokenizer, texts, tokens_at_once=per_batch))
    return loss_weights(*losses)
