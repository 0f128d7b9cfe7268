"""The products of `sparse_ops` as Triton kernels, for CUDA. Importing this needs triton.

`sparse_ops` uses them for CUDA tensors of one dtype among float32, bfloat16 and float16, after a trial on the device;
everything else takes its plain path. `SAE_TRANSFORMERS_TRITON=0` in the environment, set before the first product,
switches them off. `TRITON_INTERPRET=1`, set before the import, runs them on the CPU, to debug them.

Sums are in float32 and in a fixed order, without atomics: the same input gives the same bits. They are not
differentiable: `sparse_ops` calls them inside its autograd functions.

Gathering decoder rows instead of a dense product is as in "Scaling and evaluating sparse autoencoders"
(https://huggingface.co/papers/2406.04093).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

CHUNK = 256  # rows of a long bag that one program adds up
TILE = 8  # rows that a program reads at a time
BLOCK = 256  # columns of them, at most
OPTIONS = {"enable_fp_fusion": True}  # a product and its sum rounded once; Triton 3.10 will not do so by default


@triton.jit
def _bag_sums(
    out, rows, at, weights, starts, ends, parts, first_parts, d,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One bag, BLOCK columns. With `parts`, only its first CHUNK rows are added here, and sums of the others there."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start, end = tl.load(starts + bag), tl.load(ends + bag)
    if parts is not None:
        end = tl.minimum(end, start + CHUNK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for first in range(start, end, TILE):
        each = first + tl.arange(0, TILE)
        row = tl.load(at + each, mask=each < end, other=0)
        weight = tl.load(weights + each, mask=each < end, other=0.0).to(tl.float32)
        mask = (each < end)[:, None] & inside[None, :]
        tile = tl.load(rows + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
        total += weight[:, None] * tile.to(tl.float32)
    if parts is not None:
        last_part = tl.load(first_parts + bag + 1)
        for first in range(tl.load(first_parts + bag), last_part, TILE):
            each = first + tl.arange(0, TILE)
            mask = (each < last_part)[:, None] & inside[None, :]
            total += tl.load(parts + each[:, None] * d + columns[None, :], mask=mask, other=0.0)
    tl.store(out + bag * d + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def _sampled(out, left, right, latents, offsets, d, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One token, TILE of its latents at a time; its row of `left` stays in the cache."""
    token = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    for first in range(start, end, TILE):
        each = first + tl.arange(0, TILE)
        latent = tl.load(latents + each, mask=each < end, other=0)
        total = tl.zeros((TILE, BLOCK), tl.float32)
        for column in range(0, d, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            inside = columns < d
            x = tl.load(left + token * d + columns, mask=inside, other=0.0).to(tl.float32)
            mask = (each < end)[:, None] & inside[None, :]
            y = tl.load(right + latent[:, None] * d + columns[None, :], mask=mask, other=0.0)
            total += x[None, :] * y.to(tl.float32)
        tl.store(out + each, tl.sum(total, 1), mask=each < end)


def bag_sums(at: Tensor, rows: Tensor, starts: Tensor, weights: Tensor, *, long_bags: bool = False) -> Tensor:
    """Weighted sums of rows: `out[i] = sum(weights[j] * rows[at[j]] for j in starts[i] .. starts[i + 1] - 1)`.

    A program adds up one bag. Where bags may be long, what exceeds `CHUNK` rows is first summed in chunks, a program
    each, into a buffer of `nnz // CHUNK` rows. The longest task is then `CHUNK + n / CHUNK` rows for a bag of n: 512
    at n = 65,536, but 4,352 at a million, where more levels would be needed.

    Args:
        at: (nnz,) int64, rows of all bags, in order.
        rows: (n_rows, d).
        starts: (n_bags,) int64, where each bag starts in `at`; the last ends with it. A bag may be empty.
        weights: (nnz,).
        long_bags: whether bags of many more than `CHUNK` rows are expected.

    Returns:
        (n_bags, d), dtype of `rows`.
    """
    at, rows, starts, weights = (operand.contiguous() for operand in (at, rows, starts, weights))
    d = rows.shape[1]
    ends = torch.cat([starts[1:], starts.new_full((1,), len(at))])
    block = min(BLOCK, triton.next_power_of_2(d))

    def launch(out: Tensor, starts: Tensor, ends: Tensor, *parts: Tensor | None) -> Tensor:
        grid = len(out), triton.cdiv(d, block)
        _bag_sums[grid](  # pyright: ignore[reportIndexIssue]
            out, rows, at, weights, starts, ends, *parts, d, CHUNK=CHUNK, TILE=TILE, BLOCK=block, **OPTIONS
        )
        return out

    out = rows.new_empty(len(starts), d)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        if not long_bags or len(at) <= CHUNK:
            return launch(out, starts, ends, None, None)
        n_parts = (ends - starts) // CHUNK  # beyond a bag's first chunk; where nothing is left, the last is empty
        first_parts = F.pad(n_parts.cumsum(0), (1, 0))
        # As many parts as there can be: their number is on the device. The bag's end makes those too many empty.
        part = torch.arange(len(at) // CHUNK, device=at.device)
        bag = (torch.searchsorted(first_parts, part, right=True) - 1).clamp(max=len(starts) - 1)
        part_starts = starts[bag] + (part - first_parts[bag] + 1) * CHUNK
        part_ends = torch.minimum(part_starts + CHUNK, ends[bag])
        parts = rows.new_empty(len(part), d, dtype=torch.float32)
        launch(parts, part_starts, part_ends, None, None)
        return launch(out, starts, ends, parts, first_parts)


def sampled(latents: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`left[token] @ right[latent]` at the places of a CSR pattern.

    Args:
        latents: (nnz,) int64.
        offsets: (n_tokens + 1,) int64.
        left: (n_tokens, d).
        right: (d_sae, d).

    Returns:
        (nnz,), dtype of `left`.
    """
    latents, offsets, left, right = (operand.contiguous() for operand in (latents, offsets, left, right))
    d = left.shape[1]
    block = min(BLOCK, triton.next_power_of_2(d))
    out = left.new_empty(len(latents))
    with torch.cuda.device_of(left):
        _sampled[(len(left),)](  # pyright: ignore[reportIndexIssue]
            out, left, right, latents, offsets, d, TILE=TILE, BLOCK=block, **OPTIONS
        )
    return out
