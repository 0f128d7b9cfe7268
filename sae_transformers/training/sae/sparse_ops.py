"""The two products of a sparse autoencoder at chosen latents only, forwards and backwards.

A step needs every pre-activation once, to choose; after that only the chosen ones carry a gradient. With B tokens, n
latents, width d and k chosen latents a token, the dense product costs 2 B d n; everything else here costs 2 B d k.

The gradients are exact: each equals what autograd gives for the dense expression. They reach every use of a chosen
pre-activation, whichever loss made it.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, cached_property
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Share of chosen latents above which dense products are faster, by device: on the CPU as measured at d = 576, on a GPU
# as bandwidth and arithmetic of an H200 let expect. A sampled product costs a CPU three times as much for each chosen
# latent as sums of rows do.
DENSE_ABOVE = {"cpu": 0.25}
DENSE_ABOVE_ELSEWHERE = 0.03


class Selection:
    """Latents chosen for each token, as the pattern of a sparse (n_tokens, d_sae) matrix in CSR form.

    Args:
        latents: (nnz,) int64, the chosen latents of token 0, then those of token 1, and so on; none twice for a token.
        offsets: (n_tokens + 1,) int64, where each token's latents start, and the end.
        d_sae: number of latents.
        among: (n_columns,) int64, the only latents that could be chosen, and `latents` then counts in them; None
            where all could. Dense products take only these.
    """

    def __init__(self, latents: Tensor, offsets: Tensor, d_sae: int, among: Tensor | None = None) -> None:
        self.columns, self.offsets, self.d_sae, self.among = latents, offsets, d_sae, among
        self.latents = latents if among is None else among[latents]
        self.n_columns = d_sae if among is None else len(among)
        self.n_tokens = len(offsets) - 1

    @cached_property
    def tokens(self) -> Tensor:
        """(nnz,) int64, the token of each chosen latent."""
        counts = self.offsets.diff()
        rows = torch.arange(self.n_tokens, device=counts.device)
        return rows.repeat_interleave(counts, output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same pattern by latent: the order (nnz,) that sorts it, its tokens in that order, starts (d_sae,)."""
        # int32 sorts faster, and the order is the same.
        order = self.latents.int().argsort(stable=True)
        counts = torch.bincount(self.latents, minlength=self.d_sae)
        return order, self.tokens[order], counts.cumsum(0) - counts

    @property
    def dense(self) -> bool:
        """Whether so many latents are chosen that dense products are faster."""
        return self._share > self._dense_above

    @property
    def densely_sampled(self) -> bool:
        """The same for the sampled product."""
        return self._share > self._dense_above / (3 if self.latents.device.type == "cpu" else 1)

    @property
    def _share(self) -> float:
        return len(self.latents) / max(1, self.n_tokens * self.n_columns)

    @property
    def _dense_above(self) -> float:
        return DENSE_ABOVE.get(self.latents.device.type, DENSE_ABOVE_ELSEWHERE)

    def spread(self, values: Tensor) -> Tensor:
        """Values (nnz,) in their places, (n_tokens, d_sae), zeros elsewhere."""
        return values.new_zeros(self.n_tokens, self.d_sae).index_put_((self.tokens, self.latents), values)

    def _in_columns(self, values: Tensor) -> Tensor:
        """Values (nnz,) among the latents that could be chosen, (n_tokens, n_columns)."""
        return values.new_zeros(self.n_tokens, self.n_columns).index_put_((self.tokens, self.columns), values)

    def _of_columns(self, rows: Tensor) -> Tensor:
        """Of rows (d_sae, d), those of the latents that could be chosen: (n_columns, d)."""
        return rows if self.among is None else rows[self.among]

    # -- products; `values` is (nnz,) --------------------------------------------------------------------------------

    def times(self, values: Tensor, rows: Tensor) -> Tensor:
        """`spread(values) @ rows` for rows (d_sae, d): (n_tokens, d)."""
        if self.dense:
            return (self._in_columns(values) @ self._of_columns(rows)).to(rows.dtype)  # autocast would give its own
        return _bag_sums(self.latents, rows, self.offsets[:-1], values)

    def transposed_times(self, values: Tensor, rows: Tensor) -> Tensor:
        """`spread(values).T @ rows` for rows (n_tokens, d): (d_sae, d)."""
        if self.dense:
            sums = (self._in_columns(values).T @ rows).to(rows.dtype)
            return (
                sums
                if self.among is None
                else rows.new_zeros(self.d_sae, rows.shape[1]).index_copy_(0, self.among, sums)
            )
        order, tokens, starts = self.by_latent
        return _bag_sums(tokens, rows, starts, values[order], long_bags=True)

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """`(left @ right.T)` at the chosen places, for left (n_tokens, d) and right (d_sae, d): (nnz,)."""
        if self.densely_sampled:
            return (left @ self._of_columns(right).T).to(right.dtype)[self.tokens, self.columns]
        if triton_ops := _triton_for(left, right):
            return triton_ops.sampled(self.latents, self.offsets, left, right)
        with warnings.catch_warnings():  # "CSR tensor support is in beta state", once in a process
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                self.offsets,
                self.latents,
                left.new_zeros(len(self.latents)),
                size=(self.n_tokens, self.d_sae),
                check_invariants=False,
            )
            return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()

    def column_sums(self, values: Tensor) -> Tensor:
        """`spread(values).sum(0)`: (d_sae,)."""
        return values.new_zeros(self.d_sae).index_add_(0, self.latents, values)


