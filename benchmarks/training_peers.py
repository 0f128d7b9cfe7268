"""The other libraries' part in training.py, run in an environment that has them.

    python benchmarks/training_peers.py NAME JSON     started by training.py, not by hand

Nothing of a trainer is copied: each library's own training loop runs, unchanged, on data from a `Feed`. The feed is
the clock: from handing out a batch to the request for the next is one whole step, in CPU time of the process on a CPU
and on the wall on a GPU. Between rounds the feed waits for training.py to say "go", so that contestants take turns.
Messages are lines of JSON on the standard output; what libraries print goes to the standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOREVER = 10**6  # steps that trainers are told to make
AUX_WEIGHT = 1 / 32
DEAD = 10**9  # tokens or passes since a latent fired


class Enough(BaseException):
    """Ends a training loop from inside its data; no `except Exception` of a library catches it."""


class Feed:
    """Batches for a training loop, and its clock.

    Args:
        source: what is handed out; a loop that harvests gets what harvests.
        steps: of a round, after one that is not counted.
        send: tells training.py.
    """

    def __init__(self, source: Iterator, steps: int, send: Callable[..., object], device: str = "cpu") -> None:
        self.source, self.steps, self.send, self.device = source, steps, send, device
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.at_start = self.handed_out = 0.0
        self.kept = 1.0  # share of the language model's tokens that is trained on
        self.begin_round()

    def begin_round(self) -> None:
        self.times: list[float] = []  # of steps
        self.fetch = 0.0  # time that the source took
        self.harvested = 0.0  # tokens that the language model read for it

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.handed_out:
            self.times.append(self.clock() - self.handed_out)
        if not self.handed_out or len(self.times) > self.steps:
            peak = peak_memory(self.device)
            self.at_start = self.at_start or peak
            self.send(times=self.times[1:], fetch=self.fetch, harvested=self.harvested, peak=peak, start=self.at_start)
            self.begin_round()
            if sys.stdin.readline().strip() != "go":
                raise Enough
        start = self.clock()
        batch = next(self.source)
        self.handed_out = self.clock()
        self.fetch += self.handed_out - start
        return batch

    def count_tokens(self) -> None:
        """Count what the language model reads, whoever runs it."""

        def count(module: nn.Module, inputs: tuple) -> None:
            if isinstance(module, nn.Embedding):
                self.harvested += self.kept * inputs[0].numel()

        nn.modules.module.register_module_forward_pre_hook(count)


def peak_memory(device: str) -> float:
    """Most megabytes that this process has held, or on CUDA its tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would also count the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def dense_aux(pre_acts: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """What the most active dead latents reconstruct (n_tokens, d_in)."""
    values, chosen = torch.where(dead, pre_acts, -torch.inf).topk(k_aux, sorted=False)
    return torch.zeros_like(pre_acts).scatter(-1, chosen, values) @ W_dec


@torch.no_grad()
def prepare(s: SimpleNamespace, W_enc: Tensor, b_enc: Tensor) -> None:
    """Give every contestant the same work, through its encoder's bias; W_enc: (d_sae, d_in).

    Without top-k, about k latents of a token are active. Dead latents are too low to be chosen, not too low for AuxK.
    """
    pre_acts = s.batches[0] @ W_enc.T
    if "topk" not in s.activation:
        b_enc -= pre_acts.topk(s.k).values[:, -1].median()
    b_enc[: s.n_dead] -= 3 * pre_acts.std()


def sparsify(s: SimpleNamespace, feed: Feed, optimizer: str = "signum") -> None:
    """sparsify/trainer.py `Trainer.fit`, whole; its default optimiser is a schedule-free signum.

    It trains on what a model's module returns, so its model here is one module that returns the batch.
    """
    from sparsify import Trainer

    model = Replay(s.batches[0])
    feed.source = map(model.load, cycle(s.batches))
    config = _sparsify_config(s, optimizer=optimizer, batch_size=1, hookpoints=["block"])
    trainer = Trainer(config, Rows(feed), model)
    (sae,), (since,) = trainer.saes.values(), trainer.num_tokens_since_fired.values()
    prepare(s, sae.encoder.weight, sae.encoder.bias)
    since[: s.n_dead] = DEAD
    trainer.fit()


class Rows(torch.utils.data.Dataset):
    """Rows of tokens for sparsify's trainer; each list of rows is a batch of the feed."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return FOREVER

    def __getitems__(self, chosen: list[int]) -> list[dict]:
        return next(self.feed)


class Replay(nn.Module):
    """As much of a model as sparsify's trainer asks for."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self.block, self.batch, self.device = nn.Identity(), batch, batch.device
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, len(batch), dtype=torch.long)}  # one row, whatever its tokens

    @property
    def base_model(self) -> Replay:
        return self

    def load(self, batch: Tensor) -> list[dict]:
        self.batch = batch
        return [{"input_ids": self.dummy_inputs["input_ids"][0]}]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.block(self.batch[None])


