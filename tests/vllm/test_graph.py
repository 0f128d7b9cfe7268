"""vLLM's own cutting of graphs: our operator is a piece by itself, so nothing that the host decides is captured."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

import importlib.util

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sae_transformers.vllm.ops import STEER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
    pytest.mark.filterwarnings("ignore"),
]


def block(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden * 2 + 1
    hidden = torch.ops.sae_transformers.steer(hidden, hidden, "none", 0)
    return hidden.relu() - 3


def test_our_operator_is_a_piece_of_its_own():
    from vllm.compilation.backends import split_graph

    traced = make_fx(block, tracing_mode="fake")(torch.randn(4, 8))
    _, pieces = split_graph(traced, [STEER])
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    inside = [node.target for node in pieces[1].graph.graph.nodes if node.op == "call_function"]
    assert inside == [torch.ops.sae_transformers.steer.default]
    whole, uncut = split_graph(traced, [])
    assert [piece.is_splitting_graph for piece in uncut] == [False]
