"""Our control vectors in llama.cpp: its own loader reads them, and greedy tokens are those of `generate`.

Needs an interpreter with the wheel xllamacpp, named by SAE_TRANSFORMERS_LLAMA_CPP; `make test-parity` makes one:

    SAE_TRANSFORMERS_LLAMA_CPP=$(python benchmarks/peers.py llama.cpp) pytest -m parity tests/parity/test_llama_cpp.py
"""

from __future__ import annotations

import os

import pytest

from benchmarks.llama_cpp import compare
from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.tiny import tiny_base, tiny_sae

PYTHON = os.environ.get("SAE_TRANSFORMERS_LLAMA_CPP", "")
PROMPTS = [[start, *range(start + 3, start + 9)] for start in range(3, 43, 8)]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PYTHON, reason="SAE_TRANSFORMERS_LLAMA_CPP names no interpreter with llama.cpp"),
]


def test_greedy_tokens_are_equal_and_each_layer_is_where_it_should_be() -> None:
    model = SaeForCausalLM.from_base(
        tiny_base(num_hidden_layers=4), saes=[tiny_sae(seed, layer=seed) for seed in (1, 2, 3)]
    )
    steerings: dict[str, Steering | None] = {"none": None}
    steerings |= {f"block {number + 1}": Steering([FeatureEdit(number, 5, "direction", 2.0)]) for number in range(3)}
    steerings["all"] = Steering([FeatureEdit(number, 7, "direction", -1.0) for number in range(3)])
    rows = compare(model, PROMPTS, steerings, 12, PYTHON)
    assert [row["equal"] for row in rows] == [len(PROMPTS)] * 5, rows
    assert all(float(row["logits"]) < 1e-5 for row in rows), rows
