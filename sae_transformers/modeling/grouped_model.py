"""The group penalties of a classifier: which it has, and their terms of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .call_options import SaeCallOptions, source_of
from .call_record import CallRecord
from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import LossWeights
from .feature_head import FeatureHeadConfig
from .features_in_graph import FeatureRemoval
from .group_penalty import CONTRIBUTION, BoundGroup, GroupPenalty, bind_groups, groups_from, stored_groups
from .penalised_model import penalties_of_head
from .penalty_losses import real_tokens

Without = Callable[[BoundGroup], Tensor]


class GroupMixin:
    """The part of a classifier's public interface that keeps its scores off groups of features."""

    config: SaeConfig
    saes: Any
    training: bool
    feature_head: Any
    _open_record: Any
    _run: Any
    _real_tokens: Any
    _takes_groups = True

    def _init_groups(self) -> None:
        self._groups: tuple[BoundGroup, ...] = ()
        self._groups_source: Any = None

    @property
    def group_penalties(self) -> tuple[GroupPenalty, ...]:
        """Terms of the loss on what groups of features do to the scores; saved with the model. Assign a
        `GroupPenalty`, a list, their dicts, or None. Where no loss of their own trains them, the SAEs are frozen by
        it.

        Raises:
            ValueError: an SAE, a feature or a label that this model does not have, or a quantity that its head has
                not.
        """
        return tuple(one.penalty for one in self._bound_groups())

    @group_penalties.setter
    def group_penalties(self, value: Any) -> None:
        self.config.group_penalties = stored_groups(self._bind(value), self.config.sae_configs)
        self._freeze_saes()

    def _bind(self, value: Any) -> tuple[BoundGroup, ...]:
        head, labels = self.config.feature_head, self.config.label2id
        return bind_groups(groups_from(value), self.config.sae_configs, head, labels)

    def _bound_groups(self) -> tuple[BoundGroup, ...]:
        if torch.compiler.is_compiling():
            return self._groups
        if self.config.group_penalties is not self._groups_source:  # it was set there
            self._groups = self._bind(self.config.group_penalties)
            self._groups_source = self.config.group_penalties
        return self._groups

    def _freeze_saes(self) -> None:
        super()._freeze_saes()  # pyright: ignore[reportAttributeAccessIssue]
        if self._bound_groups() and not LossWeights(**self.config.loss_weights).any_sae_term:
            self.saes.requires_grad_(False)

    def _draws(self, device: torch.device) -> SameDraws | None:
        """The random numbers of dropout, where a score has to be made again with the same ones."""
        return SameDraws(device) if self.training and self._bound_groups() else None

    def _group_terms(
        self, logits: Tensor, labels: Tensor | None, count: Any, without: Without | None
    ) -> dict[str, Tensor]:
        """Name -> term, (), without its weight; none where there is no loss to add it to.

        Args:
            logits: (batch, num_labels). labels: of texts. count: how many the whole accumulated batch has.
            without: the logits without a group; None where there are no texts to make them of.

        Raises:
            ValueError: a contribution without texts, or a term that no step can lower.
        """
        trains = self.training and torch.is_grad_enabled()
        terms: dict[str, Tensor] = {}
        if labels is None and not trains:
            return terms
        known = known_labels(labels, logits)
        total = known.sum().clamp(min=1) if count is None else count
        for one in self._bound_groups():
            penalty = one.penalty
            with torch.set_grad_enabled(torch.is_grad_enabled() and penalty.weight > 0):
                if penalty.of != CONTRIBUTION:
                    term = self._alignment(one) * known.sum() / total
                elif without is None:
                    raise ValueError(
                        f"A contribution is what a group's features add to the scores of texts. Expected texts, or "
                        f"of='decoder', which is of the head alone. Received: `pooled_states`, for {one.name}."
                    )
                else:
                    cost = (logits - without(one)).abs() ** penalty.power
                    cost = cost if one.labels is None else cost[:, list(one.labels)]
                    term = (cost.sum(-1) * known.to(cost)).sum() / total
            if trains and penalty.weight and not term.requires_grad:
                raise ValueError(
                    f"Nothing that is trained is in this penalty, so no step can lower it. Train the head, or the "
                    f"base by a LoRA or with weights_scope='full'. To measure it only, use weight=0, `model.eval()` "
                    f"or `torch.no_grad()`. Received: {one.name} without a gradient."
                )
            terms[one.name] = term
        return terms

    def _alignment(self, one: BoundGroup) -> Tensor:
        """`sum_i mean_j |S[i, j]|^power` of the feature head's weights that read the state, ()."""
        head, sae = self.feature_head, self.saes[one.penalty.sae]
        weights = (head.hidden or head.linear).weight  # (rows, d_in)
        weights = weights if one.labels is None else weights[list(one.labels)]
        features = torch.tensor(one.features, device=weights.device)
        aligned = sae.alignment(weights, features, one.penalty.of).to(weights.dtype)  # (rows, m)
        return (aligned.abs() ** one.penalty.power).mean(-1).sum()

    def _removal(self, one: BoundGroup, inputs: Mapping[str, Any]) -> FeatureRemoval:
        source = source_of(inputs)
        every = torch.ones(source.shape[:2], device=source.device)
        tokens = real_tokens(every, source.shape[1], inputs, one.penalty.skip_first)
        return FeatureRemoval(torch.tensor(one.features, device=source.device), tokens)

    def _passed_without(
        self, one: BoundGroup, options: SaeCallOptions, inputs: Mapping[str, Any], draws: SameDraws | None
    ) -> tuple[Any, CallRecord]:
        """What the base gives without a group, and the record of that pass; steered as the other one."""
        if options.edit_features is not None:
            raise ValueError(
                f"A contribution is measured by a pass without the group's features. Expected labels or "
                f"`edit_features`. Received: both, for {one.name}."
            )
        stopped = self.feature_head is not None
        asked = SaeCallOptions(
            steering=options.steering, steering_rows=options.steering_rows, steering_mask=options.steering_mask,
            edit_features={one.penalty.sae: self._removal(one, inputs)},
            output_sae_inputs=stopped, stop_at_last_sae=stopped,
        )  # fmt: skip
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        record = self._open_record(asked, inputs)
        with again(draws):
            return self._run(record, {**inputs, "return_dict": True}), record

    def _pooled_without(
        self,
        one: BoundGroup,
        hidden: Tensor,
        options: SaeCallOptions,
        inputs: Mapping[str, Any],
        draws: SameDraws | None,
    ) -> Tensor:
        """What a feature head scores without a group, (batch, d_in).

        Args:
            hidden: (batch, seq, d_in), what its SAE reads.
        """
        head = self.feature_head
        sae = self.saes[head.config.sae]
        if one.penalty.sae == head.config.sae:
            removal = self._removal(one, inputs)
            removed = sae.remove(hidden, removal.features.to(hidden.device), "own")
            hidden = torch.where(removal.tokens.to(hidden.device).bool()[..., None], removed.to(hidden.dtype), hidden)
        else:
            hidden = self._passed_without(one, options, inputs, draws)[1].inputs[head.config.sae]
        mask = self._real_tokens(inputs.get("input_ids"), inputs.get("attention_mask"))
        return head.read(hidden, mask, sae)

    def _scored_again(self, pooled: Tensor, draws: SameDraws | None) -> Tensor:
        """Logits (batch, num_labels) of other pooled states (batch, d_in), with the same dropout."""
        with again(draws):
            return self.feature_head(pooled)


