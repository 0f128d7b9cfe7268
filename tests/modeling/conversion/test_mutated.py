"""Damaged, lying and hostile checkpoints: a clear error or a working SAE, no code run, no memory that the file is not
large enough for."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion.families import FAMILIES, D, F
from tests.modeling.conversion.mutations import MUTATIONS
from tests.modeling.loader_process import Loader

SOME, MANY = 20, 1000
HEADROOM = 2**30  # of address space, for checkpoints of a few kilobytes


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Allocations that a file of a few kilobytes cannot ask for fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(family: str, seed: int, folder: Path) -> str:
    """One mutation; what came of it."""
    chance = random.Random(f"{family} {seed}")
    root, trap = folder / str(seed), folder / f"trap-{seed}"
    path = FAMILIES[family](root)
    mutation = chance.choice(MUTATIONS)
    mutation(root, chance, trap)
    try:
        with memory_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SparseAutoencoder.from_pretrained(path, dtype=torch.float32)
            output = sae(torch.ones(2, sae.config.d_in))
            assert all(bool(value.isfinite().all()) for value in sae.state_dict().values()), (
                f"{mutation.__name__}, {seed}"
            )
            # Finite weights may still be as large as float32 goes, so the output may overflow; it must be there.
            assert output.latents.shape == (2, sae.config.d_sae)
            outcome = "loaded"
    except (ValueError, TypeError, OSError) as error:
        assert len(str(error)) > 10, f"{mutation.__name__}, {seed}: {error!r}"
        outcome = "refused"
    assert not trap.exists(), f"{mutation.__name__}, {seed}: code was run"
    shutil.rmtree(root)
    return outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_itself_loads(family, tmp_path):
    sae = SparseAutoencoder.from_pretrained(FAMILIES[family](tmp_path), dtype=torch.float32)
    output = sae(torch.randn(5, D, generator=torch.Generator().manual_seed(0)))
    assert output.reconstruction.isfinite().all() and (output.latents != 0).any()
    assert (sae.config.d_in, sae.config.d_sae) == (D, F)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("family", FAMILIES)
def test_some_mutations(family, tmp_path):
    outcomes = [check(family, seed, tmp_path) for seed in range(SOME)]
    assert outcomes.count("refused") > SOME / 3


def names_something(text: str, files: list[str], path: Path) -> bool:
    """Whether an error says which file, or which field of it."""
    return (
        str(path) in text
        or path.name in text
        or any(file in text for file in files)
        or bool(re.search(r"`\w+`", text))
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_mutations(family: str, tmp_path: Path) -> None:
    """In a process of its own: see `loader_process` for what it may take."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with Loader("sae", FAMILIES[family](tmp_path / "whole")) as loader:
        for seed in range(SOME, SOME + MANY):
            chance = random.Random(f"{family} {seed}")
            root, trap = tmp_path / str(seed), tmp_path / f"trap-{seed}"
            path = FAMILIES[family](root)
            files = [file.name for file in root.rglob("*") if file.is_file()]
            mutation = chance.choice(MUTATIONS)
            mutation(root, chance, trap)
            found = loader.load(path, root)
            kind = "executed" if trap.exists() else found.kind
            if kind == "refused" and not names_something(found.text, files, path):
                kind = "names nothing"
            counts[kind] += 1
            if kind not in ("loaded", "refused"):
                wrong.append(f"{seed} {mutation.__name__}: {found._replace(kind=kind)}")
            shutil.rmtree(root)
    print(f"{family}: {dict(counts)}")  # for `pytest -rP`
    assert not wrong, "\n".join(wrong[:10])
    assert counts["refused"] > MANY / 3 and counts["loaded"] > 0
