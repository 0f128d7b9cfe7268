#!/usr/bin/env bash
# torch 2.13.0: torch.nn.functional.linear on the CPU, without a bias, float32. The subject is rounding: which of two
# operations does the product, exactly, and that their results are not always equal in the last bits.
#
# Expected: under torch.no_grad() it makes no difference for the result whether a weight requires a gradient.
#
# What happens: for a three-dimensional input that is not contiguous (here a transposed one, as attention heads and
# sequence-first layers make) it does. A frozen weight is multiplied by bmm, once for every row of the batch; the same
# weight with requires_grad=True by one mm over all words. The two sum in another order for many shapes, so a frozen
# model and a trainable copy of it are not bit-equal, and neither is one model before and after requires_grad_(False).
# With a contiguous input both take mm and are equal.
#
# Output seen, in 18 shapes of 2x3, 8x2 and 4x6 words, 64 to 768 wide:
#   (2, 3, 256) to 64: frozen by bmm, trainable by mm, 2e-05 apart; contiguous: equal
#   (8, 2, 64) to 256: frozen by bmm, trainable by mm, 1e-05 apart; contiguous: equal
#   (4, 6, 256) to 64: frozen by bmm, trainable by mm, 0e+00 apart; contiguous: equal
#   12 of 18 shapes are not bit-equal (the number depends on the processor and its BLAS, the operations do not)
#
# Why: linear passes such an input on to matmul, whose should_fold (aten/src/ATen/native/LinearAlgebra.cpp) decides
# whether the batch is folded into the rows of one matrix. It folds if the smaller operand requires a gradient, which
# saves memory in the backward pass, and does not ask whether gradients are recorded at all; otherwise it folds only if
# the larger operand's strides allow that without a copy.
#
# Instead: for comparisons bit for bit give both copies the same requires_grad, or make inputs contiguous; else allow a
# tolerance.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1
cat > "$folder/check.py" <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


class Products(TorchDispatchMode):
    """Notes which of the matrix products are called below the mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.seen.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def product(x, weight):
    """The result, and the operations that make it."""
    with Products() as products:
        F.linear(x, weight)
    return F.linear(x, weight), products.seen


ROWS = ((2, 3), (8, 2), (4, 6))
SHAPES = [(*rows, wide, out) for rows in ROWS for wide in (64, 256, 768) for out in (64, 256)]
torch.set_num_threads(1)
apart, seen = 0, 0
with torch.no_grad():
    for rows, length, wide, out in SHAPES:
        torch.manual_seed(0)
        frozen = torch.nn.Parameter(torch.randn(out, wide), requires_grad=False)
        trainable = torch.nn.Parameter(frozen.clone(), requires_grad=True)
        x = torch.randn(length, rows, wide).transpose(0, 1)
        (of_frozen, how_frozen), (of_trainable, how_trainable) = product(x, frozen), product(x, trainable)
        check(how_frozen == ["bmm"] and how_trainable == ["mm"], f"the operations for {tuple(x.shape)}")
        gap = (of_frozen - of_trainable).abs().max().item()
        check(gap < 1e-3, "more than rounding is different")
        dense = x.contiguous()
        dense_frozen, how_frozen = product(dense, frozen)
        dense_trainable, how_trainable = product(dense, trainable)
        check(how_frozen == how_trainable == ["mm"], "the operations for a contiguous input")
        check(torch.equal(dense_frozen, dense_trainable), "a contiguous input rounds in two ways")
        seen, apart = seen + 1, apart + (gap > 0)
        print(f"{tuple(x.shape)} to {out}: frozen by bmm, trainable by mm, {gap:.0e} apart; contiguous: equal")
print(f"{apart} of {seen} shapes are not bit-equal")
check(apart > 0, "all shapes are bit-equal")
print(f"As described, with torch {torch.__version__}.")
PYTHON

"$folder/venv/bin/python" -W ignore "$folder/check.py"
