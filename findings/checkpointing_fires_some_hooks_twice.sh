#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.23.0 does the same): forward hooks under gradient checkpointing, Llama.
#
# Expected: a forward hook fires once for each training step; or, if the recomputation in the backward pass fires it
# again, then all hooks inside a layer alike, so that counts can be halved.
#
# What happens: gradient_checkpointing_enable() makes hooks on most parts of a layer fire twice a step, on its last
# parts once and on the layer itself once. Activations gathered by hooks during fine-tuning (to train a dictionary on
# them, to log norms, to count tokens) are doubled for some places and not for others. With use_reentrant=True the line
# runs elsewhere: all parts twice, the layer itself once.
#
# Output seen, calls of a hook in one step (forward and backward):
#   plain:        self_attn 1, o_proj 1, gate_proj 1, act_fn 1, down_proj 1, mlp 1, the layer 1
#   checkpointed: self_attn 2, o_proj 2, gate_proj 2, act_fn 2, down_proj 1, mlp 1, the layer 1
#   re-entrant:   self_attn 2, o_proj 2, gate_proj 2, act_fn 2, down_proj 2, mlp 2, the layer 1
#
# Why: GradientCheckpointingLayer (transformers, modeling_layers.py) checkpoints what lies inside the layer's own call,
# so the layer's hooks stay outside. The recomputation calls the parts again, hooks included. Without re-entrance torch
# (utils/checkpoint.py) stops it as soon as the last tensor that the backward pass needs is there, by an exception:
# here that is the input of down_proj, whose call does not come to its end and whose hook does not run.
#
# Instead: hook whole layers, or switch checkpointing off while gathering. Within a hook the recomputation can be told
# by a flag that is set around loss.backward().
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

PARTS = ("self_attn", "self_attn.o_proj", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", "mlp", "")
NON_REENTRANT = dict(zip(PARTS, (2, 2, 2, 2, 1, 1, 1), strict=True))
REENTRANT = dict(zip(PARTS, (2, 2, 2, 2, 2, 2, 1), strict=True))


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)
model = LlamaForCausalLM(config).train()
ids = torch.arange(3, 17).view(2, 7)
layer = model.model.layers[1]


def calls_per_step():
    counts = dict.fromkeys(PARTS, 0)

    def counting(part):
        def hook(module, args, output):
            counts[part] += 1

        return hook

    handles = [layer.get_submodule(part).register_forward_hook(counting(part)) for part in PARTS]
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return counts


plain = calls_per_step()
model.gradient_checkpointing_enable()
checkpointed = calls_per_step()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
reentrant = calls_per_step()
for what, counts in (("plain", plain), ("checkpointed", checkpointed), ("re-entrant", reentrant)):
    print(f"{what}:", {part or "(layer)": count for part, count in counts.items()})
check(set(plain.values()) == {1}, "without checkpointing")
check(checkpointed == NON_REENTRANT, "with gradient_checkpointing_enable()")
check(reentrant == REENTRANT, "with use_reentrant=True")
print(f"As described, with transformers {transformers.__version__} and torch {torch.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
