"""Texts from data stay texts, whatever Markdown renders them."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from sae_transformers.hub_cards import markdown as md

NASTY = [
    "a|b", "line\nbreak", "---", "- item", "1. item", "# head", "<script>alert(1)</script>", "`tick`", "``", "a`b``c",
    "*bold* _it_ __x__", "snake_case_name", "[link](http://x)", "![i](x)", "~~s~~", "\\", "\\|", "end\\", "&amp; &lt;",
    "<!-- comment", "-->", "\x00\x1b[31mred", "\u202eback", "a\tb", "```\ncode\n```", "$x$", "+ plus", "= eq",
    "> quote", "{{ jinja }} {% raw %}", "é 字 🙂", "  spaces  ", "http://a.b/c_d_e",
]  # fmt: skip


def cells(line: str) -> list[str]:
    """The text that a reader sees in each cell of a table's row, by another implementation of Markdown."""
    parser = MarkdownIt("commonmark").enable("table")
    page = parser.render(f"| a | b | c |\n|---|---|---|\n{line}\n")
    assert page.count("<tr>") == 2, page
    row = page.split("<tbody>")[1]
    return [html.unescape(re.sub(r"</?code>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)]


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_shows_its_text_and_nothing_else(text: str) -> None:
    assert cells(f"| x | {md.plain(text)} | z |") == ["x", md.one_line(text), "z"]


@pytest.mark.parametrize("text", [text for text in NASTY if md.one_line(text)])
def test_code_in_a_cell_shows_its_text(text: str) -> None:
    shown = cells(f"| x | {md.code_cell(text)} | z |")
    # In a table a bar of code is written \\|, and a backslash before one cannot be told apart from that.
    assert shown == ["x", md.one_line(text), "z"] or "\\|" in text


@pytest.mark.parametrize("text", NASTY)
def test_a_paragraph_that_begins_with_a_text_stays_one(text: str) -> None:
    page = MarkdownIt("commonmark").render(md.plain(text) + "\n")
    expected = md.one_line(text)
    assert page == "" if not expected else html.unescape(page.removeprefix("<p>").removesuffix("</p>\n")) == expected


@pytest.mark.parametrize("text", NASTY)
def test_a_literal_of_python_is_that_text_on_one_line(text: str) -> None:
    literal = md.python(text)
    assert eval(literal) == text and "\n" not in literal  # noqa: S307


def test_a_fence_is_longer_than_what_it_holds() -> None:
    text = "a\n````\nb"
    page = MarkdownIt("commonmark").render(f"{md.fence(text)}bash\n{md.block(text)}\n{md.fence(text)}\nend\n")
    assert page.count("<code") == 1 and page.endswith("<p>end</p>\n")


def test_an_author_may_write_paragraphs_but_no_html_headings_or_rules() -> None:
    page = MarkdownIt("commonmark").render(md.prose("One *two*.\n\n- item\n\n# no\n\n---\n\n<b>no</b>\n\n```\nno"))
    assert "<em>two</em>" in page and "<li>item</li>" in page
    assert not any(tag in page for tag in ("<h1", "<h2", "<hr", "<b>", "<pre"))


def test_numbers() -> None:
    shown = [md.number(value) for value in (None, 0.123456, 1234567, 12345.678, 1e-7, 2.0, -3.5)]
    assert shown == ["-", "0.1235", "1,234,567", "12,345.7", "1e-07", "2", "-3.5"]


def test_paths_of_a_command_lose_their_folders() -> None:
    command = (
        "sae-transformers evaluate /home/me/model --data=../x.csv --out /tmp/a/ https://a.b/c C:\\Users\\me\\f.txt"
    )
    expected = "sae-transformers evaluate model --data=../x.csv --out a https://a.b/c f.txt"
    assert md.without_folders(command) == expected


def test_a_long_text_is_cut_before_it_is_escaped() -> None:
    assert md.plain("||||||", 3) == "\\|\\|…"
