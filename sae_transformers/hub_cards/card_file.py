"""README.md as a file: written whole, and told apart from one that somebody edited.

The last line of a card is a comment with the hash of all that stands above it, so that a changed card is known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ..latents.output_files import whole_file

MARK = "<!-- sae-transformers card {digest} -->"
_MARK = re.compile(r"<!-- sae-transformers card ([0-9a-f]{16}) -->\s*\Z")
# Of a template with {fields}: what a field may hold. A field not named here is one line.
_FIELDS = {"rows": r"(?:\|[^\n]*\n?)*", "base_line": r"(?:base_model(?:_relation)?: [^\n]+\n)*"}


def marked(text: str) -> str:
    """A card with its mark."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n{MARK.format(digest=_digest(text))}\n"


def is_ours(text: str, first_cards: Sequence[str] = ()) -> bool:
    """Whether nobody edited this card.

    Args:
        text: of a README.md.
        first_cards: templates, with fields in braces, of cards without a mark that count as ours.
    """
    text = text.replace("\r\n", "\n")
    if match := _MARK.search(text):
        return match[1] == _digest(text[: match.start()])
    return any(re.fullmatch(_pattern(template), text) for template in first_cards)


def write_card(text: str, folder: str | Path, *, first_cards: Sequence[str] = (), force: bool = False) -> Path:
    """Write README.md into a folder, whole or not at all. Returns its path.

    Raises:
        ValueError: there is one that was edited by hand, and `force` is False.
        OSError: it cannot be written; then the one that was there stays.
    """
    path = Path(folder) / "README.md"
    if path.is_file() and not force and not is_ours(path.read_text(encoding="utf-8", errors="replace"), first_cards):
        raise ValueError(f"{path} was edited by hand, or not written by `sae-transformers card`. `force` replaces it.")
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return path


# Where a card names what it is about, with the name as the second group.
_NAMES = (
    re.compile(r'((?:from_pretrained|load_dataset|evaluate\.load)\(")([^"\n]+)(?=")'),
    re.compile(r"(hf download --repo-type dataset )(\S+)"),
    re.compile(r"(?m)^(# )(\S+)$"),
    re.compile(r"(?m)^(- name: )(\S+)$"),
)


def renamed(text: str, new: str) -> str:
    """A card of ours in which the repository is called by its id, as after a push: in code, title and metadata."""
    old, match = card_name(text), _MARK.search(text)
    body = text[: match.start()] if match else text
    for pattern in _NAMES if old else ():
        body = pattern.sub(lambda found: found[1] + (new if found[2] == old else found[2]), body)
    return marked(body) if match else body


def card_name(text: str) -> str:
    """The name that a card gives its repository in code; empty where it gives none."""
    found = (pattern.search(text) for pattern in _NAMES[:2])
    return next((match[2] for match in found if match), "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template)
    pieces = [re.escape(part) if i % 2 == 0 else _FIELDS.get(part, r"[^\n]+") for i, part in enumerate(parts)]
    return "".join(pieces)
