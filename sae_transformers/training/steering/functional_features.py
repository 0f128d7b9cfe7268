"""Functional features: latents that tell two behaviours apart, and the steering that makes a model choose one.

    features = functional_features(codes_of_a, codes_of_b)
    first, second = select_features(features, proportion=0.07)
    steering = functional_steering([(0, features, first, second)], towards=0, degree=2.0)

SpARE, "Steering knowledge selection behaviours in LLMs via SAE-based representation engineering"
(https://huggingface.co/papers/2410.15999), of which the behaviours are to answer from the prompt's context and from
memory. Any two groups of prompts will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...latents.sparse_codes import SparseCodes, stack_rows
from ...modeling import FeatureEdit, SparseAutoencoder, SparseAutoencoderConfig, Steering
from ...modeling.configuration_sparse_autoencoder import TOPK_ACTIVATIONS
from ...modeling.plain_files import opened_tensors
from .mutual_information import code_mutual_information
from .published_features import PublishedFeatures, read_published_features

NAMES = ("mutual_information", "expectation", "values_a", "values_b")


class FunctionalFeatures(NamedTuple):
    """What each latent of an SAE has to do with behaviour A against behaviour B.

    mutual_information: (d_sae,) float64, nats, with the behaviour. 0 for latents that are never active.
    expectation: (d_sae,), mean activation under A less that under B; its sign says whose feature it is.
    values_a, values_b: (d_sae,), typical activation under each, which an edit aims at.
    """

    mutual_information: Tensor
    expectation: Tensor
    values_a: Tensor
    values_b: Tensor

    @property
    def live(self) -> Tensor:
        """(d_sae,) bool: not zero in at least one of the groups."""
        return (self.values_a != 0) | (self.values_b != 0) | (self.expectation != 0)


def functional_features(
    codes_a: SparseCodes,
    codes_b: SparseCodes,
    *,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
    dead: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> FunctionalFeatures:
    """Mutual information, expectation and functional values from the codes of two groups of prompts.

    Args:
        codes_a, codes_b: of each prompt one row, of its last token.
        weights_a, weights_b: (n,), of the rows in the functional values, as `loss_weights` gives them; by default
            all alike. The published weights are within 2 % of that.
        dead: estimate the information of latents that are never active too, as the published code does. It is noise,
            and of a JumpReLU SAE more than nine tenths of the sum that a `proportion` refers to.
        seed: of the estimator's noise.
        progress: show a progress bar.

    Raises:
        ValueError: a group has fewer than two prompts, or the groups are of different SAEs.
    """
    for name, codes in (("a", codes_a), ("b", codes_b)):
        if codes.n_rows < 2:
            raise ValueError(f"Each behaviour needs two prompts or more. Received: {codes.n_rows} of group {name}.")
    if codes_a.d_sae != codes_b.d_sae:
        raise ValueError(f"Both groups need one SAE. Received: d_sae {codes_a.d_sae} and {codes_b.d_sae}.")
    labels = torch.tensor([1] * codes_a.n_rows + [0] * codes_b.n_rows)
    found = code_mutual_information(stack_rows([codes_a, codes_b]), labels, dead=dead, seed=seed, progress=progress)
    means = [codes.sums() / codes.n_rows for codes in (codes_a, codes_b)]
    values = [
        mean if weights is None else codes.sums(weights / weights.sum())
        for codes, weights, mean in zip((codes_a, codes_b), (weights_a, weights_b), means, strict=True)
    ]
    return FunctionalFeatures(found, means[0] - means[1], *values)


def loss_weights(own_losses: Tensor, other_losses: Tensor) -> Tensor:
    """Weights of prompts by how much likelier the model finds the answer it gave than the other, summing to 1.

    w = other / (own + other), normalised.

    Of the losses, (n,), of the whole prompt with each answer, as SpARE's code has it; the paper's appendix C.1 has
    the ratio upside down. Both are nearly uniform, since the prompt's tokens dominate the losses.

    Raises:
        ValueError: shapes differ, or a loss is not positive and finite.
    """
    both = torch.stack([own_losses, other_losses]).double() if own_losses.shape == other_losses.shape else None
    if both is None or both.ndim != 2 or not bool((torch.isfinite(both) & (both > 0)).all()):
        raise ValueError(
            f"Expected positive losses of one shape (n,). "
            f"Received: {tuple(own_losses.shape)} and {tuple(other_losses.shape)}, or losses that are not."
        )
    weights = both[1] / both.sum(0)
    return weights / weights.sum()


def select_features(
    features: FunctionalFeatures,
    *,
    proportion: float | None = None,
    count: int | None = None,
    legacy: bool = False,
) -> tuple[Tensor, Tensor]:
    """The latents that tell most about the behaviour, split by whose they are.

    In descending order of mutual information: as many as hold more than `proportion` of its sum, or `count`. Latents
    of a positive expectation are of behaviour A, of a negative one of B; those of none are skipped, and others taken
    for them, as in SpARE's code.

    Args:
        features: of one SAE.
        proportion: K of the paper (equation 5), in (0, 1), of the information of live latents.
        count: in place of `proportion`.
        legacy: the sum includes dead latents, whose information is noise (see `functional_features`).

    Returns:
        latents of A and of B, (m,) int64 each, the most informative first.

    Raises:
        ValueError: neither or both of `proportion` and `count`, one out of range, NaN in the scores, or no latent
            tells anything.
    """
    if (proportion is None) == (count is None):
        raise ValueError(f"Give `proportion` or `count`. Received: proportion={proportion!r}, count={count!r}.")
    scores, expectation = features.mutual_information.double(), features.expectation.double()
    if not bool(torch.isfinite(scores).all() and torch.isfinite(expectation).all()):
        bad = int((~(torch.isfinite(scores) & torch.isfinite(expectation))).sum())
        raise ValueError(f"Scores must be finite. Received: {bad} latents with a score that is not.")
    if not legacy:
        scores = torch.where(features.live, scores, 0.0)
    order = scores.argsort(descending=True, stable=True)
    if proportion is not None:
        if not 0 < proportion < 1:
            raise ValueError(f"`proportion` must be in (0, 1). Received: proportion={proportion!r}.")
        reached = scores[order].cumsum(0) > proportion * scores.sum()
        count = int(reached.to(torch.uint8).argmax()) + 1
    elif not isinstance(count, int) or count < 1:
        raise ValueError(f"`count` must be at least 1. Received: count={count!r}.")
    order = order[(expectation[order] != 0) & (legacy | (scores[order] > 0))][:count]
    if not len(order):
        raise ValueError(
            "No latent tells the two behaviours apart: none has information and an expectation other than 0. "
            f"Received: {int(features.live.sum())} live latents."
        )
    return order[expectation[order] > 0], order[expectation[order] < 0]


def functional_steering(
    layers: Sequence[tuple[int, FunctionalFeatures, Tensor, Tensor]],
    *,
    towards: int,
    degree: float = 1.0,
    positions: str | Sequence[tuple[int | None, int | None]] = "last_prompt",
) -> Steering:
    """SpARE's edit: of the other behaviour's latents remove what is typical of them, raise those of the wanted one.

    z -> max(z - degree * z_other, 0)   of the other behaviour's latents
    z -> max(z, degree * z_wanted)      of the wanted one's

    The published code's form. The paper's equations 2 to 4 scale the difference and not the aim; both agree at degree
    1. SAEs of several layers are edited in turn, each on the stream that the earlier ones edited.

    Args:
        layers: of each SAE its number in the model, its features, and the selected latents of A and of B.
        towards: 0 for behaviour A, 1 for B.
        degree: alpha of the paper, not negative; 0 removes nothing and raises nothing.
        positions: as for `Steering`; the paper edits the prompt's last token.

    Raises:
        ValueError: `towards` or `degree` is out of range, or there is nothing to edit.
    """
    if towards not in (0, 1):
        raise ValueError(f"`towards` must be 0 (behaviour A) or 1 (B). Received: towards={towards!r}.")
    if not degree >= 0:
        raise ValueError(f"`degree` must not be negative. Received: degree={degree!r}.")
    edits = []
    for number, features, a, b in layers:
        wanted, other = (a, b) if towards == 0 else (b, a)
        of_wanted, of_other = (features.values_a, features.values_b)[:: 1 if towards == 0 else -1]
        edits += _edits(number, "shrink", other, degree * of_other)
        edits += _edits(number, "at_least", wanted, degree * of_wanted)
    if not edits:
        raise ValueError("There is no latent to edit. Received: empty selections of all SAEs.")
    return Steering(edits, positions=positions)


def _edits(sae: int, op: str, latents: Tensor, values: Tensor) -> list[FeatureEdit]:
    chosen = values[latents].tolist()
    return [FeatureEdit(sae, latent, op, value) for latent, value in zip(latents.tolist(), chosen, strict=True)]


def save_functional_features(features: FunctionalFeatures) -> dict[str, Tensor]:
    """Tensors by name, to be written as safetensors; `read_functional_features` reads them."""
    return {name: tensor.contiguous() for name, tensor in features._asdict().items()}


def read_functional_features(path: str | Path) -> FunctionalFeatures:
    """Functional features from a file of ours, or from a folder of SpARE's published cache of one layer.

    Args:
        path: a `.safetensors` file; or a folder with `use_context_weight.pt`, `use_parameter_weight.pt` and the file
            of mutual information, `mutual_information.pt` or `layer-L mi_expectation.pt`. Context is behaviour A,
            memory B. Only tensors are read from them. Several layers: `read_published_features`.

    Raises:
        ValueError: a file or tensor is missing, or shapes differ.
    """
    path = Path(path)
    if path.is_dir():
        published = read_published_features(path)
        if len(published) != 1 or published[0].values is None:
            raise ValueError(
                f"Expected the mutual information and both functional values of one layer, use_context_weight.pt and "
                f"use_parameter_weight.pt. Received: {sorted(file.name for file in path.rglob('*.pt'))}."
            )
        return scored(published[0])
    with opened_tensors(path) as found:
        tensors = {name: found.get_tensor(name) for name in NAMES if name in found.keys()}  # noqa: SIM118
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if list(tensors) != list(NAMES) or len(set(shapes.values())) != 1:
        raise ValueError(f"Expected {', '.join(NAMES)} of one shape (d_sae,). Received: {shapes} in {path.name}.")
    return FunctionalFeatures(**tensors)


def scored(published: PublishedFeatures) -> FunctionalFeatures:
    """Published features as `select_features` reads them; functional values that are not published are zeros."""
    nothing = torch.zeros_like(published.expectation)
    return FunctionalFeatures(
        published.mutual_information, published.expectation, *(published.values or (nothing, nothing))
    )


def without_selection(sae: SparseAutoencoder) -> SparseAutoencoder:
    """An SAE whose latents are its rectified pre-activations: SpARE reads top-k SAEs so.

    The tensors are shared. SAEs whose activation selects nothing come back as they are.
    """
    if sae.config.activation not in (*TOPK_ACTIVATIONS, "batch_topk"):
        return sae
    config = SparseAutoencoderConfig(**{**sae.config.to_dict(), "activation": "relu", "k": None})
    with torch.device("meta"):
        opened = SparseAutoencoder(config)
    tensors = {name: tensor for name, tensor in sae.state_dict().items() if name in opened.state_dict()}
    opened.load_state_dict(tensors, assign=True)
    return opened
