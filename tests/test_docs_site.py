"""The documentation site: its pages, links, generated parts and docstrings; built as a whole in a slow test."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import sae_transformers
from tests.hub_cards.chromium import chromium

griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REQUIRED = (
    "attach detect steering training classifiers knowledge-selection topic-alignment feature-tables evaluation "
    "publish dashboards serve annotation harvest checkpoints scaling papers results decisions api/index cli quickstart"
    " whole-way security"
)
COMMAND = re.compile(r"^(?:sae-transformers|python|make|torchrun|from|sae =) ?", re.MULTILINE)
# What a page may not fetch: scripts, styles, fonts, pictures.
FETCHED = re.compile(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>|@import\s+url\(['\"]?http")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hooks, house_style, plots = load("hooks"), load("griffe_house_style"), load("plot_results")


def entries(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in entries(one)]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub and Python-Markdown both make them."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+?)\s*$", prose, flags=re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "").lower())) for title in titles}


def identifier_blocks(page: Path) -> list[tuple[str, list[str] | None]]:
    """What an API page shows: a dotted name, and the members named for it."""
    found = re.finditer(r"^::: (\S+)(?:\n    options:\n      members: \[(.*?)\])?", text_of(page), flags=re.MULTILINE)
    return [(match[1], match[2].split(", ") if match[2] else None) for match in found]


# -- pages and links --------------------------------------------------------------------------------------------------


def test_nav_has_every_page_once() -> None:
    listed = entries(CONFIG["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
    assert {f"{name}.md" for name in REQUIRED.split()} <= set(listed)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_where_the_files_lie(page: Path) -> None:
    for path, anchor in hooks.links(text_of(page)):
        target = page.parent / path
        assert target.is_file(), f"{page.name}: {path}"
        assert not anchor or anchor[1:] in anchors(target), f"{page.name}: {path}{anchor}"


def task_pages() -> list[str]:
    groups = {name: entries(pages) for one in CONFIG["nav"] for name, pages in one.items()}
    pages = [page for name in ("Start", "Use", "Train", "Show", "Papers") for page in groups[name]]
    return [page for page in pages if page not in ("papers.md",)]


@pytest.mark.parametrize("name", task_pages())
def test_a_page_begins_with_its_purpose_and_a_command(name: str) -> None:
    title, *parts = [part for part in text_of(DOCS / name).split("\n\n") if part.strip()]
    assert re.match(r"# \S", title.strip()), name
    purpose = next(part for part in parts if not part.startswith("## "))
    assert len(purpose.split()) >= 8 and not purpose.startswith(("#", "```", "|")), name
    first = re.search(r"^```\w*\n(.*?)^```", text_of(DOCS / name), flags=re.DOTALL | re.MULTILINE)
    assert first and COMMAND.search(first[1]), name
    assert text_of(DOCS / name)[: first.start()].count("\n") <= 24, f"{name}: the first command comes late"


def test_measured_numbers_on_paper_pages_are_in_the_results() -> None:
    results = "\n".join(text_of(page) for page in sorted((DOCS / "results").glob("*.md")))
    for page in sorted(page for page in (DOCS / "papers").glob("*.md") if page.name != "promises.md"):
        _, _, measured = text_of(page).partition("\n## Measured\n")
        numbers = re.findall(r"\d[\d,]*\.\d+|\d+(?= %)", re.sub(r"\]\([^)]*\)", "", measured))
        assert "](../results/" in measured, page.name
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", results), f"{page.name}: {number}"


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.page)
def test_a_plot_shows_the_rows_of_its_page(plot: Any) -> None:
    drawn = text_of(DOCS / "images" / "results" / f"{plot.page}.svg")
    assert f"](../images/results/{plot.page}.svg)" in text_of(DOCS / "results" / f"{plot.page}.md")
    for name, (value, low, high) in plots.points(plot):
        assert f">{name}<" in drawn and low <= value <= high, name


def test_every_example_is_told_and_tested() -> None:
    page, tests = (
        text_of(DOCS / "examples.md"),
        [text_of(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))],
    )
    for example in sorted((ROOT / "examples").glob("*.py")):
        assert f"](../examples/{example.name})" in page, example.name
        assert any(re.search(rf"\b{example.stem}\b", test) for test in tests), f"no test runs {example.name}"


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_links_out_of_the_docs_go_to_pages_of_the_site() -> None:
    text = "[a](../examples/pretrain_sae.py), [r](../README.md#limits), [p](papers/scar.md#as), `[x](../LICENSE)`"
    assert hooks.relink(text, "docs", "steering.md") == (
        "[a](source/examples/pretrain_sae.py.md), [r](index.md#limits), [p](papers/scar.md#as), `[x](../LICENSE)`"
    )
    assert hooks.relink("[c](../../CHANGELOG.md)", "docs/api", "api/index.md") == "[c](../source/CHANGELOG.md)"
    assert hooks.relink("[r](docs/results/quickstart.md)", "", "index.md") == "[r](results/quickstart.md)"
    gone = "[n](../nothing.py), [o](../../outside.md), [h](https://huggingface.co), [s](#here)"
    assert hooks.relink(gone, "docs", "steering.md") == gone  # mkdocs warns of the first two
    shown = hooks.file_page("examples/pretrain_sae.py")
    assert shown.startswith("# `examples/pretrain_sae.py`\n\n````python\n") and "def main()" in shown
    assert hooks.file_page("CHANGELOG.md") == text_of(ROOT / "CHANGELOG.md")
    notebook = hooks.file_page("notebooks/read.ipynb")
    assert (
        notebook.startswith("# Read features\n")
        and "````python\nfound.quality()\n````\n\n````text\n{'auroc'" in notebook
    )


def test_the_readme_is_shown_in_parts() -> None:
    readme = text_of(ROOT / "README.md")
    assert hooks.readme(None).startswith("# sae-transformers\n") and "\n## " not in hooks.readme(None)
    for page in PAGES:
        for section in hooks.README.findall(text_of(page)):
            assert hooks.readme(section) in readme
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        hooks.readme("Nothing")
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="steering.md"))
    made = hooks.on_page_markdown("# S\n\nSee. <!-- README: Limits -->\n\nEnd [x](../LICENSE)", page)
    assert made.startswith("# S\n\n") and made.endswith("End [x](source/LICENSE.md)")
    assert "](bases.md)" in made and "See." not in made and "<!--" not in made


def test_the_command_line_page_has_every_verb_and_option() -> None:
    import typer

    from sae_transformers.cli import app

    page = hooks.commands_page()
    known: Any = typer.main.get_command(app)
    assert re.findall(r"^## (.+)$", page, flags=re.MULTILINE) == list(known.commands)
    sections = dict(zip(known.commands, re.split(r"^## .+$", page, flags=re.MULTILINE)[1:], strict=True))
    for name, command in known.commands.items():
        for parameter in command.params:
            word = f"`{parameter.opts[0]}`" if parameter.param_type_name == "option" else parameter.name.upper()
            assert (word in sections[name]) != getattr(parameter, "hidden", False), f"{name} {word}"
    assert "sae-transformers spans MODEL TEXT [OPTIONS]" in page
    assert "| `--lower` | Less of the concept in place of more. |  |" in page
    chat = "Put prompts into the chat template, if the tokenizer has one."
    assert f"| `--chat`, `--no-chat` | {chat} | `--chat` |" in page
    usual = "by default 0.03 to 0.6 lengths of the hidden state, and factors of 2 to 32 for scale."
    assert f"| `--strengths` | Strengths from weak to strong, for all operations; {usual} |  |" in page
    assert "| `--words` | Gendered words, male:female, comma-separated; by default 26 pairs. |  |" in page
    assert hooks.cell("a|b *c* d_e_f <g>, `x_y|z`\n{h}") == r"a\|b \*c\* d\_e\_f \<g>, `x_y|z` \{h\}"


# -- docstrings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    extensions = griffe.load_extensions(str(DOCS / "griffe_house_style.py"))
    return griffe.load("sae_transformers", search_paths=[ROOT], docstring_parser="google", extensions=extensions)


def parse_all(thing: Any) -> int:
    count = 0
    for member in thing.members.values():
        if not member.is_alias:
            if member.docstring is not None:
                kinds = {section.kind.value for section in member.docstring.parse("google")}
                assert "admonition" not in kinds, f"{member.path}: `word: text` with indented lines is no section"
                count += 1
            count += parse_all(member) if hasattr(member, "members") else 0
    return count


def test_docstrings_say_what_the_signatures_say(package: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="griffe"):
        assert parse_all(package) > 1000
    assert not caplog.messages, "\n".join(caplog.messages)


def test_a_wrong_docstring_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wrong.py").write_text('def f(a: int):\n    """F.\n\n    Args:\n        a, b: of it.\n    """\n')
    extensions = griffe.load_extensions(str(DOCS / "griffe_house_style.py"))
    with caplog.at_level(logging.WARNING, logger="griffe"):
        module = griffe.load("wrong", search_paths=[tmp_path], docstring_parser="google", extensions=extensions)
        assert parse_all(module) == 1
    assert any("'b'" in message for message in caplog.messages)


def test_house_style_becomes_sections() -> None:
    text = "T.\n\nArgs:\n    a, *b: first\n        second.\n    c: third.\n\nReturns:\n    x, y: untouched."
    assert house_style.one_name_a_line(text) == (
        "T.\n\nArgs:\n    a: first\n        second.\n    *b: first\n        second.\n    c: third.\n\n"
        "Returns:\n    x, y: untouched."
    )
    text = "C.\n\nx    = a\nlong = b  or more\ns    = c\n\nArgs:\n    a:  b\n    c:  d"
    assert house_style.with_columns(text) == (
        "C.\n\n    x    = a\n    long = b  or more\n    s    = c\n\nArgs:\n    a:  b\n    c:  d"
    )
    assert house_style.with_columns("C.\n\nwith f(x):\n    g()") == "C.\n\n    with f(x):\n        g()"
    assert house_style.with_columns("`f(x)` calls it.\n\nWord") == "`f(x)` calls it.\n\nWord"
    assert house_style.with_columns("One  pair.\nof lines") == "One  pair.\nof lines"
    text = "C: a class.\n\nlow, high: ends\nof it. kind: of what.\nkind: one.\n\nother: no field."
    assert house_style.with_heading(text, {"low", "high", "kind"}) == (
        "C: a class.\n\nAttributes:\n    low, high: ends\n        of it. kind: of what.\n    kind: one.\n\n"
        "other: no field."
    )


def test_api_pages_show_what_exists(package: Any) -> None:
    shown: set[str] = set()
    for page in sorted((DOCS / "api").glob("*.md")):
        for name, members in identifier_blocks(page):
            of = package[name.removeprefix("sae_transformers.")]
            of = of.final_target if of.is_alias else of
            for one in [of] if members is None else [of[member] for member in members]:
                one = one.final_target if one.is_alias else one
                assert one.docstring is not None, f"{page.name}: {one.path} has no docstring"
                assert one.path not in shown, f"{page.name}: {one.path} is shown twice"
                shown.add(one.path)
    public = [package[name] for name in sae_transformers.__all__ if name != "__version__"]
    missing = [one.path for one in public if (one.final_target if one.is_alias else one).path not in shown]
    assert not missing
    index = text_of(DOCS / "api/index.md")
    assert all(f"`{one.name}`" in index for one in public)


# -- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_fetches_nothing(site: Path) -> None:
    for page in PAGES:
        built = site / page.relative_to(DOCS).with_suffix(".html")
        html = built.read_text(encoding="utf-8")
        fetched = FETCHED.findall(html)
        assert not fetched, f"{built.name}: {fetched[:3]}"
        assert "<!-- README" not in html and "::: sae_transformers" not in html and "<p>| " not in html, built.name
    assert not list(site.rglob("*.py"))
    for style in site.rglob("*.css"):
        assert not FETCHED.search(style.read_text(encoding="utf-8")), style.name
    for page in (site / "api").glob("*.html"):  # a lone * of a formula would open an emphasis
        assert not re.search(r"<em>[^/]*<code", page.read_text(encoding="utf-8")), page.name
    training = (site / "api" / "training.html").read_text(encoding="utf-8")
    assert 'id="sae_transformers.training.steering.calibration.calibrate"' in training and "Raises:" in training
    assert (site / "source" / "examples" / "pretrain_sae.py.html").is_file()


@pytest.mark.slow
def test_the_search_finds_and_asks_nobody_else(site: Path) -> None:
    serve = partial(QuietHandler, directory=str(site))
    with chromium() as browser, ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{server.server_address[1]}/"
        page, problems = browser.new_page(), []
        page.on("request", lambda sent: sent.url.startswith((own, "data:", "blob:")) or problems.append(sent.url))
        page.on("console", lambda told: told.type == "error" and problems.append(told.text))
        page.goto(f"{own}index.html")
        page.wait_for_selector("[data-md-component=search-query]", state="attached")
        page.keyboard.press("/")
        page.keyboard.type("ladder rung")
        page.wait_for_selector(".md-search-result__item a[href*='steering.html']", state="attached", timeout=60_000)
        page.goto(f"{own}api/training.html")
        page.wait_for_selector("text=sae_transformers.training.steering.calibration")
        server.shutdown()
        assert not problems


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
