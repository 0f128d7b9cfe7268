"""Files of Neuronpedia's public store, fetched once and kept: `{modelId}/{source}` names one SAE's."""

from __future__ import annotations

import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from html import unescape
from pathlib import Path

from huggingface_hub import constants

from ....latents.output_files import whole_file
from ....latents.safe_texts import is_loopback
from ...packages import cache_folder, whole_or_not
from .neuronpedia import BATCH

STORE = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"  # a public bucket, listed by the API of S3
BUCKET = "s3://neuronpedia-datasets"
STORE_VARIABLE = "SAE_TRANSFORMERS_NEURONPEDIA"
PREFIX = "neuronpedia:"
NAME = re.compile(r"[\w.-]+/\d+-[\w.-]+")  # a source begins with its layer
WANTED = ("explanations", "features")
LONGEST_LIST = 2**24  # bytes of one answer of the store's list
MOST_FILES = 10_000
LARGEST_FILE = 2**31
TIMEOUT_S = 60.0


def is_neuronpedia_id(name: str) -> bool:
    """Whether a text can be `{modelId}/{source}`, or begins with `neuronpedia:`."""
    return name.startswith(PREFIX) or (bool(NAME.fullmatch(name)) and not name.startswith("."))


def fetch_source(name: str, *, store: str | None = None, progress: Callable[[int, int], object] | None = None) -> Path:
    """The folder of a source's explanations and features, out of the cache where it is there.

    Nothing about this machine or its user is sent. The cache is $SAE_TRANSFORMERS_CACHE/neuronpedia.

    Args:
        name: `{modelId}/{source}`, as in the address of its page: `gemma-3-270m/12-gemmascope-2-res-16k`.
        store: address of the store; by default $SAE_TRANSFORMERS_NEURONPEDIA, else Neuronpedia's own.
        progress: called with (files done, files).

    Raises:
        ValueError: no such id, or no https address.
        OSError: the store cannot be reached, or has nothing of that name; the message says what to fetch.
    """
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"Expected an id as 'modelId/source', such as 'gemma-3-270m/12-gemmascope-2-res-16k'. Received: {name!r}."
        )
    store = (store or os.environ.get(STORE_VARIABLE) or STORE).rstrip("/")
    address = urllib.parse.urlsplit(store)
    if address.scheme != "https" and not (address.scheme == "http" and is_loopback(address.hostname)):
        raise ValueError(f"The store must be reached by https. Received: {store!r}.")
    kept = "neuronpedia" if store == STORE else f"neuronpedia-{re.sub(r'[^A-Za-z0-9.-]+', '-', address.netloc)}"
    target = cache_folder() / kept / name
    if target.is_dir():
        return target
    how = (
        f"Fetch them where there is a network, `aws s3 cp --no-sign-request --recursive {BUCKET}/v1/{name} FOLDER` "
        f"(explanations/ and features/ are read), and give FOLDER, or put it at {str(target)!r}."
    )
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"The annotations {name!r} are not in the cache, and this is offline mode. {how}")
    opener = _opener(address.hostname)
    try:
        files = [file for folder in WANTED for file in _listed(opener, store, f"v1/{name}/{folder}/")]
        if not files:
            raise FileNotFoundError(
                f"Neuronpedia's store has no explanations and no features of that name, the modelId/source of a page. "
                f"Received: {name!r}."
            )
        with whole_or_not(target) as folder:
            for done, key in enumerate(files, 1):
                _fetch(opener, f"{store}/{urllib.parse.quote(key)}", folder / Path(key).parent.name / Path(key).name)
                if progress is not None:
                    progress(done, len(files))
    except urllib.error.URLError as error:
        reason = error.reason if not isinstance(error, urllib.error.HTTPError) else f"status {error.code}"
        raise OSError(f"{store} gave no annotations {name!r} ({reason}). {how}") from error
    return target


def _opener(host: str | None) -> urllib.request.OpenerDirector:
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(host) else []  # the environment's, or none
    return urllib.request.build_opener(_NoRedirect, *proxies)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *request: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None  # which is an error: no address but the one that was named


def _listed(opener: urllib.request.OpenerDirector, store: str, prefix: str) -> list[str]:
    """The keys of the batches under a prefix."""
    keys: list[str] = []
    token = ""
    while len(keys) <= MOST_FILES:
        query = {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
        with opener.open(f"{store}/?{urllib.parse.urlencode(query)}", timeout=TIMEOUT_S) as answer:
            text = answer.read(LONGEST_LIST).decode("utf-8", errors="replace")
        found = map(unescape, re.findall(r"<Key>([^<]*)</Key>", text))
        keys += [key for key in found if key.startswith(prefix) and BATCH.fullmatch(key.removeprefix(prefix))]
        following = re.search(r"<NextContinuationToken>([^<]+)</NextContinuationToken>", text)
        if following is None:
            return keys
        token = unescape(following[1])
    raise OSError(f"The store lists more than {MOST_FILES:,} files under {prefix!r}.")


def _fetch(opener: urllib.request.OpenerDirector, address: str, path: Path) -> None:
    with opener.open(address, timeout=TIMEOUT_S) as answer, whole_file(path) as draft, draft.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        if size > LARGEST_FILE:
            raise OSError(f"{address} has {size:,} bytes; expected {LARGEST_FILE:,} at most.")
        shutil.copyfileobj(answer, file)
        if size and file.tell() != size:
            raise OSError(f"{address} was cut short: {file.tell():,} of {size:,} bytes. Try again.")
