"""Compare classifiers that may and may not use some features, and make the one to publish."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.base_model import find_base_model
from ..create_training_data.classification_data import ClassificationData, read_classification
from ..create_training_data.templates import templated_ids
from ..latents.context import reading_length
from ..modeling import SaeForSequenceClassification, SparseAutoencoder
from ..modeling.feature_head import FeatureHead, FeatureHeadConfig
from ..training.heads.comparison import Comparison, Rows, put_head, read_texts, score_texts, tune_base
from ..training.heads.train import TrainedHead
from .classify_result import ClassifyResult
from .loading import DTYPES, load_sae, this_device
from .results import Count, Progress
from .settings.classify import ClassifySettings, ComparisonSettings, LabelSettings
from .unintended import PooledTokens, find_unintended

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

    Args:
        model, tokenizer, sae: of `load_classifier_base`.
        data: the task, of `read_labelled`.
        unintended: features that the classifier must not use. Without them, those that react to half of the swaps.
        swaps: texts, and the same with an attribute swapped: they measure how far scores depend on it.
        progress: called with (texts done, texts): those that are read, and those that each method's heads learn from.

    Raises:
        ValueError: a text does not fit, fewer than two swaps change anything, or a feature is not one of the SAE's.
    """
    settings = settings or ClassifySettings()
    plan, parts = settings.comparison, dict(data.texts)
    if swaps is not None:
        parts |= {"original": list(swaps[0]), "swapped": list(swaps[1])}
    limit = reading_length(model, None, settings.max_length or MAX_LENGTH)
    if settings.max_length is not None and settings.max_length > limit:
        raise ValueError(
            f"`max_length` must be at most {limit} for this model. Received: max_length={settings.max_length!r}."
        )
    ids = {part: templated_ids(tokenizer, texts, settings.template, limit) for part, texts in parts.items()}
    reading = PooledTokens(model, sae, plan.pooling, settings.tokens_per_batch)
    reading.find_max_norm(ids["train"][:128])
    if unintended is not None:
        features = torch.tensor(list(unintended), dtype=torch.long)
    elif swaps is not None:
        features, ids["original"], ids["swapped"] = find_unintended(
            reading, ids["original"], ids["swapped"], settings.top
        )
    else:
        features = torch.empty(0, dtype=torch.long)
    head = {"pooling": plan.pooling, "max_norm": reading.max_norm, "removal": plan.removal}
    classifier: SaeForSequenceClassification = SaeForSequenceClassification.from_base(
        model,
        saes=[sae],
        feature_head={**head, "alignment": plan.alignment, "pairwise": data.pairs},
        loss_weights={"unintended": plan.penalty},
    )
    classifier.set_unintended(features.tolist())
    count = Count(progress, sum(map(len, ids.values())) + len(ids["train"]) * len(plan.methods))
    plain = FeatureHead(FeatureHeadConfig(**{**head, "removal": "none"}), sae.config.d_in, 1, 1)
    states = _states(classifier, plain, ids, data, settings, count)
    comparison = Comparison(
        *states, data.labels, objective=data.objective, folds=plan.folds, sae=sae, unintended=features
    )
    rows, trained = _compare(comparison, plan, lambda: count(len(ids["train"])))
    _keep(classifier, plan.kept, trained[plan.kept])
    lora = None
    if settings.lora.lora_epochs > 0:
        with tempfile.TemporaryDirectory() as scratch:
            classifier = tune_base(classifier, ids["train"], data.labels["train"], settings.lora, out=scratch)
        others = {part: found for part, found in ids.items() if part != "train"}
        lora = score_texts(classifier, others, data.labels.get("test"), data.objective)
    facts = {"model": model.name_or_path, "labels": data.names, "seeds": list(plan.seeds), "kept": plan.kept}
    facts["unintended"] = features.tolist()
    where = "test rows" if "test" in parts else f"{plan.folds}-fold cross-validation"
    return ClassifyResult(classifier, tokenizer, rows, lora, facts, where, settings)


def _states(
    classifier: SaeForSequenceClassification,
    plain: FeatureHead,
    ids: Mapping[str, list[Tensor]],
    data: ClassificationData,
    settings: ClassifySettings,
    report: Callable[[int], object],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a plain head and the classifier's own would score, of each part: (n, d_in), or (n, 2, d_in) of pairs."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    own = classifier.feature_head
    if own is None:
        raise ValueError("The model has no feature head.")
    for part, rows in ids.items():
        both = read_texts(classifier, rows, [plain, own], tokens_at_once=settings.tokens_per_batch, report=report)
        for states, values in zip(found, both, strict=True):
            states[part] = values.view(-1, 2, values.shape[-1]) if data.pairs and part in data.texts else values
    return found


def _compare(
    comparison: Comparison, plan: ComparisonSettings, report: Callable[[], object]
) -> tuple[Rows, dict[str, TrainedHead]]:
    rows: Rows = {}
    trained: dict[str, TrainedHead] = {}
    for name, one in plan.heads().items():
        measured, heads = comparison.run({name: one}, plan.seeds)
        rows |= measured
        trained |= heads
        report()
    return rows, trained


def _keep(classifier: SaeForSequenceClassification, method: str, head: TrainedHead) -> None:
    """Make a trained head the classifier's; only SelfReg's removes and penalises unintended features."""
    own, settings = classifier.feature_head, classifier.config.feature_head
    if method != "selfreg" and own is not None and isinstance(settings, dict):
        own.config.removal = settings["removal"] = "none"
        classifier.config.loss_weights["unintended"] = 0.0
    put_head(classifier, head)
