"""How well an SAE reconstructs: errors of its output, sparsity and use of its latents, and what the model loses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modeling import SparseAutoencoder, SparseAutoencoderConfig, SparseFeatures, Steering
from ...modeling.hook_points import find_hook_point
from ...modeling.sae_losses import normalized_mse as relative_errors
from ..journal import UNWATCHED, Watch
from .meter import ReconstructionMeter as ReconstructionMeter

ROWS = 4  # distributions of tokens that are compared at a time: what a CPU's nearest caches hold


def l0(latents: Tensor | SparseFeatures) -> float:
    """Mean number of active latents of a token, from (..., d_sae) latents or their sparse form."""
    values = latents if isinstance(latents, Tensor) else latents.values
    return float((values != 0).sum(-1).double().mean())


def fvu(target: Tensor, reconstruction: Tensor) -> float:
    """Fraction of variance unexplained: `sum |x - xh|^2 / sum |x - mean(x)|^2` over tokens; 1 - explained variance.

    Args:
        target, reconstruction: (n_tokens, d).

    Raises:
        ValueError: the target does not vary.
    """
    return _measured(target, reconstruction)["fvu"]


def normalized_mse(target: Tensor, reconstruction: Tensor) -> float:
    """Mean over tokens of `mean((xh - x)^2) / mean(x^2)`, what SCAR minimises.

    https://huggingface.co/papers/2411.07122, L_r. A target of zeros that is met counts 0.
    """
    return float(relative_errors(target.double(), reconstruction.double()).mean())


def cosine_similarity(target: Tensor, reconstruction: Tensor) -> float:
    """Mean over tokens of the cosine between target and reconstruction, (n_tokens, d) each."""
    return float(F.cosine_similarity(target.double(), reconstruction.double(), dim=-1).mean())


@torch.no_grad()
def measure_reconstruction(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    *,
    targets: Iterable[Tensor] | None = None,
    tokens_at_once: int = 2048,
) -> dict[str, float]:
    """`ReconstructionMeter.result` of an SAE.

    Args:
        batches: hidden states, (n_tokens, d_in) each. Leave out what the SAE was not made for (first tokens).
        targets: what a transcoder has to give for them, (n_tokens, d_out) each; by default the hidden states.
        tokens_at_once: of a forward pass.

    Raises:
        ValueError: a layer of a cross-layer transcoder or crosscoder, or a transcoder without targets.
    """
    if sae.config.hooks_out:
        raise ValueError(
            f"What is reconstructed is the sum over all layers of a cross-layer transcoder or crosscoder; "
            f"`cross_layer_outputs` gives it. Received: one layer, which reads {sae.config.read_at}."
        )
    if targets is None and not sae.config.reconstructs:
        raise ValueError(
            f"A transcoder gives another state than it reads. Expected `targets`, the states at "
            f"{sae.config.write_at}. Received: none."
        )
    meter = ReconstructionMeter(sae.config.d_sae)
    pairs = ((batch, batch) for batch in batches) if targets is None else zip(batches, targets, strict=True)
    for batch, target in pairs:
        for hidden, goal in zip(batch.split(tokens_at_once), target.split(tokens_at_once), strict=True):
            out = sae(hidden.to(sae.device, sae.dtype))
            meter.update(goal.to(sae.device), out.reconstruction, out.latents)
    return meter.result()


@torch.no_grad()
def ce_loss_recovered(
    model: Any, batches: Iterable[Mapping[str, Tensor]], *, saes: Sequence[int] = (0,), skip_first: int = 1
) -> dict[str, float]:
    """What the language model loses when SAEs stand in its path, against losing their sites altogether.

    recovered = (CE_zero - CE_sae) / (CE_zero - CE_base): 1 is as good as the base, 0 as bad as zeros at the site.

    Args:
        model: `SaeForCausalLM`.
        batches: `input_ids` (batch, seq) and, where there is padding, `attention_mask`; kept for a second pass.
        saes: numbers of the SAEs that are in place together.
        skip_first: first tokens of each text that stay as they are. The first is an outlier in norm that SAEs are
            seldom trained on.

    Returns:
        `ce_base`, `ce_sae`, `ce_zero`, `ce_mean` (the site's mean hidden state in its place), in nats a token;
        `recovered`, `recovered_from_mean` (with CE_mean for CE_zero); `tokens` predicted.

    Raises:
        ValueError: no token is predicted, an SAE writes elsewhere than it reads, or zeros at the sites change nothing.
    """
    batches = list(batches)
    means = site_means(model, batches, saes, skip_first)
    [losses] = replaced_losses(model, batches, [saes], means, skip_first=skip_first)
    tokens = int(losses.tokens.sum())
    found = {f"ce_{name}": float(sums.sum()) / tokens for name, sums in losses.ce.items()}
    for name, worst in (("recovered", "ce_zero"), ("recovered_from_mean", "ce_mean")):
        lost = found[worst] - found["ce_base"]
        if lost == 0:
            raise ValueError(f"Replacing the sites of SAEs {list(saes)} changes nothing. Received: {found}.")
        found[name] = (found[worst] - found["ce_sae"]) / lost
    return {**found, "tokens": tokens}


@torch.no_grad()
def site_means(
    model: Any, batches: Iterable[Mapping[str, Tensor]], saes: Sequence[int], skip_first: int = 1
) -> dict[int, Tensor]:
    """Number of each of these SAEs -> mean hidden state (d_in,) float64 that it reads, over all tokens but first
    ones; zeros if there is none.

    Raises:
        ValueError: an SAE writes elsewhere than it reads.
    """
    means = {}
    for number in saes:
        config = model.saes[number].config
        if not config.reconstructs:
            raise ValueError(
                f"Expected SAEs that write where they read. Received: {config.read_at} and {config.write_at}."
            )
        means[number] = torch.zeros(config.d_out, dtype=torch.float64, device=model.device)
    count = 0
    for ids, mask in _on(model.device, batches):
        inputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            steering=False,
            output_sae_inputs=True,
            stop_at_last_sae=True,
        ).sae_inputs
        kept = mask.bool() & (mask.cumsum(-1) > skip_first)
        count += int(kept.sum())
        for number, mean in means.items():
            mean += inputs[number][kept].double().sum(0)
    return {number: mean / max(count, 1) for number, mean in means.items()}


class ReplacedLosses(NamedTuple):
    """Sums over the predicted tokens of n texts, in nats.

    tokens: (n,) float64, how many these are. ce: `base`, `sae`, `zero`, `mean` -> (n,) float64, cross-entropy.
    kl: `sae`, `zero`, `mean` -> (n,) float64, KL(base || with the replacement); empty if it was not asked for.
    """

    tokens: Tensor
    ce: dict[str, Tensor]
    kl: dict[str, Tensor]


@torch.no_grad()
def replaced_losses(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    sets: Sequence[Sequence[int]],
    means: Mapping[int, Tensor],
    *,
    skip_first: int = 1,
    count_first: bool = True,
    kl: bool = False,
    watch: Watch = UNWATCHED,
) -> list[ReplacedLosses]:
    """What next-token predictions lose, text by text, with SAEs, zeros or means at the sites.

    Args:
        model: `SaeForCausalLM`.
        batches: as for `ce_loss_recovered`; each row is a text.
        sets: numbers of the SAEs that are in place together, set by set; the base alone runs once for all sets.
        means: of `site_means`.
        skip_first: first tokens of each text that stay as they are.
        count_first: whether what these tokens predict counts too; nothing there can change.
        kl: whether to compare the whole distributions.
        watch: is told the number of texts of each batch, once a set; has the batches that were done, and gets the
            others.

    Returns:
        One of each set.

    Raises:
        ValueError: no token is predicted.
    """
    replaced = [_Replaced(model, tuple(saes), means, skip_first) for saes in sets]
    told = {"sets": [list(saes) for saes in sets], "skip_first": skip_first, "count_first": count_first, "kl": kl}
    told["means"] = [
        hashlib.sha256(mean.detach().double().cpu().numpy().tobytes()).hexdigest() for mean in means.values()
    ]
    parts: list[dict[str, Tensor]] = []
    for ids, mask in _on(model.device, batches):

        def losses(ids: Tensor = ids, mask: Tensor = mask) -> dict[str, Tensor]:
            predicted = _Predicted(model, ids, mask, skip_first=0 if count_first else skip_first)
            alone, base = predicted.base(held=kl)
            found = {"tokens": predicted.counts, "base": alone}
            for place, one in enumerate(replaced):
                some = one.losses(predicted, base)
                found |= {f"{place}.{name}": values for name, values in some.items()}
            return found

        parts.append(dict(watch.keep({"predicted": ids.tolist(), "mask": mask.tolist(), **told}, losses)))
        for _ in sets:
            watch.done(len(ids))
    if not parts or not any(float(part["tokens"].sum()) for part in parts):
        raise ValueError("Expected a text of two tokens or more. Received: no token to predict.")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return [
        ReplacedLosses(
            whole["tokens"],
            {"base": whole["base"], **{name: whole[f"{place}.ce.{name}"] for name in one.kinds}},
            {name: whole[f"{place}.kl.{name}"] for name in one.kinds} if kl else {},
        )
        for place, one in enumerate(replaced)
    ]


class _Predicted:
    """The next-token predictions of a batch that count: those from a token, and not from the first `skip_first`.

    counts: (batch,) float64, how many of each text.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, *, skip_first: int) -> None:
        seen = mask.cumsum(-1)
        counted = (mask[:, 1:] * mask[:, :-1]).bool() & (seen[:, :-1] > skip_first)
        self.model, self.goal, self.row = model, ids[:, 1:][counted], counted.nonzero()[:, 0].cpu()
        self.counted = F.pad(counted, (0, 1))  # (batch, seq): the last token predicts nothing that is known
        self.inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (seen - 1).clamp(min=0)}
        self.counts = counted.sum(1).double().cpu()

    def base(self, *, held: bool) -> tuple[Tensor, _Distributions | None]:
        """Cross-entropy of the model alone, summed over each text's predictions, (batch,) float64; its distributions
        if they are to be held."""
        logits = self._logits(False)
        found: list[Tensor] = []
        negentropy: list[Tensor] = []
        probabilities = torch.empty(logits.shape if held else (0,), dtype=torch.float32, device=logits.device)
        for part, goal, logs in self._log_probabilities(logits):
            found.append(logs.gather(-1, goal[:, None])[:, 0])
            if held:
                negentropy.append(torch.linalg.vecdot(torch.exp(logs, out=probabilities[part]), logs))
        whole = _Distributions(probabilities, _joined(negentropy)) if held else None
        return self._by_text(-_joined(found)), whole

    def losses(self, steering: Any, base: _Distributions | None) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of a steered pass and, with the base's distributions, KL(base || steered), summed over each
        text's predictions, (batch,) float64 each.

        With probabilities p of the base and q of the pass, KL is `sum(p log p) - sum(p log q)`: the first is known.
        """
        found: list[Tensor] = []
        crossed: list[Tensor] = []
        for part, goal, logs in self._log_probabilities(self._logits(steering)):
            found.append(logs.gather(-1, goal[:, None])[:, 0])
            if base is not None:
                crossed.append(torch.linalg.vecdot(base.probabilities[part], logs))
        divergence = None if base is None else self._by_text(base.negentropy - _joined(crossed))
        return self._by_text(-_joined(found)), divergence

    def _logits(self, steering: Any) -> Tensor:
        """(n, vocabulary) of the n predictions that count, in the model's dtype, from a forward pass."""
        with _head_on(self.model, self.counted) as narrowed:
            logits = self.model(**self.inputs, steering=steering, use_cache=False).logits
        return logits[0] if narrowed else logits[self.counted.to(logits.device)]

    def _log_probabilities(self, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few predictions at a time: which they are, what came, and log-probabilities (m, vocabulary) float32."""
        for start in range(0, len(logits), ROWS):
            part = slice(start, start + ROWS)
            yield part, self.goal[part].to(logits.device), logits[part].float().log_softmax(-1)

    def _by_text(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self.counts), dtype=torch.float64).index_add_(0, self.row, values.double().cpu())


@contextmanager
def _head_on(model: Any, counted: Tensor) -> Iterator[list[bool]]:
    """Within, the head of the model is given the states of these places alone, as one row: logits of padding, and of
    tokens that count for nothing, are not made.

    Args:
        counted: (batch, seq), whether the prediction of a place counts.

    Yields:
        A list that is empty until the head was given them so; where a head is none or is called in some other way, or
        an SAE stands at it, it stays empty and logits are those of all places.
    """
    head = model.get_output_embeddings()
    narrowed: list[bool] = []
    places = {place for config in model.config.sae_configs for place in (config.read_at, *config.writes_at)}
    at_head = any(find_hook_point(model.lm, model.config, place).module is head for place in places)

    def narrow(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != counted.shape:
            return None
        narrowed.append(True)
        return (args[0][counted.to(args[0].device)][None], *args[1:])

    if head is None or at_head or not counted.any():
        yield narrowed
        return
    handle = head.register_forward_pre_hook(narrow)
    try:
        yield narrowed
    finally:
        handle.remove()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([*parts]) if parts else torch.zeros(0)


class _Distributions(NamedTuple):
    """Of n predictions: probabilities, (n, vocabulary) float32; negentropy, sum(p log p), (n,) float32, in nats."""

    probabilities: Tensor
    negentropy: Tensor


class _Replaced:
    """Losses with SAEs, zeros and means at the sites of a set of SAEs."""

    def __init__(self, model: Any, saes: tuple[int, ...], means: Mapping[int, Tensor], skip_first: int) -> None:
        self.model, self.saes = model, saes
        self.steering = Steering(reconstruct=saes, positions=[(skip_first, None)])
        values = [means[number] for number in saes]
        self.kinds = {"sae": None, "zero": [torch.zeros_like(mean) for mean in values], "mean": values}

    def losses(self, predicted: _Predicted, base: _Distributions | None) -> dict[str, Tensor]:
        """`ce.` and, with the base's distributions, `kl.` and what stands at the sites -> (batch,)."""
        made: dict[str, Tensor] = {}
        for name, values in self.kinds.items():
            with _constants(self.model, self.saes, values) if values is not None else nullcontext():
                made[f"ce.{name}"], divergence = predicted.losses(self.steering, base)
            if divergence is not None:
                made[f"kl.{name}"] = divergence
        return made


@contextmanager
def _constants(model: Any, saes: Sequence[int], values: Sequence[Tensor]) -> Iterator[None]:
    """SAEs that give the same vector, (d_out,), whatever they read, in place of those of the model."""
    originals = {str(number): model.saes[number] for number in saes}
    try:
        for (name, sae), value in zip(originals.items(), values, strict=True):
            config = SparseAutoencoderConfig(d_in=sae.config.d_in, d_sae=1, apply_b_dec_to_input=False)
            constant = SparseAutoencoder(config, dtype=sae.dtype).to(sae.device)
            for parameter in constant.parameters():
                parameter.zero_()
            constant.b_dec.copy_(value)
            model.saes.add_module(name, constant)
        yield
    finally:
        for name, sae in originals.items():
            model.saes.add_module(name, sae)


def _on(device: torch.device, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask")
        yield ids, torch.ones_like(ids) if mask is None else mask.to(device)


def _measured(target: Tensor, reconstruction: Tensor) -> dict[str, float]:
    meter = ReconstructionMeter()
    meter.update(target, reconstruction)
    return meter.result()