def _sparsify_config(s: SimpleNamespace, **options: Any) -> Any:
    from sparsify import SparseCoderConfig, TrainConfig

    sae = SparseCoderConfig(num_latents=s.d_sae, k=s.k)
    return TrainConfig(sae, auxk_alpha=AUX_WEIGHT * (s.n_dead > 0), log_to_wandb=False, **options)


def sparsify_harvest(s: SimpleNamespace, feed: Feed) -> None:
    """sparsify/__main__.py: its tokens beforehand, the model in every step; no store, and all layers run."""
    from datasets import Dataset
    from sparsify import Trainer
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoModel, AutoTokenizer

    texts, tokenizer = Dataset.from_dict({"text": s.texts}), AutoTokenizer.from_pretrained(s.model)
    rows = chunk_and_tokenize(texts, tokenizer, max_seq_len=s.context, num_proc=1)
    n_rows, at_once = len(rows), s.batch // s.context
    feed.source = (rows.__getitems__([(start + i) % n_rows for i in range(at_once)]) for start in count(0, at_once))
    model = AutoModel.from_pretrained(s.model, dtype=torch.float32).to(s.device)
    config = _sparsify_config(s, batch_size=at_once, hookpoints=[f"layers.{s.layer}"])
    Trainer(config, Rows(feed), model).fit()


def dictionary_learning(s: SimpleNamespace, feed: Feed) -> None:
    """dictionary_learning/training.py `trainSAE`, whole, with the trainer of the activation."""
    from dictionary_learning import trainers
    from dictionary_learning.training import trainSAE

    named = {
        "topk": (trainers.TopKTrainer, {"k": s.k}),
        "batchtopk": (trainers.BatchTopKTrainer, {"k": s.k}),
        "relu": (trainers.StandardTrainer, {}),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": s.k}),
        "gated": (trainers.gdm.GatedSAETrainer, {}),
    }
    base, options = named[s.activation]

    class Prepared(base):  # `trainSAE` makes its trainers itself
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            ae = self.ae
            if s.activation == "gated":
                prepare(s, ae.encoder.weight, ae.gate_bias)
                ae.mag_bias.data.copy_(ae.gate_bias.data)
            else:
                prepare(s, *((ae.W_enc.T, ae.b_enc) if hasattr(ae, "W_enc") else (ae.encoder.weight, ae.encoder.bias)))
            if hasattr(self, "num_tokens_since_fired"):
                self.num_tokens_since_fired[: s.n_dead] = DEAD

    options |= {"steps": FOREVER, "activation_dim": s.d_in, "dict_size": s.d_sae, "layer": s.layer, "lm_name": "none"}
    config = {"trainer": Prepared, "device": s.device, **options}
    trainSAE(data=feed, trainer_configs=[config], steps=FOREVER, device=s.device)


def dictionary_learning_harvest(s: SimpleNamespace, feed: Feed) -> None:
    """dictionary_learning/buffer.py `ActivationBuffer`, on nnsight, which stops after the layer."""
    from dictionary_learning import ActivationBuffer
    from nnsight import LanguageModel

    # nnsight 0.3 takes every `rope_type` for llama3's unless it is told not to.
    model = LanguageModel(s.model, device_map=s.device, dispatch=True, patch_llama_scan=False)
    feed.source = ActivationBuffer(
        cycle(s.texts), model, model.model.layers[s.layer], d_submodule=s.d_in, n_ctxs=s.buffer, ctx_len=s.context,
        refresh_batch_size=s.batch // s.context, out_batch_size=s.batch, device=s.device,
    )  # fmt: skip
    dictionary_learning(s, feed)


