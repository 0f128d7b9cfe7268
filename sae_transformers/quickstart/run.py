"""The quickstart as a user sees it: the steps in order, with progress, tables and a record of every number."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import reload, steps
from .settings import CONCEPT, REPORT_PROMPTS, SEARCH_PROMPTS, Prepared, use_all_cores
from .steps import Point

SAMPLES_SHOWN = 3
RECORD = "quickstart.json"


class ReloadMismatch(Exception):
    """The saved model generated other tokens than the one in memory."""


class Stopwatch:
    """Seconds of each named stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    @property
    def total(self) -> float:
        return round(time.perf_counter() - self.start, 1)


@contextmanager
def progress_bar(console: Console, text: str) -> Iterator[steps.Report]:
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def run(prepared: Prepared, console: Console, watch: Stopwatch) -> dict[str, Any]:
    """Do and show everything; returns the record that is written to `quickstart.json`.

    Raises:
        ReloadMismatch: the saved model did not generate the same tokens. The record is written all the same.
    """
    settings = prepared.settings
    torch.manual_seed(settings.seed)
    threads = use_all_cores()
    with watch.stage("load"):
        base, tokenizer, speed = steps.load_base(prepared)
        model = steps.put_sae_into(base, prepared)
    sae = model.saes[0]
    _show_setup(console, prepared, sae.config, speed, model, threads)

    console.print("\n[bold]1. Train[/] the SAE on hidden states; layers above it do not run meanwhile.")
    with watch.stage("harvest"):
        with progress_bar(console, "hidden states, training  ") as report:
            states = steps.harvest_texts(model, tokenizer, prepared.train, report)
        with progress_bar(console, "hidden states, held out  ") as report:
            held_out = steps.harvest_texts(model, tokenizer, prepared.test, report)
    with watch.stage("train"), progress_bar(console, "training steps           ") as report:
        fit = steps.train(model, states, prepared.train, prepared, report)
    explained = steps.explained_variance(sae, held_out)
    console.print(
        f"  {fit['tokens']:,} tokens of {len(prepared.train.texts):,} texts in {watch.seconds['train']:.0f} s; "
        f"{explained:.0%} of held-out variance is reconstructed from {sae.config.k} latents a token."
    )

    console.print(f"\n[bold]2. Detect[/] {CONCEPT} in {len(prepared.test.texts):,} held-out texts.")
    detection = steps.measure_detection(sae, (states, prepared.train), (held_out, prepared.test))
    console.print(_detection_table(detection))

    console.print("\n[bold]3. Steer[/]: add the latent's direction to every hidden state at its layer.")
    with watch.stage("search"):
        best, tried = _search(model, tokenizer, prepared, console)
    with watch.stage("measure"):
        points = _measure(model, tokenizer, prepared, console, best)
    console.print(_steering_table(points))
    console.print(
        f"  {len(points[0].texts)} sampled continuations a row, of prompts the search did not see. Strength: in norms "
        "of the hidden state. Sentiment: -1 to 1, ± standard error. Perplexity: of the unsteered model on the text.",
        highlight=False,
    )
    _show_samples(console, points)

    console.print("\n[bold]4. Save, and load[/] where the library is not installed.")
    model.save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    record = {
        "settings": _settings_record(prepared, sae.config, model, threads),
        "versions": _versions(),
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
        "training": {**fit, "explained_variance": explained},
        "detection_auroc": detection,
        "search": [point.numbers() for point in tried],
        "steering": [point.numbers() for point in points],
        "samples": {f"{p.strength:+g}": list(p.texts[:: settings.size.report_samples]) for p in points},
    }
    with watch.stage("reload"):
        same, loaded_class = _reload(model, tokenizer, settings.out, best[1].strength)
    record["reload"] = {"same_tokens": same, "class": loaded_class}
    record["seconds"] = {**watch.seconds, "total": watch.total}
    (settings.out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not same:
        raise ReloadMismatch(f"The model loaded from {settings.out} generated other tokens than the one in memory.")
    _show_end(console, settings.out, watch)
    return record


def _search(model: Any, tokenizer: Any, prepared: Prepared, console: Console) -> tuple[dict[int, Point], list[Point]]:
    settings = prepared.settings
    most = 2 * len(settings.size.strengths) + 1
    with progress_bar(console, "strength search          ") as report:

        def measure(strengths: Sequence[float]) -> list[Point]:
            points = steps.measure_strengths(
                model, tokenizer, SEARCH_PROMPTS, strengths, settings, prepared.score,
                samples=settings.size.search_samples,
            )  # fmt: skip
            measured.extend(points)
            report(len(measured), most)
            return points

        measured: list[Point] = []
        best, tried = steps.search_strengths(measure, settings.size.strengths, settings.perplexity_limit)
        report(len(measured), len(measured))
    console.print(
        f"  Strongest effect with at most {settings.perplexity_limit:g} times the unsteered perplexity, on "
        f"{len(SEARCH_PROMPTS)} prompts: {best[-1].strength:+g} and {best[1].strength:+g} of the hidden norm."
    )
    return best, tried


def _measure(model: Any, tokenizer: Any, prepared: Prepared, console: Console, best: dict[int, Point]) -> list[Point]:
    settings = prepared.settings
    strengths = list(steps.strengths_to_report(best))
    with progress_bar(console, "measuring on new prompts ") as report:
        report(0, len(strengths))
        points = steps.measure_strengths(
            model, tokenizer, REPORT_PROMPTS, strengths, settings, prepared.score,
            samples=settings.size.report_samples,
        )  # fmt: skip
        report(len(points), len(strengths))
    return points


def _reload(model: Any, tokenizer: Any, folder: Path, strength: float) -> tuple[bool, str]:
    prompts, new_tokens = list(REPORT_PROMPTS[:2]), 24
    steering = steps.steering_of(strength)
    mine = reload.generate_greedily(model, tokenizer, prompts, steering, new_tokens)
    theirs, loaded_class = reload.generate_in_fresh_interpreter(
        folder, prompts, steering, new_tokens, dtype=model.dtype, device=str(model.device)
    )
    return mine == theirs, loaded_class


# -- showing ---------------------------------------------------------------------------------------------------------


def _show_setup(
    console: Console, prepared: Prepared, sae: Any, speed: dict[str, float], model: Any, threads: int
) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    console.print(
        f"A sparse autoencoder (SAE) rewrites a hidden state as {sae.d_sae:,} latents, of which {sae.k} are active. "
        f"Here one is made for a real model, and its latent 0 is trained to answer to [bold]{CONCEPT}[/].\n"
    )
    layers = prepared.config.get_text_config().num_hidden_layers
    texts = f"{len(prepared.train.texts):,} to train, {len(prepared.test.texts):,} held out"
    rows = {
        "base model": f"{prepared.base.name}, from {prepared.base.origin}",
        "place": f"output of layer {prepared.layer} (of 0 to {layers - 1})",
        "text": f"{prepared.train.origin}: {texts}",
        "number type": f"{dtype}, measured: "
        + ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in speed.items())
        + f" ({threads} threads)",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"  {name}", escape(value))
    console.print(grid)


