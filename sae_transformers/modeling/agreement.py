"""Whether a sparse autoencoder and a base model belong together, as far as both say."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from torch import nn

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


def check_width(entry: Any, number: int, read: HookPoint, hidden_size: int | None) -> None:
    """Raises ValueError where an SAE cannot read what its place holds, as far as that is known before a forward."""
    width = hidden_size if entry.site in RESIDUAL_SITES else None
    if read.side == "input":  # of a linear map (or GPT-2's Conv1D)
        if isinstance(read.module, nn.Linear):
            width = read.module.in_features
        elif type(read.module).__name__ == "Conv1D":
            width = getattr(read.module, "nx", width)
    if width is not None and entry.d_in != width:
        raise ValueError(
            f"SAE {number} reads {entry.d_in} values at {entry.read_at}, where this base has a width of {width}. It "
            f"was made for another base or another place."
        )
