"""`Trainer` for sparse autoencoders on harvested hidden states."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ...modeling import SparseAutoencoder
from ...modeling.compatibility import same_model
from ...modeling.output_files import write_whole
from ...modeling.plain_files import written_tensors
from .arguments import SaeTrainingArguments
from .callbacks import SaeUpkeep
from .dataset import TokenBatches
from .initialization import (
    initialize,
    point_concepts_at_diffmean,
    scale_decoder_to_unit_norm,
    usual_norm_limit,
)
from .metrics import Meters
from .objective import SaeInTraining, SaeObjective
from .optimizer import clip, step_on_rows, stored_by_latent

TRAINING_STATE = "sae_training_state.safetensors"
DATA_STATE = "data_state-{rank}.json"
FREE_IN_A_CHECKPOINT = ("input_scale", "feature_names", "metadata")


class SaeTrainer(Trainer):
    """Train sparse autoencoders in place on hidden states, several in one pass if you like.

    Checkpoints hold the SAEs as `SparseAutoencoder.from_pretrained` reads them: in the folder itself, or in one folder
    for each where there are several.

    Args:
        saes: one or more, each with its place (`layer` and `site`, or `hook`), which names its hidden states.
        args: `SaeTrainingArguments`.
        train_dataset: `HiddenStateShards`, `TensorTokens`, or a stream of batches with `state_dict()`.
        eval_dataset: of the first two kinds.

    Raises:
        ValueError: the data lacks a place or label that an SAE needs, or its width does not fit.
    """

    args: SaeTrainingArguments
    model: Any

    def __init__(
        self,
        saes: SparseAutoencoder | Sequence[SparseAutoencoder],
        args: SaeTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        saes = [saes] if isinstance(saes, torch.nn.Module) else list(saes)
        for dataset in filter(None, (train_dataset, eval_dataset)):
            for sae in saes:
                _check_data(sae.config, dataset, needs_labels=args.concept_init != "none" or args.ranking_weight > 0)
        given = train_dataset if train_dataset is not None else eval_dataset
        names, others = (list(getattr(dataset, "label_names", ())) for dataset in (given, eval_dataset))
        if others and others != names:
            raise ValueError(f"Training and evaluation data need the same labels. Received: {names} and {others}.")
        objective = SaeObjective(saes, args, names)
        if not args.learning_rate:
            args.learning_rate = 2e-4 / math.sqrt(max(sae.config.d_sae for sae in saes) / 2**14)
        super().__init__(
            model=objective,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[SaeUpkeep(self), *(callbacks or [])],
            data_collator=_as_is,  # pyright: ignore[reportArgumentType]
            **kwargs,
        )
        self.saes = saes
        # The objective takes places as keywords, which Trainer takes for loss options.
        self.model_accepts_loss_kwargs = False
        self.meters = Meters(objective)
        self.train_batches: Any = None

    # -- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`. Received: None.")
        if self._stream is not None:
            return DataLoader(_RestOfStream(self._stream), batch_size=None)
        # Processes with different numbers of batches would wait for each other.
        drop_last = self.args.dataloader_drop_last or self.args.world_size > 1
        loader = self._loader(self.train_dataset, self._train_batch_size, drop_last=drop_last)
        self.train_batches = loader.batch_sampler
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`. Received: None.")
        return self._loader(dataset, self.args.eval_batch_size, drop_last=False)

    @property
    def _stream(self) -> Any:
        """The training data where it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, IterableDataset) else None

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _loader(self, dataset: Any, batch_size: int, *, drop_last: bool) -> DataLoader:
        batches = TokenBatches(
            dataset.sizes,
            batch_size,
            window_tokens=self.args.window_tokens,
            seed=self._data_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            drop_last=drop_last,
        )
        if hasattr(dataset, "shards_kept"):
            dataset.shards_kept = 2 * max(map(len, batches.windows()))
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_is,  # pyright: ignore[reportArgumentType]
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def train(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`; without a checkpoint the SAEs start from the data as `args` say."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint()
        if resume_from_checkpoint:
            self._resume_data(str(resume_from_checkpoint))
        else:
            self._initialize()
        for sae in self.saes:
            if model := getattr(self.train_dataset, "model", None):
                sae.config.metadata = {**sae.config.metadata, "base_model": model}
        self.model.requires_grad_(True)
        if resume_from_checkpoint and self._is_end(str(resume_from_checkpoint)):
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            result = TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, {})
        else:
            with stored_by_latent(self.saes):
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        for sae in self.saes:
            sae.eval()
        return result

    def _last_whole_checkpoint(self) -> str:
        """The newest checkpoint with the file that is written last; a process may have died while it wrote another."""
        folders = Path(str(self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        last = TRAINER_STATE_NAME
        if isinstance(self.train_dataset, IterableDataset):
            last = DATA_STATE.format(rank=self.args.process_index)
        whole = [folder for folder in folders if (folder / last).is_file()]
        if not whole:
            raise ValueError(f"There is no checkpoint to resume in {self.args.output_dir!r}.")
        return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))

    def _is_end(self, checkpoint: str) -> bool:
        """Whether a checkpoint is of the last step; then it is loaded. `Trainer` takes one more step from there."""
        file = Path(checkpoint) / TRAINER_STATE_NAME
        if not file.is_file():
            return False
        state = TrainerState.load_from_json(str(file))
        steps = self.args.max_steps
        if steps <= 0:  # epochs count; how many steps they have depends on the data
            steps = state.max_steps if self.args.num_train_epochs <= state.num_train_epochs else math.inf
        if state.global_step < steps:
            return False
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return True

    @torch.no_grad()
    def _initialize(self) -> None:
        with torch.random.fork_rng():
            sample = self._sample()
        for part in self.model.saes:
            torch.manual_seed(self.args.seed)  # each starts as it would alone
            config, device = part.sae.config, part.sae.device
            read, target = sample[config.read_at].to(device), sample[config.write_at].to(device)
            if self.args.outlier_norm_limit:
                part.norm_limit.fill_(usual_norm_limit(read, self.args.outlier_norm_limit))
            usual = part.usual(read, target)
            if not bool(usual.any()):
                raise ValueError(
                    f"The first {len(read)} hidden states of {config.read_at} are all zero, NaN or infinite. "
                    f"Harvest them anew, in a wider dtype."
                )
            initialize(part.sae, target[usual], weights=self.args.weight_init, bias=self.args.bias_init)
            labels = self.model.labels_of(config, sample.get("labels"))
            if self.args.concept_init == "diffmean" and labels is not None:
                point_concepts_at_diffmean(part.sae, read[usual], labels.to(device)[usual])
            if self.args.decoder_norm == "unit":
                scale_decoder_to_unit_norm(part.sae)
            part.decide_scores()

    def _sample(self) -> dict[str, Tensor]:
        """The first `init_tokens` tokens of the first epoch, the same on every process; a stream is where it was."""
        dataset: Any = self.train_dataset
        stream = self._stream
        start = None if stream is None else stream.state_dict()
        if stream is not None:
            batches: Iterator[dict[str, Tensor]] = iter(stream)
        else:
            order = TokenBatches(
                dataset.sizes, self.args.init_tokens, window_tokens=self.args.window_tokens, seed=self._data_seed
            )
            batches = (dataset.__getitems__(tokens) for tokens in order)
        parts: list[dict[str, Tensor]] = []
        while sum(len(next(iter(part.values()))) for part in parts) < self.args.init_tokens:
            batch = next(batches, None)
            if batch is None:
                break
            parts.append({name: tensor.cpu() for name, tensor in batch.items()})
        if stream is not None:
            stream.load_state_dict(start)
            parts = broadcast_object_list([parts])[0]  # each process has its own part of the text
        if not parts:
            raise ValueError("The training data holds no tokens.")
        return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        for part in self.model.saes:
            part.step = self.state.global_step + 1
        outputs = model(**inputs)
        self.meters.add(self.model)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            step_on_rows(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.distributed_type != DistributedType.NO or self.args.device.type != "cpu":
            return super()._clip_grad_norm(model)
        return clip(model.parameters(), self.args.max_grad_norm)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Trainer's own takes data without labels for data without a loss, and its mean gives a last, smaller batch the
        # weight of the others: the meters know better.
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, self._prepare_inputs(inputs))
        return None, None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**self.meters.take(self.accelerator), **logs}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, with reconstruction metrics of the whole evaluation set."""
        training, self.meters = self.meters, Meters(self.model)
        try:
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = self.meters.take(self.accelerator)
        finally:
            self.meters = training
        found["loss"] = sum(value for name, value in found.items() if name.split("/")[-1] == "loss")
        found = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(found)
        return {**metrics, **found}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def folders(self) -> list[str]:
        """Where each SAE lies below a checkpoint: "." for a single one, else its place, numbered where it repeats."""
        if len(self.saes) == 1:
            return ["."]
        names = [sae.config.read_at for sae in self.saes]
        return [name if names.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(names)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # Trainer calls this on every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for number, (name, part) in enumerate(zip(self.folders(), self.model.saes, strict=True)):
            part.sae.save_pretrained(folder / name)
            state.update({f"{number}.{key}": getattr(part, key).cpu() for key in part.memory})
        with written_tensors(folder / TRAINING_STATE):
            save_file(state, folder / TRAINING_STATE, metadata=self.model.scores_in_bfloat16)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / TRAINING_STATE).is_file():
            raise ValueError(f"{folder} is no checkpoint of an SaeTrainer: it has no {TRAINING_STATE}.")
        state = load_file(folder / TRAINING_STATE)
        with safe_open(folder / TRAINING_STATE, "pt") as file:
            in_bfloat16 = file.metadata() or {}
        if (stored_saes := len(state) // len(SaeInTraining.memory)) != len(self.saes):
            raise ValueError(f"{folder} holds {stored_saes} SAEs. Received: {len(self.saes)} to train.")
        for number, (name, part) in enumerate(zip(self.folders(), self.model.saes, strict=True)):
            stored = SparseAutoencoder.from_pretrained(folder / name)
            for key, value in vars(stored.config).items():
                if key not in FREE_IN_A_CHECKPOINT and value != getattr(part.sae.config, key):
                    raise ValueError(
                        f"{folder / name} holds an SAE with {key}={value!r}. "
                        f"Received: one with {key}={getattr(part.sae.config, key)!r}."
                    )
            part.sae.load_state_dict(stored.state_dict())
            part.sae.config.input_scale = stored.config.input_scale
            for key in part.memory:
                getattr(part, key).copy_(state[f"{number}.{key}"])
            part.decide_scores(before=f"{number}.bf16_scores" in in_bfloat16)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def save_data_state(self, folder: Path) -> None:
        """Note where a stream stands; shards need no note, their order is a function of the epoch."""
        if self._stream is not None:
            file = folder / DATA_STATE.format(rank=self.args.process_index)
            write_whole(file, json.dumps(self._stream.state_dict()))

    def _resume_data(self, checkpoint: str) -> None:
        if self._stream is not None:
            file = Path(checkpoint) / DATA_STATE.format(rank=self.args.process_index)
            self._stream.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
            self.args.ignore_data_skip = True  # the stream goes on by itself


class _RestOfStream(IterableDataset):
    """What is left of a stream's epoch, or the next where nothing is: a checkpoint may stand at an epoch's end."""

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        empty = True
        for batch in self.stream:
            empty = False
            yield batch
        if empty:
            yield from self.stream


def _as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _check_data(config: Any, dataset: Any, *, needs_labels: bool) -> None:
    widths = getattr(dataset, "widths", None)
    if widths is None:
        raise ValueError(
            f"Training data is HiddenStateShards, TensorTokens or a stream of batches. "
            f"Received: {type(dataset).__name__}."
        )
    if not config.placed or config.hooks_out:
        raise ValueError("An SAE needs its place, one; set `config.layer` and `config.site`, or `config.hook`.")
    for place, width in ((config.read_at, config.d_in), (config.write_at, config.d_out)):
        if place not in widths:
            raise ValueError(f"The data holds hidden states of {', '.join(widths)}. Received: an SAE at {place!r}.")
        if widths[place] != width:
            raise ValueError(
                f"The hidden states of {place} are {widths[place]} wide. Received: an SAE of width {width}. "
                f"Were they harvested from another model?"
            )
    trained_on, model = config.metadata.get("base_model"), getattr(dataset, "model", None)
    if trained_on and model and not same_model(trained_on, model):
        raise ValueError(
            f"The SAE was trained on hidden states of {trained_on!r}. Received: those of {model!r}. "
            f"If it is the same model, set `config.metadata['base_model']`."
        )
    labels = list(getattr(dataset, "label_names", ()))
    if needs_labels and config.concepts and not labels:
        raise ValueError(f"The data has no labels. Received: concepts={sorted(config.concepts)!r}.")
    if labels and (missing := sorted(set(config.concepts) - set(labels))):
        raise ValueError(f"The data has labels {', '.join(labels)}. Received: concepts={missing!r}.")
