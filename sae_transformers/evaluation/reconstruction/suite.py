"""The suite `reconstruction`: what SAEs keep of the hidden states they read, and what the model loses with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...latents.context import reading_length
from ...latents.settings import ReadingSettings
from ...latents.text_latents import TextBatch, batches_of, text_ids
from ..intervals import BOOTSTRAP, percentiles, resample_counts
from ..method_ids import MethodId, baseline_method
from ..results import Measurement, SuiteResult, with_methods
from ..settings import BootstrapSettings
from ..suites.settings import BOOTSTRAP as BOOTSTRAP_SETTINGS
from ..suites.settings import READING
from .metrics import ReplacedLosses, replaced_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM

LATENTS_AT_ONCE = 1 << 24  # of a forward pass of an SAE whose latents are dense: 64 MiB of float32
TOKEN_SUMS = ("tokens", "squared_error", "relative_error", "cosine", "active", "squares")


@torch.no_grad()
def reconstruction_suite(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    reading: ReadingSettings = READING,
    bootstrap: BootstrapSettings = BOOTSTRAP_SETTINGS,
    *,
    report: Callable[[int], object] | None = None,
) -> SuiteResult:
    """Measure every SAE of a model on texts it was not trained on.

    fvu                  sum |x - xh|^2 / sum |x - mean(x)|^2 over tokens; explained_variance = 1 - fvu
    normalized_mse       mean of |x - xh|^2 / |x|^2;  cosine_similarity: mean of cos(x, xh)
    l0, dead_share       active latents of a token; share of latents that are active on no token
    ce_nats, kl_nats     of next-token predictions, method by method; KL(base || with the replacement)
    recovered            (CE_zero - CE_sae) / (CE_zero - CE_base), zeros at the SAE's place being the worst
    recovered_from_mean  the same with the mean hidden state in place of zeros

    Methods are `SAE 0`, `zeros at SAE 0`, `mean at SAE 0`, ..., and `none`, the base alone; with several SAEs also
    `all SAEs` in place together.

    Args:
        model: a `SaeForCausalLM`; it runs without steering.
        tokenizer: of the base.
        texts: two or more; those without a token to predict after the first ones are left out.
        reading: the first tokens of each text are neither reconstructed nor counted: the first is an outlier in norm
            that SAEs are seldom made for. Twice (tokens_per_batch, vocabulary) float32 is held.
        bootstrap: over texts.
        report: called with the number of texts of each batch, once a pass: a pass for the states, one for each SAE,
            and one for all together.

    Raises:
        ValueError: fewer than two texts of sufficient length, no SAE that writes where it reads, or hidden states that
            do not vary.
    """
    start = time.perf_counter()
    max_length, skip_first = reading_length(model, reading.max_length, 256), reading.skip_first
    configs = model.config.sae_configs
    measured = [i for i, config in enumerate(configs) if config.read_at == config.write_at]
    if not measured:
        raise ValueError(f"Expected an SAE that writes where it reads. Received: {len(configs)} SAEs, none such.")
    rows, kept = text_ids(model, tokenizer, texts, max_length=max_length, least=skip_first + 2)
    counts = resample_counts(len(rows), bootstrap.resamples, bootstrap.seed)
    batches = list(batches_of(rows, tokens_at_once=reading.tokens_per_batch))
    found: list[Measurement] = []
    read = _read_all(model, measured, batches, len(rows), skip_first, report)
    for number, sums in read.items():
        found += sums.measurements(MethodId("sae", f"SAE {number}", number), counts)
    inputs = [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches]
    order = torch.cat([batch.texts for batch in batches])
    sets = [[number] for number in measured] + ([measured] if len(measured) > 1 else [])
    each = replaced_losses(
        model, inputs, sets, {number: sums.mean() for number, sums in read.items()},
        skip_first=skip_first, count_first=False, kl=True, report=report,
    )  # fmt: skip
    for place, (members, losses) in enumerate(zip(sets, each, strict=True)):
        alone = members[0] if len(members) == 1 else None
        method = MethodId("sae", "all SAEs" if alone is None else f"SAE {alone}", alone)
        found += _loss_measurements(losses, method, counts[:, order], with_base=place == 0)
    notes = [
        f"Left as they are and not counted: the first tokens of each text ({skip_first}), and what is predicted "
        "from them.",
        "The mean hidden state, of variances and of mean-ablation, is that of the same texts.",
        "Dead: active on no token of these texts; more texts find more latents alive.",
    ]
    if len(kept) < len(texts):
        notes.append(f"{len(texts) - len(kept)} of {len(texts)} texts are too short and left out.")
    if others := [i for i in range(len(configs)) if i not in measured]:
        notes.append(f"SAEs {others} write elsewhere than they read (transcoders) and are not measured.")
    settings = {
        "max_length": max_length, "skip_first": skip_first, **asdict(bootstrap), "texts": len(rows),
    }  # fmt: skip
    return SuiteResult("reconstruction", settings, found, notes=notes, seconds=time.perf_counter() - start)


class _Sums:
    """Of one SAE and n texts: sums over each text's tokens, (n, 6) as `TOKEN_SUMS` names them and (n, d_in) of the
    hidden states less `origin`; and on how many tokens each latent was active."""

    def __init__(self, n: int, d_in: int, d_sae: int) -> None:
        self.columns = torch.zeros(n, len(TOKEN_SUMS), dtype=torch.float64)
        self.states = torch.zeros(n, d_in, dtype=torch.float64)
        self.active_tokens = torch.zeros(d_sae, dtype=torch.long)
        self.origin: Tensor | None = None

    def update(self, text: Tensor, target: Tensor, out: Any) -> None:
        """Count tokens: text (m,), target (m, d_in), what the SAE made of it."""
        target, made = target.double(), out.reconstruction.double()
        if self.origin is None:  # variances are taken from here: a large mean would cancel their digits
            self.origin = target.mean(0)
        moved = target - self.origin
        error = (made - target).square().sum(-1)
        latents = out.latents
        active = latents != 0 if isinstance(latents, Tensor) else latents.values != 0
        indices = active.nonzero()[:, -1] if isinstance(latents, Tensor) else latents.indices[active]
        self.active_tokens += torch.bincount(indices.cpu(), minlength=len(self.active_tokens))
        columns = [
            torch.ones_like(error), error,
            error / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny),
            F.cosine_similarity(target, made, dim=-1), active.sum(-1).double(), moved.square().sum(-1),
        ]  # fmt: skip
        self.columns.index_add_(0, text, torch.stack(columns, 1).cpu())
        self.states.index_add_(0, text, moved.cpu())

    def mean(self) -> Tensor:
        """The mean hidden state, (d_in,) float64, of one token or more."""
        moved = self.states.sum(0) / self.columns[:, 0].sum()
        return moved if self.origin is None else self.origin.cpu() + moved

    def figures(self, counts: Tensor) -> dict[str, Tensor]:
        """Each number for each row of counts (resamples, n), (resamples,)."""
        tokens, error, relative, cosine, active, squares = (counts @ self.columns).unbind(1)
        variance = squares - (counts @ self.states).square().sum(1) / tokens
        fvu = torch.where(variance > 0, error / variance, torch.nan)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "normalized_mse": relative / tokens,
            "cosine_similarity": cosine / tokens,
            "l0": active / tokens,
        }

    def measurements(self, method: MethodId, counts: Tensor) -> list[Measurement]:
        n, tokens = len(self.columns), int(self.columns[:, 0].sum())
        whole, drawn = self.figures(torch.ones(1, n, dtype=torch.float64)), self.figures(counts)
        if bool(whole["fvu"].isnan()):
            raise ValueError(
                f"Hidden states must vary from token to token. Received: {tokens} at {method.label} that do not."
            )
        better = {"fvu": "lower", "normalized_mse": "lower", "l0": ""}
        found = [
            _measured(metric, method.label, value, drawn[metric], tokens, better.get(metric, "higher"))
            for metric, value in whole.items()
        ]
        dead = float((self.active_tokens == 0).double().mean())
        found.append(Measurement("dead_share", dead, method.label, n=len(self.active_tokens), better="lower"))
        return with_methods(found, [method])


def _read_all(
    model: Any, saes: Sequence[int], batches: Sequence[TextBatch], n: int, skip_first: int, report: Any
) -> dict[int, _Sums]:
    """Number of each SAE -> its sums over all texts."""
    sums = {number: _Sums(n, model.saes[number].config.d_in, model.saes[number].config.d_sae) for number in saes}
    for batch in batches:
        inputs = model(
            input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
            output_sae_inputs=True, stop_at_last_sae=True,
        ).sae_inputs  # fmt: skip
        kept = batch.mask.bool() & (batch.mask.cumsum(-1) > skip_first)
        text = batch.texts[kept.nonzero()[:, 0]]
        for number, one in sums.items():
            sae, states = model.saes[number], inputs[number][kept.to(inputs[number].device)]
            at_once = max(1, LATENTS_AT_ONCE // sae.config.d_sae)
            for members, hidden in zip(text.split(at_once), states.split(at_once), strict=True):
                one.update(members, hidden, sae(hidden.to(sae.device, sae.dtype)))
        if report is not None:
            report(len(batch.texts))
    return sums


def _loss_measurements(
    losses: ReplacedLosses, method: MethodId, counts: Tensor, *, with_base: bool
) -> list[Measurement]:
    """Of one SAE, or all: cross-entropies, divergences and what is recovered. counts: as the losses are ordered."""
    tokens = int(losses.tokens.sum())
    ones = torch.ones(1, len(losses.tokens), dtype=torch.float64)
    methods = {
        "base": baseline_method("none", "none"),
        "sae": method,
        "zero": replace(method, kind="zeros", label=f"zeros at {method.label}", baseline=True),
        "mean": replace(method, kind="mean", label=f"mean at {method.label}", baseline=True),
    }

    def rates(sums: Tensor, counts: Tensor) -> Tensor:
        return (counts @ sums) / (counts @ losses.tokens)

    found = []
    for metric, kinds in (("ce_nats", losses.ce), ("kl_nats", losses.kl)):
        for kind, sums in kinds.items():
            if kind != "base" or with_base:
                drawn = rates(sums, counts)
                found.append(_measured(metric, methods[kind].label, rates(sums, ones), drawn, tokens, "lower"))
    for metric, worst in (("recovered", "zero"), ("recovered_from_mean", "mean")):

        def share(counts: Tensor, worst: str = worst) -> Tensor:
            base, sae, bad = (counts @ losses.ce[kind] for kind in ("base", "sae", worst))
            return torch.where(bad != base, (bad - sae) / (bad - base), torch.nan)

        note = "" if bool(share(ones).isfinite()) else "replacing the state changes no prediction"
        found.append(_measured(metric, method.label, share(ones), share(counts), tokens, "higher", note))
    return with_methods(found, methods.values())


def _measured(
    metric: str, method: str, value: Tensor, drawn: Tensor, n: int, better: str, note: str = ""
) -> Measurement:
    low, high = percentiles(drawn)
    return Measurement(
        metric, float(value), method, low=low, high=high, interval=BOOTSTRAP, n=n, better=better, note=note
    )
