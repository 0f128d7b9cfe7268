"""Secrets, pickles and absolute paths are found, and what only looks like them is not."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from sae_transformers.hub_cards import opened_files
from sae_transformers.hub_cards.file_contents import SECRET, Found, absolute_paths, faults
from tests.hub_cards import folders

# Made here, so that no scanner takes this file for one that holds secrets.
LETTERS = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"
SECRETS = {
    "Hugging Face": "hf_" + LETTERS[:34],
    "OpenAI": "sk-proj-" + LETTERS[:24],
    "AWS": "AKIA" + "ABCDEFGHIJKLMNO7",
    "GitHub": "ghp_" + LETTERS[:36],
    "Google": "AIza" + LETTERS[:35],
    "Slack": "xoxb-" + "1234567890-abcdefghij",
    "Weights": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "login": "https://reader:" + "not-a-word@host.example/v1",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}


def secrets(path: Path) -> list[Found]:
    return [one for one in faults(path) if one.fault == SECRET]


def pickle_in(path: Path) -> Found | None:
    """The first reason that is no secret: a pickle, or an archive that might hold one."""
    return next((one for one in faults(path) if one.fault != SECRET), None)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_never_repeated(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(f"one\ntwo\nkey: {SECRETS[kind]}\n")
    (found,) = secrets(path)
    assert kind in found.what and found.where == "line 3"
    assert SECRETS[kind] not in str(found)


@pytest.mark.parametrize("text", ["https://host/v1?at=12:30@noon", "see https://a.example: b@c", "git@host:a/b"])
def test_an_address_without_a_login_is_no_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.md").write_text(text)
    assert not list(secrets(tmp_path / "notes.md"))


def test_a_secret_is_found_where_two_blocks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened_files, "BLOCK", 16384)
    path = tmp_path / "big.txt"
    for before in (16384 - 40, 16384 - 20, 16383, 16384, 2 * 16384 - 4096 - 20):
        path.write_bytes(b"." * (before - 1) + b" " + SECRETS["Hugging Face"].encode() + b"\n" + b"." * 40_000)
        assert len(list(secrets(path))) == 1, before


def test_a_secret_in_the_header_of_safetensors_is_found(tmp_path: Path) -> None:
    folders.safetensors(tmp_path / "m.safetensors", metadata={"note": SECRETS["AWS"]})
    assert len(list(secrets(tmp_path / "m.safetensors"))) == 1


@pytest.mark.parametrize("name", [".env", ".env.local", "server.pem", "id_rsa", ".netrc", "token"])
def test_files_that_hold_secrets_are_known_by_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert [one.what for one in secrets(tmp_path / name)] == ["a file that usually holds a secret"]


@pytest.mark.parametrize(
    "text",
    ["hf_loopback", "risk-adjusted-returns-of-2024-and-before", "sk-learn-is-not-a-key-at-all", "AKIAshort", "a" * 64,
     "self_" + LETTERS, "tokenizer", "-----BEGIN CERTIFICATE-----", "0123456789abcdef" * 4],
)  # fmt: skip
def test_words_are_no_secrets(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(text)
    assert not list(secrets(tmp_path / "a.py"))


class Harmless:
    def __reduce__(self) -> tuple:
        return print, ("a pickle ran",)


def numpy_file(value: object, *, packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, x=value) if packed else numpy.save(buffer, value, allow_pickle=True)  # pyright: ignore
    return buffer.getvalue()


def torch_file(*, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zip_file(content: bytes, name: str = "data/a") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)  # without the time: it is in the names of tests
    return buffer.getvalue()


PICKLES = {
    **{f"protocol {number}": pickle.dumps(Harmless(), protocol=number) for number in range(6)},
    "plain values": pickle.dumps([1, 2], protocol=4),
    "torch": torch_file(),
    "old torch": torch_file(old=True),
    "numpy objects": numpy_file(numpy.array([Harmless()], dtype=object)),
    "numpy records": numpy_file(numpy.array([(1, None)], dtype=[("a", int), ("b", object)])),
    "packed numpy objects": numpy_file(numpy.array([{}], dtype=object), packed=True),
    "zip": zip_file(pickle.dumps(Harmless())),
    "zip by name": zip_file(b"x", "a/data.pkl"),
    "gzip": gzip.compress(pickle.dumps(Harmless())),
    "a broken zip": b"PK\x03\x04" + bytes(50),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_found_under_an_innocent_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "weights.dat").write_bytes(PICKLES[kind])
    assert pickle_in(tmp_path / "weights.dat") is not None


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "A.PTH", "a.pkl", "a.ckpt", "a.joblib"])
def test_a_pickle_is_found_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert pickle_in(tmp_path / name) is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"(a) text.", b"class A:\n    pass\n", b"import os\n", b"{}", b'{"a": 1}', b"[1]", b"\x80", b"\x80abc",
     b"cat.", b"]\n.", numpy_file(numpy.zeros(3)), numpy_file(numpy.zeros(3), packed=True), zip_file(b"text"),
     gzip.compress(b"x", mtime=0), b"\x1f\x8bbroken", "é".encode()],
)  # fmt: skip
def test_other_files_are_no_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.dat").write_bytes(content)
    assert pickle_in(tmp_path / "file.dat") is None


def test_absolute_paths_are_found_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"a": [{"b": "/root/.cache/x"}], "/home/me/k": 1, "c": "http://a.b/c/d"})
    )
    found = {one.where: one.what for one in absolute_paths(tmp_path / "config.json")}
    assert found == {"a[0].b": "the absolute path '/root/.cache/x'", "/home/me/k": "the absolute path '/home/me/k'"}
    (tmp_path / "README.md").write_text("ok\nsee `/Users/me/model` and C:\\Users\\me\\x\n")
    assert [one.where for one in absolute_paths(tmp_path / "README.md")] == ["line 2", "line 2"]
    (tmp_path / "a.yaml").write_text(f"here: {tmp_path}\n")
    assert len(list(absolute_paths(tmp_path / "a.yaml"))) == 1
    folders.safetensors(tmp_path / "m.safetensors", metadata={"from": "/home/me/sae"})
    assert [one.where for one in absolute_paths(tmp_path / "m.safetensors")] == ["metadata"]
    (tmp_path / "broken.json").write_text('{"a": "/home/me/x"')
    assert [one.where for one in absolute_paths(tmp_path / "broken.json")] == ["line 1"]


def test_what_looks_like_a_path_is_none(tmp_path: Path) -> None:
    texts = ["and/or", "/api/models/x", "https://hub.co/home/me/x", "a /b", "1/2/3", "./home/me", "../root/x",
             "~/home/x", "org/name", "/", "//", "</root>", "s3://home/me"]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(texts))
    assert [one.what for one in absolute_paths(tmp_path / "a.json")] == []
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {"/home/me": 1, "/usr/bin": 2}}))
    assert not list(absolute_paths(tmp_path / "tokenizer.json"))
