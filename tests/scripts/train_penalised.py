"""A published model with penalties, trained where the library cannot be imported: losses of two steps, as JSON.

Arguments: folder, token ids, and of a classifier its labels.
"""

import json
import sys
from typing import Any

import blocked_library  # noqa: F401
import torch
import transformers

auto: Any = transformers.AutoModelForSequenceClassification if sys.argv[3:] else transformers.AutoModelForCausalLM
model: Any = auto.from_pretrained(sys.argv[1], trust_remote_code=True).train()
ids = torch.tensor(json.loads(sys.argv[2]))
labels = torch.tensor(json.loads(sys.argv[3])) if sys.argv[3:] else ids
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
found = []
for _ in range(2):
    out = model(ids, labels=labels)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found.append({"loss": out.loss.item(), **{name: value.item() for name, value in out.sae_losses.items()}})
frozen = not any(p.requires_grad for p in model.saes.parameters())
penalties = [penalty.to_dict() for penalty in (model.group_penalties if sys.argv[3:] else model.feature_penalties)]
print("FOUND " + json.dumps({"steps": found, "frozen": frozen, "penalties": penalties}))  # noqa: T201
