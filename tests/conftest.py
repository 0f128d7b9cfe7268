"""For all tests."""

import functools
import gc

import typer.main
import typer.testing

# Each `CliRunner.invoke` would build all commands anew, for a tenth of a second.
setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))  # noqa: B010, not an exported name


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules are a heap that every full garbage collection walks, and `Trainer` asks
    for many: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
