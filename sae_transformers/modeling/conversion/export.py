"""SAEs out to other libraries' formats, each export read back before it is believed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

from ..decoder_norm import FOLDED
from ..output_files import LOCK, locked_folder
from ..sae_files import FORMAT
from ..sparse_autoencoder import SparseAutoencoder
from . import FORMATS, Checkpoint, recognise, sae_ids
from .format import refuse

OWN = "sae_transformers"
# Plain English for a probe with a real model: enough tokens to tell a wrong scale from a right one, no more.
PROBE_TEXTS = (
    "The committee met on Tuesday to discuss the budget for the coming year, and agreed on very little.",
    "When the rain stopped, the children ran out to the garden and looked for snails under the wet leaves.",
    "To install the package, open a terminal and type the following command; it takes about a minute.",
    "She had never trusted the old bridge, but the road along the river was closed, and it was getting dark.",
    "The boiling point of water falls as the altitude rises, because the pressure of the air is lower there.",
    "In 1848 revolutions broke out in many cities of Europe; most of them were put down within a year.",
    "Dear Sir or Madam, I am writing to complain about the delay of my order, which I placed three weeks ago.",
    "def mean(values): return sum(values) / len(values)  # raises an error if the list is empty",
)


class Export(NamedTuple):
    """What was written, and how it compares.

    difference: largest difference of the two reconstructions of a probe, relative to the largest value of its row.
    fvu: share of the probe's variance that the reconstruction leaves unexplained. l0: latents active on a row.
    """

    difference: float
    fvu: float
    l0: float


def targets() -> list[str]:
    """Formats that can be written."""
    return [OWN, *(form.name for form in FORMATS if form.write is not None)]


def export(sae: SparseAutoencoder, folder: str | os.PathLike, to: str, probe: Tensor | None = None) -> Export:
    """Write an SAE in a format, read it back and compare the two on a probe.

    Args:
        sae: the SAE.
        folder: where to; new, empty, or written by an earlier export of the same format.
        to: one of `targets()`.
        probe: (n, d_in); 256 Gaussian rows of norm sqrt(d_in) by default, which say whether the copy is exact and
            little about how good the SAE is.

    Raises:
        ValueError: the format cannot say what this SAE is, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    form = next((form for form in FORMATS if form.name == to and form.write), None)
    if sae.config.hooks_out and form is not None:
        raise refuse("hooks_out", sae.config.hooks_out, to)
    if to != OWN and form is None:
        raise ValueError(f"`to` must be one of {', '.join(targets())}. Received: to={to!r}.")
    there = [file for file in Path(folder).iterdir() if file.name != LOCK] if Path(folder).is_dir() else []
    if there and format_of(folder) != to:
        raise ValueError(f"{folder} holds files of another format; give a new folder.")
    with locked_folder(folder):
        written = None
        if form is None or form.write is None:
            sae.save_pretrained(folder)
        else:
            written = form.write(sae.config, sae.state_dict(), Path(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when the SAE was first read
            copy = SparseAutoencoder.from_pretrained(folder, sae_id=written)
    return compare(sae, copy, probe)


def format_of(folder: str | os.PathLike) -> str | None:
    """The format of the SAEs in a folder, None where there are none that is known."""
    checkpoint = Checkpoint(str(folder))
    if checkpoint.has(CONFIG_NAME) and checkpoint.json(CONFIG_NAME).get("format") == FORMAT:
        return OWN
    form = recognise(checkpoint)
    return form.name if form else next(iter(sae_ids(checkpoint).values()), None)


@torch.no_grad()
def compare(sae: SparseAutoencoder, copy: SparseAutoencoder, probe: Tensor | None = None) -> Export:
    """Two SAEs on a probe (n, d_in)."""
    if probe is None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(256, sae.config.d_in, generator=generator)
    ours, theirs = (one(probe.to(one.dtype)) for one in (sae, copy))
    rows, others = ours.reconstruction.float(), theirs.reconstruction.float()
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    target = probe.float()
    fvu = torch.tensor(float("nan"))
    if rows.shape == target.shape:
        fvu = (rows - target).square().sum() / (target - target.mean(0)).square().sum()
    l0 = (ours.latents != 0).sum(-1).float().mean()
    return Export(float(((rows - others).abs() / largest).max()), float(fvu), float(l0))


def describe(config: Any) -> str:
    """An SAE in one line: `jumprelu, 2304 -> 16384, reads layers.12.resid_post, for google/gemma-2-2b`."""
    kind = config.activation + (f" (k={config.k})" if config.k else "")
    wide = f"{config.d_in} -> {config.d_sae}" + (f" -> {config.d_out}" if config.d_out != config.d_in else "")
    place = f"reads {config.read_at}" if config.placed else "no place in a model"
    if config.write_at != config.read_at:
        place += f", writes {config.write_at}"
    notes = [kind, wide, place]
    if config.normalization != "none":
        notes.insert(1, config.normalization)
    if config.metadata.get(FOLDED):
        notes.append("decoder norms folded")
    if config.metadata.get("base_model"):
        notes.append(f"for {config.metadata['base_model']}")
    return ", ".join(notes)
