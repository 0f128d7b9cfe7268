"""Compare classifiers that may and may not use some features, and make the one to publish."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.base_model import find_base_model
from ..create_training_data.classification_data import ClassificationData, read_classification
from ..create_training_data.templates import templated_ids
from ..evaluation.journal import Watch, result_of
from ..latents.context import reading_length
from ..modeling import SaeForSequenceClassification, SparseAutoencoder
from ..training.heads.comparison import Comparison, put_head, score_texts, tune_base
from ..training.heads.erasure import difference_sae, swap_directions
from ..training.heads.train import TrainedHead
from .classifier_candidates import FeatureSets, Reactions, Way, all_ways, candidate, read_states
from .classifier_trials import trial_of
from .classifier_verdict import Trial, reach_verdict
from .classify_result import ClassifyResult
from .going_on import forgotten_if_refused, rows_sha256, verb_journal
from .loading import DTYPES, load_sae, this_device
from .results import Count, Progress
from .settings.classify import ClassifySettings, LabelSettings
from .unintended import PooledTokens, SwapReactions, find_reactions, split_swaps

MAX_LENGTH = 256


class ClassifierBase(NamedTuple):
    """model: a base with a head for the labels, which the feature head replaces. sae: where the classifier reads.
    name: where the model was found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sae: SparseAutoencoder
    name: str


def read_labelled(train: Any, test: Any = None, columns: LabelSettings | None = None) -> ClassificationData:
    """A task from its training rows and, if there are any, the rows to measure on.

    Args:
        train, test: a file, a folder, a URL or a Hub data set as `open_text` takes it; or rows, a DataFrame, a
            `Dataset`.
        columns: which hold texts and labels.

    Raises:
        ValueError: a column is missing, a row has no label, or a label occurs that the training rows have not.
        OSError: something is not there.
    """
    columns = columns or LabelSettings()
    return read_classification(
        {"train": train, **({} if test is None else {"test": test})},
        text_column=columns.text_column,
        label_column=columns.label_column,
        classes=columns.classes,
        pairs=None if columns.pairs is None else (columns.pairs[0], columns.pairs[1]),
        prompt_column=columns.prompt_column,
    )


