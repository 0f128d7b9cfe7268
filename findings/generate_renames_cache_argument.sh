#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0 and 5.24.0: forward pre-hooks and an overridden forward under generate(), Llama.
#
# Expected: code that tells the prompt from the new words by past_key_values (hand-written steering does, to spare the
# prompt or to act on it alone) keeps working: 5.24.0 renames the argument to cache, but still takes the old name, with
# a warning.
#
# What happens: the old name works for callers only. generate() hands the cache over as cache, so a pre-hook that reads
# kwargs["past_key_values"] with .get finds None, at the model and at every layer, and takes each new word for a
# prompt. An overridden forward with a past_key_values parameter sees None as well, the cache going by in its **kwargs.
# Words still come out right, and the hooks get no warning: only the steering is wrong.
#
# Output seen, for a prompt of 7 words and 3 new ones (chunks of 7, 1 and 1 words):
#   5.23.0: hook on the model, hook on a layer, forward: ['prompt', 'new word', 'new word']
#   5.24.0: hook on the model, hook on a layer, forward: ['prompt', 'prompt', 'prompt']
#
# Why: in 5.24.0 prepare_inputs_for_generation (generation/utils.py) and the models put the cache under the new name.
# The translation of the old one is a decorator on forward (deprecate_kwarg in utils/deprecation.py), which runs after
# pre-hooks have read the arguments, and only from old to new.
#
# Instead: read both names, kwargs.get("cache", kwargs.get("past_key_values")), or tell prompts by something that no
# release renames, such as your own count of words since generate() began. Never take a missing name for an empty
# cache.
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
from transformers import LlamaConfig, LlamaForCausalLM

expected = {"old": ["prompt", "new word", "new word"], "new": ["prompt", "prompt", "prompt"]}[sys.argv[1]]


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}, transformers {transformers.__version__}")


def kind(past):
    return "prompt" if past is None or past.get_seq_length() == 0 else "new word"


class Wrapped(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        in_forward.append(kind(past_key_values))
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


in_forward, in_hook, at_layer, lengths = [], [], [], []
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
model = Wrapped(config).eval()


def before_model(module, args, kwargs):
    in_hook.append(kind(kwargs.get("past_key_values")))
    lengths.append(kwargs["input_ids"].shape[1])


def before_attention(module, args, kwargs):  # the layer has not put the chunk into the cache yet
    at_layer.append(kind(kwargs.get("past_key_values")))


model.register_forward_pre_hook(before_model, with_kwargs=True)
model.model.layers[0].register_forward_pre_hook(before_attention, with_kwargs=True)
model.generate(torch.arange(3, 10)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
print(f"{transformers.__version__}: chunks of {lengths} words")
for what, seen in (("hook on the model", in_hook), ("hook on a layer", at_layer), ("forward", in_forward)):
    print(f"  {what}: {seen}")
    check(seen == expected, what)
check(lengths == [7, 1, 1], "the lengths of the chunks")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" old
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" new
