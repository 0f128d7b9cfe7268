"""A fine-tuned model by its repository's id, where the library cannot be imported: logits, and what pipelines say."""

import json
import sys

import blocked_library  # noqa: F401
import torch
import transformers

kind, name, text = sys.argv[1:]
auto = getattr(transformers, f"AutoModelFor{kind}")
model = auto.from_pretrained(name, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
with torch.no_grad():
    logits = model(**tokenizer(text, return_tensors="pt")).logits
task = "text-classification" if kind == "SequenceClassification" else "text-generation"
options = {} if task == "text-classification" else {"max_new_tokens": 4, "do_sample": False}
answer = transformers.pipeline(task, model=name, trust_remote_code=True)(text, **options)
print("FOUND " + json.dumps({"logits": logits.flatten().tolist(), "answer": answer}))  # noqa: T201
