"""Whether a model that is trained against a frozen SAE still means what the SAE reads of it.

A penalty or a reward on a feature can be met by doing less, or more, of what the feature stands for, or by moving the
states to where the SAE no longer sees it. Read beside the feature are therefore probes that nothing was trained
against, and how well the SAE still reconstructs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..latents.diffmean import fit_diffmean
from ..latents.hidden_states import HiddenStateReader, kept_positions
from ..latents.settings import check_integers, check_numbers
from ..modeling.modeling_sae import SaePreTrainedModel
from .detection.metrics import auroc, mean_by_text
from .reconstruction.metrics import ce_loss_recovered, measure_reconstruction


@dataclass(frozen=True)
class CanarySettings:
    """How a canary reads, and when it has fallen.

    Args:
        later: a place after the SAE, `layers.20.resid_post`, where another probe reads; by default half-way to the
            last block, where the SAE has a layer.
        second: (number of another SAE of the model, its feature for the same concept), read beside the probes.
        pre_activations: read the feature's pre-activation; else its activation.
        with_loss: measure too what share of the language model's loss the SAE's reconstruction recovers.
        max_length: tokens; longer texts are cut.
        tokens_per_batch: of a forward pass, padding counted.
        most_variance_lost: how much of the states' variance the SAE may explain less than before.
        most_auroc_lost: how much further the feature's AUROC may fall behind a new probe's.
        most_apart: how far the feature may move away from the probes, in units of the gap between the two kinds of
            text before training.
        seed: of which texts fit probes and which measure.
    """

    later: str | None = None
    second: tuple[int, int | str] | None = None
    pre_activations: bool = True
    with_loss: bool = True
    max_length: int = 128
    tokens_per_batch: int = 2048
    most_variance_lost: float = 0.1
    most_auroc_lost: float = 0.1
    most_apart: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, max_length=2, tokens_per_batch=1, seed=0)
        check_numbers(self, "most_variance_lost", "most_auroc_lost", "most_apart", least=0)


@dataclass(frozen=True)
class CanaryReading:
    """What a canary found of a model.

    explained_variance: by the SAE, of what it is to give for held-out texts: the states that it reads, or of a
    transcoder those that its MLP gives; None for a layer of a cross-layer transcoder or crosscoder, whose output is
    only a part. loss_recovered: see `ce_loss_recovered`; None where it is not measured, as of transcoders.
    presence: reader -> mean score of held-out texts with the concept, on a scale on which texts without it were 0 and
    texts with it 1 before training. The first reader is the feature.
    aurocs: reader -> how well its score tells the two kinds of held-out texts apart.
    new_aurocs: place -> the same of a probe fitted now, on other texts.
    sae_drift: relative change of what the SAE reads of the feature and writes for it; 0 for a frozen SAE.
    """

    explained_variance: float | None
    loss_recovered: float | None
    presence: dict[str, float] = field(default_factory=dict)
    aurocs: dict[str, float] = field(default_factory=dict)
    new_aurocs: dict[str, float] = field(default_factory=dict)
    sae_drift: float = 0.0

    def numbers(self) -> dict[str, float]:
        """All of it, flat, as logs have it."""
        found: dict[str, float] = {"canary_sae_drift": self.sae_drift}
        for name in ("explained_variance", "loss_recovered"):
            if (value := getattr(self, name)) is not None:
                found[f"canary_{name}"] = value
        for kind in ("presence", "aurocs", "new_aurocs"):
            found |= {f"canary_{kind}/{reader}": value for reader, value in getattr(self, kind).items()}
        return found


class _States(NamedTuple):
    """Of some texts: states of each token at each place, the text of each token, and each text's label."""

    hidden: dict[str, Tensor]
    text_index: Tensor
    n_texts: int

    def means(self, place: str) -> Tensor:
        return mean_by_text(self.hidden[place].cpu(), self.text_index, self.n_texts)


class _Probe(NamedTuple):
    """DiffMean between texts, scaled: 0 and 1 are the means of the two kinds that it was fitted on."""

    weight: Tensor
    bias: Tensor

    def scores(self, means: Tensor) -> Tensor:
        return means.float() @ self.weight + self.bias


FEATURE = "feature"


