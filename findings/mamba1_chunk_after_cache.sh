#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.23.0 does the same): Jamba, Mamba and FalconMamba, beside Mamba2.
#
# Expected: a text may be fed to a model in pieces, each with the cache that the piece before returned, and the logits
# are those of one pass over the whole text. It holds for attention, and for Mamba2, whatever the pieces.
#
# What happens: it holds for pieces of one word. A piece of two or more words is read as if the text began there: the
# state of the Mamba layers is dropped (only the few words in the convolution's window are remembered). Nothing is
# raised or logged. A prompt that is continued (a shared prefix, the next turn of a chat, a harvest in chunks) gets
# wrong logits and wrong hidden states.
#
# Output seen, as the norm of the error over the norm of the logits, for words 9 to 20 of a text:
#   JambaForCausalLM        1 at a time 7e-07    4 at a time 1e-01    12 at a time 8e-02
#   MambaForCausalLM        1 at a time 6e-07    4 at a time 3e-01    12 at a time 2e-01
#   FalconMambaForCausalLM  1 at a time 4e-07    4 at a time 1e-01    12 at a time 1e-01
#   Mamba2ForCausalLM       1 at a time 6e-07    4 at a time 1e-07    12 at a time 2e-07
#
# Why: the mixers (JambaMambaMixer.forward in models/jamba/modeling_jamba.py and its like in models/mamba and
# models/falcon_mamba) read the stored state only on the way for a single word. With more words they run the selective
# scan over the piece, and that scan has no argument for a state to start from; its last state then overwrites the
# stored one. Mamba2's chunk scan does take the stored state.
#
# Instead: after the first pass feed these families word by word, or pass over the whole text again.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

SMALL = {"vocab_size": 99, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA1 = {**SMALL, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
JAMBA = {
    **SMALL,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
MAMBA2 = {**SMALL, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}
FAMILIES = [
    (JambaForCausalLM, JambaConfig(**JAMBA), False),
    (MambaForCausalLM, MambaConfig(**MAMBA1), False),
    (FalconMambaForCausalLM, FalconMambaConfig(**MAMBA1), False),
    (Mamba2ForCausalLM, Mamba2Config(**MAMBA2, chunk_size=4), True),
]


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


def continued(model, ids, start, step):
    """The logits after `start` words, fed `step` words at a time to the cache of the first ones."""
    outputs = model(ids[:, :start], use_cache=True)
    found = []
    for place in range(start, ids.shape[1], step):
        outputs = model(ids[:, place : place + step], cache=outputs.cache, use_cache=True)
        found.append(outputs.logits)
    return torch.cat(found, dim=1)


for model_class, config, chunks_hold in FAMILIES:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.normal_(std=0.3)
        ids = torch.randint(3, 99, (1, 20))
        whole = model(ids).logits[:, 8:]
        errors = {
            step: ((continued(model, ids, 8, step) - whole).norm() / whole.norm()).item() for step in (1, 4, 12)
        }
    print(model_class.__name__, *[f"{step} at a time: {error:.0e}" for step, error in errors.items()], sep="  ")
    check(errors[1] < 1e-4, f"{model_class.__name__} is off even one word at a time")
    for step in (4, 12):
        check((errors[step] < 1e-4) == chunks_hold, f"{model_class.__name__}, {step} words at a time")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
