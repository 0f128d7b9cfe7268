"""Latency and throughput of `serve`: 1, 8 and 32 requests at once, each steered in its own way, and unsteered.

    python benchmarks/serving.py HuggingFaceTB/SmolLM2-135M-Instruct --sae outputs/pretrain/sae

One process holds the server and its clients (the official `openai` package, a thread each). Every answer has the same
number of tokens. All settings take turns, round by round, so that a neighbour's load falls on all of them; the last
rows are the same server with room for one answer at a time.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.create_training_data.base_model import find_base_model
from sae_transformers.serving.app import build_app
from sae_transformers.serving.listening import bind, listener

QUESTIONS = ("What is a river?", "Name three animals.", "How do I boil an egg?", "Why is the sky blue at noon?")


@contextmanager
def serving(model, tokenizer, room):
    """The official client of a server that writes `room` answers at a time."""
    app = build_app(model, tokenizer, "model", max_concurrent=room)
    with bind("127.0.0.1", 0) as socket:
        server = listener(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        with openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client:
            yield client
        server.should_exit = True
        thread.join()


def ask(client, number, tokens, steering):
    """Seconds to the first piece of text and to the end of one streamed answer, and its text."""
    start = time.perf_counter()
    first, text = None, ""
    chunks = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"steering": steering.to_dict() if steering else False},
    )
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if first is None and text:
            first = time.perf_counter() - start
    return first or 0.0, time.perf_counter() - start, text


def alone(model, tokenizer, number, tokens, steering):
    """What the model writes without a server."""
    messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, steering=steering, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--sae", required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    name = find_base_model(options.model).name
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None  # answers of one length
    tokenizer.eos_token = None
    model = SaeForCausalLM.from_base(base, saes=[SparseAutoencoder.from_pretrained(options.sae)]).eval()
    steerings = [
        Steering([FeatureEdit(feature=7 + n, op="set" if n % 2 else "add", value=2.0 + n / 8)]) for n in range(32)
    ]
    found = defaultdict(list)
    with serving(model, tokenizer, 32) as together, serving(model, tokenizer, 1) as one_by_one:
        for client in (together, one_by_one):
            ask(client, 0, 2, steerings[0])
        for turn in range(options.rounds):
            for at_once, client in ((1, together), (8, together), (32, together), (-32, one_by_one)):
                for steered in (turn % 2 == 0, turn % 2 == 1):
                    with ThreadPoolExecutor(abs(at_once)) as pool:
                        start = time.perf_counter()
                        jobs = [
                            pool.submit(ask, client, n, options.tokens, steerings[n] if steered else None)
                            for n in range(abs(at_once))
                        ]
                        times = [job.result() for job in jobs]
                        wall = time.perf_counter() - start
                    found[at_once, steered] += [(wall, *one) for one in times]
            print(f"round {turn + 1} of {options.rounds}", flush=True)
    texts = [row[3] for row in found[32, True][-32:]]
    expected = [alone(model, tokenizer, n, options.tokens, steerings[n]) for n in range(32)]
    equal = sum(text == other for text, other in zip(texts, expected, strict=True))
    print(f"{equal} of 32 steered answers are what `generate` writes alone; {len(set(texts))} are different\n")
    print("| at once | steering | first text, s | whole answer, s | tokens/s |\n|---|---|---|---|---|")
    for (at_once, steered), rows in sorted(found.items(), key=lambda item: (item[0][0] < 0, item[0])):
        first, whole = (statistics.median(row[i] for row in rows) for i in (1, 2))
        speed = statistics.median(abs(at_once) * options.tokens / row[0] for row in rows)
        label = f"{at_once}" if at_once > 0 else "32, room for one"
        print(f"| {label} | {'each its own' if steered else 'none'} | {first:.2f} | {whole:.2f} | {speed:.1f} |")


if __name__ == "__main__":
    main()
