"""Commands, options, scripts and imports that the README and the docs show exist."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from sae_transformers.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_MARKS = re.compile(r"\s(?:&&|\|\||[|;<>&])\s|\s&$")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shell_lines(text: str) -> list[str]:
    """Lines of code blocks, continued lines joined, and code in a line of text."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [*(line.strip() for line in lines), *re.findall(r"`([^`\n]+)`", prose)]


def commands(text: str) -> list[str]:
    """What calls the command line, also by way of torchrun and the like."""
    found = (re.search(r"(?:^|&& |-m )sae[-_]transformers (?=[a-z])(.*)", line) for line in shell_lines(text))
    return [f"sae-transformers {SHELL_MARKS.split(match[1])[0]}" for match in found if match]


def shown_options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--\w", word)} - {"--help"}


@functools.cache
def options_of(verb: str) -> set[str]:
    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert verb in known, f"there is no verb {verb!r}"
    return {name for parameter in known[verb].params for name in [*parameter.opts, *parameter.secondary_opts]}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_exist(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        _, verb, *words = shlex.split(line.replace("...", ""), comments=True)
        if verb == "serve" and "--" in words:  # what follows are vLLM's
            words = words[: words.index("--")]
        known, shown = options_of(verb), shown_options(words)
        if verb == "train":
            shown -= {f"--{name}" for name in train_settings()}
        assert not shown - known, f"{line}: no option {sorted(shown - known)}"


@functools.cache
def train_settings() -> set[str]:
    from dataclasses import fields

    from sae_transformers import SaeTrainingArguments, SparseAutoencoderConfig
    from sae_transformers.training.sae.recipe import SECTIONS

    return {*SECTIONS, *(field.name for of in (SaeTrainingArguments, SparseAutoencoderConfig) for field in fields(of))}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_scripts_exist(page: Path) -> None:
    for line in shell_lines(page.read_text(encoding="utf-8")):
        match = re.search(r"(?:^| )python ((?:examples|benchmarks|tests)/\S+\.py)(.*)", line)
        if match is None:
            continue
        file = ROOT / match[1]
        assert file.is_file(), line
        source = file.read_text(encoding="utf-8")
        for option in shown_options(shlex.split(match[2].replace("...", ""), comments=True)):
            told = f'"{option}"' in source or f'"{option[2:]}"' in source  # some are added in a loop over their names
            assert told, f"{line}: no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in shell_lines(page.read_text(encoding="utf-8")):
        if match := re.match(r"make ([a-z0-9-]+)", line):
            assert match[1] in targets, line


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_imports_what_exists(page: Path) -> None:
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    ):
        check_imports(block)


SCRIPTS = [file for folder in ("benchmarks", "examples") for file in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_scripts_import_what_exists(script: Path) -> None:
    check_imports(script.read_text(encoding="utf-8"))


def check_imports(source: str) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_transformers"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_a_wrong_command_is_found() -> None:
    text = (
        "```bash\nsae-transformers spans M \\\n    --nothing 3  # --comment\nls\n```\nor `sae-transformers judge --no`"
    )
    line, inline = commands(text)
    assert "--nothing" in line and "--nothing" not in options_of("spans")
    assert inline == "sae-transformers judge --no" and "--no" not in options_of("judge")
    (also,) = commands("```\ntorchrun --nproc-per-node 8 -m sae_transformers harvest M T --place p | tee log --x\n```")
    assert shown_options(shlex.split(also)) == {"--place"}
    assert "learning_rate" in train_settings() and "nothing" not in train_settings()
    assert all(any(commands(page.read_text(encoding="utf-8")) for page in PAGES if page.parent.name == folder)
               for folder in ("docs", "papers"))  # fmt: skip
