"""A Hub on 127.0.0.1: the part of the Hub's HTTP interface that the real clients use, so that tests push and load.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "script.py"], env=hub.environment(tmp_path))

`huggingface_hub` and `transformers` read HF_ENDPOINT when they are imported, so the client has to be another process.
Every file is stored as a regular one, unless `lfs_from` says from which size on a file goes by LFS; no Xet transfer is
negotiated. `before` sees each request before it is answered and may hold it up. Errors carry the Hub's X-Error-Code.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_loopback"
DATE = "2024-01-01T00:00:00.000Z"  # fixed, so that the same uploads give the same answers
Files = dict[str, bytes]


def blob_id(content: bytes) -> str:
    """The id that git gives this content; the Hub uses it as ETag of a regular file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_id(content: bytes) -> str:
    """The id that git gives the pointer to a large file of this content."""
    oid = hashlib.sha256(content).hexdigest()
    return blob_id(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode())


class HubError(Exception):
    """An answer that is not 200: the status, the Hub's error code, a sentence, and what else the body says."""

    def __init__(self, status: int, code: str, message: str, **body: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message, **body}


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot."""

    id: str
    title: str
    message: str
    parent: str | None
    files: Files


@dataclass
class Repo:
    """Commits, and the branches and tags that name them.

    requests: of pull requests, `refs/pr/N` -> commit. large: SHA-256 of the files that came by LFS.
    """

    kind: str
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def is_large(self, content: bytes) -> bool:
        return bool(self.large) and hashlib.sha256(content).hexdigest() in self.large

    def commit(self, branch: str, files: Files, title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        tree = "".join(f"{path}:{blob_id(content)}\n" for path, content in sorted(files.items()))
        # The count makes two equal commits different, as the time does in git.
        seed = f"{self.kind}/{self.id}\n{len(self.commits)}\n{parent}\n{title}\n{tree}"
        new = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, message, parent, dict(files))
        self.commits[new.id] = new
        self.branches[branch] = new.id
        return new

    def resolve(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        commit_id = self.branches.get(name) or self.tags.get(name) or self.requests.get(name) or name
        if commit_id not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit_id]

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def describe(self, revision: str) -> dict[str, Any]:
        commit = self.resolve(revision)
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": blob_id(content)}
            for path, content in sorted(commit.files.items())
        ]
        return {
            "_id": commit.id[:24], "id": self.id, "modelId": self.id, "author": self.id.split("/")[0],
            "sha": commit.id, "private": self.private, "gated": False, "disabled": False, "tags": [], "downloads": 0,
            "likes": 0, "createdAt": DATE, "lastModified": DATE, "siblings": siblings,
        }  # fmt: skip


def tree_entries(repo: Repo, files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and directories below `folder`, as `/tree` lists them."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
        if repo.is_large(content):
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries[path] |= {"oid": pointer_id(content), "lfs": lfs}
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    return [entry for name, entry in entries.items() if recursive or "/" not in name.removeprefix(prefix)]


def apply_operations(files: Files, operations: list[dict[str, Any]], objects: Files) -> Files:
    """The files after the operations of one commit; `objects` are the large files that were sent, by SHA-256."""
    files = dict(files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        if key == "file":
            content = value["content"]
            files[value["path"]] = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
        elif key == "lfsFile":
            if value["oid"] not in objects:
                raise HubError(400, "BadRequest", f"{value['path']}: its LFS object was not sent")
            files[value["path"]] = objects[value["oid"]]
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(400, "BadRequest", f"cannot delete {value['path']}: it does not exist")
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            files = {path: content for path, content in files.items() if not path.startswith(folder)}
        else:
            raise HubError(
                400, "BadRequest", f"this server takes file, lfsFile, deletedFile, deletedFolder; received {key!r}"
            )
    return files


class LoopbackHub:
    """The server; `repos[kind, id]` holds what was pushed, `requests` what was asked, for tests to look at.

    lfs_from: bytes from which a file goes by LFS; never by default. `objects`: those that were sent, by SHA-256.
    before: called with method and path of each request, in the thread that will answer it.
    """

    def __init__(self, lfs_from: int | None = None) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.lfs_from = lfs_from
        self.objects: Files = {}
        self.before: Callable[[str, str], object] = lambda method, path: None
        self.lock = threading.Lock()
        hub = self

        class BoundHandler(_Handler):
            pass

        BoundHandler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def environment(self, home: Path | str) -> dict[str, str]:
        """The variables of a client process that sees only this Hub and keeps its cache in `home`."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        proxies = {name: "" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
        proxies |= {name.lower(): "" for name in proxies}
        return inherited | proxies | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "RepoNotFound", f"Repository not found: {kind} {repo_id}")
        return self.repos[kind, repo_id]

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        kind = f"{body.get('type') or 'model'}s"
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.url}/{prefix}{repo_id}"
        if (kind, repo_id) in self.repos:  # with `exist_ok` the client reads the address from the refusal
            raise HubError(409, "Conflict", f"You already created this repo: {repo_id}", url=url)
        repo = self.repos[kind, repo_id] = Repo(
            kind, repo_id, bool(body.get("private")) or body.get("visibility") == "private"
        )
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        return {"url": url, "name": repo_id, "id": repo_id}