def _bag_sums(at: Tensor, rows: Tensor, starts: Tensor, weights: Tensor, *, long_bags: bool = False) -> Tensor:
    """`out[i] = sum(weights[j] * rows[at[j]])` over the j from `starts[i]` up to the next start: (n_bags, d)."""
    if triton_ops := _triton_for(rows, weights):
        return triton_ops.bag_sums(at, rows, starts, weights, long_bags=long_bags)
    return F.embedding_bag(at, rows, starts, mode="sum", per_sample_weights=weights)


def _triton_for(*operands: Tensor) -> ModuleType | None:
    """The Triton kernels if they take these operands of a product, else None."""
    if any(operand.device.type != "cuda" for operand in operands):
        return None
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return None  # they have no gradient
    found = {(operand.device, operand.dtype) for operand in operands}
    return _tried_triton(*found.pop()) if len(found) == 1 else None


@cache
def _tried_triton(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    if os.environ.get("SAE_TRANSFORMERS_TRITON") == "0" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    try:
        from . import triton_ops

        at, row = torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, 16, device=device, dtype=dtype)
        triton_ops.bag_sums(at, row, at, row[:, 0])
    except ImportError:
        return None
    except Exception as error:  # no C compiler, or a GPU that Triton does not know
        warnings.warn(f"Triton does not run on {device}, so sparse products are slower: {error}", stacklevel=2)
        return None
    return triton_ops


class _SelectedPreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, W_enc, b_enc, b_dec, values, selection):
        ctx.save_for_backward(hidden, W_enc, b_dec)
        ctx.selection = selection
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, W_enc, b_dec = ctx.saved_tensors
        selection: Selection = ctx.selection
        need_hidden, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad[:4]
        grad = grad.to(W_enc.dtype)
        x = hidden if b_dec is None else hidden - b_dec
        grad_hidden = selection.times(grad, W_enc.T).to(hidden.dtype) if need_hidden else None
        grad_W = selection.transposed_times(grad, x).T if need_W else None
        sums = selection.column_sums(grad) if need_b_enc or need_b_dec else None
        # The bias is subtracted from every token alike, so its gradient is one matrix-vector product.
        grad_b_dec = -(W_enc @ sums) if need_b_dec and sums is not None else None
        return grad_hidden, grad_W, sums if need_b_enc else None, grad_b_dec, None, None


def selected_pre_acts(
    values: Tensor, selection: Selection, hidden: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    """Pre-activations of the chosen latents, differentiable in everything they are made of.

    Args:
        values: (nnz,), `(hidden - b_dec) @ W_enc + b_enc` at the chosen places, computed without gradient.
        hidden: (n_tokens, d_in).
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from `hidden`; None where nothing is.

    Returns:
        The same numbers, (nnz,).
    """
    return _SelectedPreActs.apply(hidden, W_enc, b_enc, b_dec, values.detach().to(W_enc.dtype), selection)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents, W_dec, selection):
        ctx.save_for_backward(latents, W_dec)
        ctx.selection = selection
        return selection.times(latents, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        latents, W_dec = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad.contiguous()
        grad_latents = selection.sampled(grad, W_dec) if ctx.needs_input_grad[0] else None
        grad_W = selection.transposed_times(latents, grad) if ctx.needs_input_grad[1] else None
        return grad_latents, grad_W, None


def sparse_decode(latents: Tensor, selection: Selection, W_dec: Tensor) -> Tensor:
    """`z @ W_dec` for latents that are zero but at the chosen places.

    Args:
        latents: (nnz,).
        W_dec: (d_sae, d_out).

    Returns:
        (n_tokens, d_out), without bias.
    """
    return _SparseDecode.apply(latents, W_dec, selection)
