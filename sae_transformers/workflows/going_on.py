"""Verbs that go on where they were stopped: what their parts depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..evaluation.journal import Journal, fingerprint, quick_fingerprint
from ..evaluation.results import versions
from ..modeling import SparseAutoencoder

if TYPE_CHECKING:
    from .settings.align_topic import TopicSettings
    from .settings.classify import ClassifySettings
    from .settings.feature_table import FeatureTableSettings
    from .settings.reduce_bias import BiasSettings

    GoingOn = ClassifySettings | FeatureTableSettings | TopicSettings | BiasSettings


def verb_journal(
    path: str | Path | None, model: nn.Module, sae: SparseAutoencoder, settings: GoingOn, *data: Any, **options: Any
) -> Journal | None:
    """The journal of a run with this model and SAE; None without a path.

    Args:
        model: of transformers.
        settings: their field `journal` does not count.
        data: whatever else all parts depend on, as JSON.
        options: of the SAE's `fingerprint`.
    """
    if path is None:
        return None
    base: Any = model
    told = {name: value for name, value in asdict(settings).items() if name != "journal"}
    about = {
        "model": [quick_fingerprint(base), base.config.to_dict(), str(base.device), str(base.dtype)],
        "sae": [fingerprint(sae, **options), sae.config.to_dict()],
        "settings": told,
        "data": data,
        "versions": dict(versions()),
    }
    return Journal(path, json.loads(json.dumps(about, default=str)))


@contextmanager
def forgotten_if_refused(journal: Journal | None) -> Iterator[None]:
    """Nothing stays of a run that began anew and ends with what the user has to change."""
    try:
        yield
    except (ValueError, TypeError):
        if journal is not None and not journal.found:
            journal.remove()
            with suppress(OSError):  # there are other files
                journal.path.parent.rmdir()
        raise


def went_on(journal: Journal | None) -> list[str]:
    """A line for a summary where a stopped run had done some."""
    return [f"Went on after {journal.found} parts of {journal.path}."] if journal is not None and journal.found else []


def rows_sha256(rows: Iterable[Tensor | Sequence[Any] | str]) -> str:
    """Of token ids, numbers or texts, row by row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.tolist() if isinstance(row, Tensor) else row).encode() + b"\n")
    return digest.hexdigest()
