"""Generates with an image in the prompt, by remote code alone: load_multimodal.py MODEL JOB."""

import json
import sys
from pathlib import Path
from typing import Any

import blocked_library  # noqa: F401
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

model: Any = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
job = Path(sys.argv[2])
model.generation_config.eos_token_id = None
steering = json.loads((job / "steering.json").read_text())
inputs = load_file(job / "inputs.safetensors")
tokens = model.generate(**inputs, steering=steering, max_new_tokens=6, do_sample=False)
save_file({"tokens": tokens}, job / "tokens.safetensors")
