"""Pushes a base and models with SAEs to the Hub of HF_ENDPOINT, moves them on, and writes down the answers.

push_repositories.py OUT: repositories `tester/base`, `tester/sae`, `tester/full` and their classifiers, all tagged v1;
afterwards the base and the language models get other weights on main. OUT receives the answers of both.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from tests.invariants import published
from tests.tiny import prompt, tiny_base


@torch.no_grad()
def main() -> None:
    out = Path(sys.argv[1])
    api, ids, answers, facts = HfApi(), prompt(), {}, {}
    facts["base_commit"] = tiny_base().push_to_hub("tester/base").oid
    for scope in ("sae", "full"):
        model = published.language_model("tester/base", scope).eval()
        model.push_to_hub(f"tester/{scope}", commit_message="first weights")
        answers |= {f"{scope}.{k}": v for k, v in published.language_model_answers(model, ids).items()}
        head = published.classifier("tester/base", scope).eval()
        head.push_to_hub(f"tester/{scope}_classifier")
        answers |= {f"{scope}_classifier.{k}": v for k, v in published.classifier_answers(head, ids).items()}
        for name in (scope, f"{scope}_classifier"):
            published.tokenizer().push_to_hub(f"tester/{name}")
            api.create_tag(f"tester/{name}", tag="v1")
        if scope == "sae":
            (out / "local").mkdir()
            (out / "local" / "optimizer.pt").write_bytes(b"a Trainer leaves such pickles in its folders")
            model.save_pretrained(out / "local", push_to_hub=True, repo_id="tester/saved", commit_message="by saving")
        for sae in model.saes:
            sae.W_enc.mul_(-1.5)
        model.push_to_hub(f"tester/{scope}")
        answers |= {f"{scope}_main.{k}": v for k, v in published.language_model_answers(model, ids).items()}
    facts["base_commit_later"] = tiny_base(seed=99).push_to_hub("tester/base").oid
    save_file({k: v.contiguous().clone() for k, v in answers.items()}, out / "answers.safetensors")
    (out / "pushed.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
