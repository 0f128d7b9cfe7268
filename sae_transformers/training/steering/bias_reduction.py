"""Features that go with gender, or any attribute that words carry, and steering that takes them out.

    ranked = rank_by_swaps(sae, states, swapped_states, texts)      or rank_by_tokens(sae, states, labels)
    steering = reducing(ranked[:20])                                ablated at every token but the first
    sweep(ranked, (0, 1, 5, 20), measure)                           a measure by number of features

The original project (seansica/sae-vector-steering) announced such a reduction and did not build it; what is here is
ours. The swaps are those of counterfactual fairness (https://huggingface.co/papers/1809.10610).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...evaluation.detection.metrics import code_aurocs
from ...latents.sparse_codes import encode_texts
from ...modeling import FeatureEdit, SparseAutoencoder, Steering
from ..heads.unintended import counterfactual_features

# Words that swapping genders changes, as `read_word_pairs` of create_training_data takes them.
GENDERED_PAIRS = (
    "he:she,him:her,his:her,himself:herself,man:woman,men:women,boy:girl,boys:girls,father:mother,fathers:mothers,"
    "son:daughter,sons:daughters,brother:sister,brothers:sisters,husband:wife,husbands:wives,king:queen,uncle:aunt,"
    "gentleman:lady,gentlemen:ladies,mr:mrs,sir:madam,male:female,males:females,actor:actress,hero:heroine"
)
OPS = ("ablate", "clamp")
NOT_THE_FIRST = ((1, None),)  # positions: the first token of a text is an outlier that SAEs are not trained on


class Ranking(NamedTuple):
    """features: (m,) int64, those that qualify, the strongest first. scores: (d_sae,) float64, of all."""

    features: Tensor
    scores: Tensor


def rank_by_swaps(
    sae: SparseAutoencoder,
    original_states: Tensor,
    swapped_states: Tensor,
    texts: tuple[Tensor, Tensor] | None = None,
    *,
    statistic: str = "paired_t",
    threshold: float = 0.0,
) -> Ranking:
    """Features whose activation changes most when the gendered words of a text are swapped.

    Args:
        original_states, swapped_states, texts, statistic: see `unintended.counterfactual_features`.
        threshold: features that score more qualify.

    Raises:
        ValueError: no feature qualifies, or as `counterfactual_features`.
    """
    found = counterfactual_features(
        sae, original_states, swapped_states, texts=texts, threshold=threshold, statistic=statistic
    )
    return _qualified(found["indices"], found["scores"], f"more than {threshold:g} by {statistic}")


def rank_by_tokens(
    sae: SparseAutoencoder, states: Tensor, labels: Tensor, *, threshold: float = 0.05, both_ways: bool = True
) -> Ranking:
    """Features whose activation tells tokens with an attribute from those without, by |AUROC - 1/2|.

    With labels 1 for gendered words and 0 for others these are features of gender at large; with 1 for female and 0
    for male words, features of either.

    Args:
        states: (n_tokens, d_in), at the place that the SAE reads.
        labels: (n_tokens,), 0 or 1; both must occur.
        threshold: features that score more qualify; AUROC runs from 0 to 1.
        both_ways: count features that are stronger where the label is 0 too.

    Raises:
        ValueError: no feature qualifies, a label is missing, or shapes do not fit.
    """
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise ValueError(
            f"Expected states (n_tokens, d_in) and labels (n_tokens,). "
            f"Received: {tuple(states.shape)} and {tuple(labels.shape)}."
        )
    areas = code_aurocs(encode_texts(sae, states), labels) - 0.5
    scores = areas.abs() if both_ways else areas
    order = scores.argsort(descending=True, stable=True)
    return _qualified(order[scores[order] > threshold], scores, f"an AUROC further than {threshold:g} from 1/2")


def reducing(
    features: Sequence[int] | Tensor,
    *,
    op: str = "ablate",
    value: float | Sequence[float] = 0.0,
    sae: int = 0,
    positions: Any = NOT_THE_FIRST,
) -> Steering:
    """Steering that takes features out of the hidden state; what the SAE does not reconstruct stays.

    Args:
        features: latents; none gives steering that does nothing.
        op: `ablate`, to 0; or `clamp`, to `value`, so that a feature no longer tells texts apart but is as active as
            usual.
        value: of `clamp`, one for all or one for each feature, such as their mean activations.
        sae: number of the SAE in the model.
        positions: see `Steering`; all tokens but the first of a text by default.

    Raises:
        ValueError: another op, or values that do not fit.
    """
    chosen = [int(feature) for feature in features]
    if op not in OPS:
        raise ValueError(f"`op` must be one of {', '.join(OPS)}. Received: op={op!r}.")
    values = [float(value)] * len(chosen) if isinstance(value, (int, float)) else [float(one) for one in value]
    if len(values) != len(chosen):
        raise ValueError(
            f"`value` needs one number, or one for each of {len(chosen)} features. Received: {len(values)}."
        )
    edits = [
        FeatureEdit(sae, feature, "ablate") if op == "ablate" else FeatureEdit(sae, feature, "set", one)
        for feature, one in zip(chosen, values, strict=True)
    ]
    return Steering(edits, positions=positions)


def sweep(
    features: Tensor,
    counts: Sequence[int],
    measure: Callable[[Steering], Any],
    *,
    op: str = "ablate",
    values: Tensor | None = None,
    sae: int = 0,
    positions: Any = NOT_THE_FIRST,
) -> dict[int, Any]:
    """Measure with the first 0, 1, 2, ... features taken out: number of features -> what `measure` returns.

    Args:
        features: (m,), in the order in which they are added.
        counts: each at most m.
        measure: of a `Steering`; for the count 0 one that does nothing.
        op, sae, positions: of `reducing`.
        values: (m,), of `clamp` for each feature; 0 by default.

    Raises:
        ValueError: a count is negative or exceeds the features there are.
    """
    if wrong := [count for count in counts if not 0 <= count <= len(features)]:
        raise ValueError(f"`counts` must be in [0, {len(features)}], the features found. Received: {wrong}.")
    values = torch.zeros(len(features)) if values is None else values
    return {
        n: measure(reducing(features[:n], op=op, value=values[:n].tolist(), sae=sae, positions=positions))
        for n in counts
    }


def _qualified(features: Tensor, scores: Tensor, wanted: str) -> Ranking:
    if not len(features):
        raise ValueError(
            f"No feature goes with the attribute: expected one with {wanted}. "
            f"Received: a largest score of {float(scores.max()):.3g} among {len(scores):,} features. Use a lower "
            f"threshold, more texts, or texts with more such words."
        )
    return Ranking(features, scores)
