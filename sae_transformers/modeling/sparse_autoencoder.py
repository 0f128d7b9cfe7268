"""One sparse autoencoder: encode, decode, and its share of a model's forward pass.

    x      = normalise(hidden) - b_dec            (b_dec only where `apply_b_dec_to_input`)
    pre    = x @ W_enc + b_enc
    z      = act(pre)
    output = denormalise(z @ W_dec + b_dec)       (+ hidden @ W_skip.T for skip transcoders)

Shapes: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc (d_sae,), b_dec (d_out,), threshold (d_sae,) or ().
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import after_top_k, gated, jump_relu, top_k
from .call_record import CallRecord, SiteResult
from .configuration_sae import TOPK_ACTIVATIONS, SparseAutoencoderConfig
from .outputs import SparseAutoencoderOutput, SparseFeatures
from .steering_plan import SaePlan


class Normalized(NamedTuple):
    """A normalised input and how to undo it: `hidden ~ x * scale + mean`; None for what is not there."""

    x: Tensor
    scale: Tensor | float | None
    mean: Tensor | None


class Code(NamedTuple):
    """All latents of the tokens at hand, sparse for top-k activations and dense for the others.

    indices, values: (..., k), or None; dense: (..., d_sae), or None; pre_acts: (..., d_sae).
    """

    pre_acts: Tensor
    indices: Tensor | None
    values: Tensor | None
    dense: Tensor | None


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder (or transcoder). `config` says which one; see `SparseAutoencoderConfig`.

    Input shape: (..., d_in). Output shape: `SparseAutoencoderOutput`, reconstruction (..., d_out), latents (..., d_sae).

    All mathematics runs inside `forward`, public methods included, so that offloading and sharding hooks of the module see
    every use of its parameters.
    """

    def __init__(self, config: SparseAutoencoderConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        c = config

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype))

        if not c.tied:
            self.W_enc = new(c.d_in, c.d_sae)
        self.W_dec = new(c.d_sae, c.d_out)
        self.b_dec = new(c.d_out)
        if c.activation == "gated":
            self.b_gate, self.b_mag, self.r_mag = new(c.d_sae), new(c.d_sae), new(c.d_sae)
        else:
            self.b_enc = new(c.d_sae)
        if c.activation == "jumprelu":
            self.threshold = new(c.d_sae)
        elif c.activation == "batch_topk":
            self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        if c.skip_connection:
            self.W_skip = new(c.d_out, c.d_in)
        if c.apply_b_dec_to_input and c.d_out != c.d_in:
            raise ValueError(
                f"`apply_b_dec_to_input=True` needs d_out == d_in; transcoders set it False. "
                f"Received: d_in={c.d_in!r}, d_out={c.d_out!r}."
            )
        # Typical maximum of each latent; 0 where it is not known.
        self.register_buffer("feature_max", torch.zeros(c.d_sae, dtype=dtype))
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc":  # tied: the only case in which it is no parameter of its own
            return self.W_dec.T
        return super().__getattr__(name)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Unit-norm decoder rows at random, encoder their transpose, biases 0, thresholds 0.001."""
        nn.init.normal_(self.W_dec)
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))
        if not self.config.tied:
            if self.config.d_in == self.config.d_out:
                self.W_enc.copy_(self.W_dec.T)
            else:
                nn.init.normal_(self.W_enc, std=1 / math.sqrt(self.config.d_in))
        for name, parameter in self.named_parameters(recurse=False):
            if name not in ("W_enc", "W_dec"):
                nn.init.constant_(parameter, 1e-3 if name == "threshold" else 0.0)
        self.feature_max.zero_()
        if self.config.activation == "batch_topk":
            self.threshold.zero_()

    @torch.no_grad()
    def initialize_from_data(self, hidden: Tensor) -> None:
        """Start `b_dec` at the mean of normalised hidden states, (n_tokens, d_in)."""
        if self.config.d_in != self.config.d_out:
            raise ValueError("A transcoder's bias lives in its output; initialise it from that.")
        self.b_dec.copy_(self._normalize(hidden.to(self.W_dec)).x.mean(0))

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    # -- public mathematics ------------------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, task: str | CallRecord = "reconstruct", **options: Any) -> Any:
        """Reconstruct `hidden`, or do one of the tasks that the methods below name.

        Args:
            hidden: (..., d_in), any float dtype.
            task: "reconstruct", the default, gives a `SparseAutoencoderOutput`.
        """
        if isinstance(task, str):
            return getattr(self, f"_{task}")(hidden, **options)
        return self._serve(hidden, task, **options)

    def encode(self, hidden: Tensor) -> Tensor:
        """Latents (..., d_sae) of hidden states (..., d_in)."""
        return self(hidden, "encode")

    def encode_pre_acts(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """Pre-activations, (..., d_sae), or (..., m) of the latents `features` (m,). Gated SAEs: the gate's."""
        return self(hidden, "pre_acts", features=features)

    def encode_selected(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Latents (..., m) of the indices `features` (m,): only their encoder columns are used, unless the activation
        selects among all latents (top-k)."""
        return self(hidden, "selected", features=features)

    def encode_sparse(self, hidden: Tensor) -> SparseFeatures:
        """The active latents of each token."""
        return self(hidden, "sparse")

    def decode(self, latents: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`latents @ W_dec + b_dec`, denormalised, (..., d_out).

        A code does not carry its token's own mean and scale: where the SAE normalises per token (`layer_norm`,
        `constant_norm`) or has a skip connection, give the `hidden` (..., d_in) that was encoded. Without it the result is
        in the SAE's normalised units.
        """
        return self(latents, "decode", source=hidden)

    def losses(self, hidden: Tensor, concept_labels: Tensor | None = None, target: Tensor | None = None) -> dict:
        """The loss terms, each averaged over tokens, as scalars ().

        Args:
            hidden: (n_tokens, d_in).
            concept_labels: (n_tokens, n_concepts) in the order of `config.concepts`, 0 to 1, -100 where unknown.
            target: (n_tokens, d_out), what a transcoder must reconstruct; `hidden` by default.

        Returns:
            reconstruction: mean((xh-x)^2) / mean(x^2) per token (SCAR, https://huggingface.co/papers/2411.07122, L_r;
                an input of zeros counts as 0). sparsity: sum(|z| * ||W_dec||) / ||x||. conditioning: binary
                cross-entropy with logits of the concepts' pre-activations, summed over concepts; an unknown label adds 0.
        """
        return self(hidden, "loss_terms", concept_labels=concept_labels, target=target)

    # -- tasks, run inside forward -----------------------------------------------------------------------------------

    def _reconstruct(self, hidden: Tensor) -> SparseAutoencoderOutput:
        code, normalized = self._full_code(hidden)
        return SparseAutoencoderOutput(
            reconstruction=self._decode_code(code, normalized, hidden).to(hidden.dtype), latents=self._dense(code)
        )

    def _encode(self, hidden: Tensor) -> Tensor:
        return self._dense(self._full_code(hidden)[0])

    def _pre_acts(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        x = self._encoder_input(self._normalize(hidden.to(self.dtype)))
        return self._linear(x, features)[0]

    def _selected(self, hidden: Tensor, features: Tensor) -> Tensor:
        if self.config.activation in TOPK_ACTIVATIONS:
            return self._dense(self._full_code(hidden)[0])[..., features]
        return self._columns(self._normalize(hidden.to(self.dtype)), features)

    def _sparse(self, hidden: Tensor) -> SparseFeatures:
        return self._sparse_features(self._full_code(hidden)[0])

    def _decode(self, latents: Tensor, source: Tensor | None) -> Tensor:
        output = latents.to(self.dtype) @ self.W_dec + self.b_dec
        if source is None:
            return output / (self.config.output_scale or self.config.input_scale)
        output = self._denormalize(output, self._normalize(source.to(self.dtype)))
        return self._skip(output, source)

    def _loss_terms(self, hidden: Tensor, concept_labels: Tensor | None, target: Tensor | None) -> dict[str, Tensor]:
        names = ("reconstruction", "sparsity") + (("conditioning",) if concept_labels is not None else ())
        terms = self._token_losses(hidden, names, concept_labels, target)
        return {name: value.mean() for name, value in terms.items()}

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _normalize(self, hidden: Tensor) -> Normalized:
        kind = self.config.normalization
        if kind == "layer_norm":
            mean = hidden.mean(-1, keepdim=True)
            centred = hidden - mean
            std = centred.std(-1, keepdim=True)
            return Normalized(centred / (std + self.config.layer_norm_eps), std, mean)
        if kind == "constant_norm":
            norm = hidden.norm(dim=-1, keepdim=True)
            root = math.sqrt(self.config.d_in)
            # A row of zeros has no direction: it stays zeros, where a division would give NaN.
            return Normalized(hidden * (root / norm.where(norm > 0, torch.ones_like(norm))), norm / root, None)
        if kind == "scalar":
            scale = self.config.output_scale or self.config.input_scale
            return Normalized(hidden * self.config.input_scale, 1 / scale, None)
        return Normalized(hidden, None, None)

    def _denormalize(self, output: Tensor, normalized: Normalized) -> Tensor:
        if normalized.scale is not None:
            output = output * normalized.scale
        return output if normalized.mean is None else output + normalized.mean

    def _encoder_input(self, normalized: Normalized) -> Tensor:
        return normalized.x - self.b_dec if self.config.apply_b_dec_to_input else normalized.x

    def _linear(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Pre-activations of all or some latents; for gated SAEs the gate's and the magnitude's."""

        def pick(vector: Tensor) -> Tensor:
            return vector if features is None else vector[features]

        weight = self.W_enc if features is None else self.W_enc.index_select(1, features)
        if self.config.activation != "gated":
            return x @ weight + pick(self.b_enc), None
        product = x @ weight
        return product + pick(self.b_gate), product * pick(self.r_mag).exp() + pick(self.b_mag)

    def _activate(self, pre_acts: Tensor, magnitudes: Tensor | None, features: Tensor | None = None) -> Tensor:
        """Latents of any activation but the top-k ones."""
        kind = self.config.activation
        if magnitudes is not None:
            return gated(pre_acts, magnitudes)
        if kind in ("jumprelu", "batch_topk"):
            threshold = self.threshold
            return jump_relu(pre_acts, threshold[features] if features is not None and threshold.ndim else threshold)
        return torch.relu(pre_acts) if kind == "relu" else pre_acts

    def _columns(self, normalized: Normalized, features: Tensor) -> Tensor:
        return self._activate(*self._linear(self._encoder_input(normalized), features), features)

    def _code_from(self, pre_acts: Tensor, magnitudes: Tensor | None) -> Code:
        if self.config.activation in TOPK_ACTIVATIONS:
            picked, indices = top_k(pre_acts, self.config.k or 1)
            return Code(pre_acts, indices, after_top_k(picked, self.config.activation), None)
        return Code(pre_acts, None, None, self._activate(pre_acts, magnitudes))

    def _full_code(self, hidden: Tensor) -> tuple[Code, Normalized]:
        normalized = self._normalize(hidden.to(self.dtype))
        return self._code_from(*self._linear(self._encoder_input(normalized))), normalized

    def _dense(self, code: Code) -> Tensor:
        if code.dense is not None:
            return code.dense
        return torch.zeros_like(code.pre_acts).scatter(-1, code.indices, code.values)

    def _sparse_features(self, code: Code) -> SparseFeatures:
        if code.dense is None:
            return SparseFeatures(code.indices, code.values, self.config.d_sae)
        width = max(1, int((code.dense != 0).sum(-1).max()))
        _, indices = code.dense.abs().topk(width, dim=-1)
        return SparseFeatures(indices, code.dense.gather(-1, indices), self.config.d_sae)

    def _decoded(self, code: Code) -> Tensor:
        """`z @ W_dec`, from the active latents alone where they are known."""
        if code.dense is not None:
            return code.dense @ self.W_dec
        k = code.indices.shape[-1]
        flat = F.embedding_bag(
            code.indices.reshape(-1, k), self.W_dec, per_sample_weights=code.values.reshape(-1, k), mode="sum"
        )
        return flat.view(*code.indices.shape[:-1], self.config.d_out)

    def _decode_code(self, code: Code, normalized: Normalized, hidden: Tensor) -> Tensor:
        return self._skip(self._denormalize(self._decoded(code) + self.b_dec, normalized), hidden)

    def _skip(self, output: Tensor, hidden: Tensor) -> Tensor:
        return output + hidden.to(self.dtype) @ self.W_skip.T if self.config.skip_connection else output

    # -- inside a model ----------------------------------------------------------------------------------------------

    def _serve(self, hidden: Tensor, record: CallRecord, number: int, target: Tensor | None = None) -> SiteResult:
        """What `record` asks of this SAE, for hidden states (batch, seq, d_in)."""
        plan = record.plan.saes.get(number) if record.plan is not None else None
        columns = record.features.get(number)
        features = losses = delta = replacement = rows = None
        x = hidden.to(self.dtype)
        if number in record.features:
            features = self._report(x, columns, record.pre_activations)
        if plan is not None:
            delta, replacement = self._steer(x, plan, record.rows)
            if plan.replace == "mixed":
                rows = plan.replace_rows[record.rows]
        if record.losses:
            seen = x.detach() if record.detach else x
            goal = seen if target is None else (target.detach() if record.detach else target).to(self.dtype)
            losses = self._token_losses(seen, record.losses, record.concept_labels.get(number), goal)
        return SiteResult(delta, replacement, rows, features, losses)

    def _report(self, x: Tensor, columns: Tensor | None, pre_activations: bool) -> SparseFeatures | Tensor:
        if pre_activations:
            return self._pre_acts(x, columns)
        return self._sparse(x) if columns is None else self._selected(x, columns)

    def _steer(self, x: Tensor, plan: SaePlan, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change (batch, seq or 1, d_out) and the replacement, each None where there is none."""
        rows = rows if plan.count > 1 else None
        norms = x.norm(dim=-1, keepdim=True) if plan.uses_norm else None  # (batch, seq, 1)
        needs_all = plan.reweight is not None or plan.replace != "none" or plan.lookup is not None
        needs_scale = needs_all or len(plan.read) or len(plan.blind)
        normalized = statistics = self._normalize(x) if needs_scale else Normalized(x, None, None)
        code = self._code_from(*self._linear(self._encoder_input(normalized))) if needs_all else None
        replacement, parts = None, []  # parts are in the SAE's normalised units
        if code is not None and plan.reweight is not None:
            old, code = code, self._reweighted(code, plan, rows)
            if plan.reweight_mode == "weight_legacy":
                mean = plan.reweight[0].mean()
                statistics = Normalized(normalized.x, mean**2, mean)
            if plan.replace != "all":
                parts.append(self._decoded(code) - self._decoded(old))
        if code is not None and plan.replace != "none":
            replacement = self._decode_code(code, statistics, x)
        if len(plan.read):
            parts.append(self._change_of_read(normalized, code, plan, rows, norms))
        if len(plan.blind):
            parts.append(plan.blind_values.at(rows, self._maxima(plan, plan.blind), None) @ self.W_dec[plan.blind])
        delta = sum(parts[1:], parts[0]) if parts else None
        if delta is not None and statistics.scale is not None:
            delta = delta * statistics.scale
        if len(plan.direct):  # in the units of the hidden state
            added = self._directions(plan, rows, norms)
            delta = added if delta is None else delta + added
        if plan.reweight is not None and plan.replace == "mixed":
            # In replaced rows the replacement holds the re-weighted code already.
            swapped = (self._decoded(code) - self._decoded(old)) * (
                1.0 if statistics.scale is None else statistics.scale
            )
            delta = torch.where(plan.replace_rows[rows][:, None, None], delta - swapped, delta)
        return delta, replacement

    def _maxima(self, plan: SaePlan, latents: Tensor) -> Tensor | None:
        return self.feature_max[latents] if plan.uses_max else None

    def _directions(self, plan: SaePlan, rows: Tensor | None, norms: Tensor | None) -> Tensor:
        directions = self.W_dec[plan.direct]  # (q, d_out)
        per_norm = norms / directions.norm(dim=-1) if norms is not None else None  # (batch, seq, q)
        return plan.direct_values.at(rows, self._maxima(plan, plan.direct), per_norm) @ directions

    def _change_of_read(
        self, normalized: Normalized, code: Code | None, plan: SaePlan, rows: Tensor | None, norms: Tensor | None
    ) -> Tensor:
        """`sum_i (z'_i - z_i) * W_dec[i]` over the latents that are read, (batch, seq, d_out)."""
        read = plan.read
        directions = self.W_dec[read]  # (m, d_out)
        latents = self._read_latents(normalized, code, plan)
        per_norm = None
        if norms is not None:
            per_norm = norms / directions.norm(dim=-1)
            if isinstance(normalized.scale, Tensor):  # an input without scale has norm 0 too: 0, not 0/0
                per_norm = per_norm / normalized.scale.clamp(min=torch.finfo(norms.dtype).tiny)
            elif normalized.scale is not None:
                per_norm = per_norm / normalized.scale
        changed = latents
        if plan.magnitude is not None:
            factor = (plan.magnitude if rows is None else plan.magnitude[rows]).unsqueeze(1)
            pre_acts = (
                self._linear(self._encoder_input(normalized), read)[0] if code is None else code.pre_acts[..., read]
            )
            changed = torch.where(factor.isnan(), changed, factor * pre_acts.abs())
        for stage in plan.stages:
            changed = stage.apply(changed, rows, self._maxima(plan, read), per_norm)
        change = changed - latents
        delta = change @ directions
        if plan.balance:
            rest = (self.W_dec.sum(0) - directions.sum(0)) / (self.config.d_sae - len(read))
            delta = delta - change.sum(-1, keepdim=True) * rest
        return delta

    def _read_latents(self, normalized: Normalized, code: Code | None, plan: SaePlan) -> Tensor:
        """Activations of the latents in `plan.read`, (batch, seq, m)."""
        if code is None:
            return self._columns(normalized, plan.read)
        if code.dense is not None:
            return code.dense[..., plan.read]
        # Scatter the picked values to their place among the m that are read; all others go to a spare column.
        place = plan.lookup[code.indices]  # (batch, seq, k)
        spare = code.values.new_zeros(*place.shape[:-1], len(plan.read) + 1)
        return spare.scatter(-1, place, code.values)[..., :-1]

    def _reweighted(self, code: Code, plan: SaePlan, rows: Tensor | None) -> Code:
        scores = (plan.reweight if rows is None else plan.reweight[rows]).unsqueeze(1)
        weighted = self._code_from(code.pre_acts * scores, None)
        if plan.reweight_mode != "swap":
            return weighted._replace(pre_acts=code.pre_acts)
        if weighted.dense is not None:
            return Code(code.pre_acts, None, None, torch.where(weighted.dense != 0, code.pre_acts, 0.0))
        values = torch.where(weighted.values != 0, code.pre_acts.gather(-1, weighted.indices), 0.0)
        return Code(code.pre_acts, weighted.indices, values, None)

    def _token_losses(
        self, x: Tensor, names: tuple[str, ...], concept_labels: Tensor | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        """Each loss term per token, (...); unknown concept labels count 0."""
        x = x.to(self.dtype)
        target = x if target is None else target.to(self.dtype)
        terms: dict[str, Tensor] = {}
        code, normalized = self._full_code(x)
        if "reconstruction" in names:
            error = (self._decode_code(code, normalized, x) - target).square().mean(-1)
            terms["reconstruction"] = error / target.square().mean(-1).clamp(min=torch.finfo(x.dtype).tiny)
        if "sparsity" in names:
            norms = self.W_dec.norm(dim=-1)  # (d_sae,)
            if code.dense is not None:
                mass = code.dense.abs() @ norms
            else:
                mass = (code.values.abs() * norms[code.indices]).sum(-1)
            terms["sparsity"] = mass / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
        if "conditioning" in names:
            latents = torch.tensor(list(self.config.concepts.values()), device=x.device)
            terms["conditioning"] = _concept_loss(code.pre_acts[..., latents], concept_labels)
        return terms


def _concept_loss(pre_acts: Tensor, labels: Tensor | None) -> Tensor:
    """Binary cross-entropy summed over known labels, (...), from (..., n_concepts) pre-activations."""
    if labels is None:
        return pre_acts.new_zeros(pre_acts.shape[:-1])
    known = labels != -100
    goal = torch.where(known, labels, 0.0).to(pre_acts)
    loss = F.binary_cross_entropy_with_logits(pre_acts, goal, reduction="none")
    return torch.where(known, loss, 0.0).sum(-1)
