"""Which options of training make latents less polysemantic: SAEs trained alike, one option changed at a time.

    python benchmarks/polysemanticity.py --model FOLDER --text boolq_passages.txt --out outputs/polysemanticity \
        --concept toxicity=toxicity.jsonl --concept sentiment=reviews.jsonl

All SAEs see the same hidden states in the same order. Each is measured by what it keeps (fraction of variance
unexplained on held-out tokens), by the decision trees and the score of SCAR's authors on labelled texts (`text` and
`label`, 0 or 1), by the coherence of its top tokens, and by the suite `intervention`. What is there already is not
made again, so that a stopped run goes on. The penalty on decoder rows is that of OrtSAE
(https://arxiv.org/abs/2509.22033): the mean over latents of the square of their largest cosine to another, times a
weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_transformers import (
    GenerationSettings,
    HiddenStateReader,
    InterventionSuite,
    SaeForCausalLM,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    load_base,
)
from sae_transformers.evaluation.detection.decision_trees import concept_tree
from sae_transformers.evaluation.detection.monosemanticity import monosemanticity
from sae_transformers.evaluation.features.coherence import token_coherence
from sae_transformers.evaluation.features.table import feature_table
from sae_transformers.evaluation.reconstruction.metrics import fvu
from sae_transformers.evaluation.suites.settings import InterventionSettings
from sae_transformers.latents.labelled_texts import read_labelled_texts
from sae_transformers.latents.splits import label_halves
from sae_transformers.latents.text_files import read_lines
from sae_transformers.latents.text_states import read_text_states
from sae_transformers.training.sae.arguments import SaeTrainingArguments
from sae_transformers.training.sae.dataset import TensorTokens
from sae_transformers.training.sae.trainer import SaeTrainer

LAYER, BASE_SIZE, K = 14, 1536, 32
PLACE = f"layers.{LAYER}.resid_post"


@dataclass(frozen=True)
class Variant:
    """What is changed. sae, training: settings beside those of all. penalty: weight of the decoder's cosines."""

    sae: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    penalty: float = 0.0


PREFIXES = [BASE_SIZE // 16, BASE_SIZE // 8, BASE_SIZE // 4, BASE_SIZE // 2, BASE_SIZE]
VARIANTS = {
    "top-k": Variant(),
    "batch top-k": Variant({"activation": "batch_topk"}),
    "Matryoshka": Variant(training={"matryoshka_prefixes": PREFIXES}),
    "half as wide": Variant({"d_sae": BASE_SIZE // 2}),
    "twice as wide": Variant({"d_sae": 2 * BASE_SIZE}),
    "orthogonality 0.25": Variant(penalty=0.25),
    "orthogonality 2.5": Variant(penalty=2.5),
}


class PenalisedTrainer(SaeTrainer):
    """Adds OrtSAE's penalty to the loss."""

    penalty = 0.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + self.penalty * largest_cosines(self.saes[0].W_dec).square().mean() if self.penalty else loss


def largest_cosines(rows: Tensor) -> Tensor:
    """Of each row the largest cosine to another, (n,)."""
    units = F.normalize(rows, dim=-1)
    return (units @ units.T).fill_diagonal_(-1.0).amax(-1)


def states_of(model: Any, tokenizer: Any, texts: Sequence[str], tokens: int | None = None) -> dict[str, Tensor]:
    """Hidden states of texts without their first tokens, as many as asked for, and the text of each."""
    reader = HiddenStateReader(model, [PLACE])
    hidden, owner, found, start = [], [], 0, 0
    while start < len(texts) and (tokens is None or found < tokens):
        read = read_text_states(reader, tokenizer, texts[start : start + 64], max_tokens=128)
        if read.left_out:
            raise ValueError(f"Every text needs two tokens. Received: {read.left_out} shorter ones from {start}.")
        hidden.append(read.hidden)
        owner.append(read.text_index + start)
        found, start = found + len(read.hidden), start + 64
        print(f"  {found:,} tokens of {start:,} texts", flush=True)
    return {"hidden": torch.cat(hidden)[:tokens], "text": torch.cat(owner)[:tokens]}


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, made if it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), draft := path.with_suffix(".part"))
        draft.replace(path)
    return load_file(path)


def train(name: str, seed: int, states: Tensor, args: Any, folder: Path) -> SparseAutoencoder:
    """One SAE."""
    if (folder / "config.json").is_file():
        return SparseAutoencoder.from_pretrained(folder)
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"d_in": states.shape[1], "d_sae": BASE_SIZE, "activation": "topk", "k": K}
    settings |= {"layer": LAYER, "site": "resid_post", **variant.sae}
    sae = SparseAutoencoder(SparseAutoencoderConfig(**settings))
    arguments = SaeTrainingArguments(
        output_dir=str(folder.with_name("work")), max_steps=args.steps, per_device_train_batch_size=args.batch,
        seed=seed, learning_rate=args.learning_rate, aux_k=256, dead_after_tokens=50_000,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", logging_steps=100, disable_tqdm=True,
        **variant.training,
    )  # fmt: skip
    trainer = PenalisedTrainer(sae, arguments, TensorTokens({PLACE: states}))
    trainer.penalty = variant.penalty
    trainer.train()
    sae.measure_feature_max([states[:100_000]])
    sae.save_pretrained(folder)
    return sae


