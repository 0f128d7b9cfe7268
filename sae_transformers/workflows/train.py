"""Train SAEs on texts or hidden states as people have them, in one call; and one latent on a labelled concept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.harvest.blocks import Harvester, HarvestSettings
from ..create_training_data.harvest.stream import HiddenStateStream
from ..latents.context import context_length, reading_length
from ..latents.hidden_states import HiddenStateReader, kept_positions
from ..latents.text_input import text_source, tokenized
from ..latents.texts import TextSource
from ..modeling import SparseAutoencoder, SparseAutoencoderConfig
from ..modeling.output_files import write_whole
from ..training.sae.dataset import HiddenStateShards, TensorTokens
from ..training.sae.in_memory import fit_conditioned_sae
from ..training.sae.recipe import Recipe, own_options, read_recipe
from ..training.sae.run import run_recipe
from .loading import parse_place
from .results import Progress, Result


@dataclass(frozen=True)
class TrainResult(Result):
    """What was trained.

    Args:
        saes: the trained SAEs; `sae` is the first.
        metrics: of the last steps: loss, steps, seconds, and for each SAE l0, fvu and the share of dead latents.
        recipe: what was run.
    """

    saes: list[SparseAutoencoder]
    metrics: dict[str, Any]
    recipe: Recipe = field(repr=False)

    @property
    def sae(self) -> SparseAutoencoder:
        return self.saes[0]

    def rows(self) -> list[dict[str, Any]]:
        """One for each metric: metric, value."""
        return [
            {"metric": name, "value": f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"}
            for name, value in self.metrics.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the metrics and the recipe."""
        return {"metrics": self.metrics, "recipe": dataclasses.asdict(self.recipe)}

    def save(self, folder: str | Path) -> None:
        """Write the SAE, or a folder for each of several, and `metrics.json`."""
        target = Path(folder)
        for number, sae in enumerate(self.saes):
            sae.save_pretrained(target if len(self.saes) == 1 else target / str(number))
        write_whole(target / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")


def train_recipe(
    recipe: str | Path | Recipe | None = None,
    flags: Sequence[str] = (),
    *,
    resume: bool = False,
) -> TrainResult:
    """Train on harvested hidden states as a recipe says: the data, the SAEs and the settings of the run are in it.

    Args:
        recipe: a YAML file, a name such as `topk`, or a `Recipe`; by default the flags are all.
        flags: more of it, such as `--data=states`, `--d_sae=4096`, `--output_dir=my-sae`.
        resume: go on from the last checkpoint in its `output_dir`.

    Raises:
        ValueError: recipe and data do not fit, or a flag is of no known name.
        OSError: a file is not there.
    """
    settings = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, flags)
    saes, metrics = run_recipe(settings, resume=resume)
    return TrainResult(saes, metrics, settings)


def recipe_options() -> list[tuple[str, Any, str]]:
    """Name, default and meaning of the flags that are not arguments of `transformers.TrainingArguments`."""
    return own_options()


