"""Harvest made-up texts from a tiny model to a folder, as other processes than the test's must do it.

Arguments: folder, and what goes wrong: `nothing`, or `stall`: the writing of the second shard never ends.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sae_transformers.create_training_data.harvest import store as shards
from tests.create_training_data.harvest.test_store import harvest_words


def stalling_save(tensors: dict, path: Path, metadata: dict) -> None:
    if metadata["block"] != "1":
        save_file(tensors, path, metadata)
        return
    path.write_bytes(b"half a shard")
    while True:
        time.sleep(1)


def main(folder: Path, trouble: str) -> None:
    if trouble == "stall":
        shards.save_file = stalling_save  # pyright: ignore[reportAttributeAccessIssue]
    harvest_words(folder)


save_file = shards.save_file

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