class FeatureCanary:
    """Reads a concept in a model by a feature, and beside it by readers that nothing is trained against.

    Make it before training, of the model as it is then; half of the texts fit its probes, half measure.

        canary = FeatureCanary(model, tokenizer, texts, labels, feature="toxic")
        ...                                  # train the model, with a penalty or a reward on that feature
        canary.fallen(canary.measure(model))   # reasons, none if it sings

    Args:
        model: with SAEs; it may be inside PEFT's.
        tokenizer: of the base.
        texts: with the concept and without it, eight of each or more, none of them trained on.
        labels: 1 where the concept is present, 0 where it is not.
        feature: the latent, or its name. sae: number of its SAE.

    Raises:
        ValueError: too few texts of a kind, labels that do not fit them, or an SAE or feature that is not there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        feature: int | str,
        sae: int = 0,
        settings: CanarySettings | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.sae = settings or CanarySettings(), tokenizer, sae
        inner = model_with_saes(model)
        entries = inner.config.sae_configs
        if not 0 <= sae < len(entries):
            raise ValueError(f"The model has {len(entries)} SAE(s), numbered from 0. Received: sae={sae!r}.")
        self.feature = entries[sae].resolve_feature(feature)
        self.readers = {FEATURE: (sae, self.feature)}
        if self.settings.second is not None:
            number, other = self.settings.second
            if not 0 <= number < len(entries):
                raise ValueError(f"The model has {len(entries)} SAE(s), numbered from 0. Received: second={number!r}.")
            self.readers["second feature"] = (number, entries[number].resolve_feature(other))
        self.probe_places = _probe_places(inner, sae, self.settings.later)
        self.texts, self.labels = list(texts), torch.as_tensor(list(labels))
        self.fitting, self.measuring = _halves(self.texts, self.labels, self.settings.seed)
        self.columns = _columns(inner.saes[sae], self.feature)
        fit = self._states(inner, self.fitting)
        of_fit = self.labels[self.fitting]
        self.probes = {place: _fit_probe(fit.means(place), of_fit) for place in self.probe_places}
        self.scales = {name: _scale(self._values(inner, fit, *which), of_fit) for name, which in self.readers.items()}
        self.before = self.measure(inner)

    @torch.no_grad()
    def measure(self, model: Any) -> CanaryReading:
        """What is found of the model as it is now."""
        inner = model_with_saes(model)
        with _evaluating(inner):
            states = self._states(inner, self.measuring)
            scores = self._scores(inner, states)
            fit = self._states(inner, self.fitting)
            labels = self.labels[self.measuring]
            new = {place: _fit_probe(fit.means(place), self.labels[self.fitting]) for place in self.probe_places}
            entry = inner.config.sae_configs[self.sae]
            variance = recovered = None
            if not entry.hooks_out:
                read, given = states.hidden[entry.read_at], states.hidden[entry.write_at]
                variance = 1 - measure_reconstruction(inner.saes[self.sae], [read], targets=[given])["fvu"]
            if entry.reconstructs and self.settings.with_loss and inner.can_generate():
                recovered = ce_loss_recovered(inner, list(self._batches(inner)), saes=[self.sae])["recovered"]
            now = _columns(inner.saes[self.sae], self.feature)
        return CanaryReading(
            variance,
            recovered,
            {name: float(values[labels == 1].mean()) for name, values in scores.items()},
            {name: auroc(values, labels) for name, values in scores.items()},
            {place: auroc(probe.scores(states.means(place)), labels) for place, probe in new.items()},
            float((now - self.columns).norm() / self.columns.norm()),
        )

    @torch.no_grad()
    def scores(self, model: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """Reader -> score of each text, (n,), on the scale of `CanaryReading.presence`. Of completions that are
        rewarded: a feature that rises while the probes stay is being pleased, not obeyed."""
        inner = model_with_saes(model)
        with _evaluating(inner):
            return self._scores(inner, self._states_of(inner, list(texts)))

    def fallen(self, reading: CanaryReading) -> list[str]:
        """Why the feature can no longer be trusted, a sentence each; none while it can."""
        limits, before, reasons = self.settings, self.before, []
        if reading.explained_variance is not None and before.explained_variance is not None:
            lost = before.explained_variance - reading.explained_variance
            if lost > limits.most_variance_lost:
                reasons.append(
                    f"The SAE explains {reading.explained_variance:.3f} of the variance of what it is to give for "
                    f"held-out texts, before it was {before.explained_variance:.3f}."
                )

        def behind(one: CanaryReading) -> float:
            return max(one.new_aurocs.values()) - one.aurocs[FEATURE]

        if behind(reading) - behind(before) > limits.most_auroc_lost:
            reasons.append(
                f"The feature tells held-out texts with the concept from others with AUROC "
                f"{reading.aurocs[FEATURE]:.3f}, a new probe on the same states with "
                f"{max(reading.new_aurocs.values()):.3f}."
            )
        reader, apart = moved_apart(before.presence, reading.presence)
        if apart > limits.most_apart:
            moved = {name: reading.presence[name] - before.presence[name] for name in (FEATURE, reader)}
            reasons.append(
                f"In texts with the concept the feature moved by {moved[FEATURE]:+.2f} gaps, {reader} by "
                f"{moved[reader]:+.2f}: what the SAE reads is not what the states say."
            )
        return reasons

    # -- reading -----------------------------------------------------------------------------------------------------

    def _states(self, model: Any, which: Tensor) -> _States:
        return self._states_of(model, [self.texts[i] for i in which.tolist()])

    def _states_of(self, model: Any, texts: list[str]) -> _States:
        rows = self._ids(texts)
        keep = [kept_positions(row) for row in rows]
        if short := [text for text, kept in zip(texts, keep, strict=True) if not len(kept)]:
            raise ValueError(
                f"Every text needs two tokens or more. Received: {len(short)} shorter ones, {short[0]!r}."
            )
        entries = model.config.sae_configs
        own = entries[self.sae]
        given = [] if own.hooks_out else [own.write_at]  # what it has to give
        places = dict.fromkeys([*(entries[n].read_at for n, _ in self.readers.values()), *given, *self.probe_places])
        reader = HiddenStateReader(model.lm, list(places), config=model.config)
        hidden = reader.read(rows, keep, dtype=torch.float32, tokens_at_once=self.settings.tokens_per_batch)
        index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(kept) for kept in keep]))
        return _States(hidden, index, len(rows))

    def _ids(self, texts: list[str]) -> list[Tensor]:
        found = self.tokenizer(texts, truncation=True, max_length=self.settings.max_length)["input_ids"]
        return [torch.tensor(row) for row in found]

    def _batches(self, model: Any) -> Iterator[Mapping[str, Tensor]]:
        rows = self._ids([self.texts[i] for i in self.measuring.tolist()])
        at_once = max(1, self.settings.tokens_per_batch // max(len(row) for row in rows))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            lengths = torch.tensor([len(row) for row in part])
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            yield {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}

    @torch.no_grad()
    def _values(self, model: Any, states: _States, sae: int, feature: int) -> Tensor:
        """Mean of a latent over each text's tokens, (n_texts,)."""
        module = model.saes[sae]
        hidden = states.hidden[model.config.sae_configs[sae].read_at].to(module.device)
        column = torch.tensor([feature], device=module.device)
        read = module.encode_pre_acts if self.settings.pre_activations else module.encode_selected
        values = torch.cat([read(part, column)[:, 0].cpu() for part in hidden.split(4096)])
        return mean_by_text(values, states.text_index, states.n_texts)

    def _scores(self, model: Any, states: _States) -> dict[str, Tensor]:
        found = {}
        for name, which in self.readers.items():
            low, gap = self.scales[name]
            found[name] = (self._values(model, states, *which) - low) / gap
        for place, probe in self.probes.items():
            found[f"probe at {place}"] = probe.scores(states.means(place))
        return found


