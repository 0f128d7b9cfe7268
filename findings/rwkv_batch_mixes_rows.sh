#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.12.0 and 5.23.0 do the same): RWKV.
#
# Expected: the rows of a batch do not touch each other. generate() on three prompts of equal length, without padding,
# finds for each what it finds for that prompt alone, with the recurrent state (use_cache=True) or without.
#
# What happens: without the state it does. With the state, which generate() uses if nothing is said, the rows are mixed
# from the second new word on, and other words come out. One call with a state and one new word a row returns logits of
# as many positions as there are rows, instead of one. Nothing is raised. A batch of one row is right.
#
# Output seen:
#   new words like those of the row alone: 1 of 12, 3 of 12, 1 of 12
#   1 row,  1 new word: logits (1, 1, 99)
#   2 rows, 1 new word: logits (2, 2, 99)
#   3 rows, 1 new word: logits (3, 3, 99)
#
# Why: for a single new word RwkvSelfAttention.extract_key_value and RwkvFeedForward.forward
# (models/rwkv/modeling_rwkv.py) take the word before from the state, as a tensor of shape (rows, width), and add it to
# the present one, of shape (rows, 1, width). Broadcasting makes (rows, rows, width) of it: each row is joined with the
# last word of every row, and what should be the time axis runs over the rows. With one row the shapes happen to fit.
#
# Instead: generate for one prompt at a time, or with use_cache=False.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


torch.manual_seed(0)
config = RwkvConfig(
    vocab_size=99,
    hidden_size=32,
    attention_hidden_size=32,
    num_hidden_layers=4,
    context_length=128,
    bos_token_id=1,
    eos_token_id=2,
)
model = RwkvForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.15)
prompts = torch.randint(3, 99, (3, 6))
how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

alone = torch.cat([model.generate(row[None], **how) for row in prompts])
check(torch.equal(alone, model.generate(prompts, use_cache=False, **how)), "without the state a batch differs as well")
cached = model.generate(prompts, use_cache=True, **how)
same = (cached == alone)[:, 6:]
print("new words like those of the row alone:", [f"{int(row.sum())} of 12" for row in same])
check(not same.all(dim=1).any(), "a row of the batch is right")

with torch.no_grad():
    for rows in (1, 2, 3):
        state = model(prompts[:rows, :5], use_cache=True).state
        one = model(prompts[:rows, 5:], state=state, use_cache=True).logits
        print(f"{rows} rows, 1 new word: logits {tuple(one.shape)}")
        check(one.shape == (rows, rows, 99), "the shape of the logits")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
