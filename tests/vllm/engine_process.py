"""A process with vLLM's engine: `python -m tests.vllm.engine_process REQUEST ANSWER`, see `worlds.run_engine`."""

# vLLM has an environment of its own.
# pyright: reportAttributeAccessIssue=false

import json
import os
import sys
from pathlib import Path


def main(request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    options = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 64,
        "max_num_seqs": 8, "enable_chunked_prefill": True, "disable_log_stats": False, **asked["engine"],
    }  # fmt: skip
    if options.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if asked["without_key"]:
        from sae_transformers.vllm import cache_key

        cache_key.install = lambda: None
    from vllm import LLM, SamplingParams

    engine = LLM(asked["repository"], skip_tokenizer_init=True, **options)
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=asked["new_tokens"], min_tokens=asked["new_tokens"], ignore_eos=True,
            detokenize=False, extra_args=None if job["steering"] is None else {"steering": job["steering"]},
        )
        for job in asked["jobs"]
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": job["prompt"]} for job in asked["jobs"]]
    rounds = []
    for _ in range(asked["rounds"]):
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        preempted = sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": sum(output.num_cached_tokens or 0 for output in outputs),
                "preemptions": preempted,
            }
        )
    Path(answer).write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