def _sae_lens_config(s: SimpleNamespace, sparse: bool) -> Any:
    import sae_lens

    kinds = {
        "topk": partial(sae_lens.TopKTrainingSAEConfig, k=s.k, use_sparse_activations=sparse),
        "batchtopk": partial(sae_lens.BatchTopKTrainingSAEConfig, k=s.k),
        "relu": sae_lens.StandardTrainingSAEConfig,
        "jumprelu": sae_lens.JumpReLUTrainingSAEConfig,
        "gated": sae_lens.GatedTrainingSAEConfig,
    }
    return kinds[s.activation](d_in=s.d_in, d_sae=s.d_sae, device=s.device)


def sae_lens(s: SimpleNamespace, feed: Feed, sparse: bool = False) -> None:
    """sae_lens/training/sae_trainer.py `SAETrainer.fit`, whole."""
    from sae_lens import TrainingSAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    logger = LoggingConfig(log_to_wandb=False)
    config = SAETrainerConfig(FOREVER * s.batch, s.batch, lr_end=3e-4, device=s.device, logger=logger)
    sae = TrainingSAE.from_dict(_sae_lens_config(s, sparse).to_dict())
    gated = s.activation == "gated"
    prepare(s, sae.W_enc.T, sae.b_gate if gated else sae.b_enc)
    if gated:
        sae.b_mag.data.copy_(sae.b_gate.data)
    trainer = SAETrainer(config, sae, data_provider=feed)
    trainer.n_forward_passes_since_fired[: s.n_dead] = DEAD
    trainer.fit()


