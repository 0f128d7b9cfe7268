"""A training run as one YAML file: what is trained, on which data, how. Every value can be overridden by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ...latents.named_configs import read_named_config
from ...modeling import SparseAutoencoder, SparseAutoencoderConfig
from .arguments import SaeLossArguments, SaeTrainingArguments

CONFIGS = Path(__file__).parent / "configs"
# What a method means before anything else is said.
METHODS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {"finetune_dead": True, "weight_init": "keep", "bias_init": "keep"},
    "condition": {},
}
SECTIONS = ("method", "data", "eval_data", "start_from", "sae", "training")


@dataclass
class Recipe:
    """One run.

    method: `pretrain`, `finetune` (needs `start_from`) or `condition` (needs concepts and labels).
    data, eval_data: folders or URLs of a harvest.
    start_from: a saved SAE to go on with.
    sae: settings of each new SAE, as `SparseAutoencoderConfig` takes them; d_in comes from the data.
    training: settings of the run, as `SaeTrainingArguments` takes them.
    """

    method: str = "pretrain"
    data: str | None = None
    eval_data: str | None = None
    start_from: str | None = None
    sae: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: method={self.method!r}.")
        if self.method == "finetune" and not self.start_from:
            raise ValueError("`method: finetune` goes on with a trained SAE; name it with `start_from`.")
        if self.method == "condition" and not self.start_from and not all(sae.get("concepts") for sae in self.sae):
            raise ValueError(
                '`method: condition` needs the `concepts` of each SAE, name and latent, as in {"toxicity": 0}. '
                f"Received: sae={self.sae!r}."
            )

    def make_saes(self, widths: Mapping[str, int]) -> list[SparseAutoencoder]:
        """The SAEs to train; what their width is, the data say.

        Args:
            widths: of the hidden states of each place.
        """
        if self.start_from:
            sae = SparseAutoencoder.from_pretrained(self.start_from, **_place(self.sae))
            if self.sae and self.sae[0].get("concepts"):
                sae.config.concepts = dict(self.sae[0]["concepts"])
            return [sae]
        if not self.sae:
            raise ValueError("The recipe names no `sae` to train.")
        saes = []
        for settings in self.sae:
            probe = SparseAutoencoderConfig.from_dict({"d_in": 1, **settings})
            if probe.read_at not in widths:
                raise ValueError(f"The data holds {', '.join(widths)}. Received: an SAE at {probe.read_at!r}.")
            sizes = {"d_in": widths[probe.read_at], "d_out": widths.get(probe.write_at)}
            saes.append(SparseAutoencoder(SparseAutoencoderConfig.from_dict({**sizes, **settings})))
        return saes

    def make_arguments(self) -> SaeTrainingArguments:
        """The checked arguments of the run."""
        words = [
            word for name, value in {**METHODS[self.method], **self.training}.items() for word in _flag(name, value)
        ]
        return _Parser(SaeTrainingArguments).parse_args_into_dataclasses(words)[0]  # pyright: ignore[reportArgumentType]


def read_recipe(config: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file, or one of this library's by its name, and apply overrides.

    Args:
        config: a path, or a name such as `scar` (`configs/scar.yaml`); None for overrides alone.
        overrides: `--name value` words; a name of `Recipe`, of `SparseAutoencoderConfig` (for every SAE) or of
            `SaeTrainingArguments`.

    Raises:
        ValueError: the file is not as expected, or a name is unknown.
        FileNotFoundError: there is no such file.
    """
    values = _read_yaml(config) if config is not None else {}
    sae = values.get("sae", [])
    values["sae"] = [dict(one) for one in (sae if isinstance(sae, list) else [sae])]
    values["training"] = dict(values.get("training", {}))
    sae_names = {f.name for f in fields(SparseAutoencoderConfig)}
    training_names = {f.name for f in fields(SaeTrainingArguments)}
    for name, value in _pairs(overrides):
        if name in SECTIONS:
            values[name] = value
        elif name in sae_names:
            values["sae"] = values["sae"] or [{}]
            for one in values["sae"]:
                one[name] = yaml.safe_load(value)
        elif name in training_names:
            # YAML takes `no` for false, which is a strategy too; a flag that is true or false understands the word.
            values["training"][name] = value if value in ("no", "yes") else yaml.safe_load(value)
        else:
            raise _unknown(name, {*SECTIONS, *sae_names, *training_names})
    for name in values["training"]:
        if name not in training_names:
            raise _unknown(name, training_names)
    return Recipe(**values)


def own_options() -> list[tuple[str, Any, str]]:
    """Name, default and meaning of each training option that is not `transformers.TrainingArguments`' own."""
    own = {**SaeLossArguments.__annotations__, **SaeTrainingArguments.__annotations__}
    return [(f.name, f.default, f.metadata["help"]) for f in fields(SaeTrainingArguments) if f.name in own]


def _read_yaml(config: str | Path) -> dict[str, Any]:
    values = read_named_config(config, CONFIGS, "recipes")
    for name in values:
        if name not in SECTIONS:
            raise _unknown(name, SECTIONS)
    return values


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"Options are `--name value`. Received: {word!r}.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            # A lone `--bf16` means true.
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs.append((name.replace("-", "_"), value))
    return pairs


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [] if value is None else [f"--{name}", str(value)]


def _place(sae: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sae[0][name] for name in ("layer", "site", "hook", "hook_out") if sae and name in sae[0]}


def _unknown(name: str, known: Any) -> ValueError:
    close = difflib.get_close_matches(name, list(known), n=3)
    return ValueError(f"There is no option {name!r}" + (f"; did you mean {', '.join(close)}?" if close else "."))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:  # argparse would end the process
        raise ValueError(message)
