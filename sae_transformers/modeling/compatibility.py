"""Whether a sparse autoencoder and a base model belong together, as far as both say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

from .hook_points import HookPoint

# Other libraries' names of models, where they differ by more than the owner.
ALIASES = {"gpt2-small": "gpt2"}
INSTRUCTION_TUNED = re.compile(r"-(it|instruct|chat)\b")
RESIDUAL_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")


def same_model(one: str, other: str) -> bool:
    """Whether two ids or folders name the same model: owner, case and other libraries' aliases do not count."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    parts = PurePath(name.replace("\\", "/")).parts
    if "snapshots" in parts:  # a folder of the Hub's cache is named by its commit
        parts = parts[parts.index("snapshots") - 1].split("--")
    plain = parts[-1].casefold().removeprefix("meta-") if parts else ""
    return ALIASES.get(plain, plain)


def check_model(sae_config: Any, number: int, base: str | None) -> None:
    """Raises ValueError where an SAE was made for a model of another name than the base's."""
    made_for = sae_config.metadata.get("base_model")
    if not isinstance(made_for, str) or not made_for or not base or same_model(made_for, base):
        return
    tuned = [bool(INSTRUCTION_TUNED.search(_plain(name))) for name in (made_for, base)]
    hint = ""
    if tuned[0] != tuned[1]:
        hint = f" One is instruction-tuned ({made_for if tuned[0] else base}), the other is not."
    raise ValueError(
        f"SAE {number} was made for {made_for!r}. Received: the base {base!r}.{hint} `force=True` puts it in all the "
        f"same; `sae.config.metadata['base_model']` is what it claims."
    )


def check_width(
    entry: Any, number: int, read: HookPoint, hidden_size: int | None, writes: Sequence[HookPoint]
) -> None:
    """Raises ValueError where an SAE cannot read or write what its places hold, as far as known before a forward."""
    ends = [("reads", "d_in", entry.d_in, entry.read_at, read)]
    if entry.write_at != entry.read_at:
        each = (entry.d_out or entry.d_in) // len(entry.writes_at)
        ends += [("writes", "d_out", each, *end) for end in zip(entry.writes_at, writes, strict=True)]
    for verb, field, given, place, point in ends:
        width = _width_at(place, point, hidden_size)
        if width is not None and given != width:
            raise ValueError(
                f"SAE {number} {verb} {given} values at {place}, where this base has a width of {width} "
                f"({type(point.module).__name__}, {point.path}). Received: {field}={given!r}. It was made for another "
                f"base or another place: give that base, or its place here with `layer`, `site`, `hook` or `hook_out`."
            )


def check_states(number: int, seen: Tensor, here: Tensor, widths: tuple[int, int | None], mask: Tensor | None) -> None:
    """Raises ValueError where hidden states are not of an SAE's widths, or not of the tokens that are steered.

    Args:
        seen: (batch, seq, d_in), where it reads. here: (batch, seq, d_out), where it writes.
        mask: (batch, length), the tokens that are steered.
    """
    if seen.shape[-1] != widths[0]:
        raise ValueError(
            f"SAE {number} reads {widths[0]} values and the module it is hooked to gives {seen.shape[-1]}. "
            f"Place it elsewhere with `layer`, `site` or `hook`."
        )
    if here.shape[-1] != widths[1]:
        raise ValueError(
            f"SAE {number} writes {widths[1]} values where the module gives {here.shape[-1]}. "
            f"Place its output elsewhere with `hook_out`."
        )
    if mask is not None and mask.shape[1] != here.shape[1]:
        raise ValueError(
            f"SAE {number} stands where there are {here.shape[1]} positions, which are not the text's tokens (an "
            f"image may be put before them). Expected {mask.shape[1]}. Steer all positions there."
        )


def _width_at(place: str, point: HookPoint, hidden_size: int | None) -> int | None:
    """Values at a place, None where only a forward can tell: of a linear map (or GPT-2's Conv1D) or of the stream."""
    names = {"input": ("in_features", "nx"), "output": ("out_features", "nf")}[point.side]
    if isinstance(point.module, nn.Linear):
        return getattr(point.module, names[0], None)
    if type(point.module).__name__ == "Conv1D" and hasattr(point.module, names[1]):
        return getattr(point.module, names[1])
    named = re.fullmatch(rf"layers\.\d+\.({'|'.join(RESIDUAL_SITES)})", place)
    return hidden_size if named else None
