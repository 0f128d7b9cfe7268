"""Cross-layer transcoders and crosscoders: SAEs, one for each layer that is read, that write to several places.

    z_l = encode_l(x_l)
    y_m = sum over the layers l that write to m of (z_l @ W_dec_lm + b_dec_lm [+ x_l @ W_skip_lm])

https://transformer-circuits.pub/2025/attribution-graphs/methods.html (cross-layer transcoders) and
https://transformer-circuits.pub/2024/crosscoders/index.html. Each layer is a `SparseAutoencoder` with `hooks_out`;
only all of them together have an output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ...modeling import SparseAutoencoder


def cross_layer_outputs(saes: Iterable[SparseAutoencoder], states: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What the layers of a cross-layer transcoder or crosscoder make of the states that they read.

    Args:
        saes: all layers, such as `model.saes`.
        states: of each what it reads, (..., d_in), as `model(..., output_sae_inputs=True).sae_inputs`.

    Returns:
        Place (as in `hooks_out`) -> (..., d_out / number of places), the sum over the layers that write there.

    Raises:
        ValueError: SAEs of another kind, or there is not a state for each.
    """
    found: dict[str, Tensor] = {}
    saes = list(saes)
    if len(saes) != len(states) or any(state is None for state in states):
        raise ValueError(
            f"Expected the state that each SAE reads. Received: {len(saes)} SAEs, "
            f"{sum(state is not None for state in states)} states."
        )
    for number, (sae, state) in enumerate(zip(saes, states, strict=True)):
        places = sae.config.hooks_out
        if not places:
            raise ValueError(
                f"Expected SAEs with `hooks_out`, of a cross-layer transcoder or a crosscoder. "
                f"Received: SAE {number}, which writes {sae.config.write_at if sae.config.placed else 'nowhere'}."
            )
        for place, part in zip(places, sae(state).reconstruction.chunk(len(places), -1), strict=True):
            found[place] = found[place] + part.to(found[place].device) if place in found else part
    return found
