"""What a training step costs, and harvest and training together, beside other libraries, in one run on one machine.

    python benchmarks/training.py --model FOLDER --text FOLDER

The others (sae-lens, eai-sparsify, dictionary-learning) are installed from the Python index into an environment of
their own, `--env`, the first time. Every contestant is a process with its library's own training loop on the same
data, see training_peers.py; they take turns, round after round, with the same number of threads. Ratios of minima
compare the least disturbed step of each; ratios of medians are taken within a round. Memory is the process's peak, at
the end and before the first step. `--batch` counts tokens, `--steps` those of a round, `--buffer` the sequences, of
`--context` tokens, that are shuffled together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
import transformers
from peers import VERSIONS, make_environment
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from training_peers import AUX_WEIGHT, DEAD, FOREVER, Feed, Parts, check_gradients, dense_aux, main, prepare
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.create_training_data.base_model import find_base_model
from sae_transformers.create_training_data.harvest.blocks import HarvestSettings
from sae_transformers.create_training_data.harvest.stream import HiddenStateStream
from sae_transformers.create_training_data.labelled_text import load_labelled_text
from sae_transformers.latents.texts import TextSource
from sae_transformers.training.sae.arguments import SaeLossArguments, SaeTrainingArguments
from sae_transformers.training.sae.objective import SaeObjective
from sae_transformers.training.sae.trainer import SaeTrainer

PEERS = ("sparsify", "sparsify adam", "dictionary-learning", "sae-lens", "sae-lens sparse")
Results = dict[str, list[dict[str, Any]]]


def matmul(s: SimpleNamespace, feed: Feed) -> None:
    """The floor: every latent's pre-activation once, into memory that is there already."""
    W_enc, out = torch.randn(s.d_in, s.d_sae, device=s.device), torch.empty(s.batch, s.d_sae, device=s.device)
    for x in feed:
        torch.mm(x, W_enc, out=out)