def moved_apart(before: Mapping[str, float], now: Mapping[str, float]) -> tuple[str, float]:
    """Of two readings of `presence`, which reader has moved least beside the feature, and how far that is from what
    the feature has moved, in gaps."""
    moved = {name: now[name] - before[name] for name in now}
    least = min((name for name in moved if name != FEATURE), key=lambda name: abs(moved[name]))
    return least, abs(moved[FEATURE] - moved[least])


def model_with_saes(model: Any) -> Any:
    """The model with SAEs that this one is, or that PEFT and others have inside."""
    found = [module for module in model.modules() if isinstance(module, SaePreTrainedModel)]
    if not found:
        raise ValueError(f"A canary reads a model with SAEs. Received: {type(model).__name__}.")
    return found[0]


def _probe_places(model: Any, sae: int, later: str | None) -> list[str]:
    entry = model.config.sae_configs[sae]
    if later is None and entry.layer is not None:
        last = model.config.get_text_config().get_text_config().num_hidden_layers - 1
        later = f"layers.{(entry.layer + last + 1) // 2}.resid_post"
    return list(dict.fromkeys([entry.read_at] + ([] if later is None else [later])))


def _halves(texts: list[str], labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the texts that fit and of those that measure, half of each kind."""
    counts = [int((labels == kind).sum()) for kind in (0, 1)]
    if len(texts) != len(labels) or sum(counts) != len(labels) or min(counts) < 8:
        raise ValueError(
            f"Expected a label, 0 or 1, for each text, and eight texts or more of each kind. Received: {len(texts)} "
            f"texts, {counts[0]} labels 0 and {counts[1]} labels 1 of {len(labels)}."
        )
    generator, halves = torch.Generator().manual_seed(seed), ([], [])
    for kind in (0, 1):
        of_kind = (labels == kind).nonzero()[:, 0]
        of_kind = of_kind[torch.randperm(len(of_kind), generator=generator)]
        for half, part in zip(halves, of_kind.tensor_split(2), strict=True):
            half.append(part)
    fitting, measuring = (torch.cat(half).sort().values for half in halves)
    return fitting, measuring


def _fit_probe(means: Tensor, labels: Tensor) -> _Probe:
    direction = fit_diffmean(means, labels)
    low, gap = _scale(means.float() @ direction, labels)
    return _Probe(direction / gap, torch.tensor(-low / gap))


def _scale(values: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean of texts without the concept, and how far that of texts with it is away.

    Raises:
        ValueError: they do not differ, so that nothing can be read.
    """
    low, high = (float(values[labels == kind].mean()) for kind in (0, 1))
    if not high != low:
        raise ValueError(f"The two kinds of text must differ in what is read of them. Received: {low} for both.")
    return low, high - low


def _columns(sae: Any, feature: int) -> Tensor:
    """What the encoder reads of a feature and the decoder writes for it, by the SAE's own mathematics."""
    with torch.no_grad():
        every = torch.eye(sae.config.d_in, device=sae.device)
        read = sae.alignment(every, torch.tensor([feature], device=sae.device), "encoder")[:, 0]
        return torch.cat([read.cpu().float(), sae.W_dec[feature].detach().cpu().float()])


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
