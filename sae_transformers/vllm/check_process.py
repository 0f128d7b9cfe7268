"""An engine for `check`, in a process of its own: `python -m ....check_process REQUEST ANSWER`."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request: str, answer: str) -> None:
    """Answer the requests of a file, twice, so that the second time the prefix cache is warm."""
    from vllm import LLM, SamplingParams

    from .check import NEW_TOKENS

    asked = json.loads(Path(request).read_text())
    options = {"max_model_len": 512, "max_num_batched_tokens": 128, "max_num_seqs": 16, **asked["options"]}
    engine = LLM(asked["repository"], skip_tokenizer_init=True, enable_chunked_prefill=True, **options)
    prompts = [{"prompt_token_ids": one["prompt"]} for one in asked["requests"]]
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False,
            extra_args={"steering": one["steering"]},
        )
        for one in asked["requests"]
    ]  # fmt: skip
    engine.generate(prompts, parameters, use_tqdm=False)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
