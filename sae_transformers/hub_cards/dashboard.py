"""A dashboard of features: one HTML file without a server, a network or anything beside it.

    write_dashboard(DashboardData("my SAE", table=read_feature_table("features")), "dashboard.html")

The page's own policy lets it run its one script and nothing else, and ask no host for anything. Texts are written as
JSON and put on the page as text.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..latents.output_files import whole_file
from .dashboard_data import DashboardData, feature_details, page_index

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dashboard.js", "dashboard_feature.js")
CHUNK = 200  # features whose details are opened together


def write_dashboard(
    data: DashboardData,
    path: str | Path,
    *,
    compress: bool = True,
    chunk: int = CHUNK,
    report: Callable[[int], object] | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        data: what it shows.
        path: of the .html file.
        compress: details as gzip, which browsers since 2023 read; else as plain JSON, some five times as large.
        chunk: features whose details are opened together.
        report: called with the number of features that are written, chunk by chunk.

    Returns:
        The path.

    Raises:
        ValueError: no feature, or one that is not there.
    """
    if chunk < 1:
        raise ValueError(f"`chunk` must be 1 or more. Received: chunk={chunk!r}.")
    path = Path(path)
    features = data.shown()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style = (TEMPLATES / "dashboard.css").read_text(encoding="utf-8")
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)

    def chunks() -> Iterator[dict[str, Any]]:
        for number, start in enumerate(range(0, len(features), chunk)):
            members = features[start : start + chunk]
            details = [feature_details(data, feature) for feature in members]
            yield {"number": number, "content": _packed(details) if compress else json_in_html(details)}
            if report is not None:
                report(len(members))

    page = environment.get_template("dashboard.html.jinja").stream(
        title=_characters(data.title),
        index=json_in_html({**page_index(data, features), "chunk": chunk}),
        chunks=chunks(),
        chunk_type="application/gzip" if compress else "application/json",
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        n_features=len(features),
    )
    with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)
    return path


def json_in_html(value: Any) -> Markup:
    """JSON for a script element: ASCII, and without characters that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _packed(value: Any) -> Markup:
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii"))


def _characters(text: str) -> str:
    """A text that can be encoded: halves of characters become a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
