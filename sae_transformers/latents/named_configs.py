"""Settings in YAML files: one's own, or one of the library's by name. No torch is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_named_config(config: str | Path, folder: Path, kind: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        config: a file, or the name of one in `folder`, without its ending.
        folder: where the library's own are. kind: what they are called, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or no mapping.
    """
    import yaml

    path, own = Path(config), folder / f"{config}.yaml"
    if not path.is_file() and own.is_file():
        path = own
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise FileNotFoundError(f"There is no file {str(config)!r}, and the library's own {kind} are {known}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings. Received: {type(values).__name__}.")
    return values
