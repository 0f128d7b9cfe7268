"""The verbs `card` and `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import guarded


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(card)
    app.command()(push)


def _first_card() -> str:
    """The template of `save_pretrained`'s card. Read, not imported: these verbs do not wait for torch."""
    import ast

    source = Path(__file__).parents[1] / "modeling" / "repository_files.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CARD":
            return ast.literal_eval(node.value)
    raise ImportError(f"Expected a template CARD in {source}. Received: none; install the library again.")


def card(
    folder: Annotated[Path, typer.Argument(help="Of a model, an SAE, a data set that this library wrote, a metric.")],
    results: Annotated[Path | None, typer.Option(help="The results.json of evaluate.")] = None,
    facts: Annotated[
        Path | None, typer.Option(help="YAML or JSON: licence, training_data, languages, intended_use, authors, ...")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Table of explain or judge: what the features of one SAE mean.")
    ] = None,
    annotated_sae: Annotated[int, typer.Option(help="Number of that SAE.")] = 0,
    repo_id: Annotated[str | None, typer.Option(help="user/name on the Hub. [default: push fills it in]")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's id on the Hub, where the config names a folder.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="model, dataset or metric. [default: what the folder holds]")
    ] = None,
    features: Annotated[int, typer.Option(help="Rows of the table of features.")] = 50,
    examples: Annotated[int, typer.Option(help="Prompts shown of each way to steer.")] = 3,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that was edited by hand.")] = False,
) -> None:
    """Write README.md from what is known of a model or a data set; what is not known is said to be so."""
    guarded(_card, dict(locals()))


def _card(s: dict[str, Any], console: Any) -> None:
    from dataclasses import replace

    from ..hub_cards.card_file import write_card
    from ..hub_cards.facts import read_author_facts

    author = read_author_facts(s["facts"])
    given = {"repo_id": s["repo_id"], "base": s["base"]}
    author = replace(author, **{name: value for name, value in given.items() if value is not None})
    for name in ("features", "examples"):
        if s[name] < 0:
            raise ValueError(f"--{name} must be 0 or more. Received: {s[name]}.")
    text, unknown, first = _rendered(s, author)
    path = write_card(text, s["folder"], first_cards=[_first_card(), *first], force=s["force"])
    console.print(f"{path}", markup=False)
    if unknown:
        options = "--facts and --results fill" if "results" in unknown else "--facts fills"
        console.print(f"Said to be unknown: {', '.join(unknown)}. {options} them in.", markup=False)


def _rendered(s: dict[str, Any], author: Any) -> tuple[str, list[str], list[str]]:
    """The card's text, what it does not know, and cards that it may replace."""
    from ..evaluation.results import read_results
    from ..hub_cards.dataset_card import dataset_card, is_dataset, read_dataset
    from ..hub_cards.facts import read_annotations, read_model
    from ..hub_cards.metric_card import is_metric, metric_card, read_metric
    from ..hub_cards.model_card import model_card

    folder, kind = s["folder"], s["kind"]
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder. Received: {str(folder)!r}, which is none.")
    if kind is None:
        other = "metric" if is_metric(folder) else "model"
        kind = "model" if (folder / "config.json").is_file() else "dataset" if is_dataset(folder) else other
    if kind not in ("model", "dataset", "metric"):
        raise ValueError(f"--kind must be model, dataset or metric. Received: {kind!r}.")
    if kind != "model" and (given := [name for name in ("results", "annotations") if s[name] is not None]):
        raise ValueError(f"--{given[0]} is for a model's card. Received: --kind {kind}.")
    unknown = [name for name in ("licence", "training_data") if not getattr(author, name)]
    if kind == "dataset":
        return dataset_card(read_dataset(folder), author), unknown, []
    if kind == "metric":
        metric = read_metric(folder)
        return metric_card(metric, author), [name for name in unknown if name == "licence"], [metric.own_card]
    model = read_model(folder)
    results = None if s["results"] is None else read_results(s["results"])
    annotations = None if s["annotations"] is None else read_annotations(s["annotations"])
    text = model_card(
        model, author, results, annotations=annotations, annotated_sae=s["annotated_sae"],
        max_features=s["features"], max_examples=s["examples"],
    )  # fmt: skip
    if any(sae.metadata.get("training_data") for sae in model.saes):
        unknown = [name for name in unknown if name != "training_data"]
    return text, unknown + (["results"] if results is None else []), []


