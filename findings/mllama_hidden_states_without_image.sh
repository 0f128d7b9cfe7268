#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.23.0 does the same): the text model of Mllama (Llama 3.2 Vision), here with 6
# layers of which 1 and 4 attend to the image.
#
# Expected: output_hidden_states returns num_hidden_layers + 1 tensors, and hidden_states[i + 1] is the output of layer
# i, for any valid input.
#
# What happens: it does with an image. Without one, the layers that attend to the image do not run, and they leave no
# gap: the tuple is shorter and every index behind the first of them means another layer. hidden_states[2] is the
# output of layer 1 with an image and of layer 2 without. With the configuration that the class starts from, 40 layers
# of which 3, 8, 13 and so on are of that kind, hidden_states[20] is layer 19 with an image and layer 24 without. A
# dictionary trained on one layer's output is fed another one's.
#
# Output seen:
#   words: 5 hidden states; layers that ran: [0, 2, 3, 5]; hidden_states[1:-1] come from layers [0, 2, 3]
#   words and an image: 7 hidden states; layers that ran: [0, 1, 2, 3, 4, 5]; hidden_states[1:-1] come from layers
#     [0, 1, 2, 3, 4]
#
# Why: MllamaTextModel.forward (models/mllama/modeling_mllama.py) skips such a layer when there is neither an image nor
# one in the cache. The states are gathered by hooks that append whatever a layer returns (utils/output_capturing.py),
# so a layer that is skipped appends nothing. The last entry is the state after the final norm in both cases, so that a
# check of the ends finds nothing.
#
# Instead: take activations by a forward hook on the layer, which then simply does not fire, or map indices through
# config.cross_attention_layers when there is no image. Check len(hidden_states) in any case.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


torch.manual_seed(0)
config = MllamaTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    cross_attention_layers=[1, 4],
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
model = MllamaForCausalLM(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):  # they start closed, which would hide the layers that read the image
            parameter.fill_(0.5)
ids = torch.arange(3, 10)[None]
image = torch.randn(1, 5, 32)
for what, more in (("words", {}), ("words and an image", {"cross_attention_states": image})):
    ran, outputs_of = [], {}

    def note(module, args, output, number=None):
        ran.append(number)
        outputs_of[number] = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.register_forward_hook(lambda m, a, o, number=number: note(m, a, o, number))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, **more).hidden_states
    for handle in handles:
        handle.remove()
    found = [
        next((number for number in ran if torch.equal(outputs_of[number], state)), None) for state in states[1:-1]
    ]
    print(f"{what}: {len(states)} hidden states; layers that ran: {ran}; hidden_states[1:-1] come from layers {found}")
    check(ran == ([0, 2, 3, 5] if not more else list(range(6))), f"the layers that ran, {what}")
    check(found == ran[:-1], f"where the hidden states come from, {what}")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
