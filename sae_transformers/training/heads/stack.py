"""Heads that train side by side: stacked parameters, one batched product for all, and what each run has of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.classification import f1_scores, pairwise_accuracy, predictions
from ...evaluation.detection.metrics import auroc
from .data import HeadData
from .losses import LEGACY_CLASS_WEIGHTS, StackedLosses, UnintendedRows
from .settings import HeadSettings

BETAS, EPS = (0.9, 0.999), 1e-8
ONE_THREAD_BELOW = 1 << 22  # numbers in a batch of all runs


class Run:
    """What belongs to one run alone: its rows, generators, patience and best parameters."""

    def __init__(self, place: int, settings: HeadSettings, seed: int) -> None:
        self.place, self.settings, self.seed = place, settings, seed
        self.offset, self.train, self.validation = 0, torch.empty(0), torch.empty(0)
        self.batches = torch.Generator().manual_seed(seed)
        self.drops = torch.Generator().manual_seed(seed)
        self.order: Tensor | None = None
        self.patience = Patience(settings)
        self.history: list[dict[str, float]] = []
        self.best: list[Tensor] = []

    def next_order(self) -> Tensor:
        if self.order is None or (self.settings.reshuffle and not self.settings.legacy):
            self.order = self.train[torch.randperm(len(self.train), generator=self.batches)]
        return self.order


class Patience:
    """When a run improves, decays or stops.

    After a decay the learning rate is base * decay^n for good. With `legacy` it is that for one batch and then base
    again: in SelfReg's code a second scheduler resets it.
    """

    def __init__(self, settings: HeadSettings) -> None:
        self.settings, self.left, self.decays = settings, settings.patience, 0
        self.best, self.best_epoch, self.just_decayed = -math.inf, 0, False

    def learning_rate(self, batch: int) -> float:
        """Of a batch, counted from 0 in its epoch."""
        base, decayed = self.settings.learning_rate, self.settings.learning_rate * self.settings.decay**self.decays
        if self.settings.legacy:
            return decayed if self.just_decayed and batch == 0 else base
        return decayed

    def judge(self, epoch: int, score: float) -> str:
        """`best`, `wait`, `decay` (go back to the best epoch) or `stop`."""
        self.just_decayed = False
        if self.settings.method == "overfit":
            self.best, self.best_epoch = score, epoch
            return "stop" if epoch == self.settings.total_epochs else "best"
        if score > self.best + self.settings.min_improvement:
            self.best, self.best_epoch, self.left = score, epoch, self.settings.patience
            verdict = "best"
        else:
            self.left -= 1
            verdict = "wait"
            if not self.left:
                verdict = "stop" if self.decays == self.settings.max_decays else "decay"
        if verdict == "decay":
            self.decays, self.left, self.just_decayed = self.decays + 1, self.settings.patience, True
        return verdict


class HeadStack:
    """Runs of one shape, trained together."""

    def __init__(
        self,
        data: HeadData,
        bank: Tensor,
        runs: list[Run],
        penalized: Sequence[UnintendedRows],
        report: Callable[[int, dict[str, float]], Any] | None,
    ) -> None:
        self.data, self.bank, self.runs, self.penalized, self.report = data, bank, runs, penalized, report
        self.width = runs[0].settings.hidden_size
        drawn = [self._initial(run.seed) for run in runs]
        self.parameters = [torch.stack(same).requires_grad_() for same in zip(*drawn, strict=True)]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0
        self._settle()

    def _initial(self, seed: int) -> list[Tensor]:
        """Layers as `torch.nn.Linear` draws them: uniform within 1 / sqrt(inputs)."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [(self.data.n_outputs, self.data.width)]
        if self.width is not None:
            sizes = [(self.width, self.data.width), (self.data.n_outputs, self.width)]
        drawn = []
        for n_out, n_in in sizes:
            for shape in ((n_out, n_in), (n_out,)):
                values = torch.rand(shape, generator=generator, dtype=self.bank.dtype)
                drawn.append(((2 * values - 1) / math.sqrt(n_in)).to(self.bank.device))
        return drawn

    def _settle(self) -> None:
        settings = [run.settings for run in self.runs]
        outputs = self.data.n_outputs
        self.losses = StackedLosses(settings, self.data.objective, self.bank[:0], outputs, self.penalized)
        self.dropped = [i for i, one in enumerate(settings) if one.method == "dropout" and one.dropout]

    def train(self) -> None:
        """Until every run has stopped."""
        size = len(self.runs) * self.runs[0].settings.batch_size * self.bank[0].numel() * (self.width or 1)
        with _one_thread_if(size < ONE_THREAD_BELOW):
            self._train()

    def _train(self) -> None:
        epoch = 0
        while self.runs:
            epoch += 1
            losses = self._epoch()
            keep = []
            for i, run in enumerate(self.runs):
                if not math.isfinite(losses[i]):
                    raise ValueError(
                        f"The loss must stay finite; lower `learning_rate`. "
                        f"Received: loss={losses[i]!r} in epoch {epoch} of run {run.place}, {run.settings!r}."
                    )
                score = self._score(i)
                rate = run.patience.learning_rate(1)
                run.history.append({"epoch": epoch, "loss": losses[i], "score": score, "learning_rate": rate})
                verdict = run.patience.judge(epoch, score)
                if self.report is not None:
                    self.report(run.place, dict(run.history[-1]))
                if run.patience.best_epoch == epoch:
                    run.best = [p[i].detach().clone() for p in self.parameters]
                elif verdict == "decay":
                    with torch.no_grad():
                        for p, best in zip(self.parameters, run.best, strict=True):
                            p[i].copy_(best)
                if verdict != "stop" and epoch < run.settings.total_epochs:
                    keep.append(i)
            if len(keep) < len(self.runs):
                self._keep(keep)

    def _keep(self, places: list[int]) -> None:
        self.runs = [self.runs[i] for i in places]
        index = torch.tensor(places, dtype=torch.long, device=self.bank.device)
        self.parameters = [p.detach()[index].requires_grad_() for p in self.parameters]
        self.moments = [(first[index], second[index]) for first, second in self.moments]
        if self.runs:
            self._settle()

    def _epoch(self) -> list[float]:
        """One pass over each run's texts; the mean loss of its batches."""
        order = torch.stack([run.next_order() for run in self.runs]).to(self.bank.device)  # (r, n_train)
        offsets = torch.tensor([run.offset for run in self.runs], device=self.bank.device)[:, None]
        size = self.runs[0].settings.batch_size
        total, count = order.new_zeros(len(self.runs), dtype=torch.float64), 0
        rates = [[run.patience.learning_rate(batch) for run in self.runs] for batch in (0, 1)]
        rates = self.bank.new_tensor(rates)
        for start in range(0, order.shape[1], size):
            picked = order[:, start : start + size]
            x = self.bank.index_select(0, (picked + offsets).reshape(-1)).view(*picked.shape, *self.bank.shape[1:])
            self._drop(x)
            targets = None if self.data.targets is None else self.data.targets[picked]
            loss = self.losses.task(self._forward(x), targets)
            loss = loss + self.losses.regularizers(self.parameters[::2], self.parameters[1::2])
            self._step(torch.autograd.grad(loss.sum(), self.parameters), rates[min(count, 1)])
            total += loss.detach()
            count += 1
        return (total / count).tolist()

    def _drop(self, x: Tensor) -> None:
        """Dropout on the states of the runs that have it, in place, each from its own generator."""
        for i in self.dropped:
            share = self.runs[i].settings.dropout
            kept = torch.empty(x[i].shape, dtype=x.dtype).bernoulli_(1 - share, generator=self.runs[i].drops)
            x[i].mul_(kept.to(x.device)).div_(1 - share)

    def _forward(self, x: Tensor) -> Tensor:
        """Logits (r, B, n_out), of pairs (r, B, 2), of states (r, B, d) or (r, B, 2, d)."""
        flat = x.flatten(1, -2)
        if self.width is not None:
            flat = _affine(flat, *self.parameters[:2]).relu()
        scores = _affine(flat, *self.parameters[-2:])
        return scores.view(x.shape[:-1]) if x.ndim == 4 else scores

    @torch.no_grad()
    def _step(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """AdamW (https://huggingface.co/papers/1711.05101, algorithm 2) without weight decay; `rates` is (r,)."""
        self.steps += 1
        first_scale, second_scale = (1 - beta**self.steps for beta in BETAS)
        for p, (first, second), gradient in zip(self.parameters, self.moments, gradients, strict=True):
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (rates / first_scale).view(-1, *[1] * (p.ndim - 1))
            p.sub_(size * first / (second.sqrt() / math.sqrt(second_scale) + EPS))

    @torch.no_grad()
    def _score(self, place: int) -> float:
        run, data = self.runs[place], self.data
        x = self.bank[run.validation + run.offset]
        if self.width is not None:
            x = F.linear(x, self.parameters[0][place], self.parameters[1][place]).relu()
        logits = F.linear(x, self.parameters[-2][place], self.parameters[-1][place])
        targets = None if data.targets is None else data.targets[run.validation]
        return selection_score(logits, targets, data.objective, run.settings)


def selection_score(logits: Tensor, targets: Tensor | None, objective: str, settings: HeadSettings) -> float:
    """Validation score of an epoch, `settings.select_by`, higher is better.

    Args:
        logits: (n, n_out), of pairs (n, 2, 1).
        targets: as `StackedLosses.task` has them, without runs.
    """
    if objective == "pairwise" or targets is None:
        chosen, rejected = logits[:, 0, 0], logits[:, 1, 0]
        if settings.select_by == "auroc":
            labels = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)])
            return auroc(torch.cat([chosen, rejected]), labels)
        return pairwise_accuracy(chosen, rejected)
    if objective == "multi_class":
        if settings.select_by == "auroc":
            share = logits.double().softmax(-1)
            return sum(auroc(share[:, c], (targets == c).long()) for c in range(share.shape[1])) / share.shape[1]
        columns = [(logits.argmax(-1), targets)]
    else:
        wanted = targets.view(len(targets), -1).long()
        if settings.select_by == "auroc":
            return sum(auroc(logits[:, c], wanted[:, c]) for c in range(logits.shape[1])) / logits.shape[1]
        guessed = predictions(logits, objective)
        columns = [(guessed[:, c], wanted[:, c]) for c in range(logits.shape[1])]
    if settings.select_by == "accuracy":
        return sum(float((guess == goal).double().mean()) for guess, goal in columns) / len(columns)
    if objective == "multi_class":
        scores = f1_scores(*columns[0], logits.shape[1])
        if settings.legacy and len(scores) == len(LEGACY_CLASS_WEIGHTS):
            scores = scores[:-1]  # SelfReg's last class is `other`
        return float(scores.mean())
    both = torch.stack([f1_scores(guess, goal, 2) for guess, goal in columns])
    return float(both[:, 1].mean() if settings.select_by == "f1" or objective == "multi_label" else both.mean())


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(r, B, n_out). In this order of factors the product and its gradient are fastest."""
    return torch.baddbmm(bias[:, :, None], weight, x.transpose(1, 2)).transpose(1, 2)


@contextmanager
def _one_thread_if(small: bool) -> Iterator[None]:
    """Products of a few megabytes gain nothing from threads and, on a busy machine, lose much by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
