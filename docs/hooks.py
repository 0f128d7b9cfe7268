"""What mkdocs does not do by itself: the README's beginning, the list of commands, and links to files outside docs/.

Pages link to files of the repository as they lie there (`../examples/pretrain_sae.py`), so that the links hold where
the pages are read as files. The site carries a page of each such file and points there.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMANDS, SETTINGS = "<!-- commands -->", "<!-- settings of train -->"
README = re.compile(r"^.*<!-- README(?:: (?P<section>.+?))? -->$", re.MULTILINE)  # the whole line is replaced
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


# -- events of mkdocs -------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file outside docs/ that a page names."""
    from mkdocs.structure.files import File

    for path in sorted(outside(files)):
        files.append(File.generated(config, page_of(path), content=file_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown
    folder = posixpath.dirname(f"docs/{source}")
    parts = README.split(markdown)  # text, section, text, section, ..., text
    for i, part in enumerate(parts):
        parts[i] = relink(readme(part), "", source) if i % 2 else relink(part, folder, source)
    markdown = "".join(parts)
    for marker, made in ((COMMANDS, commands_page), (SETTINGS, settings_table)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


# -- links ------------------------------------------------------------------------------------------------------------


def links(markdown: str) -> list[tuple[str, str]]:
    """Relative links, (path, #anchor or empty), outside code."""
    return [(found[1], found[2] or "") for found in LINK.finditer(FENCE.sub("", markdown))]


def outside(files: Any) -> set[str]:
    """Files of the repository, relative to its root, that pages link to, or parts of the README that they show."""
    found = set()
    for file in files.documentation_pages():
        folder, text = posixpath.dirname(f"docs/{file.src_uri}"), file.content_string
        parts = [(folder, text), *(("", readme(section)) for section in README.findall(text))]
        found |= {posixpath.normpath(posixpath.join(base, path)) for base, part in parts for path, _ in links(part)}
    return {path for path in found if not path.startswith("docs/") and path != "README.md" and is_file(path)}


def is_file(path: str) -> bool:
    return not path.startswith("..") and (ROOT / path).is_file()


def page_of(path: str) -> str:
    """The page, relative to docs/, that shows a file of the repository, given relative to its root."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return "index.md" if path == "README.md" else f"source/{path.removesuffix('.md')}.md"


def relink(markdown: str, folder: str, page: str) -> str:
    """Links that hold in a folder of the repository, made to hold on a page of the site."""

    def target(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        there = posixpath.normpath(posixpath.join(folder, path))
        if not there.startswith("docs/") and not is_file(there):
            return found[0]  # mkdocs warns of it
        return posixpath.relpath(page_of(there), posixpath.dirname(page) or ".") + anchor

    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        parts += [LINK.sub(target, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(target, markdown[end:])])


def file_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return relink(text, posixpath.dirname(path), page_of(path))
    if path.endswith(".ipynb"):
        return notebook_page(path, json.loads(text)["cells"])
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}.get(Path(path).suffix, "text")
    return f"# `{path}`\n\n````{language}\n{text}````\n"


def notebook_page(path: str, cells: list[dict[str, Any]]) -> str:
    """A notebook's text, code and plain outputs."""
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(relink(source, posixpath.dirname(path), page_of(path)))
            continue
        parts.append(f"````python\n{source}\n````")
        texts = [one.get("text") or one.get("data", {}).get("text/plain", []) for one in cell["outputs"]]
        shown = "".join("".join(text).rstrip("\n") + "\n" for text in texts)
        if shown.strip():
            parts.append(f"````text\n{shown}````")
    return "\n\n".join([*parts, f"The notebook is `{path}`."]) + "\n"


# -- what is told elsewhere -------------------------------------------------------------------------------------------


def readme(section: str | None) -> str:
    """A section of the README without its heading, or what stands before all sections."""
    top, *sections = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(part.split("\n", 1) for part in sections)
    if section and section not in texts:
        raise ValueError(f"The README has no section {section!r}; it has {', '.join(texts)}.")
    return (texts[section] if section else top).strip() + "\n"


def commands_page() -> str:
    """Each verb with its arguments and options, as the command line itself knows them."""
    import typer

    from sae_transformers.cli import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(verb_section(name, command) for name, command in group.commands.items()) + "\n"


def verb_section(name: str, command: Any) -> str:
    shown = [one for one in command.params if "--help" not in one.opts and not getattr(one, "hidden", False)]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name == "option"]
    words = [one.name.upper() if one.required else f"[{one.name.upper()}]" for one in arguments]
    usage = " ".join(["sae-transformers", name, *words, *(["[OPTIONS]"] if options else [])])
    parts = [f"## {name}", cell(command.help or ""), f"```\n{usage}\n```"]
    if arguments:
        rows = [f"| `{one.name.upper()}` | {cell(one.help or '')} |" for one in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    panels: dict[str, list[Any]] = {}
    for one in options:
        panels.setdefault(getattr(one, "rich_help_panel", None) or "option", []).append(one)
    for panel, members in panels.items():
        rows = [f"| {names(one)} | {cell(told(one)[0])} | {told(one)[1]} |" for one in members]
        parts.append("\n".join([f"| {panel} | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def names(option: Any) -> str:
    return ", ".join(f"`{one}`" for one in [*option.opts, *option.secondary_opts])


def told(option: Any) -> tuple[str, str]:
    """Its help without `[default: ...]`, and its default."""
    text, value = option.help or "", option.default
    if found := re.search(r"\s*\[default: (.+?)\]$", text):
        return text[: found.start()], cell(found[1])
    if option.required:
        return text, "required"
    if callable(value) or value is None or value == "" or (value is False and not option.secondary_opts):
        return text, ""
    if option.secondary_opts:
        return text, f"`{(option.opts if value else option.secondary_opts)[0]}`"
    return text, f"`{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def settings_table() -> str:
    """The settings of `train` that are not transformers' own."""
    from sae_transformers.training.sae.recipe import own_options

    rows = [f"| `--{name}` | {cell(meaning)} | `{default}` |" for name, default, meaning in own_options()]
    return "\n".join(["| setting | | default |", "|---|---|---|", *rows])


def cell(text: str) -> str:
    """One line that a table may hold."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))  # in code nothing is escaped
    return "".join(part if part.startswith("`") else re.sub(r"([|*_\\[\]{}<])", r"\\\1", part) for part in parts)
