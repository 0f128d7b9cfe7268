"""The penalties of a model: which it has, what a forward pass needs of them, and their terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .call_options import source_of
from .call_record import CallRecord
from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import LossWeights
from .feature_penalty import BoundPenalty, FeaturePenalty, bind_penalties, penalties_from, stored_penalties
from .penalty_costs import PenaltyOfCall
from .penalty_losses import check_learnable, check_penalty_inputs, penalised_tokens
from .penalty_reference import reference_states
from .sae_bank import SaeBank


class PenaltyMixin:
    """The part of a model's public interface that says what fine-tuning must not do with features."""

    config: SaeConfig
    saes: SaeBank
    training: bool
    _penalised_tokens: tuple[str, ...] = ()  # which `over` a head can have
    _groups: tuple[Any, ...] = ()  # penalties of a classifier, `BoundGroup`

    def _init_penalties(self) -> None:
        self._penalties: tuple[BoundPenalty, ...] = ()
        self._penalties_source: Any = None
        self._penalties_learn: set[str] = set()
        self._reference: list[nn.Module] = []  # no submodule: it is neither saved nor trained
        self._freeze_saes()

    @property
    def feature_penalties(self) -> tuple[FeaturePenalty, ...]:
        """Terms of the loss on features; saved with the model. Assign a `FeaturePenalty`, a list, their dicts, or
        None. Where no loss of their own trains them, the SAEs are frozen by it.

        Raises:
            ValueError: an SAE or a feature that this model does not have, or tokens that this head does not know.
        """
        return tuple(one.penalty for one in self._bound_penalties())

    @feature_penalties.setter
    def feature_penalties(self, value: Any) -> None:
        self.config.feature_penalties = penalties_of_head(type(self), value, self.config.sae_configs)
        self._freeze_saes()

    def _freeze_saes(self) -> None:
        """SAEs that something holds a model to, unless a loss of their own trains them. Loading thaws everything."""
        if self._bound_penalties() and not LossWeights(**self.config.loss_weights).any_sae_term:
            self.saes.requires_grad_(False)

    def set_penalty_reference(self, reference: nn.Module | None) -> None:
        """Say what penalties with goal='reference' compare with.

        Args:
            reference: a model of the base's family, which is frozen and not saved with this one. None: this model
                without its LoRA.
        """
        inner: Any = getattr(reference, "lm", reference) if hasattr(reference, "saes") else reference
        if inner is not None and not (isinstance(inner, nn.Module) and hasattr(inner, "config")):
            raise TypeError(f"Expected a model of the base's family, or None. Received: {type(reference).__name__}.")
        if inner is getattr(self, "lm", None) and inner is not None:
            raise ValueError(
                "The reference must be another model than the one that is trained: a copy of the base as it was, such "
                "as `copy.deepcopy(model.lm)` before training. Received: this model's own base."
            )
        self._reference = [] if inner is None else [inner.requires_grad_(False).eval()]

    def _bound_penalties(self) -> tuple[BoundPenalty, ...]:
        if torch.compiler.is_compiling():
            return self._penalties
        if self.config.feature_penalties is not self._penalties_source:  # it was set there
            penalties = penalties_from(self.config.feature_penalties)
            self._penalties = bind_penalties(penalties, self.config.sae_configs)
            self._penalties_source, self._penalties_learn = self.config.feature_penalties, set()
        return self._penalties

    def _penalties_of_call(
        self, inputs: Mapping[str, Any], token_labels: Tensor | None, mask: Any, *, with_labels: bool
    ) -> dict[int, tuple[PenaltyOfCall, ...]]:
        """SAE number -> penalties of a pass; none where there is no loss to add them to.

        Args:
            inputs: of the base. token_labels: (batch, seq). mask: `penalty_mask`.
            with_labels: whether the pass has labels of any kind.
        """
        bound = self._bound_penalties()
        trains = self.training and torch.is_grad_enabled()
        if not bound or not (with_labels or trains):
            return {}
        check_head([one.penalty for one in bound], type(self))
        source = source_of(inputs)
        check_penalty_inputs(bound, token_labels, mask, (source.shape[0], source.shape[1]))
        compared = {one.penalty.sae for one in bound if one.penalty.goal == "reference"}
        states = reference_states(self, compared, inputs) if compared else {}
        found: dict[int, list[PenaltyOfCall]] = {}
        for number, one in enumerate(bound):
            of_reference = states.get(one.penalty.sae) if one.penalty.goal == "reference" else None
            found.setdefault(one.penalty.sae, []).append(PenaltyOfCall(number, one, of_reference))
        return {sae: tuple(ones) for sae, ones in found.items()}

    def _penalty_terms(
        self,
        record: CallRecord | None,
        inputs: Mapping[str, Any],
        token_labels: Tensor | None,
        mask: Tensor | None,
        count: Any,
    ) -> dict[str, Tensor]:
        """Name -> term, (), without its weight.

        Args:
            count: LM labels in the whole accumulated batch; by default those of this one. Where there are no labels,
                or none in any batch, the tokens that count.
        """
        terms: dict[str, Tensor] = {}
        for one, costs in self._costs(record):
            tokens = penalised_tokens(one, costs.shape[1], inputs, token_labels, mask).to(costs)
            total, here = count, tokens.sum().clamp(min=1)
            if total is None:
                total = here if token_labels is None else (token_labels[:, 1:] != -100).sum()
            total = torch.as_tensor(total, device=here.device)
            terms[one.name] = (costs * tokens).sum() / torch.where(total == 0, here, total)
        return terms

    def _penalty_terms_by_text(
        self, record: CallRecord | None, inputs: Mapping[str, Any], labels: Tensor | None, mask: Any, count: Any
    ) -> dict[str, Tensor]:
        """Name -> term, (): means over texts of the mean over a text's tokens that count.

        Args:
            labels: of texts. count: how many the whole accumulated batch has.
        """
        terms: dict[str, Tensor] = {}
        for one, costs in self._costs(record):
            tokens = penalised_tokens(one, costs.shape[1], inputs, None, mask).to(costs)
            of_text = (costs * tokens).sum(-1) / tokens.sum(-1).clamp(min=1)
            known = torch.ones_like(of_text)
            if labels is not None:
                known = labels.ne(-100).reshape(len(labels), -1).sum(-1).to(of_text)
            terms[one.name] = (of_text * known).sum() / (known.sum().clamp(min=1) if count is None else count)
        return terms

    def _check_not_passed_by(self) -> None:
        """Raises a RuntimeError where the base is trained past this model's forward pass and its penalties."""
        if self._penalties and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "The base is trained past the forward pass of its model with SAEs, so the model's feature penalties "
                "are in no loss. Call the model, not its base. TRL's SFTTrainer (1.16) takes the base's last hidden "
                "state; make it `class OwnLoss(SFTTrainer): compute_loss = Trainer.compute_loss`. Without penalties: "
                "`model.feature_penalties = None`. Received: a call of the base."
            )

    def _costs(self, record: CallRecord | None) -> list[tuple[BoundPenalty, Tensor]]:
        """Each penalty that was reached, and its cost at each token, (batch, seq)."""
        if record is None:
            return []
        found = [(one, record.penalties[n]) for n, one in enumerate(self._penalties) if n in record.penalties]
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for one, costs in found:
                if one.penalty.weight:
                    check_learnable(one.name, costs, known=one.name in self._penalties_learn)
                    self._penalties_learn.add(one.name)
        return found

    @property
    def _penalty_weights(self) -> dict[str, float]:
        return {one.name: one.penalty.weight for one in (*self._penalties, *self._groups)}


def penalties_of_head(head: Any, value: Any, configs: Sequence[Any]) -> list[dict[str, Any]]:
    """What was given for the penalties of a model, as its config holds them.

    Args:
        head: class of the model. configs: of its SAEs.

    Raises:
        ValueError: an SAE or a feature that is not there, or tokens that this head does not know.
    """
    penalties = penalties_from(value)
    check_head(penalties, head)
    return stored_penalties(bind_penalties(penalties, configs), configs)


def check_head(penalties: Any, head: Any) -> None:
    """Raises a ValueError for penalties over tokens that a head's class knows nothing of."""
    for penalty in penalties:
        if not head._penalised_tokens:
            raise ValueError(
                f"{head.__name__} has no loss to add a penalty to. Use SaeForCausalLM or "
                f"SaeForSequenceClassification. Received: feature_penalties."
            )
        if penalty.over not in head._penalised_tokens:
            known = ", ".join(map(repr, head._penalised_tokens))
            raise ValueError(f"`over` of {head.__name__} must be one of {known}. Received: over={penalty.over!r}.")
