"""One sparse autoencoder: encode, decode, losses.

    x      = normalise(hidden) - b_dec            (b_dec only where `apply_b_dec_to_input`)
    pre    = x @ W_enc + b_enc
    z      = act(pre)
    output = denormalise(z @ W_dec + b_dec)       (+ hidden @ W_skip.T for skip transcoders)

Shapes: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc (d_sae,), b_dec (d_out,), threshold (d_sae,) or ().
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .activations import after_top_k, gated, jump_relu, select
from .configuration_sparse_autoencoder import TOPK_ACTIVATIONS, SparseAutoencoderConfig
from .feature_maxima import measure_feature_max
from .outputs import SparseAutoencoderOutput, SparseFeatures
from .sae_code import Code, Normalized
from .sae_files import SaeFiles
from .sae_losses import concept_losses, normalized_mse

P = ParamSpec("P")
R = TypeVar("R")
Sae = TypeVar("Sae", bound=nn.Module)


def inside_forward(method: Callable[Concatenate[Sae, P], R]) -> Callable[Concatenate[Sae, P], R]:
    """Make a method of an SAE run as a task of its `forward`: hooks of offloading and sharding, which bring the
    weights, act where a module is called and nowhere else. Such a method calls none of its kind."""

    @functools.wraps(method)
    def call(sae: Sae, *args: P.args, **kwargs: P.kwargs) -> R:
        return sae(*args, task=method, **kwargs)

    return call


class SparseAutoencoder(SaeFiles):
    """A sparse autoencoder (or transcoder). `config` says which one; see `SparseAutoencoderConfig`.

    Input shape: (..., d_in). Output shape: `SparseAutoencoderOutput`, its `reconstruction` (..., d_out) and its
    `latents` (..., d_sae). Of a hidden state with a NaN both have NaN, whatever the activation.

    All mathematics runs inside `forward`, public methods included, so that offloading and sharding hooks of the module
    see every use of its parameters.
    """

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

    def __init__(self, config: SparseAutoencoderConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config)
        c, d_out = config, config.d_out or config.d_in

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype))

        if not c.tied:
            self.W_enc = new(c.d_in, c.d_sae)
        self.W_dec = new(c.d_sae, d_out)
        self.b_dec = new(d_out)
        if c.activation == "gated":
            self.b_gate, self.b_mag, self.r_mag = new(c.d_sae), new(c.d_sae), new(c.d_sae)
        else:
            self.b_enc = new(c.d_sae)
        if c.activation == "jumprelu":
            self.threshold = new(c.d_sae)
        elif c.activation == "batch_topk":
            self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        if c.skip_connection:
            self.W_skip = new(d_out, c.d_in)
        if c.glu:
            self.W_glu, self.b_glu = new(c.d_in, c.d_sae), new(c.d_sae)
        if c.scaled_selection:
            self.register_buffer("selection_scale", torch.ones(c.d_sae, dtype=dtype))
        if c.apply_b_dec_to_input and c.d_out != c.d_in:
            raise ValueError(
                f"`apply_b_dec_to_input=True` needs d_out == d_in; transcoders set it False. "
                f"Received: d_in={c.d_in!r}, d_out={c.d_out!r}."
            )
        # Typical maximum of each latent; 0 where it is not known.
        self.register_buffer("feature_max", torch.zeros(c.d_sae, dtype=dtype))
        self.reset_parameters()

    if not TYPE_CHECKING:  # for a type checker all attributes are those above

        def __getattr__(self, name: str) -> Any:
            if name == "W_enc" and name not in self._parameters:  # tied: it is no parameter of its own
                return self.W_dec.T
            return super().__getattr__(name)

    def extra_repr(self) -> str:
        """For `print`: what it is and where it stands."""
        c = self.config
        width = f"{c.d_in} -> {c.d_sae}" + (f" -> {c.d_out}" if c.d_out != c.d_in else "")
        k = f", k={c.k}" if c.k is not None else ""
        place = "no place yet" if not c.placed else f"reads {c.read_at}"
        place += f", writes {c.write_at}" if c.placed and c.write_at != c.read_at else ""
        concepts = f"{len(c.concepts)} concept{'' if len(c.concepts) == 1 else 's'}"
        return f"{width}, {c.activation}{k}, {place}, {concepts}"

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
            if name == "W_glu":
                nn.init.normal_(parameter, std=1 / math.sqrt(self.config.d_in))
            elif name not in ("W_enc", "W_dec"):
                nn.init.constant_(parameter, 1e-3 if name == "threshold" else 0.0)
        self.feature_max.zero_()
        if self.config.activation == "batch_topk":
            self.threshold.zero_()
        if self.config.scaled_selection:
            self.selection_scale.fill_(1.0)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    # -- public mathematics ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Reconstruct hidden states (..., d_in), any float dtype: a `SparseAutoencoderOutput`.

        Args:
            task: what to do with this SAE and the arguments instead; see `inside_forward`.
        """
        return self._reconstruct(*args, **options) if task is None else task(self, *args, **options)

    def _reconstruct(self, hidden: Tensor) -> SparseAutoencoderOutput:
        normalized = self.normalize(hidden.to(self.dtype))
        code = self.code_of(normalized)
        reconstruction = self.decode_code(code, normalized, hidden).to(hidden.dtype)
        return SparseAutoencoderOutput(reconstruction=reconstruction, latents=code.dense())

    @inside_forward
    def encode(self, hidden: Tensor) -> Tensor:
        """Latents (..., d_sae) of hidden states (..., d_in)."""
        return self.code_of(self.normalize(hidden.to(self.dtype))).dense()

    @inside_forward
    def encode_pre_acts(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """Pre-activations, (..., d_sae), or (..., m) of the latents `features` (m,). Gated SAEs: the gate's."""
        return self.pre_acts_of(self.normalize(hidden.to(self.dtype)), features)[0]

    @inside_forward
    def encode_selected(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Latents (..., m) of the indices `features` (m,): only their encoder columns are used, unless the activation
        selects among all latents (top-k)."""
        return self.latents_of(self.normalize(hidden.to(self.dtype)), features)

    @inside_forward
    def encode_sparse(self, hidden: Tensor) -> SparseFeatures:
        """The active latents of each token."""
        return self.code_of(self.normalize(hidden.to(self.dtype))).sparse()

    def measure_feature_max(self, hidden: Tensor | Iterable[Tensor], tokens_per_batch: int = 4096) -> Tensor:
        """Fill `feature_max`, the unit `max` of steering, with each latent's largest activation on hidden states.

        Args:
            hidden: (n_tokens, d_in), or several of these; without first tokens, which are outliers.
            tokens_per_batch: encoded at once.

        Returns:
            (d_sae,): by magnitude; 0 where a latent never was active, which cannot be steered in this unit.
        """
        return measure_feature_max(self, hidden, tokens_per_batch)

    @inside_forward
    def decode(self, latents: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`latents @ W_dec + b_dec`, denormalised, (..., d_out).

        A code does not carry its token's own mean and scale: where the SAE normalises per token (`layer_norm`,
        `constant_norm`) or has a skip connection, give the `hidden` (..., d_in) that was encoded. Without it the
        result is in the SAE's normalised units.
        """
        output = latents.to(self.dtype) @ self.W_dec + self.b_dec
        if hidden is None:
            scale = (self.config.output_scale or self.config.input_scale) if self.config.normalize_output else 1.0
            return output / scale
        return self._skip(self.denormalize(output, self.normalize(hidden.to(self.dtype))), hidden)

    @inside_forward
    def alignment(self, directions: Tensor, features: Tensor, by: str = "affine") -> Tensor:
        """How far directions of the hidden state, such as a classifier's weights, align with latents.

        affine:   (w - b_dec) @ W_enc + b_enc     as SelfReg's code has it
        encoder:  w @ W_enc                       what the direction adds to a latent
        decoder:  w @ W_dec.T                     what a latent adds along the direction

        Args:
            directions: (n, d_in), w; not normalised.
            features: (m,), the latents.

        Returns:
            (n, m).
        """
        w = directions.to(self.dtype)
        if by == "affine":
            return self.pre_acts_of(Normalized(w, None, None), features)[0]
        return w @ (self.W_enc[:, features] if by == "encoder" else self.W_dec[features].T)

    @inside_forward
    def remove(
        self, hidden: Tensor, features: Tensor, activation: str = "relu", subtract_b_dec: bool = False
    ) -> Tensor:
        """Hidden states (..., d_in) without what some latents say of them.

        Args:
            features: (m,), the latents.
            activation: `relu`, by their rectified pre-activations, or `own`, by the SAE's activation.
            subtract_b_dec: take `b_dec` out too, as SelfReg's code does even where `features` is empty.

        Returns:
            `hidden - z_U @ W_dec[U]`, denormalised, (..., d_in).
        """
        x = hidden.to(self.dtype)
        normalized = self.normalize(x)
        if activation == "own":
            latents = self.latents_of(normalized, features)
        else:
            pre_acts, magnitudes = self.pre_acts_of(normalized, features)
            latents = torch.relu(pre_acts if magnitudes is None else magnitudes)
        share = latents @ self.W_dec[features]
        if subtract_b_dec:
            share = share + self.b_dec
        return x - (share if normalized.scale is None else share * normalized.scale)

    @inside_forward
    def losses(
        self,
        hidden: Tensor,
        concept_targets: Tensor | None = None,
        target: Tensor | None = None,
        reduction: str = "mean",
    ) -> dict[str, Tensor]:
        """The loss terms, averaged over tokens.

        Args:
            hidden: (n_tokens, d_in).
            concept_targets: (n_tokens, n_concepts) in the order of `config.concepts`, 0 to 1, -100 where unknown.
            target: (n_tokens, d_out), what a transcoder must reconstruct; `hidden` by default.
            reduction: `mean` gives scalars (), `none` one number per token (n_tokens,).

        Returns:
            reconstruction: mean((xh-x)^2) / mean(x^2) per token (SCAR, https://huggingface.co/papers/2411.07122, L_r;
                an input of zeros counts as 0). sparsity: sum(|z| * ||W_dec||) / ||x||. conditioning: binary
                cross-entropy with logits of the concepts' pre-activations, summed over concepts; an unknown label
                adds 0.
        """
        names = ("reconstruction", "sparsity") + (("conditioning",) if concept_targets is not None else ())
        terms = self.token_losses(hidden, names, concept_targets, target)
        return terms if reduction == "none" else {name: value.mean() for name, value in terms.items()}

    # -- pieces, to be called inside `forward` -----------------------------------------------------------------------

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
        return self._skip(self.denormalize(code.decoded(self.W_dec) + self.b_dec, normalized), hidden)

    def _skip(self, output: Tensor, hidden: Tensor) -> Tensor:
        return output + hidden.to(self.dtype) @ self.W_skip.T if self.config.skip_connection else output
