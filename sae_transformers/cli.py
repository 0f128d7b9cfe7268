"""The command line: `sae-transformers VERB`. Each verb parses, calls one function and shows its result."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .cli_align import register as register_align
from .cli_annotate import register as register_annotate
from .cli_classify import register as register_classify
from .cli_concepts import register as register_concepts
from .cli_dashboard import register as register_dashboard
from .cli_evaluate import register as register_evaluate
from .cli_features import register as register_features
from .cli_publish import register as register_publish
from .cli_select import register as register_select
from .cli_serve import register as register_serve
from .cli_spans import register as register_spans
from .cli_steer import register as register_steer

# Markdown: in the other forms typer takes `[default: ...]` for markup and shows nothing.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)


@app.callback()
def main() -> None:
    """Sparse autoencoders as working parts of Hugging Face models."""


@app.command()
def quickstart(
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a Hub id. [default: SmolLM2-135M-Instruct]")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Texts: .csv or .jsonl with columns text, label; or a Hub id. [default: Rotten Tomatoes]"),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Block whose output the SAE reads. [default: just under the middle]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("outputs/quickstart"),
    small: Annotated[bool, typer.Option("--small", help="Fewer texts, steps and samples: for a quick check.")] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
) -> None:
    """Train a sentiment latent in a real model, detect and steer with it, save it, load it again."""
    # Read when torch is first imported. Threads that sleep while they wait, where the default is to spin, keep their
    # speed on a machine that does other work too; spinning ones fall to a fraction of it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Here, not above: `--help` need not wait for torch.
    import transformers
    from rich.console import Console

    from .quickstart.run import ReloadMismatch, Stopwatch, run
    from .quickstart.settings import Settings, prepare

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    settings = Settings(model=model, dataset=dataset, layer=layer, out=out, small=small, seed=seed)
    watch = Stopwatch()
    try:
        with watch.stage("prepare"):
            prepared = prepare(settings, say=console.print)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error), code=2)
    try:
        run(prepared, console, watch)
    except (ReloadMismatch, RuntimeError) as error:
        _fail(str(error), code=1)


@app.command()
def attach(
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="A published SAE: a name that --list shows, a Hub id (with the path inside it), a folder or a file. "
            "Repeatable."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a folder or a Hub id. [default: the one the SAEs were made for]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("outputs/attached"),
    place: Annotated[
        str | None, typer.Option(help="Of an SAE that does not say: layers.14.resid_post, or a module path.")
    ] = None,
    head: Annotated[str, typer.Option(help="causal-lm or sequence-classification.")] = "causal-lm",
    revision: Annotated[str | None, typer.Option(help="Of the base.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Whatever model the SAEs were made for.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List known releases; --sae narrows the list.")] = False,
) -> None:
    """Put published SAEs into a model: a repository that from_pretrained loads, a few MB beside its SAEs."""
    from rich.console import Console
    from rich.table import Table

    if show:
        from .modeling.conversion.releases import releases

        table = Table("name", "values", "base", "licence", title="Known releases")
        for name, release in releases().items():
            if not sae or any(part in name for part in sae):
                table.add_row(release.pattern, release.summary(), release.base, release.licence)
        Console().print(table if table.row_count else "No release of such a name.")
        return
    from .modeling.conversion.attach import attach as attach_saes
    from .modeling.conversion.export import describe

    try:
        if not sae:
            raise ValueError("Which SAE? Give --sae; --list shows what is known.")
        loaded = [_load_sae(name, place) for name in sae]
        model = attach_saes(base, loaded, out, head=head, revision=revision, force=force)
    except (ValueError, OSError, TypeError, ImportError) as error:
        _fail(str(error), code=2)
    table = Table("SAE", "what it is", "format", title=f"{model.config.base_model_name_or_path} in {out}")
    for number, one in enumerate(loaded):
        table.add_row(str(number), describe(one.config), one.config.metadata.get("format", "sae_transformers"))
    Console().print(table)
    Console().print(
        f"{type(model).auto_model.__name__}.from_pretrained({str(out)!r}, trust_remote_code=True)", soft_wrap=True
    )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="An SAE, as attach takes it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str, typer.Option(help="sae_transformers, saelens, sparsify or dictionary_learning.")
    ] = "sae_transformers",
    sae_id: Annotated[str | None, typer.Option(help="The SAE in a repository of several.")] = None,
    place: Annotated[
        str | None, typer.Option(help="Where it reads, if that is not said: layers.14.resid_post, or a module path.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="For top-k checkpoints that do not say.")] = None,
    input_scale: Annotated[float | None, typer.Option(help="For checkpoints whose scale is not in the file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. [default: as stored]")] = None,
    base: Annotated[
        str | None, typer.Option(help="A model to take the probe's hidden states from, in place of random ones.")
    ] = None,
) -> None:
    """Read an SAE of any known format and write it in another; the copy is read back and compared."""
    from rich.console import Console

    from .modeling.conversion.export import describe, export

    try:
        options = {"sae_id": sae_id, "k": k, "input_scale": input_scale, "dtype": _dtype(dtype)}
        sae = _load_sae(source, place, **options)
        probe = None if base is None else _probe(base, sae)
        found = export(sae, out, to, probe)
    except (ValueError, OSError, TypeError, ImportError) as error:
        _fail(str(error), code=2)
    form = sae.config.metadata.get("format", "sae_transformers")
    what = f"hidden states of {base}" if base else "Gaussian rows"
    Console().print(
        f"{form}: {describe(sae.config)}; on {what} L0 {found.l0:.1f}, FVU {found.fvu:.3f}; the copy differs by "
        f"{found.difference:.1e}.",
        soft_wrap=True,
    )


@app.command()
def harvest(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    text: Annotated[
        str,
        typer.Argument(
            help="Text: a .txt, .jsonl, .json, .csv or .parquet file, a folder or glob of these, local or at any "
            "fsspec URL; or a Hub data set."
        ),
    ],
    place: Annotated[
        list[str], typer.Option(help="Where to read, e.g. layers.14.resid_post, or a module path. Repeatable.")
    ],
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the store. An interrupted harvest continues.")],
    column: Annotated[str, typer.Option(help="Column of the text; a.b is field b of column a.")] = "text",
    label: Annotated[
        list[str] | None, typer.Option(help="Column of a 0/1 label, carried to the tokens. Repeatable.")
    ] = None,
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    split: Annotated[str, typer.Option(help="Of a Hub data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a Hub data set as it is needed.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    pack: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="Join short texts. [default: unless there are labels or positions]"),
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens to keep: all, last (of a text) or after_prefix.")] = "all",
    prefix_tokens: Annotated[int, typer.Option(help="Length of that prefix.")] = 0,
    skip_first: Annotated[
        bool, typer.Option("--skip-first/--keep-first", help="The first token of a sequence is an outlier in norm.")
    ] = True,
    drop_special: Annotated[bool, typer.Option("--drop-special", help="Leave out special tokens.")] = False,
    dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
    model_dtype: Annotated[
        str, typer.Option(help="The model runs in it. auto: float32 on a CPU, else as published.")
    ] = "auto",
    rows_per_shard: Annotated[int, typer.Option(help="Rows of text in a file; memory holds so many.")] = 256,
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 4096,
    max_rows: Annotated[int | None, typer.Option(help="Use the first rows only.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use the first rows that give so many tokens, up to a whole shard.")
    ] = None,
) -> None:
    """Write a model's hidden states on a text to shards. With torchrun, each process does its part."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    import time

    import torch
    from rich.console import Console
    from rich.table import Table

    from .create_training_data.blocks import HarvestSettings
    from .create_training_data.shards import harvest_to_store, rank_and_world
    from .create_training_data.text import open_text

    rank, world = rank_and_world()
    start = 0.0
    try:
        settings = HarvestSettings(
            places=tuple(place),
            max_length=max_length,
            pack=pack,
            positions=positions,
            prefix_tokens=prefix_tokens,
            skip_first=skip_first,
            drop_special_tokens=drop_special,
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            tokens_at_once=tokens_at_once,
        )
        source = open_text(
            text,
            column=column,
            labels=label or (),
            split=split,
            subset=subset,
            streaming=streaming,
            txt_rows=txt_rows,
        )
        if max_rows is not None:
            source = source.first(max_rows)
        base, tokenizer, name = _load_base(model, revision, model_dtype)
        start = time.perf_counter()
        found = harvest_to_store(
            base,
            tokenizer,
            source,
            settings,
            out,
            max_tokens=max_tokens,
            model_name=name,
            revision=revision,
            progress=True,
        )
    except torch.OutOfMemoryError as error:
        _fail(f"{error} Try a smaller --tokens-at-once or --rows-per-shard.", code=1)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error), code=2)
    speed = f"{found.new_tokens / (time.perf_counter() - start):,.0f}" if found.new_tokens else "-"
    if not found.complete and world > 1:
        Console().print(f"process {rank}: {found.new_tokens:,} tokens ({speed}/s); others are still at work")
        return
    table = Table("tokens", "shards", "bytes", "new tokens", "tokens/s", title=out)
    table.add_row(f"{found.n_tokens:,}", f"{found.n_shards:,}", f"{found.n_bytes:,}", f"{found.new_tokens:,}", speed)
    Console().print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="A YAML file, or topk, selfreg-pretrain, selfreg-finetune or scar.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder or URL of harvested hidden states.")] = None,
    method: Annotated[str | None, typer.Option(help="pretrain, finetune or condition.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List every other option with its meaning.")] = False,
) -> None:
    """Train SAEs on harvested hidden states. Every setting is also a flag: --d_sae 4096 --learning_rate 1e-3 ..."""
    from rich.console import Console
    from rich.table import Table

    from .training.recipe import own_options, read_recipe
    from .training.run import run_recipe

    if options:
        table = Table("flag", "default", "meaning")
        for name, default, meaning in own_options():
            table.add_row(f"--{name}", str(default), meaning)
        Console().print(table)
        Console().print(
            "Also every argument of transformers.TrainingArguments, and of SparseAutoencoderConfig for each SAE."
        )
        return
    given = [f"--{name}={value}" for name, value in (("data", data), ("method", method)) if value is not None]
    try:
        metrics = run_recipe(read_recipe(config, [*given, *context.args]), resume=resume)
    except (ValueError, OSError, TypeError) as error:
        _fail(str(error), code=2)
    table = Table("metric", "value", title="Training")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