def sae_lens_harvest(s: SimpleNamespace, feed: Feed) -> None:
    """sae_lens/llm_sae_training_runner.py `LanguageModelSAETrainingRunner`, with a Hugging Face model.

    Its store stops the model after the layer and mixes a buffer.
    """
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig

    config = LanguageModelSAERunnerConfig(
        sae=_sae_lens_config(s, sparse=False), model_name=s.model, model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{s.layer}", dataset_path="texts", is_dataset_tokenized=False, streaming=False,
        context_size=s.context, n_batches_in_buffer=s.buffer, store_batch_size_prompts=s.batch // s.context,
        train_batch_size_tokens=s.batch, training_tokens=FOREVER * s.batch, device=s.device, checkpoint_path=None,
        output_path=None, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    runner = LanguageModelSAETrainingRunner(config, override_dataset=Dataset.from_dict({"text": s.texts}))
    feed.source = runner.activations_store
    runner.activations_store = feed
    runner.run()


class Parts(NamedTuple):
    """What a library computes of a batch x (n_tokens, d_in) with dead latents (d_sae,) bool.

    W_enc: (d_sae, d_in) or its transpose. aux, recon: the losses. residual: (n_tokens, d_in), what AuxK reconstructs.
    weight: (n_tokens,), of each token in AuxK, up to a factor.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    aux: Tensor
    recon: Tensor
    residual: Tensor
    weight: Tensor | float = 1.0


def check_gradients(s: SimpleNamespace, feed: Feed, parts: Callable[..., Parts]) -> None:
    """Send the gradient of AuxK for the encoder, that of plain autograd, and one that should be zero.

    AuxK's formulas differ by a factor without gradient, which the values of the two losses give. `parts` is a function
    of (s, x, dead, encoder bias).
    """
    x = s.batches[0]
    dead = torch.arange(s.d_sae) < s.n_dead
    p = parts(s, x, dead, 0.0)
    (own,) = torch.autograd.grad(p.aux, p.W_enc, retain_graph=True)
    by_latent = p.W_enc if p.W_enc.shape[0] == s.d_sae else p.W_enc.T
    recon = dense_aux(torch.relu(F.linear(x, by_latent, p.b_enc)), p.W_dec, dead, x.shape[1] // 2)
    loss = (p.weight * (recon - p.residual.detach()).square().sum(-1)).sum()
    (true,) = torch.autograd.grad(loss * (p.aux / loss).detach(), p.W_enc)
    off = parts(s, x, dead, -100.0)  # no latent is active
    (idle,) = torch.autograd.grad(off.recon, off.W_enc)
    found = {"own": own, "true": true, "error": own - true, "idle": idle}
    feed.send(**{name: gradient.norm().item() for name, gradient in found.items()})


def sparsify_parts(s: SimpleNamespace, x: Tensor, dead: Tensor, bias: float) -> Parts:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(s.d_in, SparseCoderConfig(num_latents=s.d_sae, k=s.k))
    sae.encoder.bias.data.fill_(bias)
    out = sae(x, dead_mask=dead)
    return Parts(sae.encoder.weight, sae.encoder.bias, sae.W_dec, out.auxk_loss, out.fvu, x - out.sae_out)


def dictionary_learning_parts(s: SimpleNamespace, x: Tensor, dead: Tensor, bias: float) -> Parts:
    from dictionary_learning.trainers import TopKTrainer

    trainer = TopKTrainer(FOREVER, s.d_in, s.d_sae, s.k, s.layer, "none", device=s.device)
    trainer.num_tokens_since_fired[dead] = DEAD
    trainer.ae.encoder.bias.data.fill_(bias)
    latents, _, _, rectified = trainer.ae.encode(x, return_topk=True)
    residual = x - trainer.ae.decode(latents)
    aux = trainer.get_auxiliary_loss(residual.detach(), rectified)
    encoder, W_dec = trainer.ae.encoder, trainer.ae.decoder.weight.T
    return Parts(encoder.weight, encoder.bias, W_dec, aux, residual.square().sum(), residual)


def sae_lens_parts(s: SimpleNamespace, x: Tensor, dead: Tensor, bias: float) -> Parts:
    from sae_lens import TrainingSAE

    sae = TrainingSAE.from_dict(_sae_lens_config(s, sparse=False).to_dict())
    sae.b_enc.data.fill_(bias)
    latents, pre_acts = sae.encode_with_hidden_pre(x)
    out = sae.decode(latents)
    aux = sae.calculate_topk_aux_loss(x, out, pre_acts, dead)
    return Parts(sae.W_enc, sae.b_enc, sae.W_dec, aux, (x - out).square().sum(), x - out)


CONTESTANTS: dict[str, Callable[[SimpleNamespace, Feed], None]] = {
    "sparsify": sparsify,
    "sparsify adam": lambda s, feed: sparsify(s, feed, "adam"),
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "sae-lens sparse": lambda s, feed: sae_lens(s, feed, sparse=True),
    "sparsify harvest": sparsify_harvest,
    "dictionary-learning harvest": dictionary_learning_harvest,
    "sae-lens harvest": sae_lens_harvest,
    "sparsify gradients": lambda s, feed: check_gradients(s, feed, sparsify_parts),
    "dictionary-learning gradients": lambda s, feed: check_gradients(s, feed, dictionary_learning_parts),
    "sae-lens gradients": lambda s, feed: check_gradients(s, feed, sae_lens_parts),
}


def settings(text: str) -> SimpleNamespace:
    """What training.py asks for, and the batches that all step on."""
    s = SimpleNamespace(**json.loads(text))
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    s.n_dead = int(s.dead * s.d_sae)
    if s.states:
        from safetensors.torch import load_file

        tensors = [t for t in load_file(s.states).values() if t.shape[1:] == (s.d_in,) and t.is_floating_point()]
        pool = tensors[0][: 8 * s.batch].float()
    else:
        pool = torch.randn(8 * s.batch, s.d_in)
    s.batches = pool.to(s.device).split(s.batch)[: max(1, len(pool) // s.batch)]
    if s.texts:
        s.texts = json.loads(Path(s.texts).read_text(encoding="utf-8"))
    return s


def main(contestants: dict[str, Callable[[SimpleNamespace, Feed], None]], name: str, text: str) -> None:
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    s = settings(text)
    feed = Feed(cycle(s.batches), s.steps, lambda **message: messages.write(json.dumps(message) + "\n"), s.device)
    if s.texts:
        feed.count_tokens()
    with contextlib.suppress(Enough):
        contestants[name](s, feed)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(CONTESTANTS, *sys.argv[1:])
    else:
        print("This is a part of training.py; run that.")
