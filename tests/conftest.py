"""For all tests."""

import gc


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules are a heap that every full garbage collection walks, and `Trainer` asks
    for many: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
