"""Whether a pushed revision is what was meant: fetched by its commit into a new cache, compared, and loaded.

A model is loaded twice in a new interpreter that cannot import this library: from the Hub by id and commit, and from
the folder. Its SAEs must be equal, and its logits on a fixed input.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download

from .facts import HEADS, list_of, public_id, read_json
from .fresh_interpreter import run_without_library
from .publish import Publication, plain_errors

SCRIPT = """
import gc, hashlib
own = ("saes.", "feature_head.", "lm.score.", "lm.classifier.")

@torch.no_grad()
def look(name, **options):
    if task["base"]:
        options["base_model"] = task["base"]
    model = getattr(transformers, task["head"]).from_pretrained(name, trust_remote_code=True, dtype="auto", **options)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tensors = {}
    for key, tensor in sorted(model.state_dict().items()):
        if key.startswith(own):
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            told = f"{tensor.dtype} {tuple(tensor.shape)}"
            tensors[key] = told + hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    ids = (torch.arange(24) * 7919 + 11) % model.config.get_text_config().vocab_size
    answer = model(input_ids=ids[None].to(model.device), use_cache=False)[0].float().cpu()
    return f"{type(model).__module__}.{type(model).__qualname__}", tensors, answer

kind, pushed, answer = look(task["repo_id"], revision=task["commit"])
gc.collect()
_, local, expected = look(task["folder"])
print(json.dumps({
    "class": kind,
    "different": sorted(k for k in {**pushed, **local} if pushed.get(k) != local.get(k)),
    "tensors": len(pushed),
    "error": float((answer - expected).abs().max()) if answer.shape == expected.shape else None,
    "scale": float(expected.abs().max()),
}))
"""
# Equal code and weights on one machine; where data lie in memory may change the last bits.
TOLERANCE = 1e-3


class NotAsPushed(RuntimeError):
    """The revision on the Hub is not what the folder holds, or does not load."""


@dataclass(frozen=True)
class Verified:
    """files, tensors: that were compared. error: largest difference of an output; None where none was computed."""

    files: int
    tensors: int = 0
    error: float | None = None
    loaded: str = ""


def verify(publication: Publication, commit: str, *, base: str | None = None, api: HfApi | None = None) -> Verified:
    """Fetch a revision into a cache of its own and compare it with what was published; load a model from it.

    Args:
        publication: what was pushed.
        commit: the revision's id.
        base: a folder with the base, in place of fetching it; by default the one that the folder's config names.
        api: of the Hub.

    Raises:
        NotAsPushed: a file, a tensor or an output differs, or the model does not load.
        OSError: the Hub cannot be read.
    """
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "hub"
        with plain_errors(publication.repo_id):
            fetched = Path(
                snapshot_download(
                    publication.repo_id,
                    repo_type=publication.kind,
                    revision=commit,
                    cache_dir=cache,
                    token=api.token,
                    endpoint=api.endpoint,
                )
            )
        for name, path in publication.files.items():
            if not (fetched / name).is_file() or _digest(fetched / name) != _digest(path):
                raise NotAsPushed(f"{name} at {publication.repo_id}@{commit} is not what was sent. Push again.")
        config = read_json(publication.files["config.json"]) if publication.kind == "model" else {}
        if "auto_map" not in config:
            return Verified(len(publication.files))
        base = base or publication.base_folder or None
        found = _load(publication, commit, config, base, Path(scratch))
    if not found["class"].startswith("transformers_modules."):
        raise NotAsPushed(f"{publication.repo_id}@{commit} was not loaded by its own code but as {found['class']}.")
    if found["different"]:
        raise NotAsPushed(f"Loaded from {publication.repo_id}@{commit}, other tensors: {found['different'][:5]}.")
    if found["error"] is None or not found["error"] <= TOLERANCE * max(1.0, found["scale"]):
        raise NotAsPushed(
            f"Loaded from {publication.repo_id}@{commit}, the model answers otherwise than from {publication.folder}: "
            f"outputs differ by {found['error']}."
        )
    return Verified(len(publication.files), found["tensors"], found["error"], found["class"])


def _load(publication: Publication, commit: str, config: Any, base: str | None, scratch: Path) -> dict[str, Any]:
    architecture = str((list_of(config, "architectures") or [""])[0])
    task = {
        "repo_id": publication.repo_id,
        "commit": commit,
        "folder": str(publication.folder.resolve()),
        "base": base,
        "head": HEADS.get(architecture, "AutoModelForCausalLM"),
    }
    shared = _share_base(config, scratch / "hub") if base is None else None
    caches = {"HF_HUB_CACHE": str(scratch / "hub"), "HF_MODULES_CACHE": str(scratch / "modules")}
    try:
        return run_without_library(SCRIPT, task, scratch, **caches)
    except RuntimeError as error:
        raise NotAsPushed(
            f"{publication.repo_id}@{commit} has every file, but does not load on this machine: {str(error)[:500]}"
        ) from error
    finally:
        if shared is not None and not any(shared.iterdir()):
            shared.rmdir()  # nothing was fetched


def _share_base(config: Any, cache: Path) -> Path | None:
    """Let the base come from the usual cache, and stay there: it may be large, and is not what was pushed."""
    base = public_id(config.get("base_model_name_or_path"))
    if not base:
        return None
    name = "models--" + base.replace("/", "--")
    usual, link = Path(constants.HF_HUB_CACHE) / name, cache / name
    usual.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(usual.resolve(), target_is_directory=True)
    return usual


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