def known_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    """How many known labels each text has, (batch,); 1 where none are given."""
    if labels is None:
        return logits.new_ones(len(logits))
    return labels.ne(-100).reshape(len(labels), -1).sum(-1).to(logits)


def given_penalties(
    head: Any, options: dict[str, Any], configs: Sequence[Any], feature_head: Any
) -> dict[str, list[dict[str, Any]]]:
    """`feature_penalties` and `group_penalties`, taken out of the options of a new model, as its config holds them.

    Args:
        head: class of the model. configs: of its SAEs. feature_head: settings or their dict, or None.

    Raises:
        ValueError: an SAE or a feature that is not there, or what this head does not know. Labels are looked up later.
    """
    features = penalties_of_head(head, options.pop("feature_penalties", None), configs)
    groups = groups_from(options.pop("group_penalties", None))
    if groups and not getattr(head, "_takes_groups", False):
        raise ValueError(
            f"{head.__name__} has no scores of texts. Expected SaeForSequenceClassification; `feature_penalties` are "
            f"for language models. Received: group_penalties."
        )
    settings = feature_head
    if isinstance(settings, Mapping):
        settings = FeatureHeadConfig.from_dict(settings)
    bound = bind_groups(groups, configs, None if settings is None else settings.to_dict(), None)
    return {"feature_penalties": features, "group_penalties": stored_groups(bound, configs)}


class SameDraws:
    """The random numbers that come next, to be drawn once more.

    Args:
        device: on which they are drawn, besides the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type in ("cpu", "meta") else device
        self._cpu = torch.get_rng_state()
        self._other = None if self._device is None else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """What is drawn inside is that; what is drawn afterwards, as if nothing had been drawn inside."""
        devices, kind = ([], "cuda") if self._device is None else ([self._device], self._device.type)
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(self._cpu)
            if self._device is not None:
                torch.get_device_module(self._device).set_rng_state(self._other, self._device)
            yield


@contextmanager
def again(draws: SameDraws | None) -> Iterator[None]:
    """The same draws where there are any."""
    if draws is None:
        yield
        return
    with draws.again():
        yield
