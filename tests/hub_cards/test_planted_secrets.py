"""A made-up secret of each kind, wherever our own files may hold a text: none gets past the checks of `push`.

Secrets are put together here from random letters, so that no scanner takes this file for one that holds them.
"""

from __future__ import annotations

import base64
import bz2
import datetime
import gzip
import io
import json
import lzma
import pickle
import random
import string
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from sae_transformers.create_training_data.annotation.tables import FeatureAnnotation
from sae_transformers.hub_cards import opened_files
from sae_transformers.hub_cards.dashboard import write_dashboard
from sae_transformers.hub_cards.dashboard_data import DashboardData, SpanShown
from sae_transformers.hub_cards.facts import AuthorFacts, read_model
from sae_transformers.hub_cards.file_contents import SECRETS, faults
from sae_transformers.hub_cards.model_card import model_card
from sae_transformers.hub_cards.publish import CannotPublish, prepared
from tests.hub_cards import folders, made_up
from tests.hub_cards.made_up import evil

LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


class Maker:
    """Random words from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, n: int, alphabet: str = LETTERS) -> str:
        return "7" + "".join(self._random.choice(alphabet) for _ in range(n - 1))

    def web_token(self) -> str:
        return ".".join(("ey" + "J" + self(20), "ey" + "J" + self(30), self(43)))


MADE: dict[str, Callable[[Maker], str]] = {
    "a Hugging Face token": lambda word: "hf_" + word(34),
    "an OpenAI or Anthropic key": lambda word: "sk-" + "proj-" + word(40),
    "a Groq key": lambda word: "gsk_" + word(52),
    "an xAI key": lambda word: "xai-" + word(80),
    "a Perplexity key": lambda word: "pplx-" + word(48),
    "an NVIDIA key": lambda word: "nvapi-" + word(64),
    "a Replicate token": lambda word: "r8_" + word(37),
    "a LangSmith key": lambda word: "lsv2_" + "pt_" + word(32, HEX) + "_" + word(10, HEX),
    "a Pinecone key": lambda word: "pcsk_" + word(6) + "_" + word(60),
    "a Databricks token": lambda word: "dapi" + word(32, HEX),
    "an AWS access key": lambda word: "AKIA" + word(16, string.ascii_uppercase),
    "an AWS secret key": lambda word: "aws_secret_access_key = " + word(40, LETTERS + "/+"),
    "an Azure storage key": lambda word: "AccountKey=" + word(86, LETTERS + "/+") + "==",
    "an Azure key": lambda word: "AZURE_OPENAI_API_KEY=" + word(32, HEX),
    "an Azure client secret": lambda word: word(3) + "8Q~" + word(34),
    "a GitHub token": lambda word: "ghp_" + word(36),
    "a GitLab token": lambda word: "glpat-" + word(20),
    "an npm token": lambda word: "npm_" + word(36),
    "a PyPI token": lambda word: "pypi-" + "AgE" + word(120),
    "a Google API key": lambda word: "AIza" + word(35),
    "a Google client secret": lambda word: "GOCSPX-" + word(28),
    "a Slack token": lambda word: "xoxb-" + word(40),
    "a Stripe key": lambda word: "sk_" + "live_" + word(24),
    "a SendGrid key": lambda word: "SG" + "." + word(22) + "." + word(43),
    "a Telegram token": lambda word: word(9, string.digits) + ":AA" + word(33),
    "a Weights & Biases key": lambda word: "WANDB_API_KEY=" + word(40, HEX),
    "a JSON web token": lambda word: word.web_token(),
    "a login in an address": lambda word: "https://reader:" + word(16) + "@host.example/v1",
    "a private key": lambda word: "-----BEGIN RSA " + "PRIVATE KEY-----" + word(64),
}


def pieces(secret: str) -> list[str]:
    """As a tokenizer cuts it."""
    return ["see ", *(secret[i : i + 3] for i in range(0, len(secret), 3)), " there"]


def in_dashboard(folder: Path, secret: str, compress: bool = True, whole: bool = True) -> None:
    tokens = [f"see {secret} there"] if whole else pieces(secret)
    spans = {0: [SpanShown(2.0, tokens, [0.0] * len(tokens), 0, 1)]}
    data = DashboardData("made up", {}, spans=spans, annotations={0: FeatureAnnotation("", None, [], "good")})
    write_dashboard(data, folder / "dashboard.html", compress=compress)


def in_parquet(folder: Path, secret: str, tokens: bool = False) -> None:
    """Among other texts, so that the compression has something to do."""
    others = [f"the river {number} was wide and slow" for number in range(200)]
    rows = [*others, f"see {secret} there", *others]
    column = [pieces(row) for row in rows] if tokens else rows
    table = pyarrow.table({"feature": list(range(len(rows))), "span": column})
    pyarrow.parquet.write_table(table, folder / "spans.parquet", compression="gzip")


def in_json(folder: Path, secret: str) -> None:
    """Each character as its escape."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in secret)
    (folder / "notes.json").write_text(f'{{"note": "first line\\n{escaped}"}}')


