"""Steering on vLLM: what it costs, and tokens a second beside our own server. In the environment of `make .vllm`.

    python benchmarks/vllm_serving.py REPOSITORY [--parts cost servers] [--rounds 5] [--tokens 32]

REPOSITORY is a model with SAEs whose answers never end by themselves; `--make MODEL SAE [SAE]` makes it.
`cost` runs vLLM's engine in this process and takes its CPU time, plain and steered in turn; `servers` asks both
servers by the official client, all rows in turn.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering

QUESTIONS = ("What is a river?", "Name three animals.", "How do I boil an egg?", "Why is the sky blue at noon?")
AT_ONCE = (1, 8, 32)


def make(folder: str, base: str, saes: list[str]) -> None:
    """A repository in which no token ends an answer, so that all answers have one length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(f"{folder}/base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(f"{folder}/base")
    base_model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    with_saes = SaeForCausalLM.from_base(
        base_model, [SparseAutoencoder.from_pretrained(sae) for sae in saes], force=True
    )
    with_saes.save_pretrained(f"{folder}/repository")


def kinds(model) -> dict[str, list[Steering | None]]:
    """Steerings of 32 requests by the name of a row."""
    found: dict[str, list[Steering | None]] = {
        "none": [None] * 32,
        "direction": [Steering([FeatureEdit(feature=7, op="direction", value=4.0)])] * 32,
    }
    for number, sae in enumerate(model.config.sae_configs):
        set_one = FeatureEdit(sae=number, feature=7, op="set", value=4.0)
        found[f"set, {sae.activation}"] = [Steering([set_one])] * 32
    found["each its own"] = [
        Steering([FeatureEdit(feature=7 + n, op="set" if n % 2 else "add", value=2.0 + n / 8)]) for n in range(32)
    ]
    return found


# -- cost ------------------------------------------------------------------------------------------------------------


def engine_cost(repository: str, rounds: int, tokens: int) -> None:
    """CPU time of vLLM's engine a token, steered to plain, 8 requests at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = SaeForCausalLM.from_pretrained(repository, dtype=torch.float32).eval()
    steerings = kinds(model)
    prompts = [torch.randint(0, 1000, (24,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(8)]
    wanted = [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 24, dtype=torch.long),
            steering=steerings["each its own"][n], do_sample=False, max_new_tokens=tokens,
        )[0, 24:].tolist()
        for n, prompt in enumerate(prompts)
    ]  # fmt: skip
    from vllm import LLM, SamplingParams

    engine = LLM(
        repository, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512, max_num_seqs=32,
        enable_prefix_caching=False,
    )  # fmt: skip

    def write(name: str) -> tuple[float, list[list[int]]]:
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                extra_args={"steering": False if steering is None else steering.to_dict()},
            )
            for steering in steerings[name][:8]
        ]  # fmt: skip
        start = time.process_time()
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        return time.process_time() - start, [list(output.outputs[0].token_ids) for output in outputs]

    equal = sum(got == one for got, one in zip(write("each its own")[1], wanted, strict=True))
    print(f"{equal} of 8 steered answers of {tokens} tokens are what `generate` writes\n")
    times = defaultdict(list)
    for turn in range(rounds):
        for name in list(steerings)[:: 1 if turn % 2 else -1]:
            times[name].append(write(name)[0])
    print("| vLLM, 8 at once | ms of CPU a token | to none, minima | to none, median of pairs |\n|---|---|---|---|")
    for name in steerings:
        ratio = min(times[name]) / min(times["none"])
        paired = statistics.median(a / b for a, b in zip(times[name], times["none"], strict=True))
        print(f"| {name} | {1000 * min(times[name]) / 8 / tokens:.2f} | {ratio:.2f} | {paired:.2f} |")


# -- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def serving(repository: str, *options: str) -> Iterator[openai.OpenAI]:
    """The official client of a server of its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sae_transformers", "serve", repository, "--name", "model", "--port", str(port)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended.")
            time.sleep(0.5)
        with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
            yield client
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def _is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def ask(client: openai.OpenAI, number: int, tokens: int, steering: Steering | None) -> str:
    answer = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}], max_tokens=tokens,
        temperature=0, extra_body={"steering": steering.to_dict() if steering else False},
    )  # fmt: skip
    return answer.choices[0].message.content or ""


def alone(model, tokenizer, number: int, tokens: int, steering: Steering | None) -> str:
    """What the model writes without a server."""
    messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, steering=steering or False, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def servers(repository: str, rounds: int, tokens: int) -> None:
    """Tokens a second of both servers, and whether the steered answers are those of `generate`."""
    from sae_transformers import load

    model, tokenizer, _ = load(repository)
    steerings = {name: rows for name, rows in kinds(model).items() if name in ("none", "each its own")}
    wanted = [alone(model, tokenizer, n, tokens, steerings["each its own"][n]) for n in range(8)]
    del model
    speeds, texts = defaultdict(list), {}
    vllm = ("--engine", "vllm", "--", "--max-model-len", "512", "--enforce-eager")
    with serving(repository) as own, serving(repository, *vllm) as other:
        for client in (own, other):
            ask(client, 0, 2, steerings["each its own"][0])
        for turn in range(rounds):
            for at_once in AT_ONCE:
                for name, rows in list(steerings.items())[:: 1 if turn % 2 else -1]:
                    for engine, client in (("own", own), ("vLLM", other))[:: 1 if turn % 2 else -1]:
                        with ThreadPoolExecutor(at_once) as pool:
                            start = time.perf_counter()
                            jobs = [pool.submit(ask, client, n, tokens, rows[n]) for n in range(at_once)]
                            texts[engine, at_once, name] = [job.result() for job in jobs]
                        speeds[engine, at_once, name].append(at_once * tokens / (time.perf_counter() - start))
            print(f"round {turn + 1} of {rounds}", flush=True)
    equal = sum(
        a == b for a, b in zip(texts["own", 32, "each its own"], texts["vLLM", 32, "each its own"], strict=True)
    )
    right = sum(a == b for a, b in zip(texts["vLLM", 32, "each its own"], wanted, strict=False))
    print(
        f"\n{equal} of 32 steered answers are the same from both servers; {right} of vLLM's first 8 are `generate`'s\n"
    )
    print("| at once | steering | our server, tokens/s | vLLM, tokens/s | vLLM to ours |\n|---|---|---|---|---|")
    for at_once in AT_ONCE:
        for name in steerings:
            own_speed, other_speed = (statistics.median(speeds[e, at_once, name]) for e in ("own", "vLLM"))
            print(f"| {at_once} | {name} | {own_speed:.1f} | {other_speed:.1f} | {other_speed / own_speed:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repository")
    parser.add_argument("--make", nargs="+", metavar="MODEL SAE")
    parser.add_argument("--parts", nargs="+", default=["cost", "servers"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    if options.make:
        make(str(Path(options.repository).parent), options.make[0], options.make[1:])
    if "cost" in options.parts:
        engine_cost(options.repository, options.rounds, options.tokens)
    if "servers" in options.parts:
        servers(options.repository, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
