"""Learn from a pool of questions which features go with answering from the context, and which with memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....create_training_data.grouped_prompts import GroupedPrompt
from ....create_training_data.knowledge_conflict import STYLES
from ....evaluation.generation.short_answers import text_losses
from ....latents.sparse_codes import encode_texts
from ....training.steering.functional_features import FunctionalFeatures, functional_features, loss_weights, scored
from ....training.steering.published_features import PublishedFeatures
from ...settings.select_knowledge import SIDES
from ..functional import last_states
from .answers import AskedModel

FEW = 20  # prompts of a behaviour, below which `auto` asks which answer is likelier
VARIANTS = 4  # choices of demonstrations to learn from; they come from questions that are not asked


class LearntFeatures(NamedTuple):
    """What was learnt from the pool.

    features: of each SAE. means: (d_in,) each, the mean last hidden state of both behaviours at the first SAE; None
    where nothing was learnt, all being published. grouped: the prompts that were asked, and their answers.
    answered, learnt_from: side -> prompts with that answer, and prompts that were learnt from. by_likelihood: whether
    the likelier answer decided, and not the one given.
    """

    features: list[FunctionalFeatures]
    means: tuple[Tensor, Tensor] | None
    grouped: list[GroupedPrompt]
    answered: dict[str, int]
    learnt_from: dict[str, int]
    by_likelihood: bool

    @property
    def prompts(self) -> int:
        """How many prompts were asked."""
        return len(self.grouped)


def ask_pool(asked: AskedModel, rows: Sequence[int]) -> list[GroupedPrompt]:
    """Ask each question with all styles of demonstrations, a quarter of them with the same ones each."""
    grouped = []
    for style, variant in itertools.product(STYLES, range(VARIANTS)):
        part, seed = rows[variant::VARIANTS], asked.settings.questions.split_seed + variant
        answers = asked.answers(asked.prompts(part, seed, style))
        shown = tuple(asked.demonstrations(seed))
        told = zip(part, answers, *asked.behaviours(part, answers), strict=True)
        grouped += [GroupedPrompt(row, shown, style, answer, *sides) for row, answer, *sides in told]
    return grouped


def learn_features(
    asked: AskedModel, grouped: Sequence[GroupedPrompt], published: Sequence[PublishedFeatures] | None = None
) -> LearntFeatures:
    """Divide prompts by what the model answers, and learn from both groups' last hidden states.

    Args:
        published: of each SAE; its information and expectation stand, and its functional values where there are some.

    Raises:
        ValueError: a behaviour has fewer than two prompts.
    """
    selection, prompts = asked.settings.selection, [one.prompt(asked.questions) for one in grouped]
    groups = _by_answer(grouped)
    answered = dict(zip(SIDES, map(len, groups), strict=True))
    by_likelihood = selection.grouping == "likelihood" or (
        selection.grouping == "auto" and min(answered.values()) < FEW
    )
    if by_likelihood:
        asked.count.total += len(prompts)
        memory = asked.prefers_memory([one.row for one in grouped], prompts)
        groups = [[i for i, yes in enumerate(memory) if yes == side] for side in (False, True)]
    learnt_from = dict(zip(SIDES, map(len, groups), strict=True))
    if min(learnt_from.values()) < 2:
        raise ValueError(
            f"Each behaviour needs two prompts or more to learn from. Received: {learnt_from}. Use a larger `pool`, "
            f"more `shots`, `grouping` likelihood or a model that knows more."
        )
    weights = [None, None]
    if selection.weighting == "loss":
        grouped = _with_losses(asked, grouped, prompts)
        weights = [_loss_weights([grouped[i] for i in group], side) for side, group in enumerate(groups)]
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
    if published is not None:
        features = [_as_published(*both) for both in zip(features, published, strict=True)]
    means = hidden[0][0].mean(0), hidden[1][0].mean(0)
    return LearntFeatures(features, means, list(grouped), answered, learnt_from, by_likelihood)


def take_published(published: Sequence[PublishedFeatures]) -> LearntFeatures:
    """What there is to learn where all is published."""
    return LearntFeatures([scored(one) for one in published], None, [], {}, {}, False)


def _as_published(learnt: FunctionalFeatures, published: PublishedFeatures) -> FunctionalFeatures:
    if published.values is not None:
        return scored(published)
    return learnt._replace(mutual_information=published.mutual_information, expectation=published.expectation)


def _by_answer(grouped: Sequence[GroupedPrompt]) -> list[list[int]]:
    """Numbers of the prompts of each side. An answer that is both tells nothing."""
    pairs = [(one.from_context, one.from_memory) for one in grouped]
    return [[i for i, pair in enumerate(pairs) if pair == side] for side in ((True, False), (False, True))]


def _with_losses(asked: AskedModel, grouped: Sequence[GroupedPrompt], prompts: Sequence[str]) -> list[GroupedPrompt]:
    """The prompts with the losses of both answers; those that are known stay."""
    open_ones = [i for i, one in enumerate(grouped) if one.context_loss is None or one.memory_loss is None]
    if not open_ones:
        return list(grouped)
    losses = []
    for which in ("sub", "org"):
        texts = [f"{prompts[i]} {asked.questions[grouped[i].row].answers(which)[0]}\n\n" for i in open_ones]
        per_batch = asked.settings.tokens_per_batch
        losses.append(text_losses(asked.model, asked.tokenizer, texts, tokens_at_once=per_batch).tolist())
    result = list(grouped)
    for i, context, memory in zip(open_ones, *losses, strict=True):
        result[i] = result[i]._replace(context_loss=context, memory_loss=memory)
    return result


def _loss_weights(group: Sequence[GroupedPrompt], side: int) -> Tensor:
    losses = torch.tensor([[one.context_loss, one.memory_loss] for one in group], dtype=torch.float64)
    return loss_weights(losses[:, side], losses[:, 1 - side])
