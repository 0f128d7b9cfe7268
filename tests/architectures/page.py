"""The grid as a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tests.architectures.grid import Cell

COLUMNS = {
    "idle": "idle", "resid_pre": "resid_pre", "resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_out",
    "cached": "cached = uncached", "padded": "padded = alone", "detect": "detect", "adapter": "reload, adapter",
    "full": "reload, full", "classifier": "classifier head", "compile": "compile",
}  # fmt: skip
HEAD = """# Architectures

<!-- Written by `make architectures`; a slow test holds it. Do not edit. -->

Every class of transformers' causal-LM and image-text-to-text mappings that can be made tiny, with transformers
{release}: {count} classes of {families} families, random weights, one SAE at the second block that runs. `yes`: shown
with numbers in this run. `refused`: the library says no when the model is made or called, for the reason in the notes.
`–`: nothing to compare with, since the base alone breaks the identity or has no such class.

| column | what was compared |
|---|---|
| idle | logits and generated logits are the base's, bit for bit; also with features read, and steering off |
| resid_pre ... attn_out | the same addition as by a plain hook, 1e-4; at `mlp_out` also what the block returns |
| cached = uncached | logits of every new token, steered at `all`, `prompt`, `generated`, `last_prompt`, ranges |
| padded = alone | a text with padding on its left is steered as it is alone |
| detect | a latent's score is that of the hidden state by hand; with padding as without |
| reload | saved, loaded by remote code in an interpreter without this library: idle to rounding, steered 1e-4 |
| classifier head | a feature head scores a padded text as the text alone |
| compile | `fullgraph=True`, idle and steered, as eager |

{all_yes} of these families have idle, `resid_post`, cached = uncached and both reloads all `yes`.
"""


def page(rows: Mapping[str, Mapping[str, Cell]], left_out: Mapping[str, str], release: str) -> str:
    """The page of a grid.

    Args:
        rows: `task.model_type` -> column -> cell.
        left_out: `task.model_type` -> why it has no row.
        release: of transformers.
    """
    states = {name: {column: cell.state for column, cell in row.items()} for name, row in rows.items()}
    counts = {"count": len(rows), "families": len(families_of(states)), "all_yes": len(families_of(states, all_yes))}
    parts = [HEAD.format(release=release, **counts)]
    notes: dict[str, int] = {}
    for task in sorted({name.partition(".")[0] for name in rows}):
        parts.append(f"## {task}\n\n| family | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}\n")
        for name, row in rows.items():
            if name.startswith(f"{task}."):
                cells = " | ".join(_shown(row[column], notes) for column in COLUMNS)
                parts[-1] += f"| {name.partition('.')[2]} | {cells} |\n"
    parts.append("## Notes\n\n" + "".join(f"{number}. {_plain(note)}\n" for note, number in notes.items()))
    if left_out:
        split = [(*name.partition(".")[::2], why) for name, why in left_out.items()]
        lines = "".join(f"| {family} | {task} | {_plain(why)} |\n" for task, family, why in split)
        parts.append(f"## Without a row\n\n| family | class | why |\n|---|---|---|\n{lines}")
    return "\n".join(parts)


def read_page(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """What a page says: the release of transformers, and `task.model_type` -> column -> state."""
    release = re.search(r"with transformers\s+(\S+):", text)
    if release is None:
        raise ValueError("Expected a page as `page` writes it. Received: one that names no release of transformers.")
    rows: dict[str, dict[str, str]] = {}
    for section in text.split("\n## ")[1:]:
        task = section.partition("\n")[0]
        if task in ("Notes", "Without a row"):
            break
        for line in section.splitlines()[4:]:
            family, *cells = (part.strip() for part in line.strip("|\n").split("|"))
            words = (cell.partition(" ")[0].replace("–", "n/a") for cell in cells)
            rows[f"{task}.{family}"] = dict(zip(COLUMNS, words, strict=True))
    return release[1], rows


def families_of(rows: Mapping[str, Mapping[str, str]], holds: Callable[[Mapping[str, str]], bool] = bool) -> set[str]:
    """The families of rows for which something holds; some have a row as a language model and one with images."""
    return {name.partition(".")[2] for name, row in rows.items() if holds(row)}


def all_yes(states: Mapping[str, str]) -> bool:
    """A family that can be had, steered where the stream is, generated with the cache, saved and loaded."""
    return all(states[column] == "yes" for column in ("idle", "resid_post", "cached", "adapter", "full"))


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    word = "–" if cell.state == "n/a" else cell.state
    if not cell.note or cell.state == "yes":
        return word
    return f"{word} [{notes.setdefault(cell.note, len(notes) + 1)}](#notes)"


def _plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
