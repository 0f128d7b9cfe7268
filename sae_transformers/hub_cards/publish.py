"""A folder to the Hub in one commit: prepared and checked, compared with what is there, sent where it differs.

One commit is what makes a push whole: large files are sent first and belong to nothing until the commit names them, so
a push that was killed leaves the repository as it was, or complete. The same call again sends what is not there yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .card_file import is_ours, renamed
from .dataset_card import is_dataset
from .facts import REPO_ID, read_json
from .file_contents import VOCABULARIES
from .publish_checks import Problem, card_problems, files_of, model_problems, problems

KINDS = ("model", "dataset", "space")
# Files that a push replaces as a whole: those of an earlier push that are not in this one go in the same commit.
REPLACED = {
    "model": ("*.safetensors", "model.safetensors.index.json", "*.py"),
    "dataset": ("shard-*.safetensors",),
    "space": (),
}
DASHBOARD = "dashboard"
# The HTTP library under the client is another one in other releases; its errors are no OSErrors.
NETWORK_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)
)


class CannotPublish(ValueError):
    """Reasons against publishing a folder; nothing was sent."""

    def __init__(self, folder: Path, reasons: Sequence[Problem], most: int = 12) -> None:
        self.reasons = list(reasons)
        by_remedy: dict[str, list[str]] = {}
        for reason in reasons[:most]:
            by_remedy.setdefault(reason.how, []).append(reason.what)
        shown = " ".join(f"{'; '.join(whats)}. {how}" for how, whats in by_remedy.items())
        more = f" And {len(reasons) - most} more reasons." if len(reasons) > most else ""
        super().__init__(f"{folder} cannot be published; nothing was sent. {shown}{more}")


@dataclass(frozen=True)
class Publication:
    """Files as they will stand in a repository. files: path there -> a file here. changed: those that differ from the
    folder's own, with why. base_folder: where the base is here, if the folder's config names one."""

    kind: str
    repo_id: str
    folder: Path
    files: Mapping[str, Path]
    changed: Mapping[str, str]
    base_folder: str = ""

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Difference:
    """What a push would do. head: the commit that is there; empty if there is no repository."""

    send: Sequence[str]
    delete: Sequence[str]
    head: str = ""


@dataclass(frozen=True)
class Pushed:
    """commit: its id, or that of the commit which held all of it already. new: whether a commit was made."""

    commit: str
    url: str
    new: bool
    sent: Sequence[str] = ()
    deleted: Sequence[str] = ()


def kind_of(folder: Path) -> str:
    """`model`, `dataset` or `space`, by what a folder holds."""
    if (folder / "config.json").is_file():
        return "model"
    if is_dataset(folder):
        return "dataset"
    readme = folder / "README.md"
    if (folder / "app.py").is_file() and readme.is_file() and "sdk:" in readme.read_text(encoding="utf-8"):
        return "space"
    return "model"


@contextlib.contextmanager
def prepared(
    folder: str | Path,
    repo_id: str,
    kind: str | None = None,
    *,
    base: str | None = None,
    dashboard: str | Path | None = None,
    exclude: Sequence[str] = (),
    allow_paths: bool = False,
    first_cards: Sequence[str] = (),
) -> Iterator[Publication]:
    """The files to publish, checked; they are there while the context is.

    Args:
        folder: a model's, an SAE's, a data set's or a Space's.
        repo_id: `user/name`. A card of ours calls the repository so.
        kind: one of `KINDS`; by default what the folder holds.
        base: the Hub id that stands for the base in what is sent, in place of a folder.
        dashboard: a folder or a file that goes to `dashboard/`.
        exclude: patterns of files and folders to leave out.
        allow_paths: publish files with absolute paths in them.
        first_cards: see `card_file.is_ours`.

    Raises:
        CannotPublish: with every reason.
        FileNotFoundError: no such folder.
        ValueError: a repository's id or kind that cannot be.
    """
    folder = Path(folder)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise ValueError(f"A repository is named user/name. Received: repo_id={repo_id!r}.")
    if base is not None and (not REPO_ID.fullmatch(base) or Path(base).is_dir()):
        raise ValueError(f"`base` must be a model's id on the Hub. Received: base={base!r}.")
    kind = kind or kind_of(folder)
    if kind not in KINDS:
        raise ValueError(f"A repository is one of {', '.join(KINDS)}. Received: kind={kind!r}.")
    left_out = (*exclude, "work") if (folder / "spans.json").is_file() else tuple(exclude)
    files = files_of(folder, left_out)
    if dashboard is not None:
        files |= _dashboard_files(Path(dashboard), tuple(exclude))
    with tempfile.TemporaryDirectory() as staging:
        changed, base_folder = _restage(files, Path(staging), repo_id, base, first_cards)
        reasons = problems(files, allow_paths=allow_paths) + card_problems(files, kind)
        if kind == "model":
            reasons += model_problems(files, folder)
        if reasons:
            raise CannotPublish(folder, reasons)
        yield Publication(kind, repo_id, folder, files, changed, base_folder)


def has_first_card(publication: Publication, template: str) -> bool:
    """Whether the card is still the one that `save_pretrained` wrote from this template."""
    text = publication.files["README.md"].read_text(encoding="utf-8", errors="replace")
    return not is_ours(text) and is_ours(text, [template])


def _dashboard_files(path: Path, exclude: tuple[str, ...]) -> dict[str, Path]:
    if path.is_file():
        return {f"{DASHBOARD}/{path.name}": path}
    return {f"{DASHBOARD}/{name}": file for name, file in files_of(path, exclude).items()}


def _restage(
    files: dict[str, Path], staging: Path, repo_id: str, base: str | None, first_cards: Sequence[str]
) -> tuple[dict[str, str], str]:
    """Put files that differ from the folder's own into `staging`, and into `files` in place of those."""
    changed: dict[str, str] = {}
    base_folder = ""
    for name, field in (("config.json", "base_model_name_or_path"), ("index.json", "model")):
        if base is not None and not base_folder and name in files:
            with contextlib.suppress(ValueError, AttributeError):
                base_folder = str(read_json(files[name]).get(field) or "")

    def put(name: str, text: str, why: str) -> None:
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        files[name] = path
        changed[name] = why

    if base_folder and base_folder != base:
        old, new = json.dumps(base_folder), json.dumps(base)
        for name, path in list(files.items()):
            if path.suffix == ".json" and not any(fnmatch(path.name, one) for one in VOCABULARIES):
                text = path.read_text(encoding="utf-8", errors="surrogateescape")
                if old in text:
                    put(name, text.replace(old, new), f"the base is called {base}")
    if "README.md" in files:
        text = files["README.md"].read_text(encoding="utf-8", errors="replace")
        if is_ours(text, first_cards) and (named := renamed(text, repo_id)) != text:
            put("README.md", named, f"the repository is called {repo_id}")
    return changed, base_folder if base_folder != base else ""


