"""A classifier with a feature head: states read once, methods compared on them, the best head put into the model, and
the base tuned behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.classification import classification_metrics
from ...evaluation.fairness.counterfactuals import attributed_reliance, feature_reliance, swap_sensitivity
from ...latents.progress import Keep, keep_nothing
from ...modeling import SparseAutoencoder
from ...modeling.feature_head import FeatureHead
from .data import HeadData, split_rows
from .erasure import Erasure
from .settings import HeadSettings, LoraSettings
from .train import TrainedHead, train_heads

Rows = dict[str, list[dict[str, float]]]


@torch.no_grad()
def read_texts(
    model: Any,
    ids: Sequence[Tensor],
    heads: Sequence[FeatureHead],
    *,
    tokens_at_once: int = 4096,
    report: Callable[[int], object] | None = None,
    keep: Keep = keep_nothing,
) -> list[Tensor]:
    """What heads would score of texts, in one pass of the model up to their SAE.

    Args:
        model: a `SaeForSequenceClassification` with a feature head.
        ids: (length,) int64 each.
        heads: each with its own pooling and removal, on the SAE of the model's head.
        tokens_at_once: of a forward pass, padding counted.
        report: called with the number of texts of each batch.
        keep: has the batches that were read, and gets the others.

    Returns:
        Of each head (n, d_in) float32 on the CPU.

    Raises:
        ValueError: a state is not finite.
    """
    place = model.feature_head.config.sae
    sae = model.saes[place]
    found = [torch.empty(len(ids), sae.config.d_in) for _ in heads]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    was_training = model.training
    model.eval()
    try:
        while order:
            size = max(1, tokens_at_once // len(ids[order[0]]))
            members, order = order[:size], order[size:]
            batch = padded([ids[i] for i in members], model.device)

            def read(batch: dict[str, Tensor] = batch) -> dict[str, Tensor]:
                hidden = model(**batch, output_sae_inputs=True).sae_inputs[place]
                some = (head.read(hidden, batch["attention_mask"], sae) for head in heads)
                return {str(number): states.float().cpu() for number, states in enumerate(some)}

            kept = keep({"pooled": [ids[i].tolist() for i in members]}, read)
            for number, states in enumerate(found):
                states[members] = kept[str(number)]
            if report is not None:
                report(len(members))
    finally:
        model.train(was_training)
    if not all(bool(torch.isfinite(states).all()) for states in found):
        raise ValueError("Hidden states must be finite. Received: some that are not; try float32.")
    return found


def padded(ids: Sequence[Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, longest), padded on the right with 0."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    rows = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
    return {"input_ids": rows.to(device), "attention_mask": mask.to(device)}


@dataclass(frozen=True, eq=False)
class Candidate:
    """What heads are trained on, and how.

    Args:
        settings: of the heads. What it says of removal is done in `states` already.
        states: part -> states (n, d_in), or (n, 2, d_in) of pairs, as the heads score them: `train`, and if there are
            any `test`; both sides of swaps that measure, `original` and `swapped`, and of those that choose,
            `chosen_original` and `chosen_swapped`.
        unintended: (m,) int64, the features that SelfReg's penalty is on. sae: whose they are.
        erasure: done to the states that heads learn from; the heads take it in, and score states as they are.
    """

    settings: HeadSettings
    states: Mapping[str, Tensor]
    unintended: Tensor | None = None
    sae: SparseAutoencoder | None = None
    erasure: Erasure | None = None


class Comparison:
    """Candidates and seeds on cached states: trained, measured, cross-validated if there is no test part.

    Args:
        labels: part -> labels of `train` and `test`, as `train_heads` takes them.
        sae, unintended, seen: how far heads rely on features (m,) int64 of an SAE is measured on states (n, d_in) as
            the model has them.
        folds: without a `test` part, a text is scored by heads that were trained on the other folds.
    """

    def __init__(
        self,
        labels: Mapping[str, Tensor | None],
        *,
        sae: SparseAutoencoder | None = None,
        seen: Tensor | None = None,
        unintended: Tensor | None = None,
        objective: str | None = None,
        folds: int = 5,
    ) -> None:
        self.labels, self.sae, self.seen, self.unintended = labels, sae, seen, unintended
        self.objective, self.folds = objective, folds

    def run(
        self,
        one: Candidate,
        seeds: Sequence[int],
        report: Callable[[int, dict[str, float]], Any] | None = None,
    ) -> tuple[list[dict[str, float]], TrainedHead]:
        """A row of measures a seed, and the head of the seed that did best on its validation texts.

        Cross-validated heads are measured on the texts they did not see; the head that is kept is trained on all.
        """
        states = one.states
        data = HeadData(states["train"], self.labels["train"], self.objective)
        if "test" not in states and not 2 <= self.folds <= len(data):
            raise ValueError(f"`folds` must be 2 to {len(data)}, the number of texts. Received: folds={self.folds!r}.")
        trained = self._train(one, seeds, states["train"], self.labels["train"], report)
        if "test" in states:
            logits, labels = [head.logits(states["test"]) for head in trained], self.labels["test"]
        else:
            logits, labels = self._out_of_fold(one, data, seeds), self.labels["train"]
        rows = [self._measure(head, scores, labels, states) for head, scores in zip(trained, logits, strict=True)]
        return rows, max(trained, key=lambda head: head.validation_score)

    def _train(
        self, one: Candidate, seeds: Sequence[int], states: Tensor, labels: Tensor | None, report: Any = None
    ) -> list[TrainedHead]:
        given = {} if one.unintended is None else {"sae": one.sae, "unintended": one.unintended}
        runs = [(replace(one.settings, removal="none"), seed) for seed in seeds]
        if one.erasure is None:
            return train_heads(states, labels, runs, objective=self.objective, report=report, **given)
        found = train_heads(one.erasure(states), labels, runs, objective=self.objective, report=report, **given)
        return [erased(head, one.erasure) for head in found]

    def _out_of_fold(self, one: Candidate, data: HeadData, seeds: Sequence[int]) -> list[Tensor]:
        """Of each seed the logits of all texts, each by heads that were trained without it."""
        states, labels = one.states["train"], self.labels["train"]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in seeds]
        left = torch.arange(len(states))
        for fold in range(self.folds):
            rest = HeadData(states[left], None if labels is None else labels[left], data.objective)
            share = 1 / (self.folds - fold)
            held = left if share == 1 else left[split_rows(rest, share, 0, "f1")[1]]
            mask = torch.ones(len(states), dtype=torch.bool).index_fill(0, held, False)
            heads = self._train(one, seeds, states[mask], None if labels is None else labels[mask])
            for seed, head in enumerate(heads):
                found[seed].append((held, head.logits(states[held])))
            left = left[~torch.isin(left, held)]
        result = []
        for parts in found:
            order = torch.cat([rows for rows, _ in parts]).argsort()
            result.append(torch.cat([logits for _, logits in parts])[order])
        return result

    def _measure(
        self, head: TrainedHead, logits: Tensor, labels: Tensor | None, states: Mapping[str, Tensor]
    ) -> dict[str, float]:
        found = dict(classification_metrics(logits, labels, head.objective))
        if "original" in states:
            found |= swap_measures(head.logits(states["original"]), head.logits(states["swapped"]))
        if self.sae is not None and self.seen is not None and self.unintended is not None:
            of = (self.seen, self.sae, self.unintended)
            one_of = head.objective == "multi_class"
            if head.hidden_weight is None:
                reliance = feature_reliance(head.weight, *of, one_of=one_of)
            else:
                reliance = attributed_reliance(head.scores, *of, one_of=one_of)
            found["reliance"] = reliance["contribution"]
        found["validation"] = head.validation_score
        if "chosen_original" in states:
            chosen = swap_measures(head.logits(states["chosen_original"]), head.logits(states["chosen_swapped"]))
            found["validation_delta"] = chosen["delta_in_std"]
        return found


def erased(head: TrainedHead, erasure: Erasure) -> TrainedHead:
    """The head that scores states as they are as the given one scores them erased."""
    if head.hidden_weight is None or head.hidden_bias is None:
        weight, bias = erasure.folded(head.weight, head.bias)
        return replace(head, weight=weight, bias=bias)
    weight, bias = erasure.folded(head.hidden_weight, head.hidden_bias)
    return replace(head, hidden_weight=weight, hidden_bias=bias)


def swap_measures(original: Tensor, swapped: Tensor) -> dict[str, float]:
    """How far logits move when an attribute is swapped: mean |change|, the same in standard deviations of the logits
    (a head with smaller logits is not a fairer one), and how often the decision flips."""
    swap = swap_sensitivity(original, swapped, resamples=1)
    change = swap["delta_logit"]["value"]
    spread = max(float(original.std(0).mean()), 1e-12)
    return {"delta_logit": change, "delta_in_std": change / spread, "flips": swap["flips"]["value"]}


@torch.no_grad()
def score_texts(
    model: Any, ids: Mapping[str, Sequence[Tensor]], labels: Tensor | None, objective: str
) -> dict[str, float]:
    """Measures of a classifier on the parts `test`, and `original` and `swapped`, those that are there."""
    logits = {}
    for part, rows in ids.items():
        scores = model.feature_head(read_texts(model, rows, [model.feature_head])[0].to(model.device)).float().cpu()
        logits[part] = scores[:, 0] if scores.shape[1] == 1 else scores
    found: dict[str, float] = {}
    if "test" in logits:
        test = logits["test"].view(-1, 2) if objective == "pairwise" else logits["test"]
        found |= classification_metrics(test, labels, objective)
    if "original" in logits:
        found |= swap_measures(logits["original"], logits["swapped"])
    return found


@torch.no_grad()
def put_head(model: Any, head: TrainedHead) -> None:
    """Give the model's feature head the weights of a trained one of its shape."""
    target = model.feature_head
    layers: list[tuple[Any, Tensor, Tensor | None]] = [(target.linear, head.weight, head.bias)]
    if head.hidden_weight is not None and target.hidden is not None:
        layers.append((target.hidden, head.hidden_weight, head.hidden_bias))
    for layer, weight, bias in layers:
        if bias is None or layer.weight.shape != weight.shape:
            raise ValueError(
                f"The model's head must be of shape {tuple(weight.shape)}. Received: {tuple(layer.weight.shape)}."
            )
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def tune_base(
    model: Any,
    ids: Sequence[Tensor],
    labels: Tensor | None,
    settings: LoraSettings,
    *,
    out: str | Path,
) -> Any:
    """Train low-rank changes of the base (LoRA, https://huggingface.co/papers/2106.09685) together with the head, by
    `Trainer`.

    Args:
        model: a `SaeForSequenceClassification` with a feature head.
        ids: (length,) int64 each; of pairs chosen and rejected in turn.
        labels: as `train_heads` takes them; None for pairs.
        settings: epochs, rank and weights.
        out: folder for `Trainer`.

    Returns:
        The model with the changes merged into the base, `weights_scope="full"`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model.config.loss_weights = {**model.config.loss_weights, "unintended_state": settings.state_weight}
    pairs = labels is None
    rows = [
        {"ids": ids[2 * i : 2 * i + 2], "labels": [1.0, 0.0]} if pairs else {"ids": ids[i : i + 1], "labels": [label]}
        for i, label in enumerate([0.0] * (len(ids) // 2) if labels is None else labels.tolist())
    ]
    dtype = torch.float if pairs or model.num_labels == 1 or (labels is not None and labels.ndim > 1) else torch.long

    def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        goals = torch.tensor([goal for row in batch for goal in row["labels"]], dtype=dtype)
        return {**padded([text for row in batch for text in row["ids"]]), "labels": goals}

    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        exclude_modules=r".*(saes|feature_head).*",
        modules_to_save=["feature_head"],
    )
    tuned = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=settings.lora_epochs,
        learning_rate=settings.lora_learning_rate,
        per_device_train_batch_size=settings.lora_batch_size,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        seed=settings.lora_seed,
        logging_steps=50,
        use_cpu=model.device.type == "cpu",
    )
    dataset: Any = rows
    Trainer(model=tuned, args=arguments, train_dataset=dataset, data_collator=collate).train()
    merged: Any = tuned.merge_and_unload()
    merged.config.weights_scope = "full"
    return merged.eval()
