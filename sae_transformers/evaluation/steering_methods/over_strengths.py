"""Ways to bring a concept about, each over its strengths: a latent, any steering that is scaled, an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...modeling import FeatureEdit, Steering
from ...modeling.steering import without_receipt
from ..method_ids import FEATURE, MethodId, baseline_method
from ..steering.axbench import SteeringMethod
from .method import STRENGTHS


def latent_method(
    feature: int | str,
    strengths: Sequence[float] = STRENGTHS,
    *,
    sae: int = 0,
    op: str = "direction",
    unit: str = "norm",
    positions: Any = "all",
    keep_error: bool = True,
) -> SteeringMethod:
    """One latent, or one direction of a `direction_sae`, edited with every strength.

    Args:
        feature: index of the latent, or name of a concept of the SAE.
        strengths: values of the edit, negative ones for less of the concept; for op `scale`, factors.
        sae, op, unit: of `FeatureEdit`; `scale` takes no unit and gets none.
        positions, keep_error: of `Steering`.
    """
    of_op = "absolute" if op in ("scale", "scale_magnitude") else unit
    steerings = [
        Steering([FeatureEdit(sae, feature, op, float(value), of_op)], positions=positions, keep_error=keep_error)
        for value in strengths
    ]
    of = MethodId(FEATURE, sae=sae, feature=feature, name=feature if isinstance(feature, str) else "")
    return SteeringMethod([f"{value:g}" for value in strengths], steerings, of=of)


def scaled_method(steering: Steering, factors: Sequence[float]) -> SteeringMethod:
    """A given steering at several strengths, each a factor of `scaled_steering`."""
    steerings = [scaled_steering(steering, factor) for factor in factors]
    return SteeringMethod([f"x{factor:g}" for factor in factors], steerings, of=MethodId("steering"))


def scaled_steering(steering: Steering, factor: float) -> Steering:
    """The same edits, `factor` times as strong: 1 is the steering itself, and -1 goes the other way.

    `add` and `direction` are linear, so their values are multiplied, as are those of `shrink`, and with them the
    levels of `set`, `at_least` and `at_most`. `scale a` becomes `scale 1 + factor * (a - 1)`, `ablate` being
    `scale 0`; with factor 0 these change nothing.

    Raises:
        ValueError: the steering has no edit, or re-weights a whole code or erases, which has no strength.
    """
    erased = sum(edit.op == "erase" for edit in steering.feature_edits)
    if not steering.edits or steering.reweightings or erased:
        raise ValueError(
            f"Expected a steering of single latents to scale. Received: {len(steering.feature_edits)} edits of "
            f"latents, {erased} of which erase, {len(steering.reweightings)} re-weightings."
        )
    edits = []
    for edit in steering.feature_edits:
        if edit.op in ("scale", "scale_magnitude", "ablate"):
            to = 0.0 if edit.value is None else edit.value
            op = "scale" if edit.op == "ablate" else edit.op
            edits.append(replace(edit, op=op, value=1 + factor * (to - 1)))
        else:
            edits.append(replace(edit, value=factor * (edit.value or 0.0)))
    return replace(Steering.from_dict(without_receipt(steering)), edits=tuple(edits))


def prompt_methods(prompts: Sequence[str], more: str, less: str = "") -> list[SteeringMethod]:
    """An instruction before every prompt in place of steering: one for more of the concept and one for less.

    Args:
        prompts: as the suite gets them.
        more, less: instructions; an empty one is left out.

    Raises:
        ValueError: both are empty.
    """
    told = {"for": more, "against": less}
    if not more.strip() and not less.strip():
        raise ValueError(f"Expected an instruction for or against the concept. Received: {more!r} and {less!r}.")
    prompting = baseline_method("prompt", "prompt")
    return [
        SteeringMethod([name], [None], [f"{text.strip()}\n\n{prompt}" for prompt in prompts], of=prompting)
        for name, text in told.items()
        if text.strip()
    ]
