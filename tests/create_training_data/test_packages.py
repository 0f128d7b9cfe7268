import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sae_transformers.create_training_data import packages


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("thing/data.csv"), "a,b\n")
    return buffer.getvalue()


WHEEL = wheel()
CHOSEN = packages.Wheel("thing==1.0", hashlib.sha256(WHEEL).hexdigest())


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, fail: str | None = None) -> None:
    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("-d") + 1])
        assert command[command.index("--only-binary") + 1] == ":all:" and "--no-deps" in command
        if fail is None:
            (folder / "thing-1.0-py3-none-any.whl").write_bytes(WHEEL)
        return subprocess.CompletedProcess(command, 0 if fail is None else 1, "", fail or "")

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_a_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    folder = packages.download_package(CHOSEN, tmp_path)
    assert packages.find_in(folder, "*.csv").read_text() == "a,b\n"
    with pytest.raises(OSError, match=r"\*\.gguf"):
        packages.find_in(folder, "*.gguf")


def test_a_failed_download_names_the_package_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, fail="WARNING: retrying\nERROR: no such version\nsee also")
    with pytest.raises(OSError, match=r"'thing==9'.*ERROR: no such version"):
        packages.download_package(packages.Wheel("thing==9", "0"), tmp_path)


def test_another_file_than_the_chosen_one_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    with pytest.raises(OSError, match=f"is not the file that was chosen.*Expected: SHA-256 0000.*{CHOSEN.sha256}"):
        packages.download_package(packages.Wheel("thing==1.0", "0" * 64), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing-1.0-py3-none-any.whl"]


def test_a_source_package_is_not_built(tmp_path: Path) -> None:
    """With the real pip and a folder for an index, whose one package is a source that would leave a file behind."""
    source, ran, index = tmp_path / "thing-1.0", tmp_path / "ran", tmp_path / "index"
    source.mkdir()
    index.mkdir()
    (source / "setup.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: thing\nVersion: 1.0\n")
    with tarfile.open(index / "thing-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "thing-1.0")
    (out := tmp_path / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        with pytest.raises(OSError, match="thing==1.0.*from versions: none"):
            packages.download_package(packages.Wheel("thing==1.0", "0" * 64), out)
    assert not ran.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), packages.whole_or_not(tmp_path / "a" / "target") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with packages.whole_or_not(tmp_path / "a" / "target") as folder:
        (folder / "file").write_text("first")
        assert not (tmp_path / "a" / "target").exists()
    with packages.whole_or_not(tmp_path / "a" / "target") as folder:
        (folder / "file").write_text("second")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["target"]
    assert (tmp_path / "a" / "target" / "file").read_text() == "first"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAE_TRANSFORMERS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "sae_transformers"
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path / "own"))
    assert packages.cache_folder() == tmp_path / "own"


def test_a_hub_that_nobody_serves_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(packages.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert packages.hub_answers(timeout_s=1) is False
    monkeypatch.setattr(packages.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(packages.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked in offline mode"))
    assert packages.hub_answers() is False
