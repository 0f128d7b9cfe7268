"""Neuronpedia's store on 127.0.0.1: fetched once, kept, and told what to fetch where it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from sae_transformers.create_training_data.annotation.sources import download
from sae_transformers.create_training_data.annotation.sources.download import fetch_source, is_neuronpedia_id
from tests.create_training_data.annotation.sources.layouts import MODEL, SOURCE, write_bulk

NAME = f"{MODEL}/{SOURCE}"


class Store:
    """A bucket over HTTP: lists two keys an answer, as S3 does a thousand."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.broken = ""  # a key's end that is answered short
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.asked.append(self.path)
                address = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(address.query).items()}
                file = folder / unquote(address.path).lstrip("/")
                if query.get("list-type") == "2":
                    keys = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
                    keys = [key for key in keys if key.startswith(query["prefix"])]
                    start = int(query.get("continuation-token", "0 &")[:-2])
                    more = f"<NextContinuationToken>{start + 2} &amp;</NextContinuationToken>"
                    body = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys[start : start + 2])
                    self.answer(f"<List>{body}{more if start + 2 < len(keys) else ''}</List>".encode())
                elif address.path.startswith("/away/"):
                    self.send_response(302)
                    self.send_header("Location", "http://127.0.0.1:9/")
                    self.end_headers()
                elif file.is_file():
                    self.answer(file.read_bytes(), bool(store.broken) and self.path.endswith(store.broken))
                else:
                    self.send_error(404)

            def answer(self, body: bytes, cut: bool = False) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    write_bulk(tmp_path / "bucket" / "v1" / NAME, rows_each=1)
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    made = Store(tmp_path / "bucket")
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_fetched_once_and_kept(store: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = fetch_source(NAME, store=store.url, progress=lambda *counts: seen.append(counts))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [f"explanations/batch-{n}.jsonl.gz" for n in range(4)] + [
        f"features/batch-{n}.jsonl.gz" for n in range(3)
    ]
    original = tmp_path / "bucket" / "v1" / NAME
    assert all((folder / name).read_bytes() == (original / name).read_bytes() for name in files)
    assert folder.is_relative_to(tmp_path / "cache") and seen == [(n, 7) for n in range(1, 8)]
    asked = len(store.asked)
    assert fetch_source(f"neuronpedia:{NAME}", store=store.url) == folder and len(store.asked) == asked


def test_the_address_is_that_of_the_environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_TRANSFORMERS_NEURONPEDIA", store.url + "/")
    assert fetch_source(NAME).is_dir() and store.asked


def test_offline_it_says_what_to_fetch_and_where_to(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline mode.*aws s3 cp.*explanations/ and features/") as error:
        fetch_source(NAME, store=store.url)
    assert NAME in str(error.value) and str(tmp_path / "cache") in str(error.value) and not store.asked


def test_no_network(store: Store, tmp_path: Path) -> None:
    store.server.shutdown()
    store.server.server_close()
    with pytest.raises(OSError, match=r"gave no annotations.*refused.*s3://neuronpedia-datasets/v1/"):
        fetch_source(NAME, store=store.url)


def test_what_is_not_there(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="no explanations and no features of that name.*other/3-none"):
        fetch_source("other/3-none", store=store.url)


def test_half_a_download_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.broken = "features/batch-1.jsonl.gz"
    with pytest.raises(OSError, match=r"batch-1\.jsonl\.gz was cut short"):
        fetch_source(NAME, store=store.url)
    assert not list((tmp_path / "cache").rglob("*.gz"))
    store.broken = ""
    assert fetch_source(NAME, store=store.url).is_dir()


def test_no_redirect_is_followed_and_no_plain_http(store: Store) -> None:
    with pytest.raises(OSError, match="gave no annotations"):
        fetch_source(NAME, store=f"{store.url}/away")
    with pytest.raises(ValueError, match="by https. Received: 'http://example.org'"):
        fetch_source(NAME, store="http://example.org")


@pytest.mark.parametrize(
    "name", ["../x/1-y", "a/../1-b", "/etc/1-x", "a/b/c", "neuronpedia:../../x", "neuronpedia:a/..", ""]
)
def test_names_that_are_none(name: str, store: Store) -> None:
    with pytest.raises(ValueError, match="Expected an id as 'modelId/source'"):
        fetch_source(name, store=store.url)


def test_which_names_are_of_neuronpedia() -> None:
    known = ["gemma-3-270m/12-gemmascope-2-res-16k", "gpt2-small/6-res_scefr-ajt", "neuronpedia:m/blocks"]
    assert all(map(is_neuronpedia_id, known))
    assert not any(map(is_neuronpedia_id, ["me/my-sae", "google/gemma-scope-2b", "./a/1-b", "a/1-b/c", "1-x"]))
    assert download.STORE.startswith("https://")
