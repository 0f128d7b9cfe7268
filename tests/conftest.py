"""For all tests."""

import functools
import gc
from collections.abc import Iterator

import pytest
import transformers
import typer.main
import typer.testing

# Each `CliRunner.invoke` would build all commands anew, for a tenth of a second.
setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))  # noqa: B010, not an exported name


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules are a heap that every full garbage collection walks, and `Trainer` asks
    for many: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """So stays what a file of tests leaves behind: modules that it was the first to import, and its caches."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A verb owns its process and sets threads and logging for all of it; tests share theirs. Lines are wide."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("COLUMNS", "220")
    verbosity, progress_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    transformers.logging.set_verbosity(verbosity)
    if progress_bar:
        transformers.logging.enable_progress_bar()
