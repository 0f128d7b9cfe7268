"""The mathematics of a sparse autoencoder, piece by piece, to be called inside its `forward`.

    x      = normalise(hidden) - b_dec            (b_dec only where `apply_b_dec_to_input`)
    pre    = x @ W_enc + b_enc
    z      = act(pre)
    output = denormalise(z @ W_dec + b_dec)       (+ hidden @ W_skip.T for skip transcoders)

Shapes: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc (d_sae,), b_dec (d_out,), threshold (d_sae,) or ().
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .activations import after_top_k, gated, jump_relu, select
from .configuration_sparse_autoencoder import TOPK_ACTIVATIONS
from .outputs import SparseFeatures
from .sae_code import Code, Normalized
from .sae_files import SaeFiles
from .sae_losses import concept_losses, normalized_mse


class SaeMathematics(SaeFiles):
    """What `SparseAutoencoder` computes with; its methods are called by those that run inside its `forward`."""

    W_enc: Tensor
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    W_skip: nn.Parameter
    W_glu: nn.Parameter
    b_glu: nn.Parameter
    threshold: Tensor
    selection_scale: Tensor
    feature_max: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def normalize(self, hidden: Tensor) -> Normalized:
        """The input as the encoder's mathematics sees it, before `b_dec`, and how to undo it."""
        normalized = self._normalized(hidden)
        return normalized if self.config.normalize_output else Normalized(normalized.x, None, None)

    def _normalized(self, hidden: Tensor) -> Normalized:
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

    def denormalize(self, output: Tensor, normalized: Normalized) -> Tensor:
        """An output in the units of the hidden state."""
        if normalized.scale is not None:
            output = output * normalized.scale
        return output if normalized.mean is None else output + normalized.mean

    def pre_acts_of(self, normalized: Normalized, features: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Pre-activations of all or some latents; for gated SAEs the gate's and the magnitude's."""

        def pick(vector: Tensor) -> Tensor:
            return vector if features is None else vector[features]

        x = normalized.x - self.b_dec if self.config.apply_b_dec_to_input else normalized.x
        weight = self.W_enc if features is None else self.W_enc.index_select(1, features)
        if self.config.glu:
            gate = self.W_glu if features is None else self.W_glu.index_select(1, features)
            return (x @ weight + pick(self.b_enc)) * torch.sigmoid(x @ gate + pick(self.b_glu)), None
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

    def latents_of(self, normalized: Normalized, features: Tensor) -> Tensor:
        """Latents (..., m) of the indices `features` (m,)."""
        if self.config.activation in TOPK_ACTIVATIONS:
            code = self.code_of(normalized)
            damaged = code.sparse().values[..., :1].isnan()  # only k latents say so
            return code.dense()[..., features].masked_fill(damaged, torch.nan)
        return self._activate(*self.pre_acts_of(normalized, features), features)

    def code_of(self, normalized: Normalized) -> Code:
        """All latents."""
        return self.code_from(*self.pre_acts_of(normalized))

    def code_from(self, pre_acts: Tensor, magnitudes: Tensor | None = None) -> Code:
        """All latents, from their pre-activations (..., d_sae)."""
        kind, k = self.config.activation, self.config.k or 1
        if kind in TOPK_ACTIVATIONS:
            if self.config.scaled_selection:
                indices = select(pre_acts * self.selection_scale, k, kind)[1]
                picked = pre_acts.gather(-1, indices)
            else:
                picked, indices = select(pre_acts, k, kind)
            return Code(pre_acts, SparseFeatures(indices, after_top_k(picked, kind), self.config.d_sae))
        return Code(pre_acts, self._activate(pre_acts, magnitudes))

    def decode_code(self, code: Code, normalized: Normalized, hidden: Tensor) -> Tensor:
        """The output (..., d_out), in the units of the hidden state."""
        return self.output_of(code.decoded(self.W_dec), normalized, hidden)

    def output_of(self, decoded: Tensor, normalized: Normalized, hidden: Tensor) -> Tensor:
        """The output (..., d_out) of a decoded code `z @ W_dec`, in the units of the hidden state."""
        return self._skip(self.denormalize(decoded + self.b_dec, normalized), hidden)

    def _skip(self, output: Tensor, hidden: Tensor) -> Tensor:
        return output + hidden.to(self.dtype) @ self.W_skip.T if self.config.skip_connection else output

    def token_losses(
        self,
        hidden: Tensor,
        names: tuple[str, ...],
        concept_targets: Tensor | None = None,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Each loss term per token, (...); unknown concept labels count 0."""
        x = hidden.to(self.dtype)
        target = x if target is None else target.to(self.dtype)
        normalized = self.normalize(x)
        code = self.code_of(normalized)
        terms: dict[str, Tensor] = {}
        if "reconstruction" in names:
            terms["reconstruction"] = normalized_mse(target, self.decode_code(code, normalized, x))
        if "sparsity" in names:
            norms = self.W_dec.norm(dim=-1)  # (d_sae,)
            if isinstance(code.latents, Tensor):
                mass = code.latents.abs() @ norms
            else:
                mass = (code.latents.values.abs() * norms[code.latents.indices]).sum(-1)
            terms["sparsity"] = mass / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
        if "conditioning" in names and (self.config.concepts or concept_targets is not None):
            concepts = torch.tensor(list(self.config.concepts.values()), dtype=torch.long, device=x.device)
            pre_acts = code.pre_acts[..., concepts]
            known = concept_targets is not None
            losses = concept_losses(pre_acts, concept_targets) if known else torch.zeros_like(pre_acts)
            terms["conditioning"] = losses.sum(-1)
        return terms


def without_gradients(sae: Any) -> Any:
    """The same SAE, of whose parameters autograd knows nothing: a penalty must not be met by moving the feature."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in sae.parameters(recurse=False)):
        return sae
    view = object.__new__(type(sae))
    view.__dict__.update(sae.__dict__)
    view.__dict__["_parameters"] = {
        name: None if parameter is None else parameter.detach() for name, parameter in sae._parameters.items()
    }
    return view
