"""An SAE in another library's format; the copy is read back and compared before it is believed."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ..latents.hidden_states import read_hidden_states
from ..modeling import SaeForCausalLM, SparseAutoencoder
from ..modeling.conversion.export import PROBE_TEXTS, describe, export


@dataclass(frozen=True)
class ConvertResult:
    """A copy of an SAE in a format, and how it compares.

    Args:
        source: the format that the SAE came in, and what it is, in words.
        difference: largest difference of the two reconstructions, relative to the largest value of its row.
        fvu: share of the probe's variance that the reconstruction leaves unexplained. l0: latents active on a row.
        probe: what the two were compared on, in words.
    """

    source: str
    difference: float
    fvu: float
    l0: float
    probe: str

    def summary(self) -> list[str]:
        """What the SAE is, and how its copy compares, in a line."""
        measured = f"on {self.probe} L0 {self.l0:.1f}, FVU {self.fvu:.3f}"
        return [f"{self.source}; {measured}; the copy differs by {self.difference:.1e}."]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def convert(
    sae: SparseAutoencoder | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "sae_transformers",
    *,
    probe: Tensor | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ConvertResult:
    """Write an SAE in a format, read it back and compare the two.

    Args:
        sae: an SAE, or its name as `SparseAutoencoder.from_pretrained` takes it.
        out: folder; new, empty, or written by an earlier conversion to the same format.
        to: sae_transformers, saelens, sparsify, dictionary_learning or circuit-tracer.
        probe: (n, d_in), to compare on; by default hidden states of `model` on a few sentences, or 256 Gaussian rows,
            which say whether the copy is exact and little about how good the SAE is.
        model, tokenizer: the base that the SAE is for.

    Raises:
        ValueError: the format cannot say what this SAE is, the folder holds something else, or a model without its
            tokenizer.
        OSError: the folder cannot be written.
    """
    one = sae if isinstance(sae, SparseAutoencoder) else SparseAutoencoder.from_pretrained(sae)
    words = "Gaussian rows" if probe is None else "the given rows"
    if probe is None and model is not None:
        if tokenizer is None:
            raise ValueError("`model` needs its `tokenizer`: they are compared on texts. Received: tokenizer=None.")
        reader = SaeForCausalLM.from_base(model, saes=[copy.deepcopy(one)])
        probe = read_hidden_states(reader, tokenizer, PROBE_TEXTS).hidden
        words = f"hidden states of {model.config.name_or_path}"
    found = export(one, out, to, probe)
    form = one.config.metadata.get("format", "sae_transformers")
    return ConvertResult(f"{form}: {describe(one.config)}", found.difference, found.fvu, found.l0, words)
