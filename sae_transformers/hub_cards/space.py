"""The folder of a Space: a Gradio page that reads and steers a published model, at a revision that does not move."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import HfApi, hf_hub_download

from ..latents.output_files import whole_file

TEMPLATES = Path(__file__).parent / "templates" / "space"
FILES = ("app.py", "requirements.txt", "README.md")
GRADIO = "6.31.0"  # the version that the page was tested with
SHORT = 60  # characters: the Hub takes no longer description


def write_space(
    model_id: str,
    out: str | Path,
    *,
    revision: str | None = None,
    features: Mapping[str, int | tuple[int, int]] | None = None,
    title: str | None = None,
    licence: str | None = None,
) -> list[Path]:
    """Write app.py, requirements.txt and README.md.

    Args:
        model_id: of a published `SaeForCausalLM`. A local folder works too, for a page on this machine.
        out: folder.
        revision: commit of the model; by default the one that its main branch is at now.
        features: names for the page's list: name -> latent, or (SAE, latent). Concepts and named features of the
            model's own config are in it anyhow.
        title: of the page.
        licence: of the Space, as the Hub names licences.

    Returns:
        Their paths.

    Raises:
        ValueError: the model is no `SaeForCausalLM`, or has no such feature.
        OSError: it cannot be read.
    """
    config, revision = _config(model_id, revision)
    local = Path(model_id).is_dir()
    if local:  # the page is started from its own folder
        model_id = str(Path(model_id).resolve())
    entries: Sequence[Mapping[str, Any]] = config["saes"]
    saes = [int(entry["d_sae"]) for entry in entries]
    named = _named(entries)
    for name, given in (features or {}).items():
        sae, latent = (0, given) if isinstance(given, int) else given
        if not (0 <= sae < len(saes) and 0 <= latent < saes[sae]):
            raise ValueError(
                f"The model has SAEs 0 to {len(saes) - 1} with {saes} features. Received: {name!r} at {sae}:{latent}."
            )
        named[name] = (sae, latent)
    shown = Path(model_id).name if local else model_id
    title = title or f"Features of {shown.rpartition('/')[2]}"
    base = str(config.get("base_model_name_or_path") or "")
    header: dict[str, Any] = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "yellow",
        "sdk": "gradio",
    }
    header |= {"sdk_version": GRADIO, "app_file": "app.py", "pinned": False}
    header |= {"license": licence} if licence else {}
    header |= {"short_description": "Detect and steer with the features of an SAE"[:SHORT]}
    header |= {"tags": ["sparse-autoencoder", "steering"]}
    header |= {} if local else {"models": [model_id]}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"py": ascii, "comment": lambda text: " ".join(str(text).replace('"""', "'''").split())}
    facts = {
        "model_id": model_id, "shown": shown, "revision": revision, "title": title, "saes": saes,
        "features": list(named.items()), "base": "" if Path(base).is_absolute() else base, "gradio": GRADIO,
        "header": yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
    }  # fmt: skip
    texts = {Path(out) / name: environment.get_template(f"{name}.jinja").render(facts) for name in FILES}
    for path, text in texts.items():
        with whole_file(path) as draft:
            draft.write_text(text, encoding="utf-8", newline="\n")
    return list(texts)


def _config(model_id: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """The model's config and the commit that it is of; None for a local folder."""
    if Path(model_id).is_dir():
        if revision is not None:
            raise ValueError(f"A folder has no revisions. Received: revision={revision!r} for {model_id!r}.")
        path = Path(model_id) / "config.json"
    else:
        revision = HfApi().model_info(model_id, revision=revision).sha
        path = Path(hf_hub_download(model_id, "config.json", revision=revision))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in config.json. Received: {model_id!r}, {error}.") from error
    head = "AutoModelForCausalLM"
    if not isinstance(config, dict) or not config.get("saes") or head not in config.get("auto_map", {}):
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected a published SaeForCausalLM. Received: {model_id!r}, model_type={kind!r}.")
    if (config.get("architectures") or ["SaeForCausalLM"])[0] != "SaeForCausalLM":
        raise ValueError(f"A Space steers text: it needs a SaeForCausalLM. Received: {config['architectures'][0]!r}.")
    return config, revision


def _named(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Concepts and named features of all SAEs; a name that several have gets the SAE's number."""
    found: dict[str, tuple[int, int]] = {}
    for number, entry in enumerate(entries):
        labelled = {str(v): int(k) for k, v in entry.get("feature_names", {}).items() if str(k).isdecimal()}
        for name, latent in {**labelled, **entry.get("concepts", {})}.items():
            found[f"{name} (SAE {number})" if name in found else name] = (number, int(latent))
    return found
