"""The verbs `attach` and `convert`: published SAEs, in and out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from .options import FoldDecoderNorm, HookPoint
from .tables import open_console, show_lines, show_rows
from .verb import verb


@verb()
def attach(
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="A published SAE: a name that --list shows, a Hub id (with the path inside it), a folder or a file. "
            "Repeatable."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a folder or a Hub id; by default the one the SAEs were made for.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("outputs/attached"),
    hook_point: HookPoint = None,
    head: Annotated[str, typer.Option(help="causal-lm or sequence-classification.")] = "causal-lm",
    revision: Annotated[str | None, typer.Option(help="Revision of the base on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Whatever model the SAEs were made for.")] = False,
    fold_decoder_norm: FoldDecoderNorm = False,
    show: Annotated[bool, typer.Option("--list", help="List known releases; --sae WORDS searches them.")] = False,
) -> None:
    """Put published SAEs into a model: a repository that from_pretrained loads, a few MB beside its SAEs."""
    console = open_console()  # names stay whole, to be copied
    if show:
        from ..modeling.conversion.names import listing

        show_lines(console, listing(sae or []))
        return
    if not sae:
        raise ValueError("Which SAE? Give --sae; --list shows what is known.")
    from ..modeling.conversion.attach import attach as attach_saes
    from ..modeling.conversion.export import describe
    from ..modeling.decoder_norm import maxima_convention
    from ..workflows.loading import load_saes

    loaded = [one for name in sae for one in load_saes(name, hook_point, fold_decoder_norm=fold_decoder_norm)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = attach_saes(base, loaded, out, head=head, revision=revision, force=force)
    for warning in caught:
        console.print(f"Warning: {warning.message}")
    rows = []
    for number, one in enumerate(loaded):
        form = one.config.metadata.get("format", "sae_transformers")
        maxima = maxima_convention(one.config, one.feature_max) or "not known"
        rows.append({"SAE": number, "what it is": describe(one.config), "format": form, "maxima": maxima})
    show_rows(console, rows, title=f"{model.config.base_model_name_or_path} in {out}")
    loader = f"{type(model).auto_model.__name__}.from_pretrained"
    console.print(f"{loader}({str(out)!r}, trust_remote_code=True)")


@verb(writes="folder")
def convert(
    source: Annotated[str, typer.Argument(help="An SAE, as attach takes it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str, typer.Option(help="sae_transformers, saelens, sparsify, dictionary_learning or circuit-tracer.")
    ] = "sae_transformers",
    sae_id: Annotated[str | None, typer.Option(help="The SAE in a repository of several.")] = None,
    hook_point: HookPoint = None,
    k: Annotated[int | None, typer.Option(help="For top-k checkpoints that do not say.")] = None,
    input_scale: Annotated[float | None, typer.Option(help="For checkpoints whose scale is not in the file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; by default as stored.")] = None,
    fold_decoder_norm: FoldDecoderNorm = False,
    base: Annotated[
        str | None, typer.Option(help="A model to take the probe's hidden states from, in place of random ones.")
    ] = None,
) -> None:
    """Read an SAE of any known format and write it in another; the copy is read back and compared."""
    from ..workflows.convert import convert as convert_sae
    from ..workflows.loading import load_base, load_sae

    given = {"sae_id": sae_id, "k": k, "input_scale": input_scale, "fold_decoder_norm": fold_decoder_norm}
    sae = load_sae(source, hook_point, dtype=dtype, **given)
    model, tokenizer, _ = (None, None, None) if base is None else load_base(base)
    show_lines(open_console(), convert_sae(sae, out, to, model=model, tokenizer=tokenizer).summary())