# -- the Hub ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """Errors of the client and of the network, as OSErrors in a sentence."""
    try:
        yield
    except NETWORK_ERRORS as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status in (401, 403):
            reason = f"The Hub refuses access to {repo_id} ({status}): is the token one that may write there?"
        elif status == 412:
            reason = f"{repo_id} was changed by somebody else meanwhile. Look at it, and push again."
        else:
            what = "The Hub did not answer" if status is None else f"The Hub refused ({status})"
            reason = f"{what} for {repo_id}: {_first_line(error)}. The same command goes on from there."
        raise OSError(reason) from error
    except RuntimeError as error:  # of a large file
        raise OSError(f"{_first_line(error)} The same command goes on from there.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def difference(api: HfApi, publication: Publication, revision: str = "main") -> Difference:
    """What of the files is not in the repository yet, and what there is of an earlier push that is in it no more."""
    kind, files = publication.kind, publication.files
    try:
        head = str(api.repo_info(publication.repo_id, repo_type=kind, revision=revision).sha)
    except RepositoryNotFoundError:
        return Difference(list(files), [])
    except RevisionNotFoundError:
        try:
            head = str(api.repo_info(publication.repo_id, repo_type=kind).sha)
        except RevisionNotFoundError:
            return Difference(list(files), [])
    there = _ids(api, publication, head)
    send = [name for name, path in files.items() if there.get(name) not in _own_ids(path, name in there)]
    delete = [name for name in there if name not in files and _is_replaced(name, publication)]
    return Difference(send, sorted(delete), head)


def _ids(api: HfApi, publication: Publication, revision: str) -> dict[str, str]:
    """Path -> SHA-256 of a large file, git's id of another."""
    tree = api.list_repo_tree(publication.repo_id, recursive=True, revision=revision, repo_type=publication.kind)
    found: dict[str, str] = {}
    for entry in tree:
        if (blob := getattr(entry, "blob_id", None)) is not None:
            lfs = getattr(entry, "lfs", None)
            found[entry.path] = lfs.sha256 if lfs else blob
    return found


def _own_ids(path: Path, wanted: bool) -> tuple[str, ...]:
    """Both ids that a file may have on the Hub."""
    if not wanted:
        return ()
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            plain.update(block)
            git.update(block)
    return plain.hexdigest(), git.hexdigest()


def _is_replaced(name: str, publication: Publication) -> bool:
    if name.startswith(f"{DASHBOARD}/"):
        return any(one.startswith(f"{DASHBOARD}/") for one in publication.files)
    return "/" not in name and any(fnmatch(name, pattern) for pattern in REPLACED[publication.kind])


def push(
    publication: Publication,
    *,
    api: HfApi | None = None,
    private: bool | None = None,
    revision: str = "main",
    create_pr: bool = False,
    message: str | None = None,
    force: bool = False,
) -> Pushed:
    """Send what differs in one commit; make the repository or the branch where there is none.

    Args:
        publication: what `prepared` gives.
        api: of the Hub.
        private: of a new repository.
        revision: branch.
        create_pr: open a pull request, unless there is an open one that holds all of it.
        message: of the commit.
        force: replace a model of another kind.

    Raises:
        ValueError: there is no token; `private` for a repository that exists and is public; or the repository holds a
            model of another kind.
        OSError: the Hub or the network refuses. Then nothing of it is in the repository.
    """
    api = api or HfApi()
    if get_token() is None and api.token in (None, True):
        raise ValueError("There is no token for the Hub. Run `hf auth login`, or set HF_TOKEN.")
    repo_id, kind = publication.repo_id, publication.kind
    with plain_errors(repo_id):
        _open_repository(api, publication, private)
        if revision != "main" and not create_pr:
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        found = difference(api, publication, revision)
        if not found.send and not found.delete:
            return Pushed(found.head, _url(api, publication, found.head), False)
        if publication.kind == "model" and not force:
            _check_same_kind(api, publication, found)
        if create_pr and (there := _open_request(api, publication)):
            return there
        operations: list[Any] = [CommitOperationAdd(name, publication.files[name]) for name in found.send]
        operations += [CommitOperationDelete(name) for name in found.delete]
        made = api.create_commit(
            repo_id,
            operations,
            repo_type=kind,
            revision=revision,
            create_pr=create_pr,
            parent_commit=found.head or None,
            commit_message=message or f"Publish {publication.folder.resolve().name}",
        )
    url = getattr(made, "pr_url", None) or _url(api, publication, made.oid)
    return Pushed(made.oid, url, True, found.send, found.delete)


def _open_repository(api: HfApi, publication: Publication, private: bool | None) -> None:
    repo_id, kind = publication.repo_id, publication.kind
    try:
        info: Any = api.repo_info(repo_id, repo_type=kind)
    except RevisionNotFoundError:
        return  # without a commit
    except RepositoryNotFoundError:
        sdk = None
        if kind == "space":
            card = SpaceCard(publication.files["README.md"].read_text(encoding="utf-8"))
            sdk = card.data.to_dict().get("sdk") or "gradio"
        api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk)
        return
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so `private` does not hold. Make it private in its settings on the Hub, "
            f"or give another name."
        )


