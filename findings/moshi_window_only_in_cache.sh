#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.12.0 and 5.23.0 do the same): MoshiForCausalLM with a sliding window of 6,
# beside Mistral with the same.
#
# Expected: a text longer than the window gets the same logits in one pass as word by word with the cache, the window
# being part of the model.
#
# What happens: in one pass Moshi has no window, each word attends to all before it. Word by word it has one. Up to the
# window's length the two agree, from the next word on they are far apart; so text that generate() writes is not what a
# pass over the same text scores, and hidden states from the two are not the same either.
#
# Output seen (one layer; the last figure is from one pass):
#   Moshi:   gap of words 1-6 at most 1e-06, of later ones at least 1e+00; the first word reaches 14 positions
#   Mistral: gap of words 1-6 at most 1e-06, of later ones at least 6e-07; the first word reaches 6 positions
#
# Why: MoshiModel.forward (models/moshi/modeling_moshi.py) makes a plain causal mask, and nothing in the attention
# layers reads the sliding_window they store. The cache reads it: DynamicCache built from a configuration with
# sliding_window (cache_utils.py) has layers that keep the last words only. MistralModel makes a sliding mask from the
# same field.
#
# Instead: set sliding_window to the longest text you use if both ways have to agree (the released default is 3000
# words), or keep texts below it.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM, MoshiConfig, MoshiForCausalLM

WINDOW = 6
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


for model_class, config, whole_slides in (
    (MoshiForCausalLM, MoshiConfig(**SMALL, ffn_dim=48), False),
    (MistralForCausalLM, MistralConfig(**SMALL, intermediate_size=48), True),
):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
        ids = torch.randint(3, 99, (1, 14))
        other = ids.clone()
        other[0, 0] = 3 + (ids[0, 0] - 2) % 90
        whole, whole_other = model(ids).logits, model(other).logits
        outputs, steps = None, []
        for word in ids.split(1, dim=1):
            outputs = model(word, cache=None if outputs is None else outputs.cache, use_cache=True)
            steps.append(outputs.logits)
    gap = (torch.cat(steps, dim=1) - whole).abs().amax(dim=(0, 2))
    reach = int((whole - whole_other).abs().amax(dim=(0, 2)).gt(1e-4).sum())
    inside, beyond = gap[:WINDOW].max().item(), gap[WINDOW:].min().item()
    print(
        f"{model_class.__name__}: gap of words 1-{WINDOW} at most {inside:.0e}, of later ones at least {beyond:.0e};",
        f"in one pass the first word reaches {reach} positions",
    )
    check(inside < 1e-4, "words inside the window")
    check((beyond < 1e-4) == whole_slides, "words beyond the window")
    check(reach == (WINDOW if whole_slides else 14), "how far one word reaches")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
