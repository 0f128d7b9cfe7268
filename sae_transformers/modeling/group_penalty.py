"""A penalty on what groups of features do to a classifier's scores: declarative and JSON, as feature penalties are.

    C[r, l]  logit l of text r, less that without the group's latents            (`of="contribution"`)
    loss    += weight * mean_r sum_l |C[r, l]|^power
    S[i, j]  alignment of weights i that read an SAE's state with feature j      (`of` one of `ALIGNMENTS`)
    loss    += weight * sum_i mean_j |S[i, j]|^power

The second is SelfReg's (https://huggingface.co/papers/2502.14133, section 3) for each group with a weight of its own:
what a unit of a feature adds to the logit, whatever the texts. It needs a head whose weights read the state of the
SAE. The first is the same quantity where none do, or with more layers between: what the features add to the logits
of the texts at hand. For a linear head on the last token C is the sum over the group of activation times S of
`decoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .checked_values import check_feature, check_sae_number, finite_number, from_mapping
from .feature_head import ALIGNMENTS

CONTRIBUTION = "contribution"
OF = (CONTRIBUTION, *ALIGNMENTS)


@dataclass(frozen=True)
class GroupPenalty:
    """A term of a classifier's loss that keeps its scores off a group of features. Its gradient goes to the head and
    the base, never to the SAE.

    Args:
        features: the group: an index of a latent or its name, or a list of these.
        weight: of the group in the loss, 0 or more. 0: its term is reported and not trained.
        sae: number of the SAE in the model.
        of: `contribution`, what the logits lose without the group, of any head, in a second pass; or the alignment of
            a feature head's weights: `decoder`, `encoder` or `affine`, see `SparseAutoencoder.alignment`.
        power: 1, or 2 for squares.
        labels: names or numbers of the labels whose logits count; by default all. With `contribution`, and of
            alignments where the head is linear.
        skip_first: leading tokens of each text at which the group stays: the first is an outlier. Of a contribution.
        name: in `sae_losses` it goes by `group_NAME`; by default its number among the groups.

    Raises:
        ValueError: no features, a feature twice, a weight that is negative or not finite, or an unknown word.
    """

    features: Any
    weight: float = 1.0
    sae: int = 0
    of: str = CONTRIBUTION
    power: int = 1
    labels: Any = None
    skip_first: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _several("features", self.features))
        for feature in self.features:
            check_feature(feature)
        check_sae_number(self.sae)
        object.__setattr__(self, "weight", finite_number("weight", self.weight))
        if self.weight < 0:
            raise ValueError(f"`weight` must be 0 or more. Received: weight={self.weight!r}.")
        if self.of not in OF:
            raise ValueError(f"`of` must be one of {', '.join(map(repr, OF))}. Received: of={self.of!r}.")
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(f"`power` must be 1 or 2. Received: power={self.power!r}.")
        if self.labels is not None:
            object.__setattr__(self, "labels", _several("labels", self.labels))
        if isinstance(self.skip_first, bool) or not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise ValueError(f"`skip_first` must be a count of tokens. Received: skip_first={self.skip_first!r}.")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ValueError(f"`name` must be a word, or None. Received: name={self.name!r}.")

    @property
    def is_group_penalty(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the defaults; `group_from` gives an equal object back."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "features" or value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found


def _several(name: str, given: Any) -> tuple[Any, ...]:
    """One or several names or numbers."""
    values = (given,) if isinstance(given, (int, str)) else given
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"`{name}` must be an index or a name, or a list of them. Received: {name}={given!r}.")
    values = tuple(values)
    if not values:
        raise ValueError(f"A group needs at least one of `{name}`. Received: {name}={given!r}.")
    wrong = [one for one in values if isinstance(one, bool) or not isinstance(one, (int, str))]
    if wrong or len(set(values)) < len(values):
        problem = f"{wrong[0]!r} is neither" if wrong else "one is there twice"
        raise ValueError(f"`{name}` must be indices or names, each once: {problem}. Received: {name}={given!r}.")
    return values


def group_from(value: Any) -> GroupPenalty:
    """A `GroupPenalty` from itself or its dict.

    Raises:
        TypeError: it is neither.
        ValueError: a field that group penalties do not have, or a value that they do not take.
    """
    if getattr(value, "is_group_penalty", False):  # by attribute: remote code has a class of its own
        return value
    if not isinstance(value, Mapping) or "features" not in value:
        raise TypeError(
            f"Expected a GroupPenalty or its dict, which has `features`. Received: {type(value).__name__} {value!r}."
        )
    return from_mapping(GroupPenalty, value)


def groups_from(values: Any) -> tuple[GroupPenalty, ...]:
    """What may be given for the groups of a model: None, one, or a list."""
    if values is None:
        return ()
    if isinstance(values, Mapping) or getattr(values, "is_group_penalty", False):
        values = [values]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"`group_penalties` must be a list of GroupPenalty. Received: {values!r}.")
    return tuple(group_from(value) for value in values)


class BoundGroup(NamedTuple):
    """A group with the latents that its features are in a model's SAE, and the columns that its labels are in the
    logits, None for all."""

    penalty: GroupPenalty
    name: str
    features: tuple[int, ...]
    labels: tuple[int, ...] | None


def bind_groups(
    groups: Sequence[GroupPenalty], configs: Sequence[Any], head: Any, label2id: Mapping[str, Any] | None
) -> tuple[BoundGroup, ...]:
    """Groups of a model whose SAEs have these configs.

    Args:
        head: settings of the feature head, `FeatureHeadConfig` as a dict; None of a base's own head.
        label2id: of the model; None: labels are not looked up.

    Raises:
        ValueError: an SAE, a feature or a label that is not there, a latent under two names, two groups of one name,
            or a quantity that this head does not have.
    """
    bound = []
    for number, group in enumerate(groups):
        if group.sae >= len(configs):
            raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={group.sae!r}.")
        latents = tuple(configs[group.sae].resolve_feature(feature) for feature in group.features)
        if len(set(latents)) < len(latents):
            raise ValueError(f"Two of the features are one latent. Received: {group.features!r}, latents {latents}.")
        _check_head(group, configs, head)
        labels = None if group.labels is None or label2id is None else _columns(group.labels, label2id)
        name = f"group_{number if group.name is None else group.name}"
        bound.append(BoundGroup(group, name, latents, labels))
    names = [one.name for one in bound]
    if len(set(names)) < len(names):
        raise ValueError(f"Each group needs a name of its own. Received: {', '.join(names)}.")
    return tuple(bound)


def _check_head(group: GroupPenalty, configs: Sequence[Any], head: Any) -> None:
    if head is None:
        if group.of != CONTRIBUTION:
            raise ValueError(
                f"An alignment is of weights that read the SAE's state, and the head of the base reads its last "
                f"layer. Expected of='contribution', or a model with `feature_head=`. Received: of={group.of!r}."
            )
        return
    read, there = configs[head["sae"]], configs[group.sae]
    if group.of != CONTRIBUTION and group.sae != head["sae"]:
        raise ValueError(
            f"The feature head reads the state of SAE {head['sae']}, with which alone its weights align. "
            f"Received: of={group.of!r}, sae={group.sae!r}."
        )
    if group.of != CONTRIBUTION and group.labels is not None and head["hidden_size"]:
        raise ValueError(
            f"The weights that read the state are those of a hidden layer, which all labels share. Expected no "
            f"`labels`, or of='contribution'. Received: labels={group.labels!r}, hidden_size={head['hidden_size']!r}."
        )
    if there.layer is not None and read.layer is not None and there.layer > read.layer:
        raise ValueError(
            f"The feature head reads at {read.read_at}, before SAE {group.sae} at {there.read_at}: its features "
            f"reach no score. Received: sae={group.sae!r}."
        )


def _columns(labels: Sequence[int | str], label2id: Mapping[str, Any]) -> tuple[int, ...]:
    columns = tuple(label2id.get(label, -1) if isinstance(label, str) else label for label in labels)
    for label, column in zip(labels, columns, strict=True):
        if not 0 <= column < len(label2id):
            raise ValueError(
                f"Labels are {', '.join(label2id)} (0 to {len(label2id) - 1}). Received: labels={label!r}."
            )
    if len(set(columns)) < len(columns):
        raise ValueError(f"Two of the labels are one. Received: labels={list(labels)!r}.")
    return columns


def stored_groups(bound: Sequence[BoundGroup], configs: Sequence[Any]) -> list[dict[str, Any]]:
    """Groups as a config holds them: a feature that only annotations name goes by its number."""
    stored = []
    for one in bound:
        entry, values = configs[one.penalty.sae], one.penalty.to_dict()
        known = {*entry.concepts, *entry.feature_names.values()}
        pairs = zip(one.features, one.penalty.features, strict=True)
        values["features"] = [
            latent if isinstance(given, str) and given not in known else given for latent, given in pairs
        ]
        stored.append(values)
    return stored
