"""Draw the README's picture of one prompt at three strengths, from the output that it shows, and its badges.

`python docs/draw_readme.py`; the badges come from `pyproject.toml`.
"""

from __future__ import annotations

import html
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH, LINE, COLUMNS = 820, 20, 74
COLOURS = ("#c0563f", "#808080", "#009688")
FONT = 'font-family="system-ui, sans-serif" font-size="15"'


def shown(readme: str) -> tuple[str, list[tuple[str, str]]]:
    """The prompt, and (strength, text) of each continuation that the README's first output has."""
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", readme, flags=re.DOTALL)[:2]
    prompt = re.search(r'tokenizer\("(.*?)"', code)
    strengths = re.search(r"for strength in \((.*?)\)", code)
    if prompt is None or strengths is None:
        raise ValueError("The README's first code has no prompt or no strengths.")
    names = [name.strip() for name in strengths[1].split(",")]
    texts = [" ".join(text.split()) for text in re.findall(rf"^{prompt[1]}.*", output, flags=re.MULTILINE)]
    return prompt[1], list(zip(names, texts, strict=True))


def picture(prompt: str, rows: list[tuple[str, str]]) -> str:
    """A row for each strength: a bar, the strength, and the text, which is folded."""
    parts, y = [], 10
    for (strength, text), colour in zip(rows, COLOURS, strict=True):
        lines = textwrap.wrap(text, COLUMNS)
        height = LINE * len(lines) + 16
        name = "unsteered" if float(strength) == 0 else f"{float(strength):+g} norms".replace("-", "−")
        parts.append(f'<rect x="0" y="{y}" width="6" height="{height}" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="20" y="{y + 25}" fill="{colour}" font-weight="600" {FONT}>{name}</text>')
        for number, line in enumerate(lines):
            told = html.escape(line)
            if not number:
                told = told.replace(prompt, f'<tspan font-weight="600">{prompt}</tspan>', 1)
            parts.append(f'<text x="150" y="{y + 25 + LINE * number}" fill="#808080" {FONT}>{told}</text>')
        y += height + 12
    body = "\n".join(parts)
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def badge(name: str, value: str) -> str:
    """Two words on two grounds."""
    left, right = 12 + 7 * len(name), 12 + 7 * len(value)
    font = 'font-family="Verdana, sans-serif" font-size="11" fill="#fff"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20">\n'
        f'<rect width="{left}" height="20" fill="#555"/>\n'
        f'<rect x="{left}" width="{right}" height="20" fill="#00796b"/>\n'
        f'<text x="6" y="14" {font}>{name}</text><text x="{left + 6}" y="14" {font}>{value}</text>\n</svg>\n'
    )


def badges(pyproject: str, readme: str) -> dict[str, str]:
    """File -> badge: licence, Python and the tested releases of transformers."""
    python = re.search(r'requires-python = ">=([\d.]+)', pyproject)
    tested = re.search(r"with transformers ([\d.]+ to [\d.]+)", readme)
    licence = re.search(r'license = "(.+?)"', pyproject)
    if not (python and tested and licence):
        raise ValueError("pyproject.toml or the README does not say the licence, Python or the tested transformers.")
    values = {"licence": licence[1], "python": f"{python[1]} and later", "transformers": tested[1]}
    return {f"badge-{name}.svg": badge(name, value) for name, value in values.items()}


def drawn() -> dict[str, str]:
    """Every file that this makes, by name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {"three-strengths.svg": picture(*shown(readme)), **badges(pyproject, readme)}


if __name__ == "__main__":
    for file, text in drawn().items():
        (IMAGES / file).write_text(text, encoding="utf-8")
