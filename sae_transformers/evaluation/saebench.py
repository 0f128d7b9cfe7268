"""A `SparseAutoencoder` as SAEBench, sae-probes and the evaluations of SAELens ask for one.

They read `encode`, `decode`, `W_enc`, `W_dec`, `b_enc`, `b_dec`, `device` and `dtype`, which a `SparseAutoencoder`
has, and a `cfg` that names the model and the place in TransformerLens' words, which this adds.

SAEBench: "SAEBench: A Comprehensive Benchmark for Sparse Autoencoders in Language Model Interpretability"
(https://huggingface.co/papers/2503.09532).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import SparseAutoencoder
from ..modeling.conversion.format import SITE_NAMES


@dataclass
class SaeBenchConfig:
    """What SAEBench's evaluations read of `sae.cfg`; further fields that they set may be added to it."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    dtype: str
    device: str
    architecture: str
    apply_b_dec_to_input: bool
    context_size: int = 128
    prepend_bos: bool = True
    hook_head_index: int | None = None
    normalize_activations: str = "none"  # the adapter normalises itself
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metadata = self  # SAELens 6 looks for some of the fields there; no field, so `asdict` leaves it out

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SaeBenchAdapter(nn.Module):
    """An SAE with a `cfg`. Whatever else is asked of it, such as `W_dec` or `threshold`, is the SAE's.

    Input shape of `encode` and `forward`: (..., d_in). Of `decode`: (..., d_sae).
    """

    def __init__(self, sae: SparseAutoencoder, cfg: SaeBenchConfig) -> None:
        super().__init__()
        self.sae, self.cfg = sae, cfg
        self._source: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("sae"), name)

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    def encode(self, x: Tensor) -> Tensor:
        config = self.sae.config
        if config.normalization in ("layer_norm", "constant_norm") or config.skip_connection:
            self._source = x  # what `decode`, which these evaluations give the latents only, needs of each token
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., d_in).

        Raises:
            ValueError: the SAE normalises each token, and these are not latents of what was encoded last.
        """
        if self._source is None:
            return self.sae.decode(feature_acts)
        if self._source.shape[:-1] != feature_acts.shape[:-1]:
            raise ValueError(
                f"This SAE normalises each token, so it decodes latents of what it encoded last. "
                f"Received: {tuple(feature_acts.shape)} after {tuple(self._source.shape)}."
            )
        return self.sae.decode(feature_acts, self._source)

    def forward(self, x: Tensor) -> Tensor:
        return self.sae(x).reconstruction


def for_saebench(
    sae: SparseAutoencoder, model_name: str, *, hook_name: str | None = None, context_size: int = 128
) -> SaeBenchAdapter:
    """Give an SAE what SAEBench, sae-probes and SAELens' evaluations read. Needs none of them.

        from sae_bench.evals.sparse_probing_sae_probes.main import run_eval
        run_eval(config, [("ours", for_saebench(sae, "pythia-70m-deduped"))], "cpu", "results")

    Args:
        sae: not a transcoder.
        model_name: of the base, as TransformerLens has it.
        hook_name: such as `blocks.14.hook_resid_post`; by default from the SAE's `layer` and `site`.
        context_size: tokens of a text.

    Raises:
        ValueError: a transcoder, or an SAE whose place has no name in TransformerLens and `hook_name` is not given.
    """
    config = sae.config
    if config.d_in != config.d_out or (config.placed and not config.reconstructs):
        raise ValueError(
            f"SAEBench evaluates SAEs that write where they read. "
            f"Received: d_in={config.d_in}, d_out={config.d_out}, a transcoder."
        )
    if hook_name is None:
        if config.layer is None or config.site not in SITE_NAMES:
            raise ValueError(
                f"The SAE's place has no name in TransformerLens; give `hook_name`. "
                f"Received: layer={config.layer!r}, site={config.site!r}, hook={config.hook!r}."
            )
        hook_name = f"blocks.{config.layer}.{SITE_NAMES[config.site]}"
    layer = config.layer
    if layer is None:
        digits = [part for part in hook_name.split(".") if part.isdigit()]
        if not digits:
            raise ValueError(f"`hook_name` must name a layer. Received: hook_name={hook_name!r}.")
        layer = int(digits[0])
    cfg = SaeBenchConfig(
        model_name, config.d_in, config.d_sae, layer, hook_name, str(sae.dtype).removeprefix("torch."),
        str(sae.device), config.activation, config.apply_b_dec_to_input, context_size,
    )  # fmt: skip
    return SaeBenchAdapter(sae, cfg)