def load_classifier_base(
    name: str | os.PathLike[str],
    data: ClassificationData,
    sae: str | SparseAutoencoder | None = None,
    *,
    hook_point: str | None = None,
    model_dtype: str = "auto",
) -> ClassifierBase:
    """A base to classify with, for the labels of a task, and the SAE at whose hook point it reads.

    Args:
        name: a base's folder or Hub id; or a saved model with SAEs, whose base and first SAE are taken.
        data: of `read_labelled`.
        sae: the SAE, or its name as `SparseAutoencoder.from_pretrained` takes it.
        hook_point: of an SAE that does not say where it reads.
        model_dtype: auto (float32 on a CPU, else as published), float32, bfloat16 or float16.

    Raises:
        ValueError: no SAE, or an unknown precision.
        OSError: something is not there.
    """
    if model_dtype not in DTYPES:
        raise ValueError(f"`model_dtype` must be one of {', '.join(DTYPES)}. Received: model_dtype={model_dtype!r}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, found, revision = this_device(), find_base_model(os.fspath(name)).name, None
    try:
        config: Any = transformers.AutoConfig.from_pretrained(found)
        base = found
        if config.model_type == "sae_transformer":
            base, revision = config.base_model_name_or_path, config.base_model_revision
            sae = load_sae(found if len(config.saes) == 1 else f"{found}/0", hook_point) if sae is None else sae
        if sae is None:
            raise ValueError(f"{found!r} has no SAE: give one with `sae=`. Received: sae=None.")
        one = sae if isinstance(sae, SparseAutoencoder) else load_sae(sae, hook_point)
        dtype = "float32" if model_dtype == "auto" and device == "cpu" else model_dtype
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, revision=revision)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, revision=revision, dtype=dtype, **data.base_options()
        )
    except OSError as error:
        raise OSError(f"{found!r} could not be read as a model: {str(error).strip().splitlines()[0]}") from error
    return ClassifierBase(model.to(device).eval(), tokenizer, one, found)


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ClassificationData,
    settings: ClassifySettings | None = None,
    *,
    sae: SparseAutoencoder,
    unintended: Sequence[int] | None = None,
    swaps: tuple[Sequence[str], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> ClassifyResult:
    """Train heads that may and may not use unintended features of an SAE, measure them, and make a classifier of one.

    With `swaps` a third of the pairs tells which features and directions react, a third chooses how many are taken
    out and which method is recommended, and the last third measures.

    Args:
        model, tokenizer, sae: of `load_classifier_base`.
        data: the task, of `read_labelled`.
        unintended: features that the classifier must not use. Without them, those that react to the swaps.
        swaps: texts, and the same with an attribute swapped: they measure how far scores depend on it.
        progress: called with (texts done, texts): those that are read, and those that each method's heads learn from.

    Raises:
        ValueError: a text does not fit, fewer than three swaps change anything, or a feature is not one of the SAE's.
    """
    settings = settings or ClassifySettings()
    plan, parts = settings.comparison, dict(data.texts)
    methods = plan.possible(swaps=swaps is not None)
    limit = reading_length(model, None, settings.max_length or MAX_LENGTH)
    if settings.max_length is not None and settings.max_length > limit:
        raise ValueError(
            f"`max_length` must be at most {limit} for this model. Received: max_length={settings.max_length!r}."
        )
    ids = {part: templated_ids(tokenizer, texts, settings.template, limit) for part, texts in parts.items()}
    both = [templated_ids(tokenizer, texts, settings.template, limit) for texts in swaps or ()]
    split = split_swaps(both[0], both[1]) if both else None
    told = [rows_sha256(rows) for rows in (*ids.values(), *both)] + [rows_sha256([one]) for one in _labels(data)]
    task = [data.names, data.objective, data.pairs, None if unintended is None else list(unintended)]
    journal = verb_journal(settings.journal, model.base_model, sae, settings, list(ids), told, task)
    with forgotten_if_refused(journal):
        keep = Watch(journal=journal).keep
        reading = PooledTokens(model, sae, plan.pooling, settings.tokens_per_batch)
        reading.max_norm = result_of(journal, lambda: "usual norm", lambda: reading.usual_norm(ids["train"][:128]))
        found, reactions = torch.empty(0, dtype=torch.long), None
        if split is not None:
            reacting = keep("reactions", lambda: find_reactions(reading, split.found, max(plan.top))._asdict())
            found, original, swapped = SwapReactions(**reacting)
            directions = swap_directions(original, swapped, max(plan.directions))
            reactions = Reactions(directions, difference_sae(original - swapped))
            ids |= {"chosen_original": split.chosen.original, "chosen_swapped": split.chosen.swapped}
            ids |= {"original": split.measured.original, "swapped": split.measured.swapped}
        sizes = plan.top
        if unintended is not None:
            found, sizes = torch.tensor(list(unintended), dtype=torch.long), (len(unintended),)
        head = {"pooling": plan.pooling, "max_norm": reading.max_norm, "removal": plan.removal}
        classifier: SaeForSequenceClassification = SaeForSequenceClassification.from_base(
            model,
            saes=[sae],
            feature_head={**head, "alignment": plan.alignment, "pairwise": data.pairs},
            loss_weights={"unintended": plan.penalty},
        )
        classifier.set_unintended(found.tolist())  # a feature that is not the SAE's is told before anything is read
        features = FeatureSets.of(found, sizes, sae).by_way(methods)
        ways = all_ways(plan, methods, features, reactions)
        count = Count(progress, sum(map(len, ids.values())) + len(ids["train"]) * len(ways))
        watch = Watch(count, journal)
        states = read_states(
            classifier, ids, data, features, head, tokens_per_batch=settings.tokens_per_batch, watch=watch
        )
        seen = states.plain.get("test", states.plain["train"]).flatten(0, -2)
        comparison = Comparison(
            data.labels, sae=sae, seen=seen, unintended=found, objective=data.objective, folds=plan.folds
        )
        trials: dict[Way, Trial] = {}
        for way in ways:

            def run(way: Way = way) -> Trial:
                one = candidate(way, plan.heads()[way.method], states, sae, features, reactions)
                return Trial(*comparison.run(one, plan.seeds))

            trials[way] = trial_of(way, run, watch)
            count(len(ids["train"]))
        verdict = reach_verdict(trials, plan.max_f1_loss)
        kept = verdict.kept(plan.keep)
        _keep(classifier, trials[kept].head, features.get(kept))
        lora = None
        if settings.lora.lora_epochs > 0:
            with tempfile.TemporaryDirectory() as scratch:
                classifier = tune_base(classifier, ids["train"], data.labels["train"], settings.lora, out=scratch)
            others = {part: rows for part, rows in ids.items() if part in ("test", "original", "swapped")}
            lora = score_texts(classifier, others, data.labels.get("test"), data.objective)
        facts = {"model": model.name_or_path, "labels": data.names, "seeds": list(plan.seeds), "kept": kept.method}
        facts |= {"unintended": features.get(kept, found).tolist(), **verdict.facts()}
        where = "test rows" if "test" in parts else f"{plan.folds}-fold cross-validation"
        rows = {way: trial.rows for way, trial in trials.items()}
        return ClassifyResult(classifier, tokenizer, rows, verdict, lora, facts, where, settings, journal)


def _labels(data: ClassificationData) -> list[Tensor]:
    return [labels for labels in data.labels.values() if labels is not None]


def _keep(classifier: SaeForSequenceClassification, head: TrainedHead, features: Tensor | None) -> None:
    """Make a trained head the classifier's; only SelfReg's removes and penalises features."""
    own, settings = classifier.feature_head, classifier.config.feature_head
    if features is not None:
        classifier.set_unintended(features.tolist())
    elif own is not None and isinstance(settings, dict):
        own.config.removal = settings["removal"] = "none"
        classifier.config.loss_weights["unintended"] = 0.0
    put_head(classifier, head)
