#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.23.0 does the same): output_hidden_states together with a forward hook that
# changes a layer's output, Llama.
#
# Expected: hidden_states[i + 1] is what layer i hands to the next one. With a hook that adds 10 to the output of layer
# 0, hidden_states[1] has 10 in it; or, if states were taken before hooks, it never has.
#
# What happens: it depends on the past of the model object. If nobody asked it for hidden states before the hook was
# registered, hidden_states[1] shows the edit. If one call asked for them before, hidden_states[1] shows the output
# without the edit, from then on, while the next layer and the logits do get it. The logits are the same in both cases.
#
# Output seen:
#   not asked before:                     hidden_states[1] has mean 10.00, layer 1 is fed 10.00
#   asked before:                         hidden_states[1] has mean -0.00, layer 1 is fed 10.00
#   asked before, hook with prepend=True: hidden_states[1] has mean 10.00, layer 1 is fed 10.00
#
# Why: hidden states are gathered by forward hooks of the library's own, which capture_outputs
# (utils/output_capturing.py) puts on the layers in the first call that asks for them and leaves there. torch runs
# hooks in the order of their registration, and each gets what the one before returned. So whoever comes first decides.
#
# Instead: to measure an intervention do not read output_hidden_states; read the input of the next layer with a pre-
# hook. Or register the editing hook with prepend=True, which puts it in front in both cases.
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


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


def add_ten(module, args, output):
    return output + 10


ids = torch.arange(3, 10)[None]
means, logits = {}, {}
for asked_before, prepend in ((False, False), (True, False), (True, True)):
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
    )
    model = LlamaForCausalLM(config).eval()
    into_next = []
    with torch.no_grad():
        if asked_before:
            model(ids, output_hidden_states=True)
        model.model.layers[0].register_forward_hook(add_ten, prepend=prepend)
        second = model.model.layers[1]
        second.register_forward_pre_hook(lambda m, args, seen=into_next: seen.append(args[0].mean()))
        outputs = model(ids, output_hidden_states=True)
    means[asked_before, prepend] = outputs.hidden_states[1].mean().item()
    logits[asked_before, prepend] = outputs.logits
    mean = means[asked_before, prepend]
    print(
        f"asked for hidden states before: {asked_before}, hook with prepend: {prepend};",
        f"hidden_states[1] has mean {mean:.2f}, layer 1 is fed {into_next[0].item():.2f}",
    )
    check(abs(into_next[0].item() - 10) < 0.1, "what the next layer is fed")
check(abs(means[False, False] - 10) < 0.1, "a hook that is registered first is not seen")
check(abs(means[True, False]) < 0.1, "a hook that is registered later is seen")
check(abs(means[True, True] - 10) < 0.1, "a hook that is put in front is not seen")
first, *others = logits.values()
check(all(torch.equal(first, other) for other in others), "the logits depend on the order as well")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