def push(
    folder: Annotated[Path, typer.Argument(help="Of a model, an SAE, a data set or a Space.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made where there is none.")] = "main",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The base's id on the Hub, which stands for a folder in what is sent.")
    ] = None,
    dashboard: Annotated[Path | None, typer.Option(help="Folder or file that goes to dashboard/.")] = None,
    space: Annotated[Path | None, typer.Option(help="Folder of a Space of the same name, pushed after it.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="model, dataset or space. [default: what the folder holds]")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files or folders to leave out. Repeatable.")
    ] = None,
    allow_paths: Annotated[bool, typer.Option("--allow-paths", help="Publish absolute paths in files.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of another kind that is there.")] = False,
    local_base: Annotated[
        Path | None, typer.Option(help="Folder with the base, for the verification. [default: fetched]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, compare, say what would be sent, and end.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the pushed revision back and compare it.")
    ] = True,
) -> None:
    """Publish model, code, card and dashboard in one commit, after checks; then load them back."""
    guarded(_push, dict(locals()))


def _push(s: dict[str, Any], console: Any) -> None:
    import contextlib

    from ..hub_cards.publish import has_first_card, prepared
    from ..hub_cards.verification import NotAsPushed
    from .errors import fail

    options = {"exclude": s["exclude"] or (), "allow_paths": s["allow_paths"], "first_cards": [_first_card()]}
    if s["local_base"] is not None and not (s["local_base"] / "config.json").is_file():
        raise ValueError(f"--local-base must be a model's folder. Received: {str(s['local_base'])!r}.")
    with contextlib.ExitStack() as stack:  # everything is checked before anything is sent
        publications = [
            stack.enter_context(
                prepared(s["folder"], s["repo_id"], s["kind"], base=s["base"], dashboard=s["dashboard"], **options)
            )
        ]
        if s["space"] is not None:
            publications.append(stack.enter_context(prepared(s["space"], s["repo_id"], "space", **options)))
        for publication in publications:
            for name, why in publication.changed.items():
                console.print(f"{name}, as it is sent: {why}", markup=False)
            if has_first_card(publication, _first_card()):
                console.print(
                    "README.md is the short one of `save_pretrained`; `sae-transformers card` writes a full one."
                )
        try:
            for publication in publications:
                _push_one(publication, s, console)
        except NotAsPushed as error:
            fail(error, code=1)


def _push_one(publication: Any, s: dict[str, Any], console: Any) -> None:
    from huggingface_hub import HfApi

    from ..hub_cards.publish import difference, plain_errors
    from ..hub_cards.publish import push as push_files
    from ..hub_cards.verification import verify

    api = HfApi()
    size = f"{len(publication.files):,} files, {publication.size / 1e6:,.1f} MB"
    what = f"{publication.kind} {publication.repo_id}"
    if s["dry_run"]:
        with plain_errors(publication.repo_id):
            found = difference(api, publication, s["revision"])
        console.print(
            f"{what}: {size}; nothing was sent. Would send {len(found.send):,}, delete {len(found.delete):,}:"
        )
        for sign, names in (("+", found.send), ("-", found.delete)):
            for name in names:
                console.print(f"  {sign} {name}", markup=False)
        return
    options = {name: s[name] for name in ("revision", "create_pr", "message", "force")}
    # `private=False` would ask for a public repository where an organisation's are private by default.
    done = push_files(publication, api=api, private=True if s["private"] else None, **options)
    if done.new:
        console.print(f"{what}: {size}; {len(done.sent):,} sent, {len(done.deleted):,} deleted in one commit.")
    else:
        console.print(f"{what}: {size}; all of it is there already, no commit was made.")
    console.print(f"{done.url}", markup=False)
    if s["verify"]:
        base = None if s["local_base"] is None else str(s["local_base"].resolve())
        found = verify(publication, done.commit, base=base, api=api)
        loaded = ""
        if found.loaded:
            name = found.loaded.rpartition(".")[2]
            loaded = f"; loaded by its own code as {name}, {found.tensors} tensors and the outputs are equal"
        console.print(f"Read back at {done.commit[:12]}: {found.files:,} files are equal{loaded}.", markup=False)
