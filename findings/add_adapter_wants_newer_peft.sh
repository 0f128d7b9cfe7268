#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0, peft 0.21.2, which is the newest peft on PyPI when this is written.
#
# Expected: with the newest releases of both, model.add_adapter(LoraConfig(...)) puts a LoRA into a model, and an
# adapter that load_adapter took can be switched off and on.
#
# What happens: add_adapter raises ValueError and asks for peft 0.22.0. load_adapter does not ask and works; but then
# disable_adapters and set_adapter raise, so the adapter is in and cannot be switched. peft's own wrapper works
# throughout, on the same files.
#
# Output seen:
#   add_adapter: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#   load_adapter: works
#   disable_adapters: ValueError: The version of PEFT you are using is not compatible, ... >= 0.22.0
#   set_adapter: ValueError: The version of PEFT you are using is not compatible, ... >= 0.22.0
#   get_peft_model, PeftModel.from_pretrained, disable_adapter of the wrapper: work
#
# Why: MIN_PEFT_VERSION in integrations/peft.py went from 0.20.0 in transformers 5.23.0 to 0.22.0 in 5.24.0. The
# methods of PeftAdapterMixin check it one by one, and load_adapter is not among those that do. pip knows nothing of
# the bound: peft is no dependency in transformers' metadata.
#
# Instead: use get_peft_model and PeftModel.from_pretrained (with PeftModel.disable_adapter), or transformers 5.23.0.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import tempfile

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

WANTED = "please use a version >= 0.22.0"


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


def tiny():
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
    return LlamaForCausalLM(config).eval()


def attempt(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return f"ValueError: {error}"
    return "works"


lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
ids = torch.arange(3, 10)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    wrapped = get_peft_model(tiny(), lora)
    wrapped.save_pretrained(folder)
    loaded = tiny()
    seen = {
        "add_adapter": attempt(tiny().add_adapter, lora),
        "load_adapter": attempt(loaded.load_adapter, folder),
        "disable_adapters": attempt(loaded.disable_adapters),
        "set_adapter": attempt(loaded.set_adapter, "default"),
    }
    again = PeftModel.from_pretrained(tiny(), folder)
    logits = {name: m(ids).logits for name, m in (("wrapped", wrapped), ("loaded", loaded), ("again", again))}
    with again.disable_adapter():
        plain = torch.allclose(again(ids).logits, tiny()(ids).logits)
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
for name, what in seen.items():
    print(f"{name}: {what}")
    check(what == "works" if name == "load_adapter" else what.endswith(WANTED), name)
for name in ("loaded", "again"):
    check(torch.allclose(logits["wrapped"], logits[name], atol=1e-6), f"the adapter, {name}")
check(not torch.allclose(logits["wrapped"], tiny()(ids).logits, atol=1e-3), "the adapter does nothing")
check(plain, "disable_adapter of the wrapper")
print("get_peft_model, PeftModel.from_pretrained, disable_adapter of the wrapper: work")
print(f"As described, with transformers {transformers.__version__} and peft {peft.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
