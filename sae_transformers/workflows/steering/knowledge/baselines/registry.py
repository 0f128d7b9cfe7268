"""The methods by the names that `baselines` takes."""

from __future__ import annotations

from .baseline import Baseline
from .contrast import cad, dola
from .prompting import demonstrations, instruction
from .spectral import sea
from .vectors import vectors

METHODS: dict[str, Baseline] = {
    "demonstrations": Baseline(demonstrations),
    "instruction": Baseline(instruction),
    "cad": Baseline(cad),
    "dola": Baseline(dola),
    "vectors": Baseline(vectors, prompts=2, learns=True),
    "sea": Baseline(sea, learns=True),
}
