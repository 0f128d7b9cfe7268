"""Load a saved model where this library does not exist, and compare what it generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..hub_cards.fresh_interpreter import run_without_library
from ..modeling import Steering

SCRIPT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(task["threads"])
try:
    import sae_transformers
    raise SystemExit("the library was not blocked")
except ModuleNotFoundError:
    pass
tokenizer = AutoTokenizer.from_pretrained(task["folder"], trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(
    task["folder"], trust_remote_code=True, dtype=getattr(torch, task["dtype"])
).to(task["device"])
batch = tokenizer(task["prompts"], return_tensors="pt", padding=True).to(model.device)
rows = model.generate(
    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], steering=task["steering"],
    max_new_tokens=task["new_tokens"], do_sample=False, pad_token_id=tokenizer.pad_token_id,
)
print(json.dumps({"class": f"{type(model).__module__}.{type(model).__qualname__}", "rows": rows.tolist()}))
"""


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[str], steering: Steering, new_tokens: int
) -> list[list[int]]:
    """Token ids, prompt and continuation, of each prompt."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    rows = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        steering=steering,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return rows.tolist()


def generate_in_fresh_interpreter(
    folder: Path, prompts: Sequence[str], steering: Steering, new_tokens: int, *, dtype: torch.dtype, device: str
) -> tuple[list[list[int]], str]:
    """The same in a new interpreter in which this library cannot be imported, from the saved folder alone.

    Returns:
        Token ids as `generate_greedily` gives, and the name of the class that was loaded.

    Raises:
        RuntimeError: the interpreter failed; the message ends with its last line.
    """
    task = {
        "folder": str(folder.resolve()),
        "prompts": prompts,
        "steering": steering.to_dict(),
        "new_tokens": new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    try:
        answer = run_without_library(SCRIPT, task, folder.parent.resolve())
    except RuntimeError as error:
        raise RuntimeError(f"Loading {folder} in a fresh interpreter failed: {error}") from error
    return answer["rows"], answer["class"]
