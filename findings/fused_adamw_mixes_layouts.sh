#!/usr/bin/env bash
# torch 2.13.0 (CPU): AdamW(fused=True) of a parameter that lies column by column, as W.t() of a row-major matrix does.
#
# Expected: strides are how a tensor is stored and not what it is: the same values give the same step, fused or not.
#
# What happens: with fused=True the gradient and the moments are read in the order of memory and not by their strides.
# Where all four tensors lie alike nothing is wrong. Where the gradient was assigned from elsewhere (a sum over shards, a
# kernel of one's own) or the moments came from a file (safetensors stores row by row), numbers go to other entries: no error,
# no warning, and a loss that still falls.
#
# Output seen (a 6 x 4 parameter, 4 steps of learning rate 0.1, largest difference from fused=False):
#   all alike: equal
#   all column by column: equal
#   gradient row by row, the rest column by column: differs by more than 0.1
#   moments reloaded row by row: differs by more than 0.1
#
# Why: the CPU kernel (aten/src/ATen/native/cpu/FusedAdamKernel.cpp) walks the data pointers of parameter, gradient and both
# moments with one index. Autograd itself gives a gradient the layout of its parameter, so a plain loss.backward() is safe.
#
# Instead: give the optimizer contiguous parameters, or copy gradient and moments into the parameter's strides first
# (torch.empty_like(parameter).copy_(tensor)).
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON' > "$folder/seen"
import torch


def by_column(values):
    return values.t().contiguous().t()


def trained(fused, parameter, gradient, moments):
    weight = torch.nn.Parameter(parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused, foreach=False)
    for step in range(4):
        weight.grad = gradient(torch.randn(6, 4, generator=torch.Generator().manual_seed(step + 1)))
        optimizer.step()
        if moments is not None and step == 1:
            saved = optimizer.state_dict()
            for name in ("exp_avg", "exp_avg_sq"):
                saved["state"][0][name] = moments(saved["state"][0][name])
            optimizer.load_state_dict(saved)
    return weight.detach()


def compare(label, *layouts):
    apart = (trained(True, *layouts) - trained(False, *layouts)).abs().max().item()
    print(f"{label}:", "equal" if apart < 1e-5 else f"differs by {'more' if apart > 0.1 else 'less'} than 0.1")


compare("all alike", torch.clone, torch.clone, None)
compare("all column by column", by_column, by_column, None)
compare("gradient row by row, the rest column by column", by_column, torch.clone, None)
compare("moments reloaded row by row", by_column, by_column, torch.Tensor.contiguous)
PYTHON
diff "$folder/seen" - <<'SEEN'
all alike: equal
all column by column: equal
gradient row by row, the rest column by column: differs by more than 0.1
moments reloaded row by row: differs by more than 0.1
SEEN
cat "$folder/seen"
