"""Files that are whole or absent, in folders that one run at a time writes to."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.latents.output_files import locked_file, locked_folder, whole_file, writes_to
from sae_transformers.modeling import output_files as published
from tests.tiny import tiny_model, tiny_sae

HOLD = """
import sys
from sae_transformers.latents.output_files import locked_file, locked_folder
with (locked_folder if sys.argv[1] == "folder" else locked_file)(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(place: Path, kind: str = "folder") -> Iterator[subprocess.Popen]:
    """Another process that writes to a place until the block ends."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, kind, str(place)], text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("whole", [whole_file, published.whole_file], ids=["library", "published"])
def test_a_file_is_there_whole_or_not_at_all(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole(path) as draft:
        draft.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["table.csv"]
    drafts = []
    for _ in range(2):
        with whole(path) as draft:
            assert draft.parent == tmp_path and draft.is_file() and path.read_text() != "new"
            drafts.append(draft)
            draft.write_text("new")
            draft.chmod(0o600)  # as safetensors does
        path.write_text("other")
    assert drafts[0] != drafts[1]  # nobody can put a link there beforehand
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path) as other:
        for entered in (locked_folder, published.locked_folder):
            with pytest.raises(BlockingIOError, match="One run at a time writes to"), entered(tmp_path):
                pass
        with pytest.raises(BlockingIOError, match=f"process {other.pid} of .*, since 20.*give another"):
            locked_folder(tmp_path).__enter__()
        with locked_folder(tmp_path, ".lock-1"):  # processes that share a folder have one each
            assert names(tmp_path) == [".lock", ".lock-1"]
    with locked_folder(tmp_path):  # killed, it holds nothing
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert names(tmp_path) == []


def test_a_file_has_a_lock_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "new" / "table"
    with held(table, "file"):
        with pytest.raises(BlockingIOError, match="table"), locked_file(table):
            pass
        with locked_file(tmp_path / "new" / "other"), locked_folder(tmp_path / "new"):
            pass
    with locked_file(table), locked_file(None):
        table.touch()
    assert names(table.parent) == ["table"]


def test_a_thread_enters_again_and_another_does_not(tmp_path: Path) -> None:
    def enter() -> None:
        with locked_folder(tmp_path):
            pass

    with ThreadPoolExecutor(1) as threads:
        with (
            locked_folder(tmp_path), published.locked_folder(tmp_path), locked_folder(tmp_path),
            pytest.raises(BlockingIOError),
        ):  # fmt: skip
            threads.submit(enter).result()
        threads.submit(enter).result()
    assert names(tmp_path) == []


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (".results.json.0123456789ab.draft", ".hidden", "notes.draft"):
        (tmp_path / name).touch()
    (tmp_path / ".lock").write_text("process 1 of elsewhere")
    with locked_folder(tmp_path):
        assert names(tmp_path) == [".hidden", ".lock", "notes.draft"]
    (tmp_path / ".model.safetensors.0123456789ab.draft").touch()
    with published.locked_folder(tmp_path):
        assert names(tmp_path) == [".hidden", ".lock", "notes.draft"]
    assert names(tmp_path) == [".hidden", "notes.draft"]


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ValueError), locked_folder(out):
        raise ValueError
    assert names(tmp_path) == []
    with locked_folder(out):
        (out / "result").touch()
    assert names(out) == ["result"]


def test_addresses_are_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with locked_folder("s3://bucket/states"), locked_folder(None):
        assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for entered in (locked_folder(tmp_path / "file"), locked_file(tmp_path / "file" / "table")):
        with pytest.raises(OSError, match="file' cannot be written; give another"), entered:
            pass
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="cannot be written"), locked_folder(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_function_holds_the_folder_it_writes_to(tmp_path: Path) -> None:
    @writes_to("out")
    def write(value: int, out: Path | None = None) -> list[str]:
        return [] if out is None else [*names(out), str(value)]

    assert write(3, tmp_path) == write(value=3, out=tmp_path) == [".lock", "3"] and write(3) == []
    with held(tmp_path), pytest.raises(BlockingIOError):
        write(3, tmp_path)


def test_two_do_not_save_into_one_folder(tmp_path: Path) -> None:
    model, sae = tiny_model(), tiny_sae()
    model.config.weights_scope = "full"
    for one, out in ((model, tmp_path / "model"), (sae, tmp_path / "sae")):
        one.save_pretrained(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert not [name for name in before if name.startswith(".")]
        with changed(one), held(out) as other:
            with pytest.raises(BlockingIOError, match="One run at a time"):
                one.save_pretrained(out)
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before
            other.send_signal(signal.SIGKILL)
            other.wait()
            one.save_pretrained(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} != before


@contextmanager
def changed(module: Any) -> Iterator[None]:
    """Other weights, so that what is written is seen."""
    for parameter in module.parameters():
        parameter.data.add_(1)
    yield
