"""A published model with penalties, trained where the library cannot be imported: losses of two steps, as JSON."""

import json
import sys
from typing import Any

import blocked_library  # noqa: F401
import torch
import transformers

model: Any = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).train()
ids = torch.tensor(json.loads(sys.argv[2]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
found = []
for _ in range(2):
    out = model(ids, labels=ids)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found.append({"loss": out.loss.item(), **{name: value.item() for name, value in out.sae_losses.items()}})
frozen = not any(p.requires_grad for p in model.saes.parameters())
penalties = [penalty.to_dict() for penalty in model.feature_penalties]
print("FOUND " + json.dumps({"steps": found, "frozen": frozen, "penalties": penalties}))  # noqa: T201