def dense(s: SimpleNamespace, feed: Feed) -> None:
    """Plain autograd on dense latents, `torch.optim.Adam` with its defaults, unit decoder rows, dead-latent counts."""
    W_dec = F.normalize(torch.randn(s.d_sae, s.d_in, device=s.device), dim=-1)
    made = {"W_enc": W_dec.T.contiguous(), "b_enc": W_dec.new_zeros(s.d_sae), "b_dec": W_dec.new_zeros(s.d_in)}
    made |= {"W_dec": W_dec, "threshold": W_dec.new_full((s.d_sae,), 1e-3), "r_mag": W_dec.new_zeros(s.d_sae)}
    p = SimpleNamespace(**{name: nn.Parameter(value) for name, value in made.items()})
    prepare(s, p.W_enc.T, p.b_enc)
    p.b_mag = nn.Parameter(p.b_enc.detach().clone())
    since = torch.zeros(s.d_sae, dtype=torch.long, device=s.device)
    since[: s.n_dead] = DEAD
    optimizer = torch.optim.Adam(vars(p).values())
    for x in feed:
        loss, latents = dense_loss(p, x, s, since > 10**7 if s.n_dead else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        p.W_dec.data /= p.W_dec.data.norm(dim=1, keepdim=True)
        since += len(x)
        since[latents.any(0)] = 0


def dense_loss(p: SimpleNamespace, x: Tensor, s: SimpleNamespace, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and latents (n_tokens, d_sae); sparsity is the L1 norm for relu, the gate's for gated, the number of active
    ones for jumprelu."""
    pre_acts = (x - p.b_dec) @ p.W_enc + p.b_enc
    latents, penalty, through_gate = torch.relu(pre_acts), x.new_zeros(()), None
    if "topk" in s.activation:
        rows = latents if s.activation == "topk" else latents.view(1, -1)
        values, chosen = rows.topk(s.k * len(x) // len(rows), sorted=False)
        latents = torch.zeros_like(rows).scatter(-1, chosen, values).view_as(latents)
    elif s.activation == "relu":
        penalty = latents.sum(-1).mean()
    elif s.activation == "gated":  # https://huggingface.co/papers/2404.16014
        gate, magnitudes = latents, (pre_acts - p.b_enc) * p.r_mag.exp() + p.b_mag
        latents, penalty = (gate > 0) * torch.relu(magnitudes), gate.sum(-1).mean()
        through_gate = gate @ p.W_dec.detach() + p.b_dec.detach() - x
    else:  # straight-through gradients of the threshold, https://huggingface.co/papers/2407.14435
        near = (pre_acts - p.threshold).abs() < 5e-4
        moved = near * (p.threshold - p.threshold.detach()) / 1e-3  # 0, but with a gradient
        active = (pre_acts > p.threshold).to(x.dtype)
        latents = pre_acts * active - p.threshold.detach() * moved
        penalty = (active - moved).sum(-1).mean()
    error = latents @ p.W_dec + p.b_dec - x
    loss = (error.square().sum(-1) / x.square().sum(-1)).mean() + 1e-3 * penalty
    if through_gate is not None:
        loss = loss + (through_gate.square().sum(-1) / x.square().sum(-1)).mean()
    if dead is not None:
        left = error.detach()
        recon = dense_aux(torch.relu(pre_acts), p.W_dec, dead, x.shape[1] // 2)
        loss = loss + AUX_WEIGHT * ((recon + left).square().sum(-1) / left.square().sum(-1)).mean()
    return loss, latents.detach()


def dense_harvest(s: SimpleNamespace, feed: Feed) -> None:
    """The layers up to the place and nothing else, on tokens made before; then the dense step."""
    model = AutoModel.from_pretrained(s.model, dtype=torch.float32).to(s.device)
    model.layers, model.norm = model.layers[: s.layer + 1], nn.Identity()
    ids = torch.tensor([i for row in AutoTokenizer.from_pretrained(s.model)(s.texts)["input_ids"] for i in row])
    batches = [part.view(-1, s.context) for part in ids.split(s.batch) if len(part) == s.batch]

    @torch.no_grad()
    def hidden(batch: Tensor) -> Tensor:
        return model(batch.to(s.device), use_cache=False).last_hidden_state.flatten(0, 1)

    feed.source = map(hidden, cycle(batches))
    dense(s, feed)


class Batches(torch.utils.data.IterableDataset):
    """A feed as `SaeTrainer` takes a stream."""

    def __init__(self, feed: Feed, widths: dict[str, int]) -> None:
        self.feed, self.widths = feed, widths

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.feed

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """A feed only goes on."""


def make_sae(s: SimpleNamespace) -> Any:
    activation = {"batchtopk": "batch_topk"}.get(s.activation, s.activation)
    size = {"d_in": s.d_in, "d_sae": s.d_sae, "layer": s.layer, "k": s.k if "topk" in s.activation else None}
    sae = SparseAutoencoder(SparseAutoencoderConfig(activation=activation, **size)).to(s.device)
    sae.W_dec.data = F.normalize(torch.randn(s.d_sae, s.d_in, device=s.device), dim=-1)
    sae.W_enc.data = sae.W_dec.data.clone().T  # stored by latent, as `SaeTrainer` does
    gated = activation == "gated"
    prepare(s, sae.W_enc.T, sae.b_gate if gated else sae.b_enc)
    if gated:
        sae.b_mag.data.copy_(sae.b_gate.data)
    return sae


def loss_options(s: SimpleNamespace) -> dict[str, Any]:
    return {"aux_k": s.d_in // 2 if s.n_dead else 0, "sparsity_coefficient": 0.0 if "topk" in s.activation else 1e-3}


def ours(s: SimpleNamespace, feed: Feed) -> None:
    """`SaeTrainer.train`, whole, with its defaults."""
    sae = make_sae(s)
    place = sae.config.read_at
    if not s.texts:
        feed.source = ({place: batch} for batch in cycle(s.batches))
    with tempfile.TemporaryDirectory() as folder:
        args = SaeTrainingArguments(
            output_dir=folder, max_steps=FOREVER, per_device_train_batch_size=s.batch, init_tokens=s.batch,
            weight_init="keep", save_strategy="no", report_to="none", use_cpu=s.device == "cpu", **loss_options(s),
        )  # fmt: skip
        trainer = SaeTrainer(sae, args, Batches(feed, {place: s.d_in}))
        trainer.model.saes[0].tokens_since_fired[: s.n_dead] = DEAD
        trainer.train()


def make_objective(s: SimpleNamespace) -> SaeObjective:
    objective = SaeObjective([make_sae(s)], SaeLossArguments(**loss_options(s)))
    objective.saes[0].tokens_since_fired[: s.n_dead] = DEAD
    return objective


def ours_objective(s: SimpleNamespace, feed: Feed) -> None:
    """Our loss and its gradients alone, with a fused Adam."""
    objective = make_objective(s)
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    for x in feed:
        objective(**{f"layers.{s.layer}.resid_post": x})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def ours_harvest(s: SimpleNamespace, feed: Feed) -> None:
    """`HiddenStateStream` into `SaeTrainer`, no disk; each sequence's first token is left out."""
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32).to(s.device)
    source = TextSource(lambda start: ({"text": text} for text in islice(cycle(s.texts), start, None)))
    wanted = HarvestSettings(
        hook_points=(f"layers.{s.layer}.resid_post",), max_length=s.context, dtype="float32",
        rows_per_shard=s.buffer // 4, tokens_per_batch=s.batch,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(s.model)
    stream = HiddenStateStream(model, tokenizer, source, wanted, batch_tokens=s.batch, window_blocks=4)
    feed.source, feed.kept = iter(stream), (s.context - 1) / s.context
    ours(s, feed)


def our_parts(s: SimpleNamespace, x: Tensor, dead: Tensor, bias: float) -> Parts:
    part = make_objective(s).saes[0]
    part.sae.b_enc.data.fill_(bias)
    sae, step = part.sae, part(x, x, None)
    aux, recon = step.terms["aux"].sum(), step.terms["reconstruction"].sum()
    return Parts(sae.W_enc, sae.b_enc, sae.W_dec, aux, recon, -step.error, 1 / step.error.square().sum(-1))


CONTESTANTS = {
    "matmul": matmul,
    "dense": dense,
    "ours": ours,
    "ours, objective": ours_objective,
    "dense harvest": dense_harvest,
    "ours harvest": ours_harvest,
    "ours gradients": lambda s, feed: check_gradients(s, feed, our_parts),
}


class Contestant:
    """A process that runs one contestant and waits for its turns."""

    def __init__(self, name: str, peers: list, settings: dict[str, Any]) -> None:
        self.name = name
        program = peers if name.startswith(PEERS) else [sys.executable, __file__, "--worker"]
        variables = {"OMP_NUM_THREADS": str(settings["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        variables["HF_HUB_OFFLINE"] = str(int(Path(settings.get("model", "")).is_dir()))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*program, name, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, bufsize=1, env={**os.environ, **variables}, cwd=tempfile.gettempdir(),
        )  # fmt: skip

    def message(self, console: Console) -> dict[str, Any] | None:
        """What it says next; None when it has failed, with the reason printed."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        errors = [line.strip()[:160] for line in self.log if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = [f"it ended with status {self.process.returncode}", *errors][-1]
        console.print(f"[yellow]{self.name} could not run: {reason}")
        return None


def race(names: Sequence[str], peers: list, settings: dict[str, Any], rounds: int, console: Console) -> Results:
    """Messages of each contestant, one a round; those that fail are reported and left out. A first round warms up."""
    running: dict[str, Contestant] = {}
    results: Results = {name: [] for name in names}

    def heard(name: str) -> None:
        if message := running[name].message(console):
            results[name].append(message)
        else:
            del running[name], results[name]

    try:
        for name in names:
            running[name] = Contestant(name, peers, settings)
            heard(name)
        for turn in range(rounds + 1):
            console.print(f"round {turn} of {rounds}")
            order = list(running)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                running[name].process.stdin.write("go\n")
                heard(name)
    finally:
        for contestant in running.values():
            contestant.process.communicate()  # the end of its input ends it
    return {name: messages[2:] for name, messages in results.items()}  # the first says "ready", the second warms up


def steps_table(results: Results, title: str) -> Table:
    columns = ("ms min", "median", "as fast: minima", "medians", "to matmul: minima", "medians", "peak MB", "at start")
    table = make_table(title, *columns)
    times = {name: [message["times"] for message in messages] for name, messages in results.items()}
    least = {name: min(map(min, rounds)) for name, rounds in times.items()}
    for name, rounds in times.items():
        dense, matmul = (
            median(median(a) / median(b) for a, b in zip(times[other], rounds, strict=True))
            for other in ("dense", "matmul")
        )
        table.add_row(
            name, f"{1e3 * least[name]:.0f}", f"{1e3 * median(sum(rounds, [])):.0f}",
            f"{least['dense'] / least[name]:.2f}", f"{dense:.2f}",
            f"{least[name] / least['matmul']:.2f}", f"{1 / matmul:.2f}", *memory(results[name][-1]),
        )  # fmt: skip
    return table


def harvest_table(results: Results, title: str, batch: int) -> Table:
    """A token's time is that of harvesting plus that of training: buffers make the two alternate unevenly."""
    columns = ("tokens/s", "median", "as fast", "harvest only", "time to bare", "step ms", "peak MB", "at start")
    table = make_table(title, *columns)
    bare = base = 0.0
    for name, messages in results.items():
        steps = [median(message["times"]) / batch for message in messages]
        fetched = [message["fetch"] / message["harvested"] for message in messages if message["harvested"]]
        if inside := median(fetched) < 0.01 * median(steps):  # its language model runs inside the step
            fetched = [0.0]
        time = min(fetched) + min(steps)
        bare, base = bare or min(fetched), base or time
        table.add_row(
            name.removesuffix(" harvest"), f"{1 / time:,.0f}", f"{1 / (median(fetched) + median(steps)):,.0f}",
            f"{base / time:.2f}", "in the step" if inside else f"{1 / min(fetched):,.0f}",
            "" if inside else f"{min(fetched) / bare:.3f}", f"{1e3 * batch * min(steps):.0f}", *memory(messages[-1]),
        )  # fmt: skip
    return table


def gradients_table(peers: list, settings: dict[str, Any], console: Console) -> Table:
    table = make_table("Gradient of the encoder", "AuxK's norm", "by autograd", "relative error", "no latent active")
    for name in ("ours", "sparsify", "dictionary-learning", "sae-lens"):
        if found := Contestant(f"{name} gradients", peers, settings).message(console):
            error = f"{found['error'] / found['true']:.1e}"
            table.add_row(name, f"{found['own']:.4g}", f"{found['true']:.4g}", error, f"{found['idle']:.1e}")
    return table


def memory(message: dict[str, Any]) -> tuple[str, str]:
    return f"{message['peak']:,.0f}", f"{message['start']:,.0f}"


def make_table(title: str, *columns: str) -> Table:
    return Table("", *(Column(column, justify="right") for column in columns), title=title)


def write_texts(target: Path, source: Path | None, tokenizer: Any, context: int, rows: int) -> None:
    """Rows of text a little longer than a sequence, so that those who cut each text to one waste little."""
    files = [] if source is None else sorted(source.glob("*.txt")) if source.is_dir() else [source]
    texts = [file.read_text(encoding="utf-8") for file in files] or load_labelled_text().texts
    ids, size = tokenizer("\n".join(texts)[: 8 * rows * context])["input_ids"], context + 4
    starts = range(0, min(len(ids) - size, rows * size), size)
    target.write_text(json.dumps([tokenizer.decode(ids[start : start + size]) for start in starts]))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=["gradients", "steps", "harvest"])
    add("--others", nargs="*", default=[*PEERS, "ours", "ours, objective"], help="who races matmul and dense")
    add("--activations", nargs="+", default=["topk"], help="of topk batchtopk relu jumprelu gated")
    sizes = {"d-in": 576, "d-sae": 9216, "k": 32, "batch": 2048, "layer": 14, "context": 128, "buffer": 128}
    sizes |= {"rounds": 7, "steps": 3, "harvest-rounds": 3, "threads": psutil.cpu_count(logical=False) or 1}
    for name, default in sizes.items():
        add(f"--{name}", type=int, default=default)
    add("--dead", type=float, default=0.0, help="share of latents that are dead, which turns AuxK on")
    add("--states", help="safetensors file with hidden states; Gaussian ones without")
    add("--model", help="id or folder of a base model; a small default one without")
    add("--text", type=Path, help="folder of .txt files, or one; film reviews without")
    add("--device", default="cpu")
    add("--env", type=Path, default="~/.cache/sae_transformers/benchmark-peers")
    args = parser.parse_args()
    console = Console(width=max(118, Console().width))
    peers: list[Any] = []
    if "gradients" in args.parts or "harvest" in args.parts or set(PEERS) & set(args.others):
        peers = [make_environment(args.env.expanduser(), console.print), Path(__file__).with_name("training_peers.py")]
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
    settings |= {"states": args.states, "texts": None, "activation": "topk"}
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}, {', '.join(VERSIONS)}")
    console.print(", ".join(f"{name} {settings[name]}" for name in ("d_in", "d_sae", "k", "batch", "dead", "threads")))
    if "gradients" in args.parts:
        small = {"d_in": 32, "d_sae": 2048, "k": 8, "batch": 64, "dead": 0.5, "states": None, "device": "cpu"}
        console.print(gradients_table(peers, {**settings, **small}, console))
    if "steps" in args.parts:
        for activation in args.activations:
            able = [n for n in args.others if activation == "topk" or n not in (*PEERS[:2], PEERS[4])]
            settings["activation"] = activation
            results = race(["matmul", "dense", *able], peers, settings, args.rounds, console)
            console.print(steps_table(results, f"{activation}: one training step"))
    if "harvest" in args.parts:
        base = find_base_model(args.model, say=console.print).name
        tokenizer, width = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base).hidden_size
        steps = args.buffer * args.context // args.batch  # in which everyone's buffer is filled once or more
        with tempfile.TemporaryDirectory() as folder:
            texts = Path(folder) / "texts.json"
            write_texts(texts, args.text, tokenizer, args.context, 16 * args.buffer)
            settings |= {"texts": str(texts), "model": base, "d_in": width, "steps": steps}
            settings |= {"states": None, "dead": 0.0, "activation": "topk"}
            names = [f"{n} harvest" for n in ("dense", "sparsify", "dictionary-learning", "sae-lens", "ours")]
            results = race(names, peers, settings, args.harvest_rounds, console)
        console.print(harvest_table(results, f"{Path(base).name}, layer {args.layer}: harvest and train", args.batch))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        main(CONTESTANTS, *sys.argv[2:])
    else:
        run()