def train(
    data: Any,
    recipe: str | Path | Recipe = "topk",
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hook_point: str | None = None,
    sae: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    text_column: str = "text",
    labels: Sequence[str] = (),
    harvest: HarvestSettings | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """A trained SAE from texts or hidden states, in one call.

    Args:
        data: texts (a list, a `Dataset`, a DataFrame, a path, `open_text(name)`: see `text_input.TEXTS`), which need
            `model` and `tokenizer`; hidden states (n_tokens, d_in), which need `hook_point`; or what `SaeTrainer`
            takes: `HiddenStateShards`, `TensorTokens`, a stream.
        recipe: a YAML file, a name such as `topk` or `scar`, or a `Recipe`.
        model, tokenizer: the base whose hidden states are read.
        hook_point: where the SAE reads, such as `layers.14.resid_post`.
        sae: settings of the SAE beside the recipe's, such as `{"d_sae": 4096, "k": 32}`.
        training: settings of the run beside the recipe's, such as `{"max_steps": 1000}` (`SaeTrainingArguments`);
            `max_steps` is needed for texts whose number is not known: files and streaming data sets.
        text_column: of the text, where rows have columns.
        labels: columns of 0 and 1, for recipes that use labels.
        harvest: how texts become hidden states, in place of defaults; the hook points are the SAEs'.
        output_dir: keeps checkpoints and the result; a temporary folder by default.
        resume: go on from the last checkpoint there.
        progress: called with (step, steps) after each.

    Raises:
        ValueError: something that the data or the recipe needs is missing, or does not fit.
        TypeError: `data` is of no known kind.
    """
    settings = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    entries = [dict(entry) for entry in settings.sae] or [{}]
    place = parse_place(hook_point)
    for entry in entries:
        if place:
            for name in ("layer", "site", "hook"):
                entry.pop(name, None)
        entry.update({**place, **(sae or {})})
    run = {**settings.training, **(training or {})}
    with tempfile.TemporaryDirectory() as scratch:
        run["output_dir"] = str(output_dir or run.get("output_dir") or scratch)
        if not output_dir:
            run = {"save_strategy": "no", "report_to": "none", **run, "output_dir": scratch}
        settings = dataclasses.replace(settings, sae=entries, training=run)
        places = [SparseAutoencoderConfig.from_dict({"d_in": 1, **entry}).read_at for entry in entries]
        dataset = _dataset(data, places, model, tokenizer, text_column, labels, harvest)
        if isinstance(dataset, HiddenStateStream) and (run.get("max_steps") or 0) < 1:
            raise ValueError(
                "How many texts a file or a streaming data set holds is not known beforehand: say how long to train, "
                f"`training={{'max_steps': ...}}`, or give a list. Received: data={data!r}, "
                f"max_steps={run.get('max_steps')!r}."
            )
        saes, metrics = run_recipe(settings, train_dataset=dataset, resume=resume, report=progress, quiet=True)
    return TrainResult(saes, metrics, settings)


def train_concept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    labels: Sequence[int],
    concept: str,
    *,
    hook_point: str,
    d_sae: int = 2048,
    k: int = 64,
    steps: int = 500,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> TrainResult:
    """An SAE, one of whose latents detects a concept: from labelled texts in one call (SCAR, arXiv:2411.07122).

    Args:
        model, tokenizer: the base whose hidden states are read.
        texts: see `text_input.TEXTS`.
        labels: 1 where the concept is in the text, 0 where it is not, -100 where that is unknown.
        concept: its name; `detect(..., feature=concept)` and steering take it.
        hook_point: where the SAE reads, such as `layers.14.resid_post`.
        d_sae, k: latents, and how many of them are active for a token.
        steps: of training.
        max_length: tokens; longer texts are cut.
        training: more `SaeTrainingArguments`.

    Raises:
        ValueError: labels do not fit the texts, or one of the two kinds is missing.
    """
    length = reading_length(model, max_length, 256)
    found = tokenized(tokenizer, texts, max_length=length)
    if len(labels) != len(found.ids) or not {0, 1} <= {int(label) for label in labels}:
        raise ValueError(
            f"Expected a label for each of {len(found.ids)} texts, 0 and 1 among them. Received: {len(labels)} "
            f"labels, {sorted({int(label) for label in labels})}."
        )
    ids = [torch.tensor(row) for row in found.ids]
    keep = [kept_positions(row) for row in ids]
    config = SparseAutoencoderConfig(
        d_in=1, d_sae=d_sae, activation="topk", k=k, concepts={concept: 0}, **parse_place(hook_point)
    )
    hidden = HiddenStateReader(model, [config.read_at]).read(ids, keep, dtype=torch.float32)[config.read_at]
    of_token = torch.tensor([float(label) for label in labels]).repeat_interleave(torch.tensor([len(p) for p in keep]))
    torch.manual_seed(seed)
    sae = SparseAutoencoder(dataclasses.replace(config, d_in=hidden.shape[1], d_out=None)).to(hidden.device)
    metrics = fit_conditioned_sae(
        sae, hidden, of_token[:, None].to(hidden.device), steps=steps, seed=seed, report=progress, **training
    )
    sae.measure_feature_max(hidden)
    return TrainResult([sae], dict(metrics), Recipe(method="condition", sae=[sae.config.to_dict()]))


def _dataset(
    data: Any,
    places: Sequence[str],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
    labels: Sequence[str],
    harvest: HarvestSettings | None,
) -> Any:
    """What `SaeTrainer` reads: hidden states as they are, or those of texts, in memory where their number is known."""
    if hasattr(data, "widths"):
        return data
    if isinstance(data, Tensor) and data.is_floating_point():
        if len(set(places)) != 1 or data.ndim != 2:
            raise ValueError(
                f"Hidden states (n_tokens, d_in) are those of one place. Received: shape {tuple(data.shape)} for "
                f"{', '.join(sorted(set(places)))}."
            )
        return TensorTokens({places[0]: data})
    if isinstance(data, Mapping) and all(isinstance(value, Tensor) for value in data.values()):
        return TensorTokens(dict(data))
    if isinstance(data, (str, Path)) and (Path(data) / "index.json").is_file():
        return HiddenStateShards(data)
    if model is None or tokenizer is None:
        raise ValueError("Texts need the base that reads them. Received: model=None or tokenizer=None.")
    source = text_source(data, text_column=text_column, labels=labels)
    limit = context_length(model)
    wanted = tuple(dict.fromkeys(places))
    settings = harvest or HarvestSettings(wanted, max_length=min(256, limit or 256))
    settings = dataclasses.replace(settings, hook_points=wanted)
    if source.n_rows is None:
        return HiddenStateStream(model, tokenizer, source, settings)
    return _in_memory(Harvester(model, tokenizer, source, settings), source)


def _in_memory(harvester: Harvester, source: TextSource) -> TensorTokens:
    parts: list[dict[str, Tensor]] = []
    for number, rows in source.blocks(harvester.settings.rows_per_shard, itertools.count()):
        block = harvester.tokens(number, rows)
        own = {"labels": block.labels} if source.labels else {}
        parts.append({**{place: states.cpu() for place, states in harvester.hidden(block).items()}, **own})
    if not any(len(next(iter(part.values()))) for part in parts):
        raise ValueError("Expected texts of two tokens or more. Received: none so long.")
    return TensorTokens({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, list(source.labels))
