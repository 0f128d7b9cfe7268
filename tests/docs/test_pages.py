"""Every page, from its first block to its last: Python and commands run on tiny models under the names of the page."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from sae_transformers.cli import app
from sae_transformers.evaluation.suites import SUITES
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.docs.pages import DOCS, ROOT, blocks
from tests.docs.running import PageRun
from tests.docs.world import World, byte_tokenizer, put, tiny_world

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
# pages that need a model of sentences
EMBEDDING = {"docs/topic-alignment.md", "docs/topic-files.md", "docs/papers/topic-alignment.md"}
# They train, or run what the tests of their verbs run as well.
SLOW = {
    "docs/topic-alignment.md", "docs/topic-files.md", "docs/papers/topic-alignment.md", "docs/training.md",
    "docs/whole-way.md", "docs/dashboards.md", "docs/evaluation.md", "docs/knowledge-selection.md",
    "docs/papers/scar.md",
}  # fmt: skip
# tests/test_docs_python.py runs the page of verbs, test_promises.py that of promises. Pages of results name the data
# that was measured: only parsed, by tests/test_docs_commands.py.
ELSEWHERE = {"python.md", "promises.md"}
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name not in ELSEWHERE and page.parent.name != "results"]
RUN = {
    str(page.relative_to(ROOT)): found
    for page in PAGES
    if (found := [b for b in blocks(page) if not b.reason and (b.language == "python" or b.commands())])
}
# Page and reason of every block that is not run.
NOT_RUN = [
    ("docs/evaluation.md", "HellaSwag comes from the Hub"),
    ("docs/evaluation.md", "Inspect needs an environment of its own"),
    ("docs/evaluation.md", "SAEBench needs an environment of its own"),
    ("docs/feature-penalty.md", "needs a latent that tells the two kinds of text apart"),
    ("docs/feature-penalty.md", "needs TRL"),
    ("docs/papers/feature-tables.md", "needs the weights of gpt2 and of its SAE"),
    ("docs/papers/feature-tables.md", "needs the weights of gpt2 and of its SAE"),
    ("docs/papers/spare.md", "needs Llama 3 8B and four of its SAEs"),
    ("docs/quickstart.md", "tests/test_cli.py runs the quickstart"),
    ("docs/rewards.md", "needs TRL"),
    ("docs/vllm.md", "needs the environment of vLLM"),
    ("docs/vllm.md", "needs a server on vLLM"),
    ("docs/vllm.md", "needs the environment of vLLM"),
    ("docs/vllm.md", "needs the environment of vLLM"),
    ("docs/vllm.md", "needs the environment of vLLM"),
    ("docs/whole-way.md", "tests/test_cli.py runs the quickstart"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with tiny_world(tmp_path_factory.mktemp("docs")) as made:
        yield made


@pytest.fixture
def page_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: None) -> Iterator[PageRun]:
    """In a folder with what the page names; what a page adds to this process is taken out again."""
    shutil.copytree(world.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    suites = dict(SUITES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with PageRun(port) as run:
        yield run
    SUITES.clear()
    SUITES.update(suites)
    sys.modules.pop("app", None)  # of a Space


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in RUN]
)
@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set",  # no GPU here
    "ignore:No steering was chosen",  # of a random model
)
def test_the_blocks_of(page: str, page_run: PageRun, world: World) -> None:
    if page in EMBEDDING:
        folder = world.folder.parent / "embedding"
        put(world.hub, EMBEDDER, Path(save_tiny_embedder(folder, tokenizer=byte_tokenizer())))
    for block in RUN[page]:
        page_run.block(block)


def test_blocks_that_are_not_run_have_a_reason() -> None:
    found = [(block.page, block.reason) for page in PAGES for block in blocks(page) if block.reason]
    assert found == NOT_RUN


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        text, found = page.read_text(encoding="utf-8"), blocks(page)
        assert text.count("```python") == sum(block.language == "python" for block in found), page
        assert text.count("<!-- not run") == sum(bool(block.reason) for block in found), page
    results = [page for page in DOCS.rglob("*.md") if page.parent.name == "results"]
    assert not any("```python" in page.read_text(encoding="utf-8") for page in results)


def test_every_verb_is_run() -> None:
    run = {words[0] for page in RUN.values() for block in page for words in block.commands()}
    verbs = set(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    assert run == verbs - {"quickstart"}
