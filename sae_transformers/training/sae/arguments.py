"""What a training run of sparse autoencoders is told: the losses' settings, and what differs from `Trainer`'s."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

RECONSTRUCTION_LOSSES = ("normalized_mse", "mse")
WEIGHT_INITS = ("tied_unit_norm", "kaiming", "linear", "keep")
BIAS_INITS = ("mean", "geometric_median", "zeros", "keep")
CONCEPT_INITS = ("diffmean", "none")
BF16_SCORES = ("auto", "on", "off")
DECODER_NORMS = ("unit", "none")


def _told(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SaeLossArguments:
    """The objective of one sparse autoencoder; the activation is the SAE's own. Losses are means over tokens."""

    reconstruction_loss: str = _told(
        "normalized_mse",
        "normalized_mse: |xh-x|^2 / |x|^2 of each token (SCAR, SelfReg, OpenAI). mse: mean over width of (xh-x)^2.",
    )
    sparsity_coefficient: float = _told(
        0.0,
        "Weight of the sparsity term. relu: L1 norm of the latents times decoder norms over |x|; gated: L1 norm of "
        "the gate's positive pre-activations; jumprelu: number of active latents (L0). Top-k activations have none.",
    )
    sparsity_warmup_steps: int = _told(0, "Steps over which that weight rises linearly from 0.")
    aux_k: int = _told(
        0,
        "AuxK: dead latents, at most this many a token, reconstruct what the others leave. 0: off. OpenAI: d_in / 2.",
    )
    aux_coefficient: float = _told(1 / 32, "Weight of the AuxK term.")
    dead_after_tokens: int = _told(10_000_000, "A latent that was active on none of so many tokens is dead.")
    k_start: int = _told(0, "Annealing: k falls linearly from here to the SAE's own. 0: off.")
    k_anneal_steps: int = _told(0, "Steps that this takes.")
    bf16_scores: str = _told(
        "auto",
        "On a CPU, top-k latents from a product in bfloat16, with a proof that they are those of float32. auto: where "
        "that product, measured at the start, is fast enough to pay. on, off.",
    )
    matryoshka_prefixes: list[int] | None = _told(
        None, "Matryoshka: the first so many latents must reconstruct too, for each number; the last is d_sae."
    )
    jumprelu_bandwidth: float = _told(1e-3, "Width of the kernel that estimates a threshold's gradient.")
    conditioning_weight: float = _told(
        1.0, "Weight of the cross-entropy of concept latents; counts where the SAE has concepts and the data labels."
    )
    pos_weight: float = _told(1.0, "Weight of tokens with the concept in that cross-entropy; 0 turns it off.")
    conditioning_legacy: bool = _told(
        False, "As SCAR's code computes it: pos_weight weighs reconstruction too, and unknown labels count as absent."
    )
    ranking_weight: float = _told(
        0.0, "Weight of a hinge that lifts a concept's latent into the top k of tokens with the concept."
    )
    ranking_margin: float = _told(0.0, "By how much it must exceed the k-th pre-activation.")
    finetune_dead: bool = _told(
        False,
        "SelfReg's fine-tuning: latents alive on this data reconstruct, the others reconstruct what is left. Sought "
        "at the start of every epoch.",
    )
    dead_residual_weight: float = _told(0.1, "Weight of that second term.")
    finetune_legacy: bool = _told(
        False,
        "As SelfReg's code computes it: b_dec counts in the residual's reconstruction too, values are not rectified, "
        "and alive means a pre-activation above 0, in the top k or not.",
    )

    def check(self) -> None:
        """Raise a ValueError for the first setting that makes no sense."""
        _check_choice("reconstruction_loss", self.reconstruction_loss, RECONSTRUCTION_LOSSES)
        _check_choice("bf16_scores", self.bf16_scores, BF16_SCORES)
        for f in fields(SaeLossArguments):
            if isinstance(value := getattr(self, f.name), (int, float)):
                _check_amount(f.name, value)
        if bool(self.k_start) != bool(self.k_anneal_steps):
            raise ValueError(
                "`k_start` and `k_anneal_steps` go together. "
                f"Received: k_start={self.k_start!r}, k_anneal_steps={self.k_anneal_steps!r}."
            )
        prefixes = self.matryoshka_prefixes or []
        if sorted(set(prefixes)) != prefixes or (prefixes and prefixes[0] < 1):
            raise ValueError(
                f"`matryoshka_prefixes` must rise from 1 or more. Received: matryoshka_prefixes={prefixes!r}."
            )

    def k_at(self, step: int, k: int) -> int:
        """Top-k's k at an optimiser step, counted from 1: `max(k, int(k_start - (k_start - k) * step / steps))`.

        SelfReg (https://huggingface.co/papers/2502.14133) anneals 200 -> 20 in 625 steps.
        """
        if not self.k_anneal_steps:
            return k
        return max(k, int(self.k_start - (self.k_start - k) * step / self.k_anneal_steps))


@dataclass
class SaeTrainingArguments(SaeLossArguments, TrainingArguments):
    """`TrainingArguments` for SAEs. A batch counts tokens, not texts.

    Other defaults than the parent's: the learning rate depends on d_sae, a batch is 4096 tokens, and the last
    incomplete one is dropped.
    """

    per_device_train_batch_size: int = _told(4096, "Tokens of a step on each device.")
    per_device_eval_batch_size: int = _told(4096, "Tokens of an evaluation step on each device.")
    learning_rate: float = _told(
        0.0, "0: 2e-4 / sqrt(d_sae / 16384), the scaling of 'Scaling and evaluating sparse autoencoders', section 2."
    )
    weight_init: str = _told(
        "tied_unit_norm",
        "tied_unit_norm: random decoder rows of norm 1, the encoder their transpose. kaiming: standard deviation "
        "sqrt(2 / d_in) (SelfReg). linear: uniform in +-1 / sqrt(d_in) (SCAR). keep: as they are.",
    )
    bias_init: str = _told("mean", "Start of b_dec, from a sample of the data: mean, geometric_median, zeros or keep.")
    concept_init: str = _told(
        "none", "diffmean: each concept's latent starts along its difference of means. none: as any other."
    )
    init_tokens: int = _told(16_384, "Tokens of that sample.")
    decoder_norm: str = _told(
        "unit", "unit: decoder rows keep norm 1, and their gradient along themselves is dropped. none: free."
    )
    outlier_norm_limit: float = _told(
        10.0, "Tokens whose norm exceeds so many times the median of the sample are left out. 0: none are."
    )
    window_tokens: int = _told(
        2**21, "Tokens are shuffled inside windows of so many, made of shards in random order; one is read at a time."
    )
    dataloader_drop_last: bool = _told(True, "Drop the last incomplete batch of an epoch.")
    remove_unused_columns: bool = _told(False, "Not used here.")
    dataloader_pin_memory: bool = _told(False, "Pin memory for faster copies to a GPU.")
    ddp_find_unused_parameters: bool | None = _told(False, "Not needed: every parameter has a part in every step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        _check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        _check_choice("bias_init", self.bias_init, BIAS_INITS)
        _check_choice("concept_init", self.concept_init, CONCEPT_INITS)
        _check_choice("decoder_norm", self.decoder_norm, DECODER_NORMS)
        _check_amount("outlier_norm_limit", self.outlier_norm_limit)
        _check_amount("learning_rate", self.learning_rate)
        for name in ("per_device_train_batch_size", "init_tokens", "window_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(self, name)!r}.")


def _check_amount(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number, 0 or more. Received: {name}={value!r}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}.")
