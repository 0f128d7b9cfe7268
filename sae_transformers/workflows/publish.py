"""Cards of what was made, from measured values; and folders to the Hub, checked before and loaded back after."""

from __future__ import annotations

import ast
import contextlib
import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..create_training_data.annotation.tables import read_feature_annotations
from ..evaluation.results import Results, read_results
from ..hub_cards.card_file import write_card
from ..hub_cards.dataset_card import dataset_card, is_dataset, read_dataset
from ..hub_cards.facts import AuthorFacts, author_facts, read_author_facts, read_model
from ..hub_cards.metric_card import is_metric, metric_card, read_metric
from ..hub_cards.model_card import model_card
from ..hub_cards.publish import Difference, Publication, Pushed, difference, has_first_card, plain_errors, prepared
from ..hub_cards.publish import push as push_files
from ..hub_cards.verification import NotAsPushed as NotAsPushed
from ..hub_cards.verification import Verified, verify
from ..latents.output_files import locked_folder
from .settings.publish import CardSettings, PushSettings


@dataclass(frozen=True)
class CardResult:
    """A card.

    Args:
        path: of the README.md that was written.
        text: what it says.
        unknown: what it says is not known; `facts` fills it in, and `results` does for a model.
    """

    path: Path
    text: str
    unknown: list[str]

    def summary(self) -> list[str]:
        """The file, and what is not known."""
        lines = [str(self.path)]
        if self.unknown:
            fill = "facts and results of evaluate fill" if "results" in self.unknown else "facts fill"
            lines.append(f"Said to be unknown: {', '.join(self.unknown)}; {fill} them in.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.path), "unknown": self.unknown, "text": self.text}

    def save(self, folder: str | Path) -> Path:
        """Write the same card into another folder that has none, or one of ours."""
        return write_card(self.text, folder, first_cards=[first_card()])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


def card(
    folder: str | Path,
    settings: CardSettings | None = None,
    *,
    results: Results | str | Path | None = None,
    facts: AuthorFacts | Mapping[str, Any] | str | Path | None = None,
    annotations: str | Path | None = None,
    repo_id: str | None = None,
    base: str | None = None,
) -> CardResult:
    """Write README.md from what is known of a model, an SAE, a data set or a metric; the rest is said to be unknown.

    Args:
        folder: what this library wrote.
        results: of `evaluate`, or its results.json.
        facts: licence, training_data, languages, intended_use, authors, ...; or a YAML or JSON file of them.
        annotations: table of `explain` or `judge`: what the features of one SAE mean.
        repo_id: user/name on the Hub; by default `push` fills it in.
        base: the base's id on the Hub, where the config names a folder.

    Raises:
        ValueError: the README.md was edited by hand, a fact is of no known name, or results are of another model.
        OSError: a file is not there.
    """
    settings = settings or CardSettings()
    given = {"repo_id": repo_id, "base": base}
    author = replace(_author(facts), **{name: value for name, value in given.items() if value is not None})
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder. Received: {str(folder)!r}, which is none.")
    kind = settings.kind or _kind_of(folder)
    if kind != "model":
        for name, value in {"results": results, "annotations": annotations}.items():
            if value is not None:
                raise ValueError(f"`{name}` is for a model's card. Received: kind={kind!r}.")
    unknown = [name for name in ("licence", "training_data") if not getattr(author, name)]
    replaced = [first_card()]
    if kind == "dataset":
        text = dataset_card(read_dataset(folder), author)
    elif kind == "metric":
        metric = read_metric(folder)
        text, unknown = metric_card(metric, author), [name for name in unknown if name == "licence"]
        replaced.append(metric.own_card)
    else:
        model = read_model(folder)
        measured = read_results(results) if isinstance(results, (str, Path)) else results
        text = model_card(
            model, author, measured,
            annotations=None if annotations is None else read_feature_annotations(annotations),
            annotated_sae=settings.annotated_sae, max_features=settings.features, max_examples=settings.examples,
        )  # fmt: skip
        if any(sae.metadata.get("training_data") for sae in model.saes):
            unknown = [name for name in unknown if name != "training_data"]
        unknown += ["results"] if measured is None else []
    with locked_folder(folder):
        return CardResult(write_card(text, folder, first_cards=replaced, force=settings.force), text, unknown)


@dataclass(frozen=True)
class PushedFolder:
    """A folder on the Hub, or on its way there.

    Args:
        kind: model, dataset or space. repo_id: its repository.
        files: how many, of `size` bytes.
        changed: file -> why it is sent otherwise than it is in the folder.
        short_card: whether the card is still the short one of `save_pretrained`.
        difference: what would be sent, of a dry run.
        pushed: the commit; None of a dry run.
        verified: what was compared of the revision on the Hub; None where that was not asked for.
    """

    kind: str
    repo_id: str
    files: int
    size: int
    changed: Mapping[str, str]
    short_card: bool
    difference: Difference | None = None
    pushed: Pushed | None = None
    verified: Verified | None = None

    def before(self) -> list[str]:
        """Lines on what is sent otherwise than it is in the folder."""
        lines = [f"{name}, as it is sent: {why}" for name, why in self.changed.items()]
        if self.short_card:
            lines.append("README.md is the short one of `save_pretrained`; `sae-transformers card` writes a full one.")
        return lines

    def summary(self) -> list[str]:
        """Lines on what was sent, and what was read back."""
        what = f"{self.kind} {self.repo_id}: {self.files:,} files, {self.size / 1e6:,.1f} MB"
        if self.difference is not None:
            send, delete = self.difference.send, self.difference.delete
            head = f"{what}; nothing was sent. Would send {len(send):,}, delete {len(delete):,}:"
            return [head, *(f"  + {name}" for name in send), *(f"  - {name}" for name in delete)]
        if self.pushed is None:
            return [what]
        sent, deleted = len(self.pushed.sent), len(self.pushed.deleted)
        done = "all of it is there already, no commit was made"
        if self.pushed.new:
            done = f"{sent:,} sent, {deleted:,} deleted in one commit"
        lines = [f"{what}; {done}.", self.pushed.url]
        if self.verified is not None:
            loaded = ""
            if self.verified.loaded:
                name = self.verified.loaded.rpartition(".")[2]
                loaded = (
                    f"; loaded by its own code as {name}, {self.verified.tensors} tensors and the outputs are equal"
                )
            lines.append(f"Read back at {self.pushed.commit[:12]}: {self.verified.files:,} files are equal{loaded}.")
        return lines


@dataclass(frozen=True)
class PushResult:
    """What was pushed.

    Args:
        folders: the folder; and the Space, if there was one.
    """

    folders: list[PushedFolder]

    def summary(self) -> list[str]:
        """What was sent, and what was read back."""
        return [line for folder in self.folders for line in folder.summary()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: of each folder its repository, commit and address."""
        return {
            "folders": [
                {
                    "kind": one.kind, "repo_id": one.repo_id, "files": one.files, "size": one.size,
                    "commit": one.pushed and one.pushed.commit, "url": one.pushed and one.pushed.url,
                    "sent": list(one.pushed.sent) if one.pushed else [],
                    "verified": one.verified is not None,
                }
                for one in self.folders
            ]
        }  # fmt: skip


def push(
    folder: str | Path,
    repo_id: str,
    settings: PushSettings | None = None,
    *,
    dashboard: str | Path | None = None,
    space: str | Path | None = None,
    api: HfApi | None = None,
    notice: Callable[[str], object] | None = None,
) -> PushResult:
    """Publish model, code, card and dashboard in one commit, after checks; then load them back.

    The same call again sends what is not there yet. Everything is checked before anything is sent.

    Args:
        folder: of a model, an SAE, a data set or a Space.
        repo_id: user/name on the Hub.
        dashboard: folder or file that goes to dashboard/.
        space: folder of a Space of the same name, pushed after it.
        api: of the Hub.
        notice: called with each line of `PushedFolder.before` and `PushedFolder.summary`, as they are known.

    Raises:
        CannotPublish: with every reason; nothing was sent.
        ValueError: there is no token, a name cannot be, or the repository holds a model of another kind.
        OSError: the Hub or the network refuses.
        NotAsPushed: the revision on the Hub is not what the folder holds, or does not load.
    """
    settings = settings or PushSettings()
    say = notice or (lambda line: None)
    first = first_card()
    done = []
    with contextlib.ExitStack() as stack:
        publications = []
        for path, kind, extra in ((folder, settings.kind, dashboard), (space, "space", None)):
            if path is not None:
                named = settings.base if path is folder else None
                publications.append(
                    stack.enter_context(
                        prepared(
                            path, repo_id, kind, base=named, dashboard=extra, exclude=settings.exclude or (),
                            allow_paths=settings.allow_paths, first_cards=[first],
                        )
                    )
                )  # fmt: skip
        known = [_known(publication, first) for publication in publications]
        for line in (line for one in known for line in one.before()):
            say(line)
        api = api or HfApi()
        for publication, facts in zip(publications, known, strict=True):
            if settings.dry_run:
                with plain_errors(repo_id):
                    one = replace(facts, difference=difference(api, publication, settings.revision))
            else:
                # `private=False` would ask for a public repository where an organisation's are private by default.
                pushed = push_files(
                    publication, api=api, private=True if settings.private else None, revision=settings.revision,
                    create_pr=settings.create_pr, message=settings.message, force=settings.force,
                )  # fmt: skip
                one = replace(facts, pushed=pushed)
            told = one.summary()
            for line in told:
                say(line)
            if settings.verify and one.pushed is not None:
                base = None if settings.local_base is None else str(Path(settings.local_base).resolve())
                one = replace(one, verified=verify(publication, one.pushed.commit, base=base, api=api))
                for line in one.summary()[len(told) :]:
                    say(line)
            done.append(one)
    return PushResult(done)


def first_card() -> str:
    """The template of `save_pretrained`'s card. Read, not imported: cards do not wait for torch."""
    source = Path(__file__).parents[1] / "modeling" / "repository_files.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CARD":
            return ast.literal_eval(node.value)
    raise ImportError(f"Expected a template CARD in {source}. Received: none; install the library again.")


def _author(facts: AuthorFacts | Mapping[str, Any] | str | Path | None) -> AuthorFacts:
    if isinstance(facts, AuthorFacts):
        return facts
    return author_facts(facts) if isinstance(facts, Mapping) else read_author_facts(facts)


def _kind_of(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "model"
    return "dataset" if is_dataset(folder) else "metric" if is_metric(folder) else "model"


def _known(publication: Publication, first: str) -> PushedFolder:
    return PushedFolder(
        publication.kind, publication.repo_id, len(publication.files), publication.size, publication.changed,
        has_first_card(publication, first),
    )  # fmt: skip
