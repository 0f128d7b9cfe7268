"""What a sparse autoencoder is: its sizes, its mathematics, its place in a base model; and the weights of losses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

ACTIVATIONS = (
    "relu", "topk", "topk-sigmoid", "topk-tanh", "topk-identity", "abs_topk", "groupmax",
    "batch_topk", "jumprelu", "gated", "identity",
)  # fmt: skip
TOPK_ACTIVATIONS = ("topk", "topk-sigmoid", "topk-tanh", "topk-identity", "abs_topk", "groupmax")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm", "scalar")
SHOWN_NAMES = 10  # in a message: an SAE may have a name for every latent
SHOWN_TEXT = 60  # characters of a description in a message
MOST_NUMBERS = 20  # of latents with one name, in a message
SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out", "mlp_in", "mlp_act", "attn_heads")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}.")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}.")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


def check_dtype(values: Mapping[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if isinstance(value, str) and value != "auto" and not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"`{name}` must be the name of a torch dtype, as 'bfloat16'. Received: {name}={value!r}.")


def read_fields(cls: Any, values: Mapping[str, Any], what: str) -> Any:
    """An instance of a dataclass from its dict; an unknown name is an error, never ignored."""
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known, key=str):
        raise ValueError(f"Unknown {what} fields {unknown}. Known: {', '.join(sorted(known))}.")
    return cls(**values)


@dataclass
class SparseAutoencoderConfig:
    """One sparse autoencoder: its sizes, its mathematics and its place in the base model.

    Args:
        d_in: width of the hidden state that is read.
        d_sae: number of latents (features).
        d_out: width of the hidden state that is written; `d_in` unless this is a transcoder.
        activation: `relu`, `topk`, `batch_topk` (its threshold is used at inference), `jumprelu`, `gated`, `identity`,
            or `topk-sigmoid` / `topk-tanh` / `topk-identity` (top-k of the signed pre-activations, then that
            function), `abs_topk` (the largest magnitudes, with their sign), `groupmax` (the largest of each of `k`
            groups of neighbours).
        k: latents kept per token by the top-k activations; the average for `batch_topk`.
        normalization: what is done to the input and undone on the output: `none`; `layer_norm` (per token, unbiased
            standard deviation, eps added to it in the division only); `constant_norm` (scaled to norm sqrt(d_in));
            `scalar` (multiplied by `input_scale`).
        input_scale: the factor of `normalization="scalar"`; the output is divided by `output_scale`.
        output_scale: defaults to `input_scale`.
        layer_norm_eps: the eps of `layer_norm`.
        normalize_output: whether the normalisation is undone on the output; some transcoders leave it out.
        apply_b_dec_to_input: whether `b_dec` is subtracted from the normalised input before the encoder.
        tied: one matrix for both directions, `W_enc = W_dec.T`.
        skip_connection: adds `x @ W_skip.T` to the output (skip transcoders).
        glu: pre-activations are multiplied by `sigmoid(x @ W_glu + b_glu)`.
        scaled_selection: top-k activations choose by the pre-activation times `selection_scale`, a buffer (d_sae,).
        layer: index of the decoder block, from 0.
        site: of that block: `resid_pre`, `resid_post`, `mlp_out`, `attn_out`, or `mlp_in`, `mlp_act`, `attn_heads`:
            what its MLP, its MLP's last linear map and its attention's last linear map read.
        hook: instead of `layer` and `site`, a module path of the base, optionally ended by `.input` or `.output`
            (the default), as in `model.layers.10.mlp.output`.
        hook_out: where the decoder writes, when it is not where the encoder reads (transcoders).
        hooks_out: the places that a layer of a cross-layer transcoder or of a crosscoder writes to, in the order in
            which the model runs them, none before what is read. `d_out` is the sum of their widths, which are equal,
            and the decoder's columns are theirs one after the other.
        concepts: name -> latent trained to detect it.
        feature_names: latent -> label; a label names its latent wherever a concept's name does.
        metadata: anything worth keeping: origin, licence, training data.
    """

    d_in: int
    d_sae: int
    d_out: int | None = None
    activation: str = "relu"
    k: int | None = None
    normalization: str = "none"
    input_scale: float = 1.0
    output_scale: float | None = None
    layer_norm_eps: float = 1e-5
    normalize_output: bool = True
    apply_b_dec_to_input: bool = True
    tied: bool = False
    skip_connection: bool = False
    glu: bool = False
    scaled_selection: bool = False
    layer: int | None = None
    site: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    hooks_out: list[str] = field(default_factory=list)
    concepts: dict[str, int] = field(default_factory=dict)
    feature_names: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    _stored = None  # the annotations of its features, no field: see `describe`

    def __post_init__(self) -> None:
        for name in ("hook", "hook_out"):
            check_kind(name, getattr(self, name), (str, type(None)), "a module path")
        for name in ("concepts", "feature_names", "metadata"):
            check_kind(name, getattr(self, name), Mapping, "a dict")
        for name in (
            "apply_b_dec_to_input", "tied", "skip_connection", "normalize_output", "glu", "scaled_selection",
        ):  # fmt: skip
            check_kind(name, getattr(self, name), bool, "True or False")
        for name in ("d_in", "d_sae"):
            check_count(name, getattr(self, name))
        self.d_out = self.d_in if self.d_out is None else self.d_out
        check_count("d_out", self.d_out)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        if self.activation in TOPK_ACTIVATIONS or self.k is not None:
            check_count("k", self.k)
            if self.k is not None and self.k > self.d_sae:
                raise ValueError(f"`k` must not exceed `d_sae`={self.d_sae}. Received: k={self.k!r}.")
        if self.activation == "groupmax" and self.d_sae % (self.k or 1):
            raise ValueError(
                f"`activation='groupmax'` needs d_sae to be a multiple of k. "
                f"Received: d_sae={self.d_sae!r}, k={self.k!r}."
            )
        if self.scaled_selection and self.activation not in TOPK_ACTIVATIONS:
            raise ValueError(
                f"`scaled_selection=True` needs a top-k activation. Received: activation={self.activation!r}."
            )
        if self.glu and (self.activation == "gated" or self.tied):
            raise ValueError(
                f"`glu=True` needs an activation other than 'gated' and tied=False. "
                f"Received: activation={self.activation!r}, tied={self.tied!r}."
            )
        if self.tied and (self.d_out != self.d_in or self.activation == "gated"):
            raise ValueError(
                f"`tied=True` needs d_out == d_in and an activation other than 'gated'. "
                f"Received: d_in={self.d_in!r}, d_out={self.d_out!r}, activation={self.activation!r}."
            )
        if self.d_out != self.d_in and self.normalization == "layer_norm" and self.normalize_output:
            raise ValueError(
                f"`normalization='layer_norm'` is undone with the input's mean and needs d_out == d_in. "
                f"Received: d_in={self.d_in!r}, d_out={self.d_out!r}."
            )
        for name in ("input_scale", "output_scale", "layer_norm_eps"):
            value = getattr(self, name)
            optional = name == "output_scale" and value is None
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not optional and not (number and value > 0):  # pyright: ignore[reportOptionalOperand]
                raise ValueError(f"`{name}` must be a finite positive number. Received: {name}={value!r}.")
        self._check_place()
        self._check_places_written()
        for name, feature in self.concepts.items():
            if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < self.d_sae:
                raise ValueError(
                    f"`concepts` must map names to latents in [0, {self.d_sae}). Received: "
                    f"concepts[{name!r}]={feature!r}."
                )
        for feature, label in self.feature_names.items():
            number = "" if isinstance(feature, bool) else str(feature)
            if not (number.isdecimal() and int(number) < self.d_sae and isinstance(label, str)):
                raise ValueError(
                    f"`feature_names` must map latents in [0, {self.d_sae}) to labels, as {{'5': 'rivers'}}; "
                    f"`concepts` maps names to latents. Received: feature_names[{feature!r}]={label!r}."
                )
        self.feature_names = {str(feature): label for feature, label in self.feature_names.items()}  # as JSON has it

    def _check_place(self) -> None:
        if self.site is not None:
            check_choice("site", self.site, SITES)
        if self.layer is not None:
            check_count("layer", self.layer, minimum=0)
        if self.hook is not None and (self.layer is not None or self.site is not None):
            raise ValueError(
                f"Give either `hook` or `layer` with `site`, not both. "
                f"Received: hook={self.hook!r}, layer={self.layer!r}, site={self.site!r}."
            )
        if self.layer is not None and self.site is None:
            self.site = "resid_post"
        if self.hook_out is None and not self.hooks_out and self.d_out != self.d_in and self.placed:
            raise ValueError(
                f"A transcoder writes {self.d_out} values where it reads {self.d_in}: say where with `hook_out`. "
                f"Received: hook_out=None."
            )

    def _check_places_written(self) -> None:
        places = self.hooks_out
        if not isinstance(places, (list, tuple)) or not all(isinstance(place, str) and place for place in places):
            raise TypeError(f"`hooks_out` must be a list of module paths. Received: hooks_out={places!r}.")
        self.hooks_out = list(places)
        if not places:
            return
        if self.hook_out is not None or len(set(places)) < len(places):
            raise ValueError(
                f"`hooks_out` must be different places, and goes without `hook_out`. "
                f"Received: hooks_out={places!r}, hook_out={self.hook_out!r}."
            )
        if (self.d_out or 0) % len(places):
            raise ValueError(
                f"`d_out` must be a multiple of the number of places in `hooks_out`, {len(places)}. "
                f"Received: d_out={self.d_out!r}."
            )
        if self.normalization not in ("none", "scalar") or self.apply_b_dec_to_input or self.tied:
            raise ValueError(
                f"An SAE with `hooks_out` has no output in the units of its input. Expected "
                f"normalization 'none' or 'scalar', apply_b_dec_to_input=False and tied=False. Received: "
                f"{self.normalization!r}, {self.apply_b_dec_to_input!r}, {self.tied!r}."
            )

    @property
    def placed(self) -> bool:
        """Whether the config says where in the base the SAE stands."""
        return self.hook is not None or self.layer is not None

    @property
    def read_at(self) -> str:
        """The place that is read, as one string: `layers.14.resid_post` or the module path."""
        return self.hook if self.hook is not None else f"layers.{self.layer}.{self.site}"

    @property
    def write_at(self) -> str:
        """The place that is written; the same as `read_at` unless this is a transcoder. All of `hooks_out` as one
        text."""
        return ", ".join(self.hooks_out) or self.hook_out or self.read_at

    @property
    def reconstructs(self) -> bool:
        """Whether the output is to be what is read: not that of a transcoder, nor of one layer of a crosscoder."""
        return self.write_at == self.read_at and not self.hooks_out

    @property
    def writes_at(self) -> list[str]:
        """The places that are written, one but for `hooks_out`."""
        return self.hooks_out or [self.hook_out or self.read_at]

    def describe(self, stored: Any) -> SparseAutoencoderConfig:
        """Have features named by their whole descriptions too: those of a `StoredAnnotations`."""
        self._stored = stored
        return self

    @property
    def annotations(self) -> Any:
        """What is known of the features in words, where this is the config of an SAE that has some; else None."""
        return None if self._stored is None else self._stored.get()

    def resolve_feature(self, feature: int | str | None) -> int:
        """The index of a latent given by index, by concept name, by its label in `feature_names`, or else by a whole
        description of its annotations."""
        if isinstance(feature, str):
            if feature in self.concepts:
                return self.concepts[feature]
            named = [int(latent) for latent, label in self.feature_names.items() if label == feature]
            notes = None if named else self.annotations
            named = named if notes is None else notes.latents_of(feature)
            if len(named) > 1:
                numbers = ", ".join(map(str, named[:MOST_NUMBERS])) + (", ..." if len(named) > MOST_NUMBERS else "")
                raise ValueError(
                    f"Features {numbers} of this SAE have that name: give one's number. Received: feature={feature!r}."
                )
            if not named:
                names = list(dict.fromkeys([*self.concepts, *self.feature_names.values()]))
                close = difflib.get_close_matches(feature, names, n=SHOWN_NAMES) or names[:SHOWN_NAMES]
                known = ", ".join(map(repr, close)) or "none: give an index"
                known += f", ... ({len(names)} in all)" if len(names) > len(close) else ""
                if notes is not None and (like := notes.like(feature, SHOWN_NAMES)):
                    found = ", ".join(f"{number} {text[:SHOWN_TEXT]!r}" for number, text in like)
                    known += f"; described like it are {found}: give a number or a whole description"
                raise ValueError(
                    f"No concept or feature of that name in this SAE; it has {known}. Received: feature={feature!r}."
                )
            return named[0]
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < self.d_sae:
            raise ValueError(
                f"`feature` must be a name or an integer in [0, {self.d_sae}). Received: feature={feature!r}."
            )
        return feature

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; only what differs from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {
            k: v
            for k, v in asdict(self).items()
            if k in ("d_in", "d_sae") or (v != defaults[k] and v != {} and v != [])
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAutoencoderConfig:
        """Read what `to_dict` wrote; an unknown name is an error, never ignored."""
        check_kind("saes", values, Mapping, "a list of SparseAutoencoderConfig objects or their dicts")
        if missing := [name for name in ("d_in", "d_sae") if name not in values]:
            raise ValueError(
                f"An SAE config needs `d_in` and `d_sae`; {missing} is missing. Received: {dict(values)}."
            )
        return read_fields(cls, values, "SAE config")


@dataclass
class LossWeights:
    """Weight of each term in `loss`. All but the first are off by default.

    Args:
        lm: cross-entropy of the language model, or the classifier's own loss.
        reconstruction: normalised mean squared error of each SAE.
        sparsity: L1 norm of the latents (times decoder norms) over the norm of the input.
        conditioning: binary cross-entropy of each concept latent's pre-activation.
        unintended: of a feature head, how far its weights align with unintended features (SelfReg's penalty).
        unintended_state: of a feature head, how active unintended features are in the states it reads.
    """

    lm: float = 1.0
    reconstruction: float = 0.0
    sparsity: float = 0.0
    conditioning: float = 0.0
    unintended: float = 0.0
    unintended_state: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`loss_weights` must be finite numbers. Received: {f.name}={value!r}.")

    @property
    def any_sae_term(self) -> bool:
        return bool(self.reconstruction or self.sparsity or self.conditioning)