class Concept(NamedTuple):
    """hidden: (n_tokens, d) of labelled texts. text: (n_tokens,), the text of each. labels: (n_texts,)."""

    hidden: Tensor
    text: Tensor
    labels: Tensor

    def means(self, sae: SparseAutoencoder) -> Tensor:
        """Mean latents of each text, (n_texts, d_sae)."""
        found = torch.zeros(len(self.labels), sae.config.d_sae)
        for hidden, text in zip(self.hidden.split(4096), self.text.split(4096), strict=True):
            found.index_add_(0, text, sae.encode(hidden))
        return found / torch.bincount(self.text, minlength=len(found))[:, None]


def read_concept(given: str, most: int, model: Any, tokenizer: Any, out: Path) -> tuple[str, Concept]:
    """Of `name=file` the name, and the first texts of each label with their states."""
    name, _, file = given.partition("=")
    rows = read_labelled_texts(file)
    chosen = [
        i for label in (0, 1)
        for i in [k for k, one in enumerate(rows.labels) if one == label and len(rows.texts[k].split()) > 3][:most]
    ]  # fmt: skip
    texts = [rows.texts[i] for i in chosen]
    kept_states = kept(out / f"{name}.safetensors", lambda: states_of(model, tokenizer, texts))
    return name, Concept(kept_states["hidden"], kept_states["text"], torch.tensor([rows.labels[i] for i in chosen]))


@torch.no_grad()
def measure(
    sae: SparseAutoencoder, base: Any, tokenizer: Any, held_out: Tensor, concepts: Mapping[str, Concept]
) -> dict[str, float]:
    """Every number of one SAE."""
    sae.eval()
    latents = sae.encode(held_out)
    fires = (latents != 0).any(0)
    found = {
        "fvu": fvu(held_out, sae(held_out).reconstruction),
        "l0": float((latents != 0).sum(1).double().mean()),
        "silent": float((~fires).double().mean()),
        "cosine": float(largest_cosines(sae.W_dec[fires]).mean()),
    }
    model = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    table = feature_table(model, tokenizer, sae)
    coherence = token_coherence(model, table.weights.top_ids, table.weights.top_weights)
    found["coherence"], found["kurtosis"] = float(coherence[fires].mean()), float(table.weights.kurtosis[fires].mean())
    for name, concept in concepts.items():
        means = concept.means(sae)
        fitted, held = label_halves(concept.labels.tolist(), 0)
        tree = concept_tree(means, concept.labels)
        half = concept_tree(means[fitted], concept.labels[fitted], means[held], concept.labels[held])
        score = monosemanticity(means, concept.labels)
        found |= {
            f"{name} tree depth": tree.depth, f"{name} tree nodes": tree.nodes,
            f"{name} tree accuracy": half.accuracy or 0.0, f"{name} first latent": score.capacity,
            f"{name} FMS@1": score.score[1], f"{name} FMS@5": score.score[5],
        }  # fmt: skip
    model.unwrap()
    return found


def intervene(sae: SparseAutoencoder, base: Any, tokenizer: Any, args: Any) -> dict[str, float]:
    """The suite `intervention` of one SAE."""
    model = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    settings = InterventionSettings(
        interventions=args.interventions, intervention_strength=args.strength,
        generation=GenerationSettings(max_new_tokens=24, temperature=0.7),
    )  # fmt: skip
    result = InterventionSuite(args.prompts, settings=settings)(model, tokenizer)
    model.unwrap()
    found = {}
    for metric, method in (
        ("similarity_change", "steered"), ("similarity_minus_random", "steered"), ("passed", "steered"),
        ("passed", "random feature"), ("perplexity", "steered"), ("perplexity", "none"),
    ):  # fmt: skip
        found[f"{metric}, {method}"] = result.value(metric, method) or 0.0
    return found


def show(found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """A table in Markdown: means over seeds, and standard deviations."""
    names = list(next(iter(found.values()))[0])
    print("| | " + " | ".join(found) + " |\n|" + "---|" * (1 + len(found)))
    for name in names:
        cells = []
        for rows in found.values():
            values = [row[name] for row in rows]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3g}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="a text a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concept", action="append", default=[], help="name=file.jsonl with text and label")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=300, help="of each label of a concept")
    parser.add_argument("--interventions", type=int, default=40)
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--prompts", nargs="+", default=["What topic is on your mind?", "Tell me something."])
    args = parser.parse_args()
    model, tokenizer, _ = load_base(args.model)
    texts = [line for line in read_lines(args.text) if len(line.split()) > 3]
    states = kept(
        args.out / "states.safetensors", lambda: states_of(model, tokenizer, texts, args.tokens + args.held_out)
    )["hidden"]
    print(f"{len(states):,} states", flush=True)
    concepts = dict(read_concept(one, args.texts, model, tokenizer, args.out) for one in args.concept)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in args.seeds:
        for name in VARIANTS:
            sae = train(name, seed, states[: args.tokens], args, args.out / "saes" / f"{name} {seed}")
            parts = {
                "measures": partial(measure, sae, model, tokenizer, states[args.tokens :], concepts),
                f"interventions at {args.strength:g}": partial(intervene, sae, model, tokenizer, args),
            }
            found[name].append({})
            for part, make in parts.items():
                path = args.out / part / f"{name} {seed}.json"
                if not path.is_file():
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(json.dumps(make()))
                found[name][-1] |= json.loads(path.read_text())
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    show(found)


if __name__ == "__main__":
    main()
