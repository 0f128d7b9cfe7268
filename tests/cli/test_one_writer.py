"""Two runs of a verb on one `--out`: the second is refused at once, and nothing of the first is lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.create_training_data.harvest.blocks import HarvestSettings
from sae_transformers.latents.output_files import locked_file, locked_folder
from sae_transformers.modeling.conversion.attach import attach
from sae_transformers.workflows.harvest import harvest
from sae_transformers.workflows.publish import card
from sae_transformers.workflows.reading.spans import spans
from sae_transformers.workflows.train import train
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

FILES = {
    "ask-features",
    "attribute",
    "concept-data",
    "dashboard",
    "detect",
    "explain",
    "export-steering",
    "features",
    "find",
    "generate",
    "judge",
}
FILES |= {"steer-feature"}
# These take the lock themselves: they share a folder between processes, take it from a recipe, or have other uses too.
OWN = {"attach", "card", "harvest", "spans", "train"}


def writers() -> list[str]:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(name for name, one in commands.items() if any(p.name == "out" for p in one.params))


def words(verb: str, out: Path) -> list[str]:
    """The least that a verb takes, of things that are not there."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    needed = [p for p in commands[verb].params if p.required and p.name != "out"]
    found = [verb]
    for one in needed:
        found += ["0"] if one.param_type_name == "argument" else [one.opts[0], "0"]
    out_option = next(p for p in commands[verb].params if p.name == "out")
    return [*found, str(out)] if out_option.param_type_name == "argument" else [*found, "--out", str(out)]


@pytest.mark.parametrize("verb", [name for name in writers() if name not in OWN])
def test_the_second_run_is_refused_at_once(verb: str, tmp_path: Path) -> None:
    out = tmp_path / ("table.jsonl" if verb in FILES else "folder")
    given = words(verb, out)
    with (locked_file if verb in FILES else locked_folder)(out), ThreadPoolExecutor(1) as threads:
        result = threads.submit(lambda: CliRunner().invoke(app, given)).result()
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: One run at a time writes to") and out.name in result.stderr
    assert list(tmp_path.iterdir()) == []


def _train(out: Path) -> Any:
    settings: Any = {"sae": {"d_sae": 16, "k": 2}, "training": {"max_steps": 1}}
    return train(torch.randn(64, 8), hook_point="layers.0.resid_post", output_dir=out, **settings)


def _harvest(out: Path) -> Any:
    tokenizer = word_tokenizer()
    settings = HarvestSettings(("layers.0.resid_post",), max_length=8)
    return harvest(tiny_base(vocab_size=len(tokenizer)), tokenizer, word_texts(4), out, settings)


def _spans(out: Path) -> Any:
    tokenizer = word_tokenizer()
    sae = tiny_sae(layer=0, site="resid_post")
    return spans(tiny_base(vocab_size=len(tokenizer)), tokenizer, word_texts(4), sae=sae, out=out)


def _attach(out: Path) -> Any:
    tiny_base().save_pretrained(out.parent / "base")
    word_tokenizer().save_pretrained(out.parent / "base")
    return attach(str(out.parent / "base"), [tiny_sae(layer=0, site="resid_post")], out)


def _card(out: Path) -> Any:
    return card(out)


@pytest.mark.parametrize(
    ("write", "lock"),
    [(_train, ".lock"), (_harvest, ".lock-0"), (_spans, ".lock-0"), (_attach, ".lock"), (_card, ".lock")],
)
def test_so_are_those_that_lock_it_themselves(write: Callable[[Path], Any], lock: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if write is _card:
        tiny_sae().save_pretrained(out)
    with ThreadPoolExecutor(1) as threads:
        with locked_folder(out, lock):
            before = {path.name: path.read_bytes() for path in out.iterdir()}
            with pytest.raises(BlockingIOError, match="One run at a time writes to .*out"):
                threads.submit(write, out).result()
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        threads.submit(write, out).result()
    assert not list(out.glob(".lock*")) and any(out.iterdir())
