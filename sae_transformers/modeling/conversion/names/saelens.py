"""SAELens' names of published SAEs: `gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical`. Works offline.

`saelens.json` is its registry (sae_lens/pretrained_saes.yaml) as rules, made by tests/scripts/saelens_registry.py.
What is not in it: numbers that were measured of an SAE, which its own files say where they are needed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("saelens.json")
PREFIX = "sae_lens:"
# SAELens' conversion function -> our format that reads the same files; its own files have no conversion function.
READERS = {
    "": "saelens",
    "connor_rob_hook_z": "Kissane (attention)",
    "deepseek_r1": "DeepSeek-R1 (qresearch)",
    "dictionary_learning_1": "dictionary_learning",
    "gemma_2": "Gemma Scope",
    "gemma_2_transcoder": "Gemma Scope",
    "gemma_3": "Gemma Scope 2",
    "goodfire": "Goodfire",
    "llama_scope": "Llama Scope",
    "llama_scope_r1_distill": "Llama Scope R1-Distill",
    "mntss_clt_layer_transcoder": "circuit-tracer, cross-layer",
    "mwhanna_transcoder": "circuit-tracer",
    "qwen_scope": "Qwen Scope",
}
REFUSED = {
    "temporal": "its encoder attends to earlier tokens, so a latent is no function of one hidden state",
}


# Where a reader's path is no path of the repository.
PATHS = {"mntss_clt_layer_transcoder": "W_enc_{}.safetensors"}


class RegisteredSae(NamedTuple):
    """One SAE of SAELens' registry.

    Attributes:
        release, sae_id: its name there.
        repository, path: where it lies on the Hub.
        base: Hub id of its model.
        reader: SAELens' conversion function, "" for its own files.
        neuronpedia: `model/source` of its page, "" where it has none.
        normalize: `normalize_activations` where the registry overrides what the files say, else "".
    """

    release: str
    sae_id: str
    repository: str
    path: str
    base: str
    reader: str
    neuronpedia: str
    normalize: str

    @property
    def name(self) -> str:
        """What `from_pretrained` takes: `sae_lens:release/sae_id`."""
        return f"{PREFIX}{self.release}/{self.sae_id}"

    @property
    def format(self) -> str | None:
        """Our format of its files, None where it is not read."""
        return READERS.get(self.reader)

    @property
    def refusal(self) -> str | None:
        """Why it is not read, None where it is."""
        return None if self.format else REFUSED[self.reader]


def version() -> str:
    """The release of SAELens whose registry this is."""
    return _table()["version"]


@cache
def saelens_releases() -> tuple[str, ...]:
    """The names of all releases, in the registry's order."""
    return tuple(name for name in _table() if name != "version")


def saes_of(release: str) -> Iterator[RegisteredSae]:
    """All SAEs of a release."""
    entry = _table()[release]
    facts = (entry["repository"], entry["base"], entry.get("reader", ""), entry.get("normalize", ""))
    for rule in entry["rules"]:
        for values in _rows(rule.get("of")):
            sae_id, path, page = (
                _filled(rule.get(field, ""), values)
                for field in ("id", "path" if "path" in rule else "id", "neuronpedia")
            )
            repository, base, reader, normalize = facts
            path = PATHS.get(reader, "{}").format(path)
            yield RegisteredSae(release, sae_id, repository, path, base, reader, page, normalize)


def find_registered(name: str) -> RegisteredSae | None:
    """The SAE that a name of SAELens' registry means, with or without `sae_lens:` before it; None where its first part
    names no release.

    Raises:
        ValueError: the release has no such SAE, or with `sae_lens:` there is no such release; says what is near.
    """
    release, _, sae_id = name.removeprefix(PREFIX).strip("/").partition("/")
    if release not in saelens_releases():
        if not name.startswith(PREFIX):
            return None
        close = difflib.get_close_matches(release, saelens_releases(), n=3, cutoff=0.4)
        raise ValueError(
            f"SAELens {version()} lists no release {release!r}; near are {', '.join(close) or 'none'}. "
            f"`sae-transformers attach --list --sae WORD` searches. Received: {name!r}."
        )
    ids = {sae.sae_id: sae for sae in saes_of(release)}
    if sae_id in ids:
        return ids[sae_id]
    if not sae_id and len(ids) == 1:
        return next(iter(ids.values()))
    close = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or list(ids)[:3]
    raise ValueError(
        f"SAELens' release {release} has {len(ids)} SAEs; near are {', '.join(close)}. Received: {name!r}."
    )


def search_registered(query: str) -> list[RegisteredSae]:
    """SAEs whose name, model, repository or Neuronpedia page holds every word of the query, whatever their case."""
    words = query.lower().removeprefix(PREFIX).split()
    return [sae for release in saelens_releases() for sae in saes_of(release) if _holds(sae, words)]


def _holds(sae: RegisteredSae, words: list[str]) -> bool:
    text = f"{sae.release}/{sae.sae_id} {sae.base} {sae.repository}/{sae.path} {sae.neuronpedia}".lower()
    return all(word in text for word in words)


@cache
def _table() -> Mapping[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _rows(tree: Any) -> Iterator[tuple[str, ...]]:
    """What the placeholders of a rule take together."""
    if tree is None:
        yield ()
    elif isinstance(tree, str):
        yield from ((value,) for value in _counted(tree))
    else:
        for values, branch in tree:
            rest = list(_rows(branch))
            yield from ((value, *row) for value in _counted(values) for row in rest)


def _counted(text: str) -> Iterator[str]:
    """`0-3,16k` as 0, 1, 2, 3, 16k."""
    for item in text.split(","):
        if match := re.fullmatch(r"(\d+)-(\d+)", item):
            yield from map(str, range(int(match[1]), int(match[2]) + 1))
        else:
            yield item


def _filled(pattern: str, values: tuple[str, ...]) -> str:
    return re.sub(r"\{(\d+)\}", lambda match: values[int(match[1])], pattern)