def in_json_in_json(folder: Path, secret: str) -> None:
    inner = json.dumps({"tokens": pieces(secret)})
    (folder / "notes.jsonl").write_text(json.dumps({"ok": 1}) + "\n" + json.dumps({"answer": inner}) + "\n")


def in_gzip(folder: Path, secret: str) -> None:
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"see {secret}"}).encode()))


def in_archives(folder: Path, secret: str) -> None:
    """A zip in a compressed tar."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("texts/a.csv", f"text\nsee {secret} there\n")
    with tarfile.open(fileobj=outer, mode="w") as archive:
        member = tarfile.TarInfo("all/texts.zip")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    (folder / "texts.tar.xz").write_bytes(lzma.compress(outer.getvalue()))


def in_utf16(folder: Path, secret: str) -> None:
    (folder / "notes.txt").write_text(f"see {secret} there", encoding="utf-16")


def in_card(folder: Path, secret: str) -> None:
    card = model_card(read_model(folder), AuthorFacts(summary=f"Made with {secret} here."))
    (folder / "README.md").write_text(card)


PLACES: dict[str, Callable[[Path, str], None]] = {
    "dashboard": in_dashboard,
    "dashboard's tokens": lambda folder, secret: in_dashboard(folder, secret, whole=False),
    "plain dashboard": lambda folder, secret: in_dashboard(folder, secret, compress=False, whole=False),
    "parquet": in_parquet,
    "parquet's tokens": lambda folder, secret: in_parquet(folder, secret, tokens=True),
    "json": in_json,
    "json in json": in_json_in_json,
    "gzip": in_gzip,
    "archives": in_archives,
    "utf-16": in_utf16,
    "card": in_card,
}


def test_each_kind_has_a_made_up_one() -> None:
    assert set(MADE) == set(SECRETS) and len(MADE) * len(PLACES) >= 200


@pytest.mark.parametrize("place", PLACES)
def test_no_planted_secret_gets_past_the_checks(tmp_path: Path, place: str) -> None:
    missed = []
    for number, (kind, make) in enumerate(MADE.items()):
        secret = make(Maker(number))
        folder = folders.model(tmp_path / str(number))
        if number == 0:  # without it the folder passes; it is the same for all
            with prepared(folder, "me/m"):
                pass
        PLACES[place](folder, secret)
        try:
            with prepared(folder, "me/m"):
                missed.append(kind)
        except CannotPublish as refused:
            assert any(f" {kind}" in reason.what for reason in refused.reasons), (kind, str(refused))
            assert secret not in str(refused)
    assert not missed


# -- what is opened, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [*opened_files.CLOSED, b"\xfd7zXZ\x00", b"PK\x03\x04", b"BZh9"])
def test_an_archive_that_cannot_be_opened_is_refused(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "data.dat"
    path.write_bytes(mark + bytes(100))
    assert [one.fault for one in faults(path)] == ["closed"]
    path.write_bytes(b"." + mark[:2] + bytes(100))
    assert not list(faults(path))


def test_a_file_that_is_cut_short_is_read_as_far_as_it_goes_and_refused(tmp_path: Path) -> None:
    secret = MADE["a Groq key"](Maker(1))
    noise = "".join(random.Random(0).choices(LETTERS + " ", k=100_000))
    whole = gzip.compress(f"see {secret} there {noise}".encode())
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    assert {one.what for one in faults(tmp_path / "a.gz")} == {
        "a Groq key",
        "it cannot be opened: EOFError while it was read",
    }


@pytest.mark.parametrize("kind", ["gzip", "zip", "xz", "base64", "parquet"])
def test_what_opens_to_much_more_than_it_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(opened_files, "SMALLEST", 1 << 16)
    monkeypatch.setattr(opened_files, "PART", 1 << 12)
    blank = b" " * (1 << 20)
    path = tmp_path / "texts.dat"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", blank)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [blank.decode()]}), path, compression="gzip")
    elif kind == "base64":
        path.write_text("<p>" + base64.b64encode(gzip.compress(blank)).decode() + "</p>")
    else:
        path.write_bytes(gzip.compress(blank) if kind == "gzip" else lzma.compress(blank))
    (found,) = faults(path)
    assert found.fault == "closed" and "it opens to more than" in found.what
    monkeypatch.setattr(opened_files, "SMALLEST", 1 << 22)
    assert not list(faults(path))


def test_layers_have_an_end(tmp_path: Path) -> None:
    content = b"text"
    for depth in range(1, 7):
        content = gzip.compress(content)
        (tmp_path / "a.gz").write_bytes(content)
        assert [one.fault for one in faults(tmp_path / "a.gz")] == ["closed"] * (depth > opened_files.DEEPEST)


def test_the_place_of_a_secret_is_told(tmp_path: Path) -> None:
    secret = MADE["an npm token"](Maker(2))
    in_archives(tmp_path, secret)
    in_parquet(tmp_path, secret, tokens=True)
    in_dashboard(tmp_path, secret)
    told = {path.name: [one.where for one in faults(path)] for path in tmp_path.iterdir()}
    assert told == {
        "texts.tar.xz": ["xz, all/texts.zip, texts/a.csv, line 2"],
        "spans.parquet": ["column span"],
        "dashboard.html": ["gzip in base64, line 1"],
    }


@pytest.mark.parametrize("inside", ["tar", "xz", "bzip2", "gzip in a zip", "parquet"])
def test_a_pickle_is_found_in_what_is_packed(tmp_path: Path, inside: str) -> None:
    program = pickle.dumps(datetime.timedelta(3), protocol=4)
    path = tmp_path / "texts.dat"
    if inside == "tar":
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("a")
            member.size = len(program)
            archive.addfile(member, io.BytesIO(program))
    elif inside == "gzip in a zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", gzip.compress(program))
    elif inside == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"a": [b"none", program]}), path)
    else:
        path.write_bytes((lzma if inside == "xz" else bz2).compress(program))
    assert [one.fault for one in faults(path)] == ["pickle"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_after_other_bytes_is_found(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "notes.dat"
    path.write_bytes(b"some words, then\n" + pickle.dumps(datetime.timedelta(3), protocol=protocol) + b"\nand more")
    assert [one.what for one in faults(path)] == ["a pickle after other bytes"]


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folder, blob, elsewhere = folders.model(tmp_path / "m"), cache / "models--a--b" / "blobs" / "1", tmp_path / "diary"
    blob.parent.mkdir(parents=True)
    blob.write_text("of the Hub")
    elsewhere.write_text("of mine")
    (folder / "inside.txt").symlink_to(folder / "README.md")
    (folder / "cached.txt").symlink_to(blob)
    with prepared(folder, "me/m") as publication:
        assert {"inside.txt", "cached.txt"} <= set(publication.files)
    (folder / "outside.txt").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="outside.txt must be a file of the folder.*a link to .*diary"):
        prepared(folder, "me/m").__enter__()
    with prepared(folder, "me/m", exclude=["outside.txt"]) as publication:
        assert "outside.txt" not in publication.files


def test_a_snapshot_of_another_cache_can_be_pushed(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "1"
    blob.parent.mkdir(parents=True)
    blob.write_text("of the Hub")
    folder = folders.model(tmp_path / "models--a--b" / "snapshots" / "abc")
    (folder / "cached.txt").symlink_to(blob)
    with prepared(folder, "me/m") as publication:
        assert "cached.txt" in publication.files


# -- what is none -----------------------------------------------------------------------------------------------------


def test_our_own_files_hold_none(tmp_path: Path) -> None:
    write_dashboard(evil(), tmp_path / "evil.html")
    write_dashboard(made_up.example().made_up(8), tmp_path / "many.html")
    folders.spans(tmp_path / "spans")
    golden = Path(__file__).parent / "golden"
    docs = Path(__file__).parents[2] / "docs"
    for path in [*tmp_path.rglob("*"), *golden.iterdir(), *docs.rglob("*.md"), *docs.rglob("*.png")]:
        if path.is_file():
            assert not list(faults(path)), path


def test_numbers_and_words_hold_none(tmp_path: Path) -> None:
    """Random bytes and numbers, a vocabulary with the beginnings of keys, hashes, and lists of words."""
    numbers = random.Random(0)
    (tmp_path / "random.dat").write_bytes(b"." + numbers.randbytes(300_000))
    (tmp_path / "numbers.dat").write_bytes(numpy.arange(-20_000, 20_000, dtype=numpy.int64).tobytes())
    numpy.save(tmp_path / "normal.npy", numpy.random.default_rng(0).normal(size=30_000))
    words = ["hf", "_", "hf_", "sk", "sk-", "AKIA", "eyJ", "Q~", "api_key", "secret_access_key", "://", ":", "@",
             *("".join(numbers.choices(string.ascii_letters, k=6)) for _ in range(2_000))]  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "hashes.json").write_text(json.dumps({"key": numbers.randbytes(20).hex(), "sha256": "0a" * 32}))
    (tmp_path / "merges.json").write_text(json.dumps([[f" {a}", b] for a, b in zip(words, words[1:], strict=False)]))
    for path in tmp_path.iterdir():
        assert not list(faults(path)), path
