"""Activations by hand-computed examples, and their gradients."""

# pyright: reportArgumentType=false, reportUnusedExpression=false

import torch
from torch.autograd import gradcheck

from sae_transformers.modeling.activations import after_top_k, gated, jump_relu, select, top_k

PRE = torch.tensor([[3.0, -5.0, 0.5, 2.0], [-1.0, -4.0, -0.5, -2.0]])


def test_top_k_takes_the_largest_signed_values():
    values, indices = top_k(PRE, 2)
    assert values.tolist() == [[3.0, 2.0], [-0.5, -1.0]]
    assert indices.tolist() == [[0, 3], [2, 0]]


def test_select_by_magnitude_and_by_group():
    values, indices = select(PRE, 2, "abs_topk")
    assert values.tolist() == [[-5.0, 3.0], [-4.0, -2.0]] and indices.tolist() == [[1, 0], [1, 3]]
    values, indices = select(PRE, 2, "groupmax")
    assert values.tolist() == [[3.0, 2.0], [-1.0, -0.5]] and indices.tolist() == [[0, 3], [0, 2]]
    assert torch.equal(select(PRE, 3, "topk")[1], top_k(PRE, 3)[1])


def test_after_top_k_is_relu_unless_named_otherwise():
    values = torch.tensor([2.0, -1.0])
    assert after_top_k(values, "topk").tolist() == [2.0, 0.0]
    assert torch.equal(after_top_k(values, "topk-sigmoid"), torch.sigmoid(values))
    assert torch.equal(after_top_k(values, "topk-tanh"), torch.tanh(values))
    assert after_top_k(values, "topk-identity").tolist() == after_top_k(values, "abs_topk").tolist() == [2.0, -1.0]
    assert after_top_k(values, "groupmax").tolist() == [2.0, 0.0]


def test_jump_relu_is_strict_and_keeps_the_value():
    threshold = torch.tensor([3.0, 0.0, 0.4, -1.0])
    assert jump_relu(PRE, threshold).tolist() == [[0.0, 0.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0]]
    assert jump_relu(PRE, torch.tensor(1.0)).tolist() == [[3.0, 0.0, 0.0, 2.0], [0.0] * 4]


def test_jump_relu_with_gradients_gives_the_same_values():
    threshold = torch.tensor([3.0, 0.0, 0.4, -1.0])
    leaf = PRE.clone().requires_grad_()
    assert torch.equal(jump_relu(leaf, threshold), jump_relu(PRE, threshold))
    assert torch.equal(jump_relu(PRE, threshold.clone().requires_grad_()), jump_relu(PRE, threshold))


def test_jump_relu_gradient_of_the_input_is_that_of_what_is_kept():
    leaf = PRE.double().requires_grad_()
    threshold = torch.tensor([2.5, 0.3, 0.3, 2.5], dtype=torch.float64)
    assert gradcheck(lambda x: jump_relu(x, threshold), leaf)


def test_jump_relu_gradient_of_the_threshold_is_the_rectangle_estimate():
    """Equation 11: -threshold / bandwidth where the pre-activation is within half a bandwidth, summed over tokens."""
    threshold = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    pre = torch.tensor([[1.04, 1.06, 0.97], [0.96, 3.0, 1.2]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]], dtype=torch.float64)
    (jump_relu(pre, threshold, bandwidth=0.1) * weight).sum().backward()
    assert torch.allclose(threshold.grad, torch.tensor([-(1 + 5) / 0.1, 0.0, -3 / 0.1], dtype=torch.float64))
    shared = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (jump_relu(pre, shared, bandwidth=0.1) * weight).sum().backward()
    assert torch.allclose(shared.grad, torch.tensor(-(1 + 5 + 3) / 0.1, dtype=torch.float64))


def test_gated_takes_the_magnitude_where_the_gate_is_open():
    gate = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert gated(gate, torch.tensor([4.0, 4.0, 4.0, -4.0])).tolist() == [4.0, 0.0, 0.0, 0.0]


def test_arguments_are_left_alone():
    before = PRE.clone()
    top_k(PRE, 2), after_top_k(PRE, "topk"), jump_relu(PRE, torch.tensor(1.0)), gated(PRE, PRE)
    assert torch.equal(PRE, before)
