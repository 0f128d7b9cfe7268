"""What passes over text cost beside the language model alone: the suite `reconstruction` and the collection of spans.

    python benchmarks/passes.py --texts 250

A random Llama of 4 layers and width 128 with SmolLM2's vocabulary, an SAE of 2,048 latents, texts of random tokens:
what is added to the model shows. CPU time of the process, one thread, in turn; in forward passes with logits for the
suite (it makes four, and one without logits), in truncated ones for the spans; minima / medians of the rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.create_training_data.spans.collect import SpanCollector
from sae_transformers.create_training_data.spans.settings import SpanSettings
from sae_transformers.evaluation.journal import UNWATCHED
from sae_transformers.evaluation.suites.reconstruction import ReconstructionSuite
from sae_transformers.latents.text_latents import batches_of, text_ids
from sae_transformers.latents.texts import TextSource

VOCABULARY, LENGTHS, LAYER = 49152, (12, 41), 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "<unk>", *(f"w{n}" for n in range(VOCABULARY - 3))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def make_model() -> SaeForCausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=128, d_sae=2048, activation="topk", k=32, layer=LAYER))
    return SaeForCausalLM.from_base(AutoModelForCausalLM.from_config(config), saes=[sae]).eval()


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chooser = random.Random(0)
    texts = [
        " ".join(f"w{chooser.randrange(VOCABULARY - 3)}" for _ in range(chooser.randrange(*LENGTHS)))
        for _ in range(options.texts)
    ]
    tokenizer, model = make_tokenizer(), make_model()
    suite = ReconstructionSuite(texts)
    rows, _ = text_ids(model, tokenizer, texts, max_length=512, least=2)
    batches = list(batches_of(rows, tokens_at_once=suite.reading.tokens_per_batch))

    def forward(**options: bool) -> None:
        for batch in batches:
            model(input_ids=batch.ids, attention_mask=batch.mask, steering=False, use_cache=False, **options)

    def spans() -> None:
        source = TextSource(lambda start: ({"text": text} for text in texts[start:]))
        SpanCollector(model, tokenizer, 0, source, SpanSettings()).run()

    cases: dict[str, Callable[[], object]] = {
        "forward": forward,
        "reconstruction": lambda: suite.measure(model, tokenizer, UNWATCHED),
        "truncated": lambda: forward(output_sae_inputs=True, stop_at_last_sae=True),
        "spans": spans,
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, case in cases.items():
            times[name].append(cpu_time(case))
    tokens = sum(len(row) for row in rows)
    print(f"{tokens} tokens; forward {tokens / min(times['forward']):,.0f} tokens/s, without logits up to the SAE "
          f"{tokens / min(times['truncated']):,.0f}")  # fmt: skip
    for name, floor in (("reconstruction", "forward"), ("spans", "truncated")):
        ratios = [a / b for a, b in zip(times[name], times[floor], strict=True)]
        print(f"{name}: {min(times[name]) / min(times[floor]):.2f} / {median(ratios):.2f} of a pass '{floor}'")


if __name__ == "__main__":
    main()
