"""One sparse autoencoder: encode, decode, steer, losses. What it computes with is in `sae_mathematics`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .feature_maxima import measure_feature_max
from .outputs import SparseAutoencoderOutput, SparseFeatures
from .sae_code import Normalized
from .sae_mathematics import SaeMathematics
from .sae_steering import steered
from .steering_plan import SaePlan

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


class SparseAutoencoder(SaeMathematics):
    """A sparse autoencoder (or transcoder). `config` says which one; see `SparseAutoencoderConfig`.

    Input shape: (..., d_in). Output shape: `SparseAutoencoderOutput`, its `reconstruction` (..., d_out) and its
    `latents` (..., d_sae). Of a hidden state with a NaN both have NaN, whatever the activation.

    All mathematics runs inside `forward`, public methods included, so that offloading and sharding hooks of the module
    see every use of its parameters.
    """

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
        described = f", {said}" if (said := self.stored_annotations.summary()) else ""
        return f"{width}, {c.activation}{k}, {place}, {concepts}{described}"

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
    def steer_tokens(
        self,
        hidden: Tensor,
        plan: SaePlan,
        rows: Tensor | None = None,
        mask: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Steer tokens one by one, each by its own row of a plan: what a serving engine needs, which lays the tokens
        of many requests one after the other.

        Args:
            hidden: (T, d_in), what the SAE reads.
            plan: `model.prepare_steering([...]).saes[number]`.
            rows: (T,) int64, each token's row of the plan; None where the plan has one.
            mask: (T,) bool; the other tokens are left as they are and cost nothing. None: all.
            target: (T, d_out), what is changed, where it is not what is read (transcoders).

        Returns:
            (T, d_out), of the dtype of `target`.
        """
        target = hidden if target is None else target
        if mask is None:
            return steered(self, hidden, plan, rows, target)
        where = mask.nonzero()[:, 0]
        if not len(where):
            return target
        edited = steered(self, hidden[where], plan, None if rows is None else rows[where], target[where])
        return target.index_copy(0, where, edited)

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
