"""Rewards by what a frozen model with SAEs reads of a completion: for TRL's GRPO, and for choosing among samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..evaluation.canary import FeatureCanary, model_with_saes, moved_apart
from ..latents.settings import check_choice, check_integers
from ..modeling.checked_values import finite_number
from ..modeling.feature_reading import POOLINGS, pooled

Text = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FeatureRewardSettings:
    """How completions are read.

    Args:
        pooling: of a completion's tokens: `mean`, `max` or `last`.
        pre_activations: score by the pre-activation, which differs among completions where the feature is off, too.
        weight: of the score; below 0 for a feature that is not wanted.
        empty: reward of a completion without a token that counts; by default the lowest of its batch, so that to say
            nothing never pays.
        tokens_per_batch: of a forward pass, padding counted.
        window: completions over which the canary is averaged; the first so many are what later ones are compared to.
        max_length: tokens of prompt and completion; of longer ones the beginning is cut.
    """

    pooling: str = "mean"
    pre_activations: bool = True
    weight: float = 1.0
    empty: float | None = None
    tokens_per_batch: int = 8192
    window: int = 64
    max_length: int = 2048

    def __post_init__(self) -> None:
        check_choice(self, "pooling", POOLINGS)
        check_integers(self, tokens_per_batch=1, window=2, max_length=2)
        finite_number("weight", self.weight)
        if self.empty is not None:
            finite_number("empty", self.empty)


class FeatureReward:
    """How strongly a feature answers to completions, as a reward function of TRL.

        reward = FeatureReward(reader, tokenizer, feature="kindness", canary=canary)
        GRPOTrainer(policy, reward_funcs=[reward], callbacks=[reward.callback], ...)

    Probes on features as rewards are RLFR's (Goodfire, 2026). A direction or a linear probe is a feature, too: of a
    `direction_sae` at its place.

    Args:
        model: the reader, with SAEs, which is not trained; inside PEFT's it is read without its adapters.
        tokenizer: of the reader.
        feature: a latent, or its name. sae: number of its SAE.
        canary: of the reader, for the same concept: the probes that completions must please as well. None turns it
            off, and then nothing tells a model that obeys from one that has found what the feature mistakes for it.

    Raises:
        ValueError: an SAE or feature that is not there, or a reader that is being trained.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        feature: int | str,
        canary: FeatureCanary | None,
        sae: int = 0,
        settings: FeatureRewardSettings | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sae, self.canary = model, tokenizer, sae, canary
        self.settings = settings or FeatureRewardSettings()
        self.reader = model_with_saes(model)
        entries = self.reader.config.sae_configs
        if not 0 <= sae < len(entries):
            raise ValueError(f"The model has {len(entries)} SAE(s), numbered from 0. Received: sae={sae!r}.")
        self.feature = entries[sae].resolve_feature(feature)
        trained = [name for name, p in self.reader.lm.named_parameters() if p.requires_grad]
        if trained and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"The reader must not be trained, or it would learn to read what it writes. Expected a frozen model, "
                f"such as `SaeForCausalLM.from_base` gives, beside the one that is trained. Received: {trained[0]} "
                f"requires a gradient."
            )
        self.__name__ = f"feature_{self.feature}_of_sae_{sae}"  # by which TRL logs it
        self.callback = RewardCallback(self)
        self.reasons: list[str] = []
        self._first: deque[dict[str, float]] = deque(maxlen=self.settings.window)
        self._last: deque[dict[str, float]] = deque(maxlen=self.settings.window)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **others: Any,
    ) -> list[float]:
        """The reward of each completion.

        Args:
            prompts, completions: n texts each, or conversations as TRL has them.
            completion_ids: of each its token ids, where they are known.

        Raises:
            ValueError: lengths differ, or no completion has a token that counts.
            RuntimeError: the canary has fallen, and `callback` is not in the trainer to stop it.
        """
        scores = self.scores(prompts, completions, completion_ids)
        if bool(scores.isnan().all()):
            raise ValueError(f"No completion has a token that counts. Received: {len(scores)} empty completions.")
        rewards = self.settings.weight * scores
        empty = self.settings.empty
        empty = float(rewards[~rewards.isnan()].min()) if empty is None else empty
        if self.canary is not None:
            self._heed(self.canary, completions)
        return rewards.nan_to_num(empty).tolist()

    def best(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]) -> list[int]:
        """Rejection sampling: of each prompt's completions the number of the one with the greatest reward."""
        if len(prompts) != len(completions) or not all(completions):
            raise ValueError(
                f"Expected completions of each prompt, one or more. Received: {len(prompts)} prompts, "
                f"{[len(some) for some in completions]} completions."
            )
        every = [(prompt, one) for prompt, some in zip(prompts, completions, strict=True) for one in some]
        rewards = torch.tensor(self([prompt for prompt, _ in every], [one for _, one in every]))
        return [int(part.argmax()) for part in rewards.split([len(some) for some in completions])]

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """What is read of each completion behind its prompt, (n,) float32; NaN where it has no token that counts.
        Special tokens do not count, nor does the first token of a text."""
        if not len(prompts) == len(completions) == len(completions if completion_ids is None else completion_ids):
            given = None if completion_ids is None else len(completion_ids)
            raise ValueError(
                f"Expected a prompt for each completion. Received: {len(prompts)} prompts, {len(completions)} "
                f"completions, {given} rows of ids."
            )
        rows = [
            self._ids(*row) for row in zip(prompts, completions, completion_ids or [None] * len(prompts), strict=True)
        ]
        found = torch.full((len(rows),), torch.nan)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
        was_training = self.reader.training
        self.reader.eval()
        try:
            with self._without_adapters():
                while order:
                    at_once = max(1, self.settings.tokens_per_batch // max(1, len(rows[order[0]][0])))
                    part, order = order[:at_once], order[at_once:]
                    if any(any(rows[row][1]) for row in part):
                        found[part] = self._read([rows[row] for row in part])
        finally:
            self.reader.train(was_training)
        return found

    def _without_adapters(self) -> Any:
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    def _ids(self, prompt: Text, completion: Text, ids: Sequence[int] | None) -> tuple[list[int], list[bool]]:
        """Token ids of a prompt and its completion, and which of them count."""
        if isinstance(prompt, str):
            before = self.tokenizer(prompt)["input_ids"]
        else:
            messages: Any = list(prompt)
            before = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        after = (
            list(ids) if ids is not None else self.tokenizer(plain(completion), add_special_tokens=False)["input_ids"]
        )
        special = set(self.tokenizer.all_special_ids)
        row = [*before, *after][-self.settings.max_length :]
        counts = ([False] * len(before) + [token not in special for token in after])[-self.settings.max_length :]
        return row, [counted and place > 0 for place, counted in enumerate(counts)]

    def _read(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        width, device = max(len(ids) for ids, _ in rows), self.reader.device
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=device)
        counted = torch.tensor([kept + [False] * (width - len(kept)) for _, kept in rows], device=device)
        inputs = self.reader.with_positions({"input_ids": ids, "attention_mask": mask})
        read = {self.sae: [self.feature]}
        options = {"pre_activations": self.settings.pre_activations, "steering": False, "stop_at_last_sae": True}
        values = self.reader(**inputs, features=read, **options).sae_features[self.sae][..., 0]
        return pooled(values.float(), counted.to(values.device), self.settings.pooling).per_text.cpu()

    # -- the canary --------------------------------------------------------------------------------------------------

    def _heed(self, canary: FeatureCanary, completions: Sequence[Text]) -> None:
        texts = [text for text in map(plain, completions) if len(self.tokenizer(text)["input_ids"]) > 1]
        if not texts:
            return
        with self._without_adapters():
            found = canary.scores(self.model, texts)
        for row in range(len(texts)):
            reading = {reader: float(values[row]) for reader, values in found.items()}
            (self._first if len(self._first) < self.settings.window else self._last).append(reading)
        if len(self._last) < self.settings.window:
            return
        before, now = _mean(self._first), _mean(self._last)
        reader, apart = moved_apart(before, now)
        self.reasons = []
        if apart > canary.settings.most_apart:
            self.reasons = [
                f"In the last {self.settings.window} completions the feature stands {apart:.2f} gaps further from "
                f"{reader} than in the first: what is rewarded is not what the states say."
            ]
            if not self.callback.attached:
                raise RuntimeError(
                    f"The canary has fallen: {self.reasons[0]} Give `reward.callback` to the trainer to have it stop "
                    f"there, or `canary=None` to go on without."
                )

    def forget(self) -> None:
        """Begin anew: what the canary read of another training's completions does not count."""
        self.reasons = []
        self._first.clear()
        self._last.clear()

    def numbers(self) -> dict[str, float]:
        """What the canary reads of the latest completions, as logs have it; empty without one."""
        latest = self._last or self._first
        return {f"canary_completions/{reader}": value for reader, value in _mean(latest).items()} if latest else {}


class RewardCallback(TrainerCallback):
    """Logs what a reward's canary reads, and ends the training when it has fallen."""

    def __init__(self, reward: FeatureReward) -> None:
        self.reward, self.attached = reward, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached = True
        self.reward.forget()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reward.reasons:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "train_runtime" not in logs:
            for record in (logs, *state.log_history[-1:]):
                record.update({name: round(value, 6) for name, value in self.reward.numbers().items()})


def plain(text: Text) -> str:
    """A completion as a text: of a conversation what its messages say."""
    return text if isinstance(text, str) else "\n".join(str(message["content"] or "") for message in text)


def _mean(readings: Sequence[dict[str, float]] | deque[dict[str, float]]) -> dict[str, float]:
    return {reader: sum(one[reader] for one in readings) / len(readings) for reader in readings[0]}
