"""The card of a metric that `evaluate.load` takes: a folder with `NAME.py`, read and not run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .card_file import marked
from .facts import AuthorFacts
from .markdown import one_line, render

if TYPE_CHECKING:
    from ..evaluation.metrics import SaeMetric

OWN = "sae_transformers.evaluation.metrics"
OWN_BASE = "SaeMetric"
BASES = ("Metric", "Measurement", "Comparison")  # of the library `evaluate`
TEXTS = {
    "description": ("_DESCRIPTION", "DESCRIPTION"),
    "inputs": ("_KWARGS_DESCRIPTION", "INPUTS", "INPUTS_DESCRIPTION"),
    "citation": ("_CITATION", "CITATION"),
}


@dataclass(frozen=True)
class MetricFacts:
    """What a metric's file says, with empty texts where it does not. name: of the file. needs: packages.

    call, answer: of an example. own_card: the card that was written with the metric, for metrics of this library.
    """

    name: str
    folder: Path
    description: str = ""
    inputs: str = ""
    citation: str = ""
    needs: tuple[str, ...] = ()
    limits: str = ""
    call: str = ""
    answer: str = ""
    own_card: str = ""


def is_metric(folder: str | Path) -> bool:
    """Whether a folder holds a metric."""
    return bool(_files(Path(folder)))


def read_metric(folder: str | Path) -> MetricFacts:
    """The facts of a metric.

    Raises:
        FileNotFoundError: no file with a class of `evaluate.Metric`.
        ValueError: several, and none is called as the folder.
    """
    folder = Path(folder)
    files = _files(folder)
    if not files:
        raise FileNotFoundError(
            f"Expected a folder with a .py file that has a class of evaluate.Metric. Received: {str(folder)!r}."
        )
    name = folder.resolve().name if folder.resolve().name in files else next(iter(files))
    if len(files) > 1 and name != folder.resolve().name:
        raise ValueError(
            f"One file of a metric's folder must be called as the folder. Received: {sorted(files)} in "
            f"{str(folder)!r}."
        )
    tree = files[name]
    if (own := _own_class(tree)) is not None:
        return _own_facts(name, folder, own)
    constants = _constants(tree)
    info = _info(tree, constants)
    docstring = ast.get_docstring(tree) or ""
    found = {
        key: info.get(key) or next((constants[one] for one in names if one in constants), "")
        for key, names in TEXTS.items()
    }
    found["description"] = found["description"] or docstring
    return MetricFacts(name, folder, needs=_needs(folder), **found)


def _needs(folder: Path) -> tuple[str, ...]:
    path = folder / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _own_class(tree: ast.Module) -> str | None:
    """The class of this library that a script is made of, or takes its metric from: see `evaluation.metrics.space`."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == OWN:
            return node.names[0].name
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    made = [node.name for node in classes if OWN_BASE in map(ast.unparse, node.bases)]
    return made[0] if made and made[0] in _own_classes() else None


def _own_classes() -> dict[str, type[SaeMetric]]:
    """Metrics of this library by their classes' names."""
    from ..evaluation.metrics import METRICS

    return {one.__name__: one for one in METRICS.values()}


def _own_facts(name: str, folder: Path, own: str) -> MetricFacts:
    from ..evaluation.metrics import space as metric_space

    known = _own_classes()
    if (kind := known.get(own)) is None:
        raise ValueError(f"{name}.py must import a metric of {OWN}, one of {', '.join(known)}. Received: {own!r}.")
    facts = kind.facts
    told = {**facts.inputs, **dict(facts.options)}
    lines = [f"{column}: {what}" for column, what in told.items()]
    lines.append(f"gives {', '.join(facts.answer)}: {facts.values}")
    return MetricFacts(
        name, folder, f"{facts.description}\n\nSource: {facts.source}", "\n".join(lines), needs=_needs(folder),
        limits=facts.limits, call=", ".join(f"{column}={value!r}" for column, value in facts.example.items()),
        answer=str({column: round(value, 4) for column, value in facts.answer.items()}),
        own_card=metric_space.metric_card(kind),
    )  # fmt: skip


def metric_card(metric: MetricFacts, author: AuthorFacts | None = None) -> str:
    """A card, whole; its metadata is that of a Space, which is where `evaluate` looks for metrics."""
    author = author or AuthorFacts()
    first = one_line(metric.description.strip().split("\n\n")[0], 200)
    metadata = {
        "title": one_line(metric.name),
        "sdk": "gradio",
        "app_file": "app.py",
        "pinned": False,
        "tags": ["evaluate", "metric", *map(one_line, author.tags)],
        "description": first or "A metric.",
        **({"license": one_line(author.licence)} if author.licence else {}),
    }
    context = {
        "metadata": yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000).strip(),
        "metric": metric,
        "name": author.repo_id or metric.name,
        "author": author,
        "citation": author.citation.strip() or metric.citation.strip(),
    }
    return marked(render("metric.md.jinja", context))


def _files(folder: Path) -> dict[str, ast.Module]:
    found = {}
    for path in sorted(folder.glob("*.py")) if folder.is_dir() else []:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        own = any(ast.unparse(base).rpartition(".")[2] in BASES for node in classes for base in node.bases)
        if own or (_own_class(tree) is not None and path.stem != "app"):
            found[path.stem] = tree
    return found


def _constants(tree: ast.Module) -> dict[str, str]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := _text(node.value, {})):
            found[node.targets[0].id] = text
    return found


def _info(tree: ast.Module, constants: Mapping[str, str]) -> dict[str, str]:
    """What `evaluate.MetricInfo(...)` is given as texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "MetricInfo":
            given = {one.arg: _text(one.value, constants) for one in node.keywords}
            return {
                "description": given.get("description", ""),
                "inputs": given.get("inputs_description", ""),
                "citation": given.get("citation", ""),
            }
    return {}


def _text(node: ast.expr, constants: Mapping[str, str]) -> str:
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    try:
        value = ast.literal_eval(node)
    except (ValueError, SyntaxError):
        return ""
    return value if isinstance(value, str) else ""