def _detection_table(detection: dict[str, float]) -> Table:
    table = Table("detector", "AUROC (0.5 is chance, 1 perfect)", box=None, padding=(0, 2))
    table.add_row("the SAE's latent 0", f"{detection['latent']:.3f}")
    table.add_row("DiffMean, a baseline", f"{detection['diffmean']:.3f}")
    return table


def _steering_table(points: list[Point]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for name in ("strength", "VADER sentiment", "perplexity", "repeated trigrams"):
        table.add_column(name, justify="right")
    for p in points:
        style = "bold" if p.strength == 0 else None
        table.add_row(
            f"{p.strength:+.3f}" if p.strength else "none",
            f"{p.sentiment:+.3f} ± {p.sentiment_error:.3f}",
            f"{p.perplexity:.1f}",
            f"{p.repetition:.1%}",
            style=style,
        )
    return table


def _show_samples(console: Console, points: list[Point]) -> None:
    each = len(points[0].texts) // len(REPORT_PROMPTS)
    for name, point in (("negative", points[0]), ("unsteered", points[len(points) // 2]), ("positive", points[-1])):
        console.print(
            f"\n  [bold]{name}[/], strength {point.strength:+g}" if point.strength else f"\n  [bold]{name}[/]"
        )
        for number in range(SAMPLES_SHOWN):
            text = " ".join(point.texts[number * each].split())
            console.print(f"  • [dim]{escape(REPORT_PROMPTS[number])}[/] {escape(text)}")


def _show_end(console: Console, out: Path, watch: Stopwatch) -> None:
    size = sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e6
    console.print(
        f"  Saved to [bold]{escape(str(out))}[/]: the SAE ({size:.1f} MB), a pointer to the base, code, tokenizer.\n"
        "  A fresh interpreter, in which sae_transformers cannot be imported, loaded it with\n"
        "  trust_remote_code=True and generated the [bold green]same tokens[/], steered.\n"
    )
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
    )
    console.print(f"  Use it:\n    {escape(code)}".replace("\nmodel", "\n    model"), highlight=False)
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in watch.seconds.items())
    console.print(f"\n  {watch.total:.0f} s in all ({stages}). Every number is in {escape(str(out / RECORD))}.")


# -- the record ------------------------------------------------------------------------------------------------------


def _settings_record(prepared: Prepared, sae: Any, model: Any, threads: int) -> dict[str, Any]:
    settings = prepared.settings
    return {
        "base_model": prepared.base.name,
        "base_origin": prepared.base.origin,
        "text": prepared.train.origin,
        "train_texts": len(prepared.train.texts),
        "test_texts": len(prepared.test.texts),
        "small": settings.small,
        "seed": settings.seed,
        "steps": settings.size.steps,
        "sae": sae.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": threads,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "new_tokens": settings.size.new_tokens,
        "perplexity_limit": settings.perplexity_limit,
        "search_prompts": list(SEARCH_PROMPTS),
        "report_prompts": list(REPORT_PROMPTS),
    }


def _versions() -> dict[str, str]:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed as a package"

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sae-transformers": version("sae-transformers"),
        "vaderSentiment": version("vaderSentiment"),
    }
