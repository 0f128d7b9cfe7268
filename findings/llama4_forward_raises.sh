#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0 and 5.24.0: Llama4ForConditionalGeneration.
#
# Expected: a forward pass returns logits, for words alone and for words with an image.
#
# What happens: with 5.23.0 it does. With 5.24.0 every forward of the class raises AttributeError after the whole
# computation is done, with an image or without, and so does generate(). The language model inside it works.
#
# Output seen:
#   5.23.0, text: logits (1, 8, 110)
#   5.23.0, text and image: logits (1, 12, 110)
#   5.24.0, text: AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'
#   5.24.0, text and image: the same
#   both, model.language_model: logits (1, 8, 110)
#
# Why: Llama4ForConditionalGeneration.forward (models/llama4/modeling_llama4.py) was moved to the output class that
# multimodal models now share, whose image_outputs field it copies from the result of the inner call. In other families
# that inner call goes to a multimodal model which fills the field. Here it goes to Llama4ForCausalLM, a plain language
# model, whose output has no such field.
#
# Instead: stay on 5.23.0 for Llama 4 with images. For words alone, model.language_model can be called by itself.
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
from transformers import Llama4Config, Llama4ForConditionalGeneration

raises = sys.argv[1] == "raises"
text = {
    "vocab_size": 110,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
vision = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
config = Llama4Config(
    text_config=text, vision_config=vision, image_token_index=109, boi_token_index=108, eoi_token_index=107
)
torch.manual_seed(0)
model = Llama4ForConditionalGeneration(config).eval()
words = torch.randint(3, 99, (1, 8))
with_image = torch.cat([words[:, :3], torch.full((1, 4), 109), words[:, 3:]], dim=1)
cases = {
    "text": {"input_ids": words},
    "text and image": {"input_ids": with_image, "pixel_values": torch.randn(1, 3, 16, 16)},
}
for what, inputs in cases.items():
    try:
        with torch.no_grad():
            seen = f"logits {tuple(model(**inputs).logits.shape)}"
    except AttributeError as error:
        seen = f"AttributeError: {error}"
    print(f"{transformers.__version__}, {what}: {seen}")
    if ("has no attribute 'image_outputs'" in seen) != raises or (not raises and not seen.startswith("logits")):
        raise SystemExit(f"Not as the head of this script says: {what} with transformers {transformers.__version__}")
with torch.no_grad():
    shape = tuple(model.language_model(words).logits.shape)
print(f"{transformers.__version__}, model.language_model: logits {shape}")
if shape != (1, 8, 110):
    raise SystemExit("Not as the head of this script says: the language model alone")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" runs
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py" raises
