#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0: SFTTrainer with its default settings, and the forward pass of the model
# that it is given.
#
# Expected: a trainer trains what the model's class computes: its forward is called, as transformers' Trainer calls it,
# so that a subclass can add to the loss or change hidden states, and a hook on lm_head sees the logits.
#
# What happens: SFTTrainer puts a function of its own in the place of the model's forward, which runs the inner decoder
# and computes the cross-entropy from its last hidden state and lm_head's weight. The forward of the class is never
# called in training, lm_head is never called as a module, and what either adds to the loss is left out without a word.
# Hooks on the model itself still fire.
#
# Output seen, of one step:
#   Trainer: forward of the class called, hooks lm_head, model
#   SFTTrainer: forward of the class not called, hooks model
#
# Instead: a subclass of SFTTrainer with `compute_loss = transformers.Trainer.compute_loss`.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cat > "$folder/check.py" <<'PYTHON'
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

SIZES = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": 1}
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}


class Own(LlamaForCausalLM):
    called = False

    def forward(self, input_ids=None, attention_mask=None, labels=None, **more):
        Own.called = True
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)


words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="</s>", pad_token="</s>")
found = {}
for name in ("Trainer", "SFTTrainer"):
    Own.called, fired, model = False, set(), Own(LlamaConfig(**SIZES, **HEADS))
    model.register_forward_hook(lambda *call, fired=fired: fired.add("model"))
    model.lm_head.register_forward_hook(lambda *call, fired=fired: fired.add("lm_head"))
    if name == "Trainer":
        rows = [{"input_ids": [2, 3, 2], "labels": [2, 3, 2]}] * 2
        trainer = Trainer(model, TrainingArguments("out", **STEP), train_dataset=rows)
    else:
        rows = Dataset.from_dict({"text": ["a b a", "b a b"]})
        settings = SFTConfig("out", bf16=False, **STEP)
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    found[name] = (Own.called, sorted(fired))
    print(f"{name}: forward of the class {'called' if Own.called else 'not called'}, hooks {', '.join(sorted(fired))}")
if found != {"Trainer": (True, ["lm_head", "model"]), "SFTTrainer": (False, ["model"])}:
    raise SystemExit("Not as the head of this script says.")
print("As described, with trl 1.16.0.")
PYTHON

cd "$folder" && "$folder/venv/bin/python" -W ignore check.py 2> "$folder/log" || { tail -20 "$folder/log"; exit 1; }
