#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: Trainer.train(resume_from_checkpoint=True) with a checkpoint of the last step, as it
# lies there where a process was killed after its last save and before its end, of a run that ends within an epoch.
#
# Expected: `max_steps` is the number of optimiser steps. A run that has them all takes no more, so that the weights are
# those of a run that was not stopped.
#
# What happens: the check for the end comes after a step, so one more is taken: step 5 of 4, at a learning rate of 0
# where the schedule has ended, at the full one where it is constant, and a further checkpoint is written. Each time
# that such a run is started again it goes on by another step.
#
# Output seen:
#   whole run: step 4 of 4
#   resumed once: step 5 of 4, weights changed: True
#   resumed twice: step 6 of 4, weights changed: True
#
# Instead: compare global_step of the checkpoint's trainer_state.json with max_steps before resuming.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 "accelerate==1.15.0"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cat > "$folder/check.py" <<'PYTHON'
import torch
from transformers import Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, y):
        return {"loss": ((x * self.weight).sum(-1) - y).square().mean()}


rows = [{"x": torch.tensor([float(i), 1.0]), "y": torch.tensor(float(i % 3))} for i in range(64)]
settings = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01}
settings |= {"lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
found, before = [], None
for name in ("whole run", "resumed once", "resumed twice"):
    model = Line()
    trainer = Trainer(model, TrainingArguments("out", **settings), train_dataset=rows)
    trainer.train(resume_from_checkpoint=before is not None)
    changed = before is not None and not torch.equal(before, model.weight)
    before = model.weight.detach().clone()
    found.append((trainer.state.global_step, changed))
    print(f"{name}: step {trainer.state.global_step} of 4" + (f", weights changed: {changed}" if len(found) > 1 else ""))
if found != [(4, False), (5, True), (6, True)]:
    raise SystemExit("Not as the head of this script says.")
print("As described, with transformers 5.24.0.")
PYTHON

cd "$folder" && "$folder/venv/bin/python" -W ignore check.py 2> "$folder/log" || { tail -20 "$folder/log"; exit 1; }
