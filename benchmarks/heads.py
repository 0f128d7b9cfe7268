"""A sweep of classification heads beside a plain torch loop of one run at a time, in one run.

    python benchmarks/heads.py

Every method with every seed on random states. The loop is SelfReg's way: a `torch.nn.Linear`, `torch.optim.AdamW`, one
run after the other; two of its runs (plain, and selfreg with removed states) are timed for a few epochs, and the time
of an epoch is multiplied by the epochs that the sweep's runs took.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.training.heads.train import METHODS, HeadSettings, train_heads


def loop_seconds_an_epoch(states, labels, sae, features, epochs: int) -> float:
    """Of a plain run's epoch; `features` adds SelfReg's penalty."""
    layer = torch.nn.Linear(states.shape[1], 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0)
    train, held = states[: int(0.8 * len(states))], states[int(0.8 * len(states)) :]
    goals = labels[: len(train)].float()
    if features is not None:
        W_enc, b_enc = sae.W_enc.detach()[:, features].contiguous(), sae.b_enc.detach()[features]
    start = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            loss = F.binary_cross_entropy_with_logits(layer(train[rows])[:, 0], goals[rows])
            if features is not None:
                loss = loss + (layer.weight @ W_enc + b_enc).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            layer(held)
    return (time.perf_counter() - start) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("texts", 5654), ("width", 576), ("d-sae", 4608), ("unintended", 1000), ("seeds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--loop-epochs", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="no early stop: every run takes all of its epochs")
    args = parser.parse_args()
    torch.manual_seed(0)
    labels = (torch.rand(args.texts) < 0.3).long()
    states = torch.randn(args.texts, args.width)
    states[:, :20] += 0.5 * labels[:, None]
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=args.width, d_sae=args.d_sae, activation="relu"))
    features = torch.randperm(args.d_sae)[: args.unintended]
    patience = 1000 if args.full else 3
    runs = [(HeadSettings(method=m, patience=patience), seed) for m in METHODS for seed in range(args.seeds)]

    start = time.perf_counter()
    heads = train_heads(states, labels, runs, sae=sae, unintended=features)
    sweep = time.perf_counter() - start
    plain = loop_seconds_an_epoch(states, labels, sae, None, args.loop_epochs)
    selfreg = loop_seconds_an_epoch(states, labels, sae, features, args.loop_epochs)
    epochs = {m: sum(len(h.history) for h in heads if h.settings.method == m) for m in METHODS}
    loop = sum(count * (selfreg if method == "selfreg" else plain) for method, count in epochs.items())
    print(f"{len(runs)} runs on {args.texts} states of {args.width}, {torch.get_num_threads()} threads")
    print("epochs: " + ", ".join(f"{method} {count}" for method, count in epochs.items()))
    print(f"an epoch of the loop: plain {plain:.3f} s, selfreg {selfreg:.3f} s")
    print(f"sweep {sweep:.1f} s, loop {loop:.1f} s, ratio {loop / sweep:.2f}")


if __name__ == "__main__":
    main()
