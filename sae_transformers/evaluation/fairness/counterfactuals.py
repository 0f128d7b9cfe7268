"""Does a classifier rely on features that it should not use? Measured on swapped texts, on groups, on its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...modeling import SparseAutoencoder
from ..classification import mean_interval

AT_ONCE = 1 << 24  # latents held at a time: 64 MiB of float32


@torch.no_grad()
def unintended_reconstruction(states: Tensor, sae: SparseAutoencoder, features: Tensor) -> Tensor:
    """What unintended features say in each hidden state, `relu(pre_U) @ W_dec[U]`, in the units of the state.

    All of U by its rectified pre-activation, whatever the SAE's own activation selects: SelfReg
    (https://huggingface.co/papers/2502.14133) removes features so.

    Args:
        sae: with one affine encoder; gated and GLU ones have none.
        states: (..., d_in), any float dtype.
        features: (m,) int64, U; may be empty.

    Returns:
        (..., d_in), dtype and device of `states`; zeros where `features` is empty.

    Raises:
        ValueError: the widths differ, a feature is out of range, or the encoder is not affine.
    """
    features = check_features(sae, features)
    if states.shape[-1] != sae.config.d_in or (sae.config.d_out or sae.config.d_in) != sae.config.d_in:
        raise ValueError(
            f"Expected states (..., {sae.config.d_in}) and an SAE that reconstructs its input. "
            f"Received: states {tuple(states.shape)}, d_out={sae.config.d_out!r}."
        )
    rows = states.reshape(-1, states.shape[-1])
    result = torch.zeros_like(rows)
    if len(features):
        W_dec = sae.W_dec[features]
        for start in range(0, len(rows), max(1, AT_ONCE // len(features))):
            part = slice(start, start + max(1, AT_ONCE // len(features)))
            hidden = rows[part].to(device=sae.device, dtype=sae.dtype)
            said = sae.encode_pre_acts(hidden, features).relu() @ W_dec
            scale = sae.normalize(hidden).scale
            result[part] = (said if scale is None else said * scale).to(result)
    return result.view(states.shape)


def check_features(sae: SparseAutoencoder, features: Tensor) -> Tensor:
    """Distinct indices, sorted, (m,) int64 on the SAE's device, of indices or a (d_sae,) bool mask; or ValueError."""
    d_sae = sae.config.d_sae
    if sae.config.activation == "gated" or sae.config.glu:
        raise ValueError(
            f"Unintended features need an SAE with one affine encoder. "
            f"Received: activation={sae.config.activation!r}, glu={sae.config.glu!r}."
        )
    if features.dtype == torch.bool:
        if features.shape != (d_sae,):
            raise ValueError(f"A mask of features is ({d_sae},). Received: {tuple(features.shape)}.")
        features = features.nonzero()[:, 0]
    if features.ndim != 1 or features.is_floating_point() and len(features):
        raise ValueError(
            f"Features are (m,) integers or a ({d_sae},) mask. Received: {tuple(features.shape)}, {features.dtype}."
        )
    features = features.to(device=sae.device, dtype=torch.long).unique()
    if len(features) and (int(features[0]) < 0 or int(features[-1]) >= d_sae):
        raise ValueError(
            f"Features are in [0, {d_sae}); are they of another SAE? "
            f"Received: {int(features[0])} to {int(features[-1])}."
        )
    return features


def swap_sensitivity(
    logits_original: Tensor, logits_swapped: Tensor, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """How much a decision changes when one attribute of a text is swapped, such as a name or a gender.

    Counterfactual fairness asks for no change (https://huggingface.co/papers/1703.06856); measured on paired texts as
    in "Counterfactual Fairness in Text Classification through Robustness"
    (https://huggingface.co/papers/1809.10610), section 3.

    Args:
        logits_original, logits_swapped: (n,) of one yes-or-no decision, or (n, n_classes), 2 classes or more.
        resamples: of the bootstrap over texts.

    Returns:
        `delta_logit`, mean |change of the logit|; `delta_probability`, the same of sigmoid or softmax; both averaged
        over classes; `flips`, share of texts whose predicted class changes. Each a dict of `value` and of the 95 %
        interval, `low` and `high`.

    Raises:
        ValueError: shapes differ, or there is no text.
    """
    if logits_original.shape != logits_swapped.shape or logits_original.ndim not in (1, 2) or not len(logits_original):
        raise ValueError(
            f"Expected logits of one shape, (n,) or (n, n_classes). "
            f"Received: {tuple(logits_original.shape)} and {tuple(logits_swapped.shape)}."
        )
    first, second = (logits.detach().cpu().double() for logits in (logits_original, logits_swapped))
    if first.ndim == 2 and first.shape[1] == 1:
        first, second = first[:, 0], second[:, 0]
    if first.ndim == 1:
        probabilities, flips = (first.sigmoid(), second.sigmoid()), (first > 0) != (second > 0)
    else:
        probabilities, flips = (first.softmax(-1), second.softmax(-1)), first.argmax(-1) != second.argmax(-1)
    changes = {
        "delta_logit": (first - second).abs(),
        "delta_probability": (probabilities[0] - probabilities[1]).abs(),
        "flips": flips.double(),
    }
    return {
        name: mean_interval(change.reshape(len(change), -1).mean(-1), resamples=resamples, seed=seed)
        for name, change in changes.items()
    }


def group_gaps(predictions: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Largest difference between groups of a yes-or-no decision.

    demographic parity:  max - min over groups of P(predicted 1 | group)   (https://huggingface.co/papers/1104.3913)
    equal opportunity:   max - min over groups of P(predicted 1 | label 1, group)
    equalised odds:      the larger of that and the same for label 0       (https://huggingface.co/papers/1610.02413)

    Args:
        predictions, labels: (n,) 0 or 1.
        groups: (n,) integers, the group of each text; two groups or more.

    Returns:
        `demographic_parity`, `equal_opportunity`, `equalised_odds`, each 0 to 1; nan where a group has no text of the
        label that is asked for.

    Raises:
        ValueError: shapes differ, a value is neither 0 nor 1, or there is only one group.
    """
    if predictions.ndim != 1 or predictions.shape != labels.shape or labels.shape != groups.shape:
        raise ValueError(
            f"Expected (n,) three times. "
            f"Received: {tuple(predictions.shape)}, {tuple(labels.shape)}, {tuple(groups.shape)}."
        )
    for name, values in (("predictions", predictions), ("labels", labels)):
        if not bool(((values == 0) | (values == 1)).all()):
            raise ValueError(f"`{name}` must be 0 or 1. Received: {sorted(set(values.tolist()))[:5]}.")
    names = groups.unique()
    if len(names) < 2:
        raise ValueError(f"A gap needs two groups or more. Received: groups={names.tolist()!r}.")
    yes = predictions.double()

    def gap(among: Tensor) -> float:
        rates = torch.stack([yes[(groups == name) & among].mean() for name in names])  # the mean of nothing is nan
        return float(rates.max() - rates.min())

    opportunity, other = gap(labels == 1), gap(labels == 0)
    odds = float(torch.tensor([opportunity, other], dtype=torch.float64).max())  # nan if one is
    everyone = torch.ones_like(labels, dtype=torch.bool)
    return {"demographic_parity": gap(everyone), "equal_opportunity": opportunity, "equalised_odds": odds}


@torch.no_grad()
def feature_reliance(
    weight: Tensor, states: Tensor, sae: SparseAutoencoder, unintended: Tensor, *, one_of: bool = True
) -> dict[str, float]:
    """Share of a linear decision that goes through unintended features.

    s = H @ w                                      the decision, without its bias
    c = (relu(pre_U) @ W_dec[U]) @ w               the part of it that U's reconstruction says
    variance     = Cov(c, s) / Var(s)              c and s - c add up to s, so the two shares add up to 1
    contribution = mean|c - mean c| / (mean|c - mean c| + mean|r - mean r|),  r = s - c

    `variance` is the covariance share of a sum's part (Shorrocks 1982, https://doi.org/10.2307/1912537); it exceeds
    [0, 1] where c and the rest oppose each other. `contribution` is always inside. Both ignore constants, which a bias
    can undo. With several rows of w, sums and means run over the rows too.

    Args:
        weight: (d_in,) or (n_classes, d_in), of a linear head.
        states: (n, d_in), n at least 2; for a head that removes features, before the removal.
        sae: whose features they are.
        unintended: (m,) indices or (d_sae,) mask.
        one_of: whether several rows score classes of which one holds: softmax does not see what they have in common,
            so it is taken out of w first. False for yes-or-no labels that may hold together.

    Returns:
        `variance` and `contribution`; 0 where U is empty or w is 0.
    """
    if states.ndim != 2 or len(states) < 2 or weight.shape[-1] != states.shape[1] or weight.ndim not in (1, 2):
        raise ValueError(
            f"Expected weight (..., d_in) and states (n, d_in), n at least 2. "
            f"Received: weight {tuple(weight.shape)}, states {tuple(states.shape)}."
        )
    rows = weight.detach().double().view(-1, weight.shape[-1]).to(states.device)
    if one_of and len(rows) > 1:
        rows = rows - rows.mean(0)
    decision = states.double() @ rows.T  # (n, n_classes)
    return _shares(decision, unintended_reconstruction(states, sae, unintended).double() @ rows.T)


def attributed_reliance(
    score: Callable[[Tensor], Tensor],
    states: Tensor,
    sae: SparseAutoencoder,
    unintended: Tensor,
    *,
    one_of: bool = True,
) -> dict[str, float]:
    """`feature_reliance` of any decision, by attribution: its slope takes the place of the weights.

    s = score(H),   c = relu(pre_U) @ W_dec[U] times ds/dH, summed over the width      (gradient x latent)

    For a linear score the same as `feature_reliance`. Where the score is not linear `c` is what the features say to
    first order.

    Args:
        score: hidden states (n, d_in) to (n,) or (n, n_classes), each row by itself, with a gradient.
        states, sae, unintended, one_of: as for `feature_reliance`.
    """
    with torch.enable_grad():
        leaf = states.detach().clone().requires_grad_()
        decision = score(leaf)
        if decision.ndim not in (1, 2) or len(decision) != len(states) or len(states) < 2:
            raise ValueError(
                f"Expected a score (n,) or (n, n_classes) of states (n, d_in), n at least 2. Received: "
                f"{tuple(decision.shape)} of {tuple(states.shape)}."
            )
        decision = decision.reshape(len(states), -1)
        slopes = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in decision.unbind(1)]
    said = unintended_reconstruction(states, sae, unintended).double()
    part = torch.stack([(said * slope.double()).sum(-1) for slope in slopes], 1)
    decision = decision.detach().double()
    if one_of and decision.shape[1] > 1:
        decision, part = decision - decision.mean(1, keepdim=True), part - part.mean(1, keepdim=True)
    return _shares(decision, part)


def _shares(decision: Tensor, part: Tensor) -> dict[str, float]:
    """`variance` and `contribution` of a part (n, n_classes) of decisions."""
    decision, part = decision - decision.mean(0), part - part.mean(0)
    total, through = decision.square().sum(), part.abs().sum()
    both = through + (decision - part).abs().sum()
    return {
        "variance": float((part * decision).sum() / total) if total > 0 else 0.0,
        "contribution": float(through / both) if both > 0 else 0.0,
    }