def _load_sae(name: str, place: str | None, **options: Any) -> Any:
    """An SAE by name, put at a place given as one text."""
    from .modeling import SparseAutoencoder
    from .modeling.configuration_sae import SITES

    if place is not None:
        parts = place.split(".")
        if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit() and parts[2] in SITES:
            options.update(layer=int(parts[1]), site=parts[2])
        else:
            options["hook"] = place
    return SparseAutoencoder.from_pretrained(name, **options)


def _probe(base: str, sae: Any) -> Any:
    """Hidden states (n_tokens, d_in) of a model on a few sentences, at the place that an SAE reads."""
    from .create_training_data.hidden_states import harvest as read_hidden
    from .modeling import SaeForCausalLM
    from .modeling.conversion.export import PROBE_TEXTS

    lm, tokenizer, _ = _load_base(base, None, "auto")
    return read_hidden(SaeForCausalLM.from_base(lm, saes=[copy.deepcopy(sae)]), tokenizer, PROBE_TEXTS).hidden


def _dtype(name: str | None) -> Any:
    import torch

    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16. Received: dtype={name!r}.")
    return getattr(torch, name) if name else None


def _load_base(
    name: str, revision: str | None, dtype: str, head: str = "AutoModelForCausalLM", **options: Any
) -> tuple[Any, Any, str]:
    """A base model on this process's device, its tokenizer, and where it was found."""
    import torch
    import transformers

    from .create_training_data.base_model import find_base_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"`model_dtype` must be auto, float32, bfloat16 or float16. Received: model_dtype={dtype!r}.")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    found = find_base_model(name).name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(found, revision=revision)
        base: Any = getattr(transformers, head).from_pretrained(found, revision=revision, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{found!r} could not be read as a model: {str(error).strip().splitlines()[0]}") from error
    return base.to(device).eval(), tokenizer, found


def _fail(message: str, *, code: int) -> NoReturn:
    """End with one line on stderr."""
    typer.secho(f"Error: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


register_spans(app)
register_annotate(app)
register_classify(app)
register_select(app)
register_features(app)
register_align(app)
register_steer(app)
register_concepts(app)
register_evaluate(app)
register_publish(app)
register_serve(app)
register_dashboard(app)
