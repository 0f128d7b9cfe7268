#!/usr/bin/env bash
# torch 2.13.0, transformers 5.12.0, 5.19.0 and 5.23.0: Gemma 2 as it is loaded when nobody names an attention.
#
# Expected: the model computes what its config says. Gemma 2 caps its attention scores softly (attn_logit_softcapping,
# 50 in the published models), so whatever attention is taken has to.
#
# What happens: up to 5.19.0 the model is loaded with sdpa, which is handed the cap and drops it without a word: the same
# weights give other logits and other hidden states than with eager. Texts look right; SAEs, probes and comparisons with
# other engines (vLLM applies the cap) are of another model.
#
# Output seen (random weights, a cap of 50, then none):
#   5.12.0: loaded with sdpa; cap 50: sdpa and eager differ; no cap: they agree
#   5.19.0: loaded with sdpa; cap 50: sdpa and eager differ; no cap: they agree
#   5.23.0: loaded with eager; sdpa is refused
#
# Why: sdpa_attention_forward (integrations/sdpa_attention.py) has no softcap among its arguments and takes what it does not
# know in **kwargs; the family said _supports_sdpa = True. 5.23.0 says False.
#
# Instead: attn_implementation="eager" for every model whose config has attn_logit_softcapping.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
for release in 5.12.0 5.19.0 5.23.0; do
    "$folder/venv/bin/pip" install --quiet "transformers==$release"
    "$folder/venv/bin/python" - <<'PYTHON' >> "$folder/seen"
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

sizes = {
    "vocab_size": 99, "hidden_size": 64, "head_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 96, "query_pre_attn_scalar": 8,
}
ids = torch.arange(3, 60)[None]


def apart(cap):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", attn_logit_softcapping=cap, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        logits = []
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            logits.append(model(ids).logits)
    return (logits[0] - logits[1]).abs().max().item()


default = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes)).config._attn_implementation
told = f"{transformers.__version__}: loaded with {default}; "
try:
    told += f"cap 50: sdpa and eager {'differ' if apart(50.0) > 1e-3 else 'agree'}; "
    told += f"no cap: they {'agree' if apart(None) < 1e-4 else 'differ'}"
except ValueError:
    told += "sdpa is refused"
print(told)
PYTHON
done
diff "$folder/seen" - <<'SEEN'
5.12.0: loaded with sdpa; cap 50: sdpa and eager differ; no cap: they agree
5.19.0: loaded with sdpa; cap 50: sdpa and eager differ; no cap: they agree
5.23.0: loaded with eager; sdpa is refused
SEEN
cat "$folder/seen"
