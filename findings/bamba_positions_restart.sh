#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.23.0 does the same): Bamba, beside Llama.
#
# Expected: calling a model with a cache and without position_ids counts the positions on from what the cache holds, as
# Llama and most families do.
#
# What happens: BambaForCausalLM counts from 0 again in every call. The attention layers rotate the queries and keys of
# the new words as if these stood at the start of the text, and the logits are wrong, for one new word as for several.
# generate() is right, since it hands positions over; so are calls that give position_ids. Nothing is raised or logged.
#
# Output seen, as the norm of the error over the norm of the logits, for words 9 to 20 of a text fed in pieces:
#   Bamba, 1 at a time: 2e-01 without position_ids, 6e-07 with them; bit for bit what positions from 0 give
#   Bamba, 4 at a time: 1e-01 without position_ids, 2e-07 with them; bit for bit what positions from 0 give
#   Llama, 1 or 4 at a time: 4e-07 either way
#
# Why: BambaModel.forward (models/bamba/modeling_bamba.py) fills in missing positions with a range over the length of
# the piece alone; LlamaModel.forward adds the length that the cache reports.
#
# Instead: in a decoding loop of your own hand over position_ids, counted from the first word of the text.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


def continued(model, ids, start, step, positions):
    outputs = model(ids[:, :start], use_cache=True)
    found = []
    for place in range(start, ids.shape[1], step):
        chunk = ids[:, place : place + step]
        outputs = model(chunk, cache=outputs.cache, use_cache=True, **positions(place, chunk.shape[1]))
        found.append(outputs.logits)
    return torch.cat(found, dim=1)


def nothing(place, count):
    return {}


def counted_on(place, count):
    return {"position_ids": torch.arange(place, place + count)[None]}


def counted_from_zero(place, count):
    return {"position_ids": torch.arange(count)[None]}


for model_class, config, restarts in (
    (BambaForCausalLM, BambaConfig(**SMALL, **MAMBA), True),
    (LlamaForCausalLM, LlamaConfig(**SMALL), False),
):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
        ids = torch.randint(3, 99, (1, 20))
        whole = model(ids).logits[:, 8:]
        for step in (1, 4):
            left_out = continued(model, ids, 8, step, nothing)
            given = continued(model, ids, 8, step, counted_on)
            from_zero = continued(model, ids, 8, step, counted_from_zero)
            error = ((left_out - whole).norm() / whole.norm()).item()
            error_given = ((given - whole).norm() / whole.norm()).item()
            print(
                f"{model_class.__name__}, {step} at a time: {error:.0e} without positions, {error_given:.0e} with,",
                f"same as positions from 0: {torch.equal(left_out, from_zero)}",
            )
            check(error_given < 1e-4, f"{model_class.__name__} is off with positions as well")
            check((error > 1e-2) == restarts, f"{model_class.__name__} without positions")
            check(torch.equal(left_out, from_zero) == restarts, f"{model_class.__name__} and positions from 0")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