KINDS = "models|datasets|spaces"
API_REPO = re.compile(rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+?)(?:/(?P<rest>.+))?")
LFS_BATCH = re.compile(rf"/(?:(?P<kind>{KINDS})/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")
RESOLVE = re.compile(rf"/(?:(?P<kind>{KINDS})/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests read `LoopbackHub.requests`."""

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked_body() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        body = body or self.rfile.read(length)
        self.hub.requests.append(f"{method} {self.path}")
        self.hub.before(method, self.path)
        try:
            with self.hub.lock:
                status, headers, content = self._route(method, body)
        except HubError as error:
            status, content = error.status, json.dumps(error.body).encode()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        try:
            self.end_headers()
            if method != "HEAD":
                self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _chunked_body(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, method: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        if method in ("GET", "HEAD") and (match := RESOLVE.fullmatch(parts.path)):
            return self._file(match)
        if match := LFS_BATCH.fullmatch(parts.path):
            return 200, {"Content-Type": "application/json"}, json.dumps(self._lfs_batch(match, body)).encode()
        if match := LFS_OBJECT.fullmatch(parts.path):
            if method == "PUT":
                if hashlib.sha256(body).hexdigest() != match["oid"]:
                    raise HubError(400, "BadRequest", "the object was cut short")
                self.hub.objects[match["oid"]] = body
            return 200, {}, b""
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        answer = self._api(method, parts.path, query, body)
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _lfs_batch(self, match: re.Match[str], body: bytes) -> dict[str, Any]:
        self.hub.repo(match["kind"] or "models", unquote(match["id"]))
        answers = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.url}/lfs/{wanted['oid']}"
            upload = {} if wanted["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}}}
            answers.append({"oid": wanted["oid"], "size": wanted["size"], **upload})
        return {"transfer": "basic", "objects": answers}

    def _file(self, match: re.Match[str]) -> tuple[int, dict[str, str], bytes]:
        repo = self.hub.repo(match["kind"] or "models", unquote(match["id"]))
        commit = repo.resolve(unquote(match["revision"]))
        path = unquote(match["path"])
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", f"Entry not found: {path}")
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if repo.is_large(content) else blob_id(content)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        # The client resumes with "bytes=N-"; safetensors headers are read with "bytes=0-N".
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1)
            if start >= len(content):
                raise HubError(416, "RangeNotSatisfiable", f"the file has {len(content)} bytes")
            part = content[start : stop + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            return 206, headers, part
        return 200, headers, content

    def _api(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        if path in ("", "/"):
            return {}  # the Hub's front page: asked whether anyone is there
        if path == "/api/whoami-v2":
            return {"type": "user", "id": USER, "name": USER, "fullname": USER, "email": "", "orgs": [], "auth": {}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.hub.create(json.loads(body))
        if path == "/api/repos/delete":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
            self.hub.repo(f"{asked.get('type') or 'model'}s", repo_id)
            del self.hub.repos[f"{asked.get('type') or 'model'}s", repo_id]
            return {}
        match = API_REPO.fullmatch(path)
        if match is None:
            raise HubError(501, "NotImplemented", f"this server does not know {method} {path}")
        repo = self.hub.repo(match["kind"], unquote(match["id"]))
        verb, _, rest = (match["rest"] or "").partition("/")
        name, _, folder = rest.partition("/")
        answer = getattr(self, f"_{method.lower()}_{verb.replace('-', '_') or 'info'}", None)
        if answer is None:
            raise HubError(501, "NotImplemented", f"this server does not know {method} {path}")
        return answer(repo, unquote(name) or "main", unquote(folder), query, body)

    # One method per verb: (repo, revision or name, folder, query, body) -> what JSON says.

    def _get_info(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        return repo.describe(name)

    _get_revision = _get_info

    def _get_tree(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        return tree_entries(
            repo, repo.resolve(name).files, folder, query.get("recursive", "").lower() in ("true", "1")
        )

    def _get_refs(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        def refs(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

        heads, tags = refs(repo.branches, "heads"), refs(repo.tags, "tags")
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": []}

    def _get_commits(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        return [
            {"id": c.id, "title": c.title, "message": c.message, "date": DATE, "authors": [{"user": USER}]}
            for c in repo.history(name)
        ]

    def _post_paths_info(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        try:
            paths = json.loads(body)["paths"]
        except ValueError:  # the client sends a form
            paths = parse_qs(body.decode()).get("paths", [])
        everything = tree_entries(repo, repo.resolve(name).files, "", recursive=True)
        return [entry for entry in everything if entry["path"] in paths]

    def _post_preupload(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        held = repo.resolve(name).files
        files = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            large = self.hub.lfs_from is not None and entry["size"] >= self.hub.lfs_from
            oid = None
            if path in held:
                oid = hashlib.sha256(held[path]).hexdigest() if large else blob_id(held[path])
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _post_commit(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        operations = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = operations.pop(0)["value"]
        held = repo.resolve(name)
        if name not in repo.branches and not query.get("create_pr"):
            raise HubError(400, "BadRequest", f"commits go to a branch; received: revision={name!r}")
        if header.get("parentCommit") not in (None, held.id):
            raise HubError(412, "PreconditionFailed", f"{name} is at {held.id}, not at {header['parentCommit']}")
        files = apply_operations(held.files, operations, self.hub.objects)
        repo.large.update(one["value"]["oid"] for one in operations if one["key"] == "lfsFile")
        prefix = "" if repo.kind == "models" else f"{repo.kind}/"
        address = f"{self.hub.url}/{prefix}{repo.id}"
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if query.get("create_pr"):
            number = len(repo.requests) + 1
            repo.branches["refs/pr/new"] = held.id
            commit = repo.commit("refs/pr/new", files, header["summary"], header.get("description", ""))
            repo.requests[f"refs/pr/{number}"] = repo.branches.pop("refs/pr/new")
            answer["pullRequestUrl"] = f"{address}/discussions/{number}"
        else:
            commit = repo.commit(name, files, header["summary"], header.get("description", ""))
        return {**answer, "commitOid": commit.id, "commitUrl": f"{address}/commit/{commit.id}"}

    def _get_discussions(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        found = [
            {
                "title": repo.commits[commit].title, "num": int(ref.rpartition("/")[2]), "author": {"name": USER},
                "createdAt": DATE, "status": "open", "isPullRequest": True,
                "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
            }
            for ref, commit in repo.requests.items()
        ]  # fmt: skip
        return {"count": len(found), "start": 0, "discussions": found}

    def _post_tag(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise HubError(409, "Conflict", f"Tag already exists: {tag}")
        repo.tags[tag] = repo.resolve(name).id
        return {}

    def _delete_tag(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        if repo.tags.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return {}

    def _post_branch(self, repo: Repo, name: str, folder: str, query: dict[str, str], body: bytes) -> Any:
        if name in repo.branches:
            raise HubError(409, "Conflict", f"Branch already exists: {name}")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repo.branches[name] = repo.resolve(start).id
        return {}
