"""What a foreign format is, and what reading one gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..output_files import whole_file
from ..plain_files import written_tensors
from .checkpoint import PICKLES, Checkpoint


@dataclass
class Converted:
    """An SAE in our terms.

    Args:
        values: fields of `SparseAutoencoderConfig`. What the format says about the model goes into `metadata`:
            `base_model` (id), `context_length`, `prepend_bos`, `processing` (what another library did to the model).
        tensors: by the names of `SparseAutoencoder`; views of the file where nothing has to be computed.
        warnings: what a user must know before trusting the numbers.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    warnings: list[str] = field(default_factory=list)


# Of an SAE's config and tensors, into a folder; gives the file's name where a folder holds several SAEs.
Writer = Callable[[Any, Mapping[str, Tensor], Path], str | None]


class Format(NamedTuple):
    """A foreign checkpoint format.

    Attributes:
        name: as users know it.
        weights: pattern of its weight file's path, relative to the SAE's folder: `sae_weights\\.safetensors`.
        recognise: whether the files of one SAE are of this format; looks at names and configs, not at weights.
        read: its config and tensors.
        write: the way back, where there is one. Raises ValueError for what the format cannot say.
        one_file: an SAE is one file, and a folder may hold many.
    """

    name: str
    weights: str
    recognise: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], Converted]
    write: Writer | None = None
    one_file: bool = False

    def ids(self, files: list[str]) -> list[str]:
        """Paths of the SAEs of this format that a repository seems to hold."""
        found = (re.fullmatch(f"(?:(?P<folder>.*)/)?(?:{self.weights})", file) for file in files)
        return [m.group(0) if self.one_file else m["folder"] or "" for m in found if m]


# -- what several formats share --------------------------------------------------------------------------------------


def need(tensors: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> None:
    """Raises ValueError unless all of `names` are there, as tensors."""
    if missing := [name for name in names if not isinstance(tensors.get(name), Tensor)]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(map(str, tensors))) or 'nothing'}."
        )


