#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0 and 5.24.0: two subclasses of MambaForCausalLM with empty bodies.
#
# Expected: a subclass that changes nothing but its name generates like its parent.
#
# What happens: with 5.23.0 it depends on the name. SteeredMambaLM generates; SteeredLM raises ValueError from the
# cache. A wrapper, a dynamically made class or a mixin that renames the class is enough. With 5.24.0 both generate.
#
# Output seen:
#   5.23.0, MambaForCausalLM and SteeredMambaLM: (2, 10), cache handed over as ['cache_params']
#   5.23.0, SteeredLM: ValueError: `get_seq_length` can only be called on Attention layers, and the current Cache
#     seem to only contain LinearAttention layers.
#   5.24.0, all three: (2, 10), cache handed over as ['cache']
#
# Why: in 5.23.0 GenerationMixin._prepare_cache_for_generation (generation/utils.py) decides whether the cache travels
# as cache_params or as past_key_values by looking for "mamba" in the lower-cased name of the object's class. Under the
# second name _prefill, in the same file, asks it for the number of cached words, which a cache without attention
# layers refuses to tell. 5.24.0 has one name for all and skips that question for such caches.
#
# Instead: on 5.23.0 keep "Mamba" in the name of every subclass of a Mamba family (and out of all others), or 5.24.0.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

by_name = sys.argv[1] == "by-name"


class SteeredLM(MambaForCausalLM):
    pass


class SteeredMambaLM(MambaForCausalLM):
    pass


config = MambaConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    state_size=8,
    time_step_rank=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
prompts = torch.arange(3, 15).view(2, 6)
for model_class in (MambaForCausalLM, SteeredMambaLM, SteeredLM):
    torch.manual_seed(0)
    model = model_class(config).eval()
    names = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs, names=names: names.extend(n for n in kwargs if "cache" in n or "past" in n),
        with_kwargs=True,
    )
    try:
        words = model.generate(prompts, max_new_tokens=4, do_sample=False, eos_token_id=None)
        seen = f"{tuple(words.shape)}, cache handed over as {sorted(set(names) - {'use_cache'})}"
    except ValueError as error:
        seen = f"ValueError: {error}"
    print(f"{transformers.__version__}, {model_class.__name__}: {seen}")
    fails = by_name and model_class is SteeredLM
    if seen.startswith("ValueError: `get_seq_length` can only be called on Attention") != fails:
        raise SystemExit(f"Not as the head of this script says: {model_class.__name__}")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" by-name
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" any-name