def _check_same_kind(api: HfApi, publication: Publication, found: Difference) -> None:
    """Refuse to put a model with SAEs, or an SAE, in the place of something else: a slip of a name."""
    if not found.head or "config.json" not in found.send:
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            place = api.hf_hub_download(
                publication.repo_id, "config.json", revision=found.head, local_dir=scratch, repo_type="model"
            )
        except EntryNotFoundError:
            return
        config = json.loads(Path(place).read_text(encoding="utf-8"))
    if "saes" not in config and "d_sae" not in config:
        raise ValueError(
            f"{publication.repo_id} holds another model (model_type={config.get('model_type')!r}), which this one "
            f"would replace. Give another name, or `force`."
        )


def _open_request(api: HfApi, publication: Publication) -> Pushed | None:
    """An open pull request that holds all of it already: that of an earlier run of the same command."""
    requests = api.get_repo_discussions(
        publication.repo_id, repo_type=publication.kind, discussion_type="pull_request", discussion_status="open"
    )
    for request in requests:
        found = difference(api, publication, f"refs/pr/{request.num}")
        if not found.send and not found.delete:
            return Pushed(found.head, request.url, False)
    return None


def _url(api: HfApi, publication: Publication, commit: str) -> str:
    prefix = "" if publication.kind == "model" else f"{publication.kind}s/"
    return f"{api.endpoint}/{prefix}{publication.repo_id}/tree/{commit}"