def only(tensors: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises ValueError where there is more than `names`: what is not understood must not be dropped in silence."""
    if extra := sorted(map(str, set(tensors) - set(names))):
        raise ValueError(f"{where} holds {', '.join(extra)}, which this format does not know.")


def matrix(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """A matrix by name."""
    need(tensors, (name,), where)
    if tensors[name].ndim != 2:
        raise ValueError(f"{name} in {where} must be a matrix. Received: shape {tuple(tensors[name].shape)}.")
    return tensors[name]


def shaped(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Floating-point numbers by name, of the shape that the other tensors ask for."""
    need(tensors, (name,), where)
    if tuple(tensors[name].shape) != shape:
        raise ValueError(
            f"{name} in {where} must have shape {shape} to fit the other tensors. Received: shape "
            f"{tuple(tensors[name].shape)}."
        )
    if not tensors[name].is_floating_point() or tensors[name].element_size() < 2:
        raise ValueError(
            f"{name} in {where} must be numbers of a 16-bit float or wider. Received: {tensors[name].dtype}."
        )
    return tensors[name]


# By these words libraries say in a config what an SAE computes. Several libraries give their files the same names.
MATHEMATICS = (
    "act_fn", "activation", "activation_fn", "activation_fn_str", "activation_type", "architecture", "dict_class",
    "encoder_type", "nonlinearity", "sae_type",
)  # fmt: skip


def no_other_words(values: Mapping[str, Any], own: tuple[str, ...], where: str) -> None:
    """Raises ValueError where a config says what it computes by a word that this format does not have: another
    library wrote it, whose mathematics would be left out in silence."""
    if others := [name for name in MATHEMATICS if values.get(name) is not None and name not in own]:
        raise ValueError(
            f"{where} says what it computes by {', '.join(map(repr, others))}, which this format does not have: "
            f"another library wrote it. Received: {others[0]}={values[others[0]]!r}."
        )


def agree(values: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Raises ValueError where a config states other sizes than the tensors have."""
    for name, size in sizes.items():
        if number(values, name, where, default=None) not in (None, size):
            raise ValueError(f"`{name}` in {where} must be {size}, as its tensors. Received: {name}={values[name]!r}.")


def given_or_stated(checkpoint: Checkpoint, values: Mapping[str, Any], name: str, where: str) -> int:
    """A whole number of at least 1 that a config states or, where it does not, the caller."""
    found = number(values, name, where, kind=int, default=None)
    if found is None:
        found = number(checkpoint.given, name, "the options", kind=int, default=None)
    if found is None:
        raise ValueError(f"{where} does not state `{name}`; give `{name}=`.")
    if found < 1:
        raise ValueError(f"`{name}` in {where} must be at least 1. Received: {name}={found!r}.")
    return found


def takes(checkpoint: Checkpoint, *names: str) -> None:
    """Raises TypeError where the caller states a field that the files say themselves."""
    if extra := sorted(set(checkpoint.given) - set(names) - {"base_model"}):
        raise TypeError(f"{checkpoint.label} says all that is needed. Received: {', '.join(extra)}.")


def whole_name(checkpoint: Checkpoint) -> str:
    """Repository and path of an SAE, for what only their names say: id of the base, layer, site."""
    # Not resolved: in the Hub's cache a file is a link to a name that says nothing.
    return Path(checkpoint.label).absolute().as_posix() if checkpoint.local else checkpoint.label


def one_pickle(checkpoint: Checkpoint) -> str | None:
    """The file of an SAE that is one torch file and nothing else."""
    files = checkpoint.files
    return files[0] if len(files) == 1 and "/" not in files[0] and files[0].endswith(PICKLES) else None


def number(values: Mapping[str, Any], name: str, where: str, *, kind: type = float, default: Any = ...) -> Any:
    """A finite number of a config."""
    value = values.get(name, default)
    if value is default and default is not ...:
        return default
    whole = kind is int and isinstance(value, float) and value.is_integer()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (kind is int and not isinstance(value, int) and not whole)
    ):
        raise ValueError(f"`{name}` in {where} must be a number ({kind.__name__}). Received: {name}={value!r}.")
    if not -1e30 < value < 1e30:
        raise ValueError(f"`{name}` in {where} must be a finite number. Received: {name}={value!r}.")
    return kind(value)


def flag(values: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    """True or False of a config."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` in {where} must be true or false. Received: {name}={value!r}.")
    return value


def text(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """A text of a config, None where there is none."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{name}` in {where} must be a text. Received: {name}={value!r}.")
    return value or None


def full(value: Tensor | float, like: Tensor, d_sae: int) -> Tensor:
    """One number for every latent, (d_sae,), with dtype of `like`."""
    return torch.full((d_sae,), float(value), dtype=like.dtype)


def by_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """Rows times `factors` (n,), computed in float32 at least, with dtype of `matrix`."""
    return (matrix.to(_accurate(matrix)) * factors[:, None]).to(matrix.dtype)


def by_columns(values: Tensor, factors: Tensor) -> Tensor:
    """The same for columns, or for the elements of a vector."""
    return (values.to(_accurate(values)) * factors).to(values.dtype)


def row_norms(matrix: Tensor) -> Tensor:
    """Norms of rows (n,), in float32 at least."""
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=_accurate(matrix))


def _accurate(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# -- what several writers share --------------------------------------------------------------------------------------


def refuse(name: str, value: Any, form: str, instead: str = "") -> ValueError:
    """The error of a writer for what its format cannot say."""
    return ValueError(f"{form} checkpoints cannot say this{instead and '; ' + instead}. Received: {name}={value!r}.")


def without_input_scale(config: Any, tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Weights that do the same without `normalization="scalar"`, where a format lacks it; same latents."""
    found = dict(tensors)
    if config.normalization != "scalar":
        return found
    scale = config.input_scale
    undone = (config.output_scale or scale) if config.normalize_output else 1.0
    if config.apply_b_dec_to_input and undone != scale:
        name = "output_scale" if config.normalize_output else "normalize_output"
        raise refuse(name, getattr(config, name), form, "with `apply_b_dec_to_input` one scale must serve both sides")
    if config.tied:
        found["W_enc"] = found["W_dec"].T
    found["W_enc"] = found["W_enc"] * scale
    found["W_dec"], found["b_dec"] = found["W_dec"] / undone, found["b_dec"] / undone
    return found


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_tensors(path), whole_file(path) as draft:
        save_file(stored, draft, metadata={"format": "pt"})


# -- places ----------------------------------------------------------------------------------------------------------


TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_heads",
    "mlp.hook_in": "mlp_in",  # not `hook_mlp_in`, which is before the norm
    "mlp.hook_post": "mlp_act",
}
SITE_NAMES = {site: hook for hook, site in TRANSFORMER_LENS.items()}


def place_of_hook(hook: str | None) -> dict[str, Any]:
    """`layer` and `site` of a TransformerLens hook name, as `blocks.12.hook_resid_post`; empty where it has no
    counterpart in a Hugging Face model."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    site = TRANSFORMER_LENS.get(match[2]) if match else None
    return {"layer": int(match[1]), "site": site} if match and site else {}


def place_of_hooks(hook_in: str | None, hook_out: str | None) -> tuple[dict[str, Any], list[str]]:
    """Place of an SAE or transcoder by the TransformerLens hooks that it reads and writes, and warnings."""
    place = place_of_hook(hook_in)
    if hook_in and not place:
        return {}, [
            f"it reads {hook_in}, which no Hugging Face module has as its input or output; it has no place until "
            f"`layer` and `site` or `hook` give it one."
        ]
    if hook_out in (None, hook_in):
        return place, []
    written = place_as_text(hook_out)
    if place and not written:
        return {}, [f"it writes {hook_out}, which has no counterpart in a Hugging Face model; it has no place."]
    return (place | {"hook_out": written} if place else {}), []


def place_as_text(hook: str | None) -> str | None:
    """The same as one string, for `hook_out`: `layers.12.mlp_out`."""
    place = place_of_hook(hook)
    return f"layers.{place['layer']}.{place['site']}" if place else None
