"""What a file holds that must not be published: secrets, pickles, absolute paths. By name and by its bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from . import pickles
from .markdown import PATH
from .opened_files import Piece, opened, safetensors_header

# Kind of secret -> what each one has in it, looked for first (a tenth of the time in large files), and its form, which
# is long enough that words and vocabularies do not have it by accident.
SECRETS: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "a Hugging Face token": ((b"hf_", b"api_org_"), rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "an OpenAI or Anthropic key": ((b"sk-",), rb"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"),
    "a Groq key": ((b"gsk_",), rb"(?<![A-Za-z0-9_])gsk_[A-Za-z0-9]{40,}"),
    "an xAI key": ((b"xai-",), rb"(?<![A-Za-z0-9_-])xai-[A-Za-z0-9]{40,}"),
    "a Perplexity key": ((b"pplx-",), rb"(?<![A-Za-z0-9_-])pplx-[A-Za-z0-9]{40,}"),
    "an NVIDIA key": ((b"nvapi-",), rb"(?<![A-Za-z0-9_-])nvapi-[A-Za-z0-9_-]{50,}"),
    "a Replicate token": ((b"r8_",), rb"(?<![A-Za-z0-9_])r8_[A-Za-z0-9]{30,}"),
    "a LangSmith key": ((b"lsv2_",), rb"(?<![A-Za-z0-9_])lsv2_(?:pt|sk)_[0-9a-f]{32}"),
    "a Pinecone key": ((b"pcsk_",), rb"(?<![A-Za-z0-9_])pcsk_[A-Za-z0-9_]{40,}"),
    "a Databricks token": ((b"dapi",), rb"(?<![A-Za-z0-9_])dapi[0-9a-f]{32}"),
    "an AWS access key": ((b"AKIA", b"ASIA"), rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    "an AWS secret key": (
        (b"key", b"KEY", b"Key"),
        rb"(?i:(?:aws|secret)[\w-]{0,20}key)[^A-Za-z0-9/+]{1,10}"
        rb"(?![0-9a-f]{40})[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])",
    ),
    "an Azure storage key": ((b"AccountKey=",), rb"AccountKey=[A-Za-z0-9/+]{86}=="),
    "an Azure key": (
        (b"key", b"KEY", b"Key"),
        rb"(?i:azure[\w-]{0,30}key)[^A-Za-z0-9]{1,10}(?:[0-9a-f]{32}|[A-Za-z0-9]{84})(?![A-Za-z0-9])",
    ),
    "an Azure client secret": ((b"Q~",), rb"(?<![\w~.-])[\w~.-]{3}[0-9]Q~[\w~.-]{31,34}(?![\w~.-])"),
    "a GitHub token": (
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    ),
    "a GitLab token": (
        (b"glpat-", b"gldt-", b"glrt-", b"glft-", b"glsoat-", b"glagent-", b"glcbt-", b"glptt-", b"glimt-"),
        rb"(?<![A-Za-z0-9_-])gl(?:pat|dt|rt|ft|soat|agent|cbt|ptt|imt)-(?=[A-Za-z_.-]*[0-9])[A-Za-z0-9_.-]{20,}",
    ),
    "an npm token": ((b"npm_",), rb"(?<![A-Za-z0-9_])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    "a PyPI token": ((b"pypi-AgE",), rb"(?<![A-Za-z0-9_-])pypi-AgE[A-Za-z0-9_-]{50,}"),
    "a Google API key": ((b"AIza",), rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    "a Google client secret": ((b"GOCSPX-",), rb"(?<![A-Za-z0-9_-])GOCSPX-[A-Za-z0-9_-]{28}(?![A-Za-z0-9_-])"),
    "a Slack token": ((b"xox",), rb"(?<![A-Za-z0-9])xox[abeposr](?:\.xox[bp])?-[A-Za-z0-9-]{20,}"),
    "a Stripe key": (
        (b"_live_", b"_test_", b"whsec_"),
        rb"(?<![A-Za-z0-9_])(?:[sr]k_(?:live|test)_[A-Za-z0-9]{20,}|whsec_[A-Za-z0-9+/]{32,})",
    ),
    "a SendGrid key": ((b"SG.",), rb"(?<![\w.-])SG\.[\w-]{22}\.[\w-]{43}(?![\w-])"),
    "a Telegram token": ((b":AA",), rb"(?<![\w:])[0-9]{8,10}:AA[\w-]{33}(?![\w-])"),
    "a Weights & Biases key": ((b"wandb", b"WANDB"), rb"(?:wandb|WANDB)(?i:[_-]?api[_-]?key\W{1,5}[0-9a-f]{40})"),
    "a JSON web token": ((b"eyJ",), rb"(?<![\w.-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"),
    "a login in an address": (
        (b"://",),
        rb"(?i:\b[a-z][a-z0-9+.-]{1,20}://)[^\s/?#:@\"'<>]{1,100}:[^\s/?#@\"'<>]{1,200}@[A-Za-z0-9\[]",
    ),
    "a private key": ((b"PRIVATE KEY",), rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
}
_SECRETS = [(kind, hints, re.compile(form)) for kind, (hints, form) in SECRETS.items()]
SECRET_NAMES = (".env", ".env.*", "*.pem", "id_rsa*", "id_ed25519*", ".netrc", "_netrc", ".git-credentials", ".pypirc",
                ".npmrc", "credentials", "credentials.json", "token", "stored_tokens")  # fmt: skip
# Files whose texts are words of a language: a path in them is a word.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model")
WITH_PATHS = ("*.json", "*.md", "*.yaml", "*.yml", "*.toml", "*.cfg", "*.ini")
# Folders that a machine has and a text does not mention by accident.
ROOTS = ("root", "home", "Users", "mnt", "tmp", "var", "data", "opt", "scratch", "work", "workspace", "private", "srv",
         "media", "gpfs", "lustre", "nfs", "content", "kaggle", "dbfs", "Volumes")  # fmt: skip
# In a text of two bytes a character, or of four.
_WIDE = re.compile(rb"\0(?:[ -~]\0){4}|\0\0\0(?:[ -~]\0\0\0){3}")
_ESCAPE = re.compile(rb"\\(?:u00([0-7][0-9A-Fa-f])|x([0-7][0-9A-Fa-f])|([nrtbf])|([!-/:-@\[-`{-~]))")
_BETWEEN = re.compile(rb"([\"'])\s*,\s*\1")  # two texts of a list
SECRET, PICKLE, CLOSED = "secret", "pickle", "closed"


class Found(NamedTuple):
    """What is wrong with a file: what it is, where in it, if that is known, and which kind of fault."""

    what: str
    where: str = ""
    fault: str = SECRET


def faults(path: Path) -> Iterator[Found]:
    """Secrets and pickles in a file and in what is packed in it, and what of it cannot be opened.

    A message never holds the secret. Each kind of secret is told once, and one pickle.
    """
    seen: set[str] = set()
    for piece in opened(path):
        for found in _of_piece(piece) if isinstance(piece, Piece) else [_closed(*piece)]:
            if (kind := found.what if found.fault == SECRET else found.fault) not in seen:
                seen.add(kind)
                yield found


def _closed(where: str, why: str) -> Found:
    return Found(f"it cannot be opened: {why}", where, CLOSED)


def _of_piece(piece: Piece) -> Iterator[Found]:
    if piece.first:
        if any(fnmatch(piece.name, name) for name in SECRET_NAMES):
            yield Found("a file that usually holds a secret", piece.where)
        if any(fnmatch(piece.name.lower(), name) for name in pickles.NAMES):
            yield Found("a pickle by its name", piece.where, PICKLE)
        if what := pickles.is_pickle(piece.block[: pickles.START]):
            yield Found(what, piece.where, PICKLE)
    if pickles.holds_pickle(piece.block):
        yield Found("a pickle after other bytes", piece.where, PICKLE)
    for text, in_lines in _readings(piece.block):
        for kind, hints, form in _SECRETS:
            if any(hint in text for hint in hints) and (match := form.search(text)):
                line = f"line {piece.line + text.count(10, 0, match.start())}" if piece.line and in_lines else ""
                yield Found(kind, ", ".join(filter(None, (piece.where, line))))


def _readings(block: bytes) -> Iterator[tuple[bytes, bool]]:
    """A block as it lies and as its texts read, each with whether its lines are the file's.

    Its texts: of one byte a character; without escapes, twice for JSON in JSON; and those of a list side by side, as
    the tokens of a text stand in dashboards.
    """
    yield block, True
    if _WIDE.search(block):
        block = block.replace(b"\0", b"")
        yield block, True
    for _ in range(2):
        if b"\\" not in block or (plain := _ESCAPE.sub(_meant, block)) == block:
            break
        block = plain
        yield block, True
    if (joined := _BETWEEN.sub(b"", block)) != block:
        yield joined, False


def _meant(found: re.Match[bytes]) -> bytes:
    """The character that an escape of JSON, Python or Markdown stands for; of white space a space."""
    code, short, space, mark = found.groups()
    if space:
        return b" "
    return mark or bytes.fromhex((code or short).decode())


def absolute_paths(path: Path) -> Iterator[Found]:
    """Absolute paths in JSON, YAML and Markdown, and in the metadata of safetensors; the first three of a file."""
    if path.suffix == ".safetensors":
        try:
            texts = [("metadata", json.dumps(json.loads(safetensors_header(path) or b"{}").get("__metadata__", {})))]
        except ValueError:
            return
    elif not any(fnmatch(path.name, name) for name in WITH_PATHS) or any(
        fnmatch(path.name, name) for name in VOCABULARIES
    ):
        return
    elif path.suffix == ".json":
        texts = list(_strings(path))
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [(f"line {number}", line) for number, line in enumerate(lines, 1)]
    found = [(where, path_) for where, text in texts for path_ in _paths(text)]
    for where, shown in found[:3]:
        yield Found(f"the absolute path {shown!r}", where)


def _paths(text: str) -> list[str]:
    return [found[0] for found in PATH.finditer(text) if _of_a_machine(found[0])]


def _of_a_machine(path: str) -> bool:
    parts = re.split(r"[/\\]", path)
    return "\\" in path or parts[1] in ROOTS or Path(path).exists()


def _strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of a JSON file with the way to it; of a broken one its lines."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1))
        return
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, str):
            yield where.lstrip("."), value
        elif isinstance(value, dict):
            stack.extend((f"{where}.{key}", one) for key, one in reversed(value.items()))
            yield from ((f"{where}.{key}".lstrip("."), key) for key in value)
        elif isinstance(value, list):
            stack.extend((f"{where}[{i}]", one) for i, one in reversed(list(enumerate(value))))
