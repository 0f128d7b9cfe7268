"""What a card is made of: a model's config and what its author says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

HEADS = {
    "SaeForCausalLM": "AutoModelForCausalLM",
    "SaeForSequenceClassification": "AutoModelForSequenceClassification",
    "SaeModel": "AutoModel",
}
# SaeConfig's own fields and the base's id are enough for a card; the rest of config.json is left alone.
REPO_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
LISTS = ("authors", "languages", "datasets", "methods", "tags")


@dataclass(frozen=True)
class AuthorFacts:
    """What no file of a model says; everything is optional, and Markdown is welcome in the longer ones.

    repo_id: `user/name` on the Hub. base: the base's id there, where the config names a folder.
    summary: a sentence or two.
    licence: a short name of the Hub's list, such as apache-2.0; licence_name and licence_link for another one.
    languages: ISO codes. datasets: Hub ids. training_data: what the SAEs and heads were fitted to, and its licence.
    intended_use, limits, contact: shown as they are. methods: of `citations.BIBTEX`, what the files do not show.
    citation: BibTeX of the author's own. command: what reproduces the model, where it is not the evaluation's.
    """

    repo_id: str = ""
    base: str = ""
    summary: str = ""
    authors: Sequence[str] = ()
    licence: str = ""
    licence_name: str = ""
    licence_link: str = ""
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    training_data: str = ""
    intended_use: str = ""
    limits: str = ""
    contact: str = ""
    methods: Sequence[str] = ()
    tags: Sequence[str] = ()
    citation: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        if self.repo_id and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo_id):
            raise ValueError(f"`repo_id` must be user/name. Received: repo_id={self.repo_id!r}.")
        if self.base and not public_id(self.base):
            raise ValueError(f"`base` must be a model's id on the Hub. Received: base={self.base!r}.")


SPELLINGS = {"license": "licence", "license_name": "licence_name", "license_link": "licence_link",
             "language": "languages", "author": "authors", "dataset": "datasets"}  # fmt: skip


def read_author_facts(path: str | Path | None) -> AuthorFacts:
    """The facts of a YAML or JSON file; none without a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mapping, or has a field that is unknown or of another type.
    """
    if path is None:
        return AuthorFacts()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a YAML or JSON file of facts. Received: {str(path)!r}, which is not there.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return author_facts({} if given is None else given, str(path))


def author_facts(given: Any, where: str = "facts") -> AuthorFacts:
    """The same from a mapping."""
    known = [f.name for f in fields(AuthorFacts)]
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(known)}. Received: {type(given).__name__}.")
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = SPELLINGS.get(key, key)
        if name not in known:
            raise ValueError(f"{where} may say {', '.join(known)}. Received: {key!r}.")
        if name in LISTS:
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ValueError(f"`{key}` in {where} must be a text or a list of texts. Received: {key}={value!r}.")
        elif not isinstance(value, str):
            raise ValueError(f"`{key}` in {where} must be a text. Received: {key}={value!r}.")
        values[name] = value
    return AuthorFacts(**values)


@dataclass(frozen=True)
class SaeFacts:
    """An SAE as its entry in a config says; see `SparseAutoencoderConfig`."""

    number: int
    entry: Mapping[str, Any]

    @property
    def place(self) -> str:
        if self.entry.get("hook"):
            return str(self.entry["hook"])
        if self.entry.get("layer") is None:
            return ""
        return f"layers.{self.entry['layer']}.{self.entry.get('site') or 'resid_post'}"

    @property
    def d_sae(self) -> int:
        return int(self.entry["d_sae"])

    @property
    def activation(self) -> str:
        kind, k = str(self.entry.get("activation", "relu")), self.entry.get("k")
        return kind if k is None else f"{kind}, k = {k}"

    @property
    def concepts(self) -> dict[str, int]:
        return dict(self.entry.get("concepts") or {})

    @property
    def feature_names(self) -> dict[int, str]:
        return {int(feature): str(name) for feature, name in (self.entry.get("feature_names") or {}).items()}

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.entry.get("metadata") or {})


@dataclass(frozen=True)
class ModelFacts:
    """A model's folder, or that of one SAE alone: then `auto_class` is empty."""

    folder: Path
    config: Mapping[str, Any]
    saes: Sequence[SaeFacts]
    auto_class: str = ""
    files: Sequence[str] = field(default_factory=tuple)

    @property
    def base(self) -> str:
        """The base's id on the Hub; empty where it is a folder or not said."""
        return public_id(self.config.get("base_model_name_or_path")) or self._made_for()

    def _made_for(self) -> str:
        named = {public_id(sae.metadata.get("base_model")) for sae in self.saes}
        return named.pop() if len(named) == 1 else ""

    @property
    def base_type(self) -> str:
        return str((self.config.get("text_config") or {}).get("model_type", "")) or "language model"

    @property
    def self_contained(self) -> bool:
        return self.config.get("weights_scope") == "full"


def public_id(name: Any) -> str:
    """`name` if it looks like a model's id on the Hub and is no folder here; else empty."""
    text = str(name or "")
    return text if REPO_ID.fullmatch(text) and not Path(text).is_dir() else ""


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Save it again.") from error


def read_model(folder: str | Path) -> ModelFacts:
    """The facts of a folder that `save_pretrained` wrote, of a model or of one SAE.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no such config.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected the folder of a model, with its config.json. Received: {str(folder)!r}, where there is none."
        )
    config = read_json(folder / "config.json")
    entries = config.get("saes") if isinstance(config, Mapping) else None
    if isinstance(config, Mapping) and entries is None and {"d_in", "d_sae"} <= set(config):
        entries, auto_class = [config], ""
    else:
        auto_class = HEADS.get(str((list_of(config, "architectures") or [""])[0]), "AutoModelForCausalLM")
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and "d_sae" in e for e in entries):
        raise ValueError(
            f"{folder / 'config.json'} must be of a model with SAEs, or of an SAE. Received: a config with "
            f"{sorted(config)[:8] if isinstance(config, Mapping) else type(config).__name__}."
        )
    saes = tuple(SaeFacts(number, entry) for number, entry in enumerate(entries))
    names = tuple(sorted(path.name for path in folder.iterdir()))
    return ModelFacts(folder, config, saes, auto_class, names)


def list_of(config: Any, name: str) -> list[Any]:
    value = config.get(name) if isinstance(config, Mapping) else None
    return value if isinstance(value, list) else []
