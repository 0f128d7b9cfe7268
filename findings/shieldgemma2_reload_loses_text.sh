#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0, safetensors 0.8.0 (transformers 5.23.0 does the same, 5.12.0 does not): a
# ShieldGemma 2 configuration with AutoModelForImageTextToText, beside the same sizes as Gemma 3.
#
# Expected: save_pretrained followed by from_pretrained of the same auto class gives the model back.
#
# What happens: all weights of the language model are drawn anew. Those of the file are listed as unexpected, those of
# the model as missing, in a log message; nothing is raised, and the logits are noise. The image encoder comes back as
# it was. The auto class builds a Gemma3ForConditionalGeneration for both configurations, and with Gemma 3's own one
# nothing is lost.
#
# Output seen (two layers):
#   shieldgemma2 (Gemma3ForConditionalGeneration): 29 weights drawn anew, 28 of the file unused, logits 0.47 apart
#   gemma3 (Gemma3ForConditionalGeneration): 0 weights drawn anew, 0 of the file unused, logits 0.00 apart
#
# Why: the renamings between file and model are looked up by the class's name and then by config.model_type
# (get_model_conversion_mapping in conversion_mapping.py). The class has none of its own, so model_type decides, and
# "shieldgemma2" stands for a renaming that is meant for ShieldGemma2ForImageClassification, where everything sits one
# "model." deeper. A second renaming, of the inner language model, is undone on saving; on loading, the added prefix
# keeps it from matching, so the names of the text weights lead nowhere.
#
# Instead: load and save with ShieldGemma2ForImageClassification and take its .model, or give the configuration's
# values to a Gemma3Config before building. Ask for output_loading_info=True and refuse missing_keys.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=critical
cat > "$folder/check.py" <<'PYTHON'
import tempfile

import torch
import transformers
from transformers import AutoModelForImageTextToText, Gemma3Config, ShieldGemma2Config


def check(holds, message):
    if not holds:
        raise SystemExit(f"Not as the head of this script says: {message}")


text = {
    "model_type": "gemma3_text",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
vision = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
tokens = {"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96}
ids = torch.arange(3, 15)[None]
for config_class, loses in ((ShieldGemma2Config, True), (Gemma3Config, False)):
    torch.manual_seed(0)
    config = config_class(text_config=text, vision_config=vision, **tokens)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        apart = (model(ids).logits - loaded.eval()(ids).logits).abs().max().item()
    missing = sorted(report["missing_keys"])
    of_text = [name for name in missing if "language_model" in name or name == "lm_head.weight"]
    expected = [name for name, _ in model.named_parameters() if "language_model" in name]
    print(
        f"{config.model_type} ({type(loaded).__name__}): {len(missing)} weights drawn anew,",
        f"{len(report['unexpected_keys'])} of the file unused, logits {apart:.2f} apart",
    )
    check(missing == of_text, "weights beside the text are missing as well")
    check(set(expected) <= set(missing) if loses else not missing, "the weights that are missing")
    check((apart > 1e-2) == loses, "the logits after loading")
print(f"As described, with transformers {transformers.__version__}.")
PYTHON

"$folder/venv/bin/pip" install --quiet transformers==5.24.0 safetensors==0.8.0
"$folder/venv/bin/python" -W ignore "$folder/check.py"
