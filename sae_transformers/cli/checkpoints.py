"""The verbs `attach` and `convert`: published SAEs, in and out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import fail
from .loading import load_base, load_sae


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(attach)
    app.command()(convert)


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
        from ..modeling.conversion.releases import releases

        console = Console(highlight=False, soft_wrap=True)  # names stay whole, to be copied
        chosen = [release for name, release in releases().items() if not sae or any(part in name for part in sae)]
        for release in chosen:
            console.print(release.pattern, style="bold", markup=False)
            for fact in filter(None, (f"{release.base}, {release.licence}", release.summary())):
                console.print(f"    {fact}", markup=False)
        console.print(f"{len(chosen)} releases" if chosen else "No release of such a name.")
        return
    from ..modeling.conversion.attach import attach as attach_saes
    from ..modeling.conversion.export import describe

    try:
        if not sae:
            raise ValueError("Which SAE? Give --sae; --list shows what is known.")
        loaded = [load_sae(name, place) for name in sae]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            model = attach_saes(base, loaded, out, head=head, revision=revision, force=force)
    except (ValueError, OSError, TypeError, ImportError) as error:
        fail(error, code=2)
    for warning in told:
        Console().print(f"Warning: {warning.message}", markup=False, soft_wrap=True)
    table = Table("SAE", "what it is", "format", title=f"{model.config.base_model_name_or_path} in {out}")
    for number, one in enumerate(loaded):
        table.add_row(str(number), describe(one.config), one.config.metadata.get("format", "sae_transformers"))
    Console().print(table)
    Console().print(
        f"{type(model).auto_model.__name__}.from_pretrained({str(out)!r}, trust_remote_code=True)", soft_wrap=True
    )


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

    from ..modeling.conversion.export import describe, export

    try:
        options = {"sae_id": sae_id, "k": k, "input_scale": input_scale, "dtype": _dtype(dtype)}
        sae = load_sae(source, place, **options)
        probe = None if base is None else _probe(base, sae)
        found = export(sae, out, to, probe)
    except (ValueError, OSError, TypeError, ImportError) as error:
        fail(error, code=2)
    form = sae.config.metadata.get("format", "sae_transformers")
    what = f"hidden states of {base}" if base else "Gaussian rows"
    Console().print(
        f"{form}: {describe(sae.config)}; on {what} L0 {found.l0:.1f}, FVU {found.fvu:.3f}; the copy differs by "
        f"{found.difference:.1e}.",
        soft_wrap=True,
    )


def _probe(base: str, sae: Any) -> Any:
    """Hidden states (n_tokens, d_in) of a model on a few sentences, at the place that an SAE reads."""
    from ..latents.hidden_states import read_hidden_states as read_hidden
    from ..modeling import SaeForCausalLM
    from ..modeling.conversion.export import PROBE_TEXTS

    lm, tokenizer, _ = load_base(base, None, "auto")
    return read_hidden(SaeForCausalLM.from_base(lm, saes=[copy.deepcopy(sae)]), tokenizer, PROBE_TEXTS).hidden


def _dtype(name: str | None) -> Any:
    import torch

    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16. Received: dtype={name!r}.")
    return getattr(torch, name) if name else None
