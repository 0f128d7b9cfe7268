#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0 (5.12.0 and 5.23.0 do the same): Ernie 4.5 VL (MoE) with an image in the prompt.
#
# Expected: generate(use_cache=False) finds the words that generate(use_cache=True) finds, only slower. It is what one
# falls back to when hooks or hidden states need the whole text in every pass.
#
# What happens: with the cache it works. Without it the first new word is found, and the second pass raises IndexError
# in a mixture-of-experts layer. The inputs are those that the family's processor makes; it adds the field
# moe_mm_token_type_ids on its own.
#
# Output seen:
#   with the cache: [39, 42, 93, 93]
#   without the cache: IndexError: The shape of the mask [1, 10, 32] at index 1 does not match the shape of the
#     indexed tensor [1, 11, 32] at index 1
#   by hand, without the cache: [39, 42, 93, 93]
#
# Why: after each new word GenerationMixin._update_model_kwargs_for_generation (generation/utils.py) makes
# token_type_ids and mm_token_type_ids one longer, but not moe_mm_token_type_ids. With a cache the field is cut or
# dropped after the first pass, so its length does not matter. Without one the MoE layer splits the words between text
# and image experts by a mask that is as long as the prompt, while the text has grown.
#
# Instead: keep the cache, or write the loop and lengthen both fields by zeros, as below.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import torch
import transformers
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


text = {
    "vocab_size": 105,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": [24, 24],
    "mlp_layer_types": ["dense", "sparse"],
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
tokens = {
    "image_start_token_id": 99,
    "image_end_token_id": 100,
    "image_token_id": 101,
    "video_start_token_id": 102,
    "video_end_token_id": 103,
    "video_token_id": 104,
}
torch.manual_seed(0)
config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **tokens)
model = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
with torch.no_grad():
    for name, parameter in model.model.language_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
ids = torch.tensor([[5, 99, 101, 101, 101, 101, 100, 7, 8, 9]])
inputs = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "pixel_values": torch.randn(16, 3 * 4 * 4),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
    "mm_token_type_ids": (ids == 101).long(),
    "moe_mm_token_type_ids": ((ids >= 99) & (ids <= 101)).long(),  # as the family's processor makes it
}
how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
cached = model.generate(**inputs, **how, use_cache=True)[0, ids.shape[1] :].tolist()
print("with the cache:", cached)
try:
    seen = str(model.generate(**inputs, **how, use_cache=False)[0, ids.shape[1] :].tolist())
except IndexError as error:
    seen = f"IndexError: {error}"
print("without the cache:", seen)
check("The shape of the mask [1, 10, 32]" in seen, "generation without the cache")

with torch.no_grad():  # one word after the other, with the field made longer by hand
    for _ in range(4):
        word = model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], word], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1))
by_hand = inputs["input_ids"][0, ids.shape[1] :].tolist()
print("by hand, without the cache:", by_hand)
check(by_hand == cached, "the words found by hand")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
