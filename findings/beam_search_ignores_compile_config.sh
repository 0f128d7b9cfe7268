#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0 and 5.24.0: generate() over a static cache with a compile_config, a tiny Llama.
#
# Expected: generation over a static cache compiles its steps (by itself on a GPU, or where a compile_config asks), for
# one beam or several; or it says that it does not. For what cannot be compiled (quantised, offloaded, another device)
# generate() warns that "compilation will be skipped".
#
# What happens: greedy search and sampling compile. Beam search runs every step uncompiled, with the static cache that
# was asked for and without a word: the memory of the whole length is paid, and the speed is not had. The warning is
# not given either, as nothing checks.
#
# Output seen, graphs compiled for 6 new tokens, and warnings that name compilation:
#   5.23.0: greedy 1 and 0, sampling 1 and 0, 2 beams 0 and 0; on a device that is not compiled for, greedy warns
#   5.24.0: the same
#
# Why: get_compiled_call and the check of what can be compiled (_valid_auto_compile_criteria, generation/utils.py) are
# called in _prefill and _sample. _beam_search calls the model itself.
#
# Instead: with beams compile the forward yourself for passes of one token, model.forward = torch.compile(...), or take
# the cache that grows. The flag _compile_all_devices below stands for a GPU, which compiles by itself.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cat > "$folder/check.py" <<'PYTHON'
import logging

import torch
import transformers
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


heard = Heard()
logging.getLogger("transformers").addHandler(heard)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
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
).eval()
ids = torch.arange(3, 10)[None]


def run(everywhere=True, **options):
    """Graphs compiled, warnings about compilation."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    heard.messages.clear()
    config = CompileConfig(backend="eager", mode="default")
    config._compile_all_devices = everywhere
    asked = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 6, **options}
    model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **asked)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs, sum("ompilation will be skipped" in text for text in heard.messages)


found = {
    "greedy": run(do_sample=False),
    "sampling": run(do_sample=True),
    "2 beams": run(do_sample=False, num_beams=2),
    "greedy, another device": run(False, do_sample=False),
}
print(f"transformers {transformers.__version__}: {found}")
for name, (graphs, warnings) in found.items():
    wanted = {"2 beams": graphs == 0 and warnings == 0, "greedy, another device": graphs == 0 and warnings == 1}
    if not wanted.get(name, graphs >= 1 and warnings == 0):
        raise SystemExit(f"Not as the head of this script says: {name}: {graphs} graphs, {warnings} warnings")
PYTHON
for version in 5.23.0 5.24.0; do
    "$folder/venv/bin/pip" install --quiet "transformers==$version"
    "$folder/venv/bin/python" "$folder/check.py"
done
