"""The Triton kernels against the plain products of `sparse_ops` on the CPU.

The tests marked `gpu` need a CUDA device: `pytest -m gpu tests/training/sae/test_triton_ops.py`. Where triton is
installed without one, the fast suite runs the same tests in Triton's interpreter, in a process of its own, because
the variable that switches it on holds for all of a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from sae_transformers.training.sae import sparse_ops
from sae_transformers.training.sae.sparse_ops import Selection, selected_pre_acts, sparse_decode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of each dtype's rounding, once
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_device = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device")

# How many latents each token has, of how many; the width.
PATTERNS = {
    "even": ([4] * 6, 20, 16),
    "uneven, some without": ([0, 1, 9, 0, 30, 3, 0], 40, 24),
    "width not a power of two": ([3, 5], 10, 37),
    "more than a block of columns": ([2, 11], 12, 300),
    "width 1": ([2, 3], 7, 1),
    "nothing chosen": ([0, 0, 0], 5, 8),
    "no tokens": ([], 5, 8),
}


def pattern(counts: list[int], d_sae: int) -> Selection:
    latents = [torch.randperm(d_sae)[:count] for count in counts]
    offsets = F.pad(torch.tensor(counts, dtype=torch.long).cumsum(0), (1, 0))
    return Selection(torch.cat([torch.empty(0, dtype=torch.long), *latents]), offsets, d_sae)


def on_device(selection: Selection) -> Selection:
    return Selection(selection.latents.to(DEVICE), selection.offsets.to(DEVICE), selection.d_sae)


def compare(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == dtype
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu().float(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.fixture
def triton_ops(monkeypatch):
    """The kernels; `Selection` takes the sparse way at these small sizes too."""
    from sae_transformers.training.sae import triton_ops

    torch.manual_seed(0)
    monkeypatch.setattr(sparse_ops, "DENSE_ABOVE", {"cpu": 9.0, "cuda": 1.0})
    return triton_ops


def products(selection: Selection, values, left, right) -> list[torch.Tensor]:
    return [
        selection.times(values, right),
        selection.transposed_times(values, left),
        selection.sampled(left, right),
    ]


def kernel_products(triton_ops, selection: Selection, values, left, right) -> list[torch.Tensor]:
    order, tokens, starts = selection.by_latent
    return [
        triton_ops.bag_sums(selection.latents, right, selection.offsets[:-1], values),
        triton_ops.bag_sums(tokens, left, starts, values[order], long_bags=True),
        triton_ops.sampled(selection.latents, selection.offsets, left, right),
    ]


@pytest.mark.gpu
@needs_triton
@needs_device
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", PATTERNS)
def test_kernels_equal_the_plain_products(triton_ops, case, dtype):
    counts, d_sae, width = PATTERNS[case]
    selection = pattern(counts, d_sae)
    # The plain products are taken in float32 of the same, already rounded, numbers.
    operands = [torch.randn(size).to(dtype) for size in [(sum(counts),), (len(counts), width), (d_sae, width)]]
    expected = products(selection, *(operand.float() for operand in operands))
    found = kernel_products(triton_ops, on_device(selection), *(operand.to(DEVICE) for operand in operands))
    for one, other in zip(found, expected, strict=True):
        compare(one, other, dtype)


@pytest.mark.gpu
@needs_triton
@needs_device
def test_operands_with_strides(triton_ops):
    selection = pattern([3, 0, 5], 12)
    values, left, right = torch.randn(16)[::2], torch.randn(20, 3).T, torch.randn(20, 24).T[::2]
    expected = products(selection, values, left, right)
    strided = torch.randn(16, device=DEVICE)[::2].copy_(values), left.to(DEVICE), right.T.to(DEVICE).T
    assert not any(operand.is_contiguous() for operand in strided)
    for one, other in zip(kernel_products(triton_ops, on_device(selection), *strided), expected, strict=True):
        compare(one, other)


@pytest.mark.gpu
@needs_triton
@needs_device
@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 23])
def test_a_long_bag_is_summed_in_chunks(triton_ops, monkeypatch, length):
    """Bags around a multiple of the chunk, between short and empty ones."""
    monkeypatch.setattr(triton_ops, "CHUNK", 4)
    lengths = torch.tensor([2, length, 0, 13, 1, length, 0])
    starts = lengths.cumsum(0) - lengths
    rows = torch.randn(50, 20)
    at, weights = torch.randint(50, (int(lengths.sum()),)), torch.randn(int(lengths.sum()))
    expected = F.embedding_bag(at, rows, starts, mode="sum", per_sample_weights=weights)
    operands = [operand.to(DEVICE) for operand in (at, rows, starts, weights)]
    found = triton_ops.bag_sums(*operands, long_bags=True)
    compare(found, expected)
    assert torch.equal(found, triton_ops.bag_sums(*operands, long_bags=True))


@pytest.mark.gpu
@needs_triton
@needs_device
def test_a_latent_of_every_token(triton_ops):
    """More rows than `CHUNK` as it is."""
    n_tokens = 2 * triton_ops.CHUNK + 3
    latents = torch.stack([torch.full((n_tokens,), 5), torch.randint(6, 20, (n_tokens,))], 1).flatten()
    selection = Selection(latents, torch.arange(0, 2 * n_tokens + 1, 2), 20)
    values, left, right = torch.randn(2 * n_tokens), torch.randn(n_tokens, 8), torch.randn(20, 8)
    expected = products(selection, values, left, right)
    operands = [operand.to(DEVICE) for operand in (values, left, right)]
    for one, other in zip(kernel_products(triton_ops, on_device(selection), *operands), expected, strict=True):
        compare(one, other)


@pytest.mark.gpu
@needs_triton
@needs_device
def test_a_step_takes_the_kernels_and_has_the_same_gradients(triton_ops, monkeypatch):
    sizes = {"hidden": (6, 10), "W_enc": (10, 30), "b_enc": (30,), "b_dec": (10,), "W_dec": (30, 10)}
    plain = {name: torch.randn(size, requires_grad=True) for name, size in sizes.items()}
    ours = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in plain.items()}

    def step(selection: Selection, hidden, W_enc, b_enc, b_dec, W_dec) -> torch.Tensor:
        values = ((hidden - b_dec) @ W_enc + b_enc)[selection.tokens, selection.latents]
        pre_acts = selected_pre_acts(values, selection, hidden, W_enc, b_enc, b_dec)
        (sparse_decode(torch.relu(pre_acts), selection, W_dec) + b_dec - hidden).square().sum().backward()
        return pre_acts

    selection = pattern([2, 0, 7, 3, 1, 4], 30)
    step(selection, **plain)
    calls = []

    def counted(name: str):
        return lambda *args, **kwargs: calls.append(name) or getattr(triton_ops, name)(*args, **kwargs)

    counting = SimpleNamespace(bag_sums=counted("bag_sums"), sampled=counted("sampled"))
    if INTERPRETED:
        monkeypatch.setattr(sparse_ops, "_triton_for", lambda *operands: counting)
    else:
        monkeypatch.setattr(sparse_ops, "_tried_triton", lambda device, dtype: counting)
    step(on_device(selection), **ours)
    assert sorted(calls) == ["bag_sums"] * 4 + ["sampled"]  # decode, three gradients of rows; that of the latents
    for name, tensor in plain.items():
        found, expected = ours[name].grad, tensor.grad
        assert found is not None and expected is not None
        compare(found, expected)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_take_the_kernels():
    row = torch.ones(2, 4, device="cuda")
    sparse_ops._tried_triton.cache_clear()
    assert sparse_ops._triton_for(row, row) is not None
    assert sparse_ops._triton_for(row, row.bfloat16()) is None  # of two dtypes
    assert sparse_ops._triton_for(row.double()) is None
    assert sparse_ops._triton_for(row.requires_grad_()) is None  # a gradient is wanted


def test_the_cpu_takes_the_plain_path():
    assert sparse_ops._triton_for(torch.ones(2), torch.ones(2, 4)) is None


def test_the_environment_switches_them_off(monkeypatch):
    monkeypatch.setenv("SAE_TRANSFORMERS_TRITON", "0")
    monkeypatch.setitem(sys.modules, "sae_transformers.training.sae.triton_ops", None)  # importing it would fail
    assert sparse_ops._tried_triton.__wrapped__(torch.device("cpu"), torch.float32) is None


def test_without_triton_the_plain_path_is_taken(monkeypatch):
    monkeypatch.delenv("SAE_TRANSFORMERS_TRITON", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sae_transformers.training.sae.triton_ops", raising=False)
    assert sparse_ops._tried_triton.__wrapped__(torch.device("cpu"), torch.float32) is None


def test_where_triton_fails_the_plain_path_is_taken_with_a_warning(monkeypatch):
    def fails(*operands):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.delenv("SAE_TRANSFORMERS_TRITON", raising=False)
    monkeypatch.setitem(sys.modules, "sae_transformers.training.sae.triton_ops", SimpleNamespace(bag_sums=fails))
    with pytest.warns(UserWarning, match="Triton does not run on cpu.*Failed to find C compiler"):
        assert sparse_ops._tried_triton.__wrapped__(torch.device("cpu"), torch.float32) is None


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_kernels_in_the_interpreter():
    if Version(version("triton")) < Version("3.7"):
        pytest.skip("the interpreter of triton before 3.7 does not work with numpy from 2.4 on")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
