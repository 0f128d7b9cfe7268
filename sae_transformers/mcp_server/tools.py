"""The tools: each calls the function of the library that has its name, within the limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.scorers.registry import get_scorer
from ..evaluation.settings import GenerationSettings
from ..evaluation.steering.receipt import Receipt, ReceiptTexts, measure_receipt
from ..evaluation.suites.settings import ReceiptSettings
from ..latents.context import context_length, reading_length
from ..latents.safe_texts import visible
from ..latents.text_input import tokenized
from ..modeling import SaeForCausalLM, Steering
from ..serving.steering_field import read_steering
from ..workflows.reading.attribute import attribute
from ..workflows.reading.detect import detect
from ..workflows.reading.find import find
from ..workflows.reading.top_features import top_features
from ..workflows.settings.detect import AttributionSettings, DetectSettings
from ..workflows.settings.generate import GenerateSettings
from ..workflows.steering.generate import UNSTEERED, generate
from . import answers, arguments, limits

PAST_THE_FIRST = [[1, None]]  # positions: the hidden state of the first token is an outlier


class Tools:
    """A model and what may be asked of it; each method is a tool of its name.

    Args:
        model: with its SAEs, in eval mode.
        tokenizer: of the base.
        name: what the model is called; of a folder only the last part is told.
        write_to: folder for `save_steering`; None: nothing is ever written.
    """

    def __init__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, write_to: Path | None = None
    ) -> None:
        self.model, self.tokenizer, self.name, self.write_to = model, tokenizer, _public(name), write_to
        self._length = reading_length(model, None, limits.MAX_TOKENS)  # tokens of a text that is read

    def describe_model(self, asked: arguments.DescribeModel) -> answers.ModelFacts:
        model, base = self.model, getattr(self.model.config, "base_model_name_or_path", None)
        return answers.ModelFacts(
            name=self.name,
            base=None if base is None else _public(base),
            n_saes=len(model.saes),
            saes=[self._sae_facts(number) for number in range(min(len(model.saes), limits.MAX_SAES))],
            context=context_length(model),
            chat_template=bool(getattr(self.tokenizer, "chat_template", None)),
            steered_by_default=bool(model.steering),
            can_write=self.write_to is not None,
            limits={name.lower(): value for name, value in vars(limits).items() if name.isupper()},
        )

    def find_features(self, asked: arguments.FindFeatures) -> answers.FindAnswer:
        if asked.sae is not None:
            self._config(asked.sae)
        found = find(self.model, asked.query, asked.k, sae=asked.sae, by="words")
        rows = [
            answers.Found(
                sae=row["sae"],
                feature=row["feature"],
                description=_told(row["description"]),
                frequency=_finite(row["frequency"]),
                output_score=_finite(row["output_score"]),
                maximum=_finite(row["maximum"]),
                score=_finite(row["score"]),
                explainer=None if row["explainer"] is None else _told(row["explainer"]),
            )
            for row in found.found
        ]
        return answers.FindAnswer(query=asked.query, by=found.by, features=rows)

    def top_features(self, asked: arguments.TopFeatures) -> answers.TopAnswer:
        self._config(asked.sae)
        self._check_read([asked.text], asked.skip_first)
        found = top_features(
            self.model, self.tokenizer, asked.text, asked.k, sae=asked.sae, skip_first=asked.skip_first,
            max_length=self._length,
        )  # fmt: skip
        rows = [answers.Strongest(**_named(row)) for row in found.strongest(asked.k)]
        return answers.TopAnswer(sae=asked.sae, n_tokens=len(found.tokens), cut=found.cut, features=rows)

    def read_features(self, asked: arguments.ReadFeatures) -> answers.ReadAnswer:
        config = self._config(asked.sae)
        numbers = list(dict.fromkeys(config.resolve_feature(feature) for feature in asked.features))
        self._check_read([asked.text], asked.skip_first)
        read = tokenized(self.tokenizer, asked.text, max_length=self._length)
        ids = torch.tensor(read.ids, device=self.model.device)
        output = self.model(input_ids=ids, features={asked.sae: numbers}, steering=False, stop_at_last_sae=True)
        values = output.sae_features[asked.sae][0].float().cpu()  # (tokens, features)
        values[: asked.skip_first] = 0.0
        rows = [
            answers.Activations(
                feature=number, name=self._name(asked.sae, number), max=float(column.max()), values=column.tolist()
            )
            for number, column in zip(numbers, values.T, strict=True)
        ]
        tokens = [str(self.tokenizer.decode([token])) for token in read.ids[0]]
        return answers.ReadAnswer(sae=asked.sae, tokens=tokens, cut=read.cut > 0, features=rows)

    def detect(self, asked: arguments.Detect) -> answers.DetectAnswer:
        self._config(asked.sae)
        self._check_read(asked.texts, asked.skip_first)
        settings = DetectSettings(
            pooling=asked.pooling, skip_first=asked.skip_first,
            max_length=self._length,
        )  # fmt: skip
        found = detect(
            self.model, self.tokenizer, asked.texts, asked.feature, asked.labels, settings, sae=asked.sae
        )  # fmt: skip
        return answers.DetectAnswer(
            feature=found.feature,
            name=self._name(asked.sae, found.feature),
            sae=asked.sae,
            scores=[_finite(score) for score in found.scores.tolist()],
            cut=found.cut,
            quality={name: value for name, value in found.quality().items() if math.isfinite(value)},
        )

    def attribute(self, asked: arguments.Attribute) -> answers.AttributeAnswer:
        if asked.sae is not None:
            self._config(asked.sae)
        self._check_read([asked.text], asked.skip_first)
        if tokenized(self.tokenizer, asked.text, max_length=self._length).cut:
            raise ValueError(f"`text` must be of at most {self._length} tokens. Received: a longer one.")
        settings = AttributionSettings(
            max_length=self._length, skip_first=asked.skip_first, max_pairs=limits.MAX_ABLATED,
            sae_numbers=() if asked.sae is None else (asked.sae,), curve=asked.faithfulness,
        )  # fmt: skip
        found = attribute(
            self.model, self.tokenizer, asked.text, asked.target, asked.method, position=asked.position,
            settings=settings,
        )  # fmt: skip
        checked, curve, faithful = found.agreement, found.curve, None
        if curve is not None:
            faithful = answers.Faithful(
                pairs_move=curve.whole - curve.none, kept=_finite(curve.area("keep")),
                kept_at_random=_finite(curve.area("keep_random")), for_80_percent=curve.needed(),
            )  # fmt: skip
        numbers = {} if checked is None else checked._asdict()
        numbers |= {name: _finite(numbers.get(name)) for name in ("spearman", "pearson", "same_sign")}
        return answers.AttributeAnswer(
            target=found.target, value=found.effects.value, method=found.method, n_tokens=len(found.tokens),
            n_pairs=len(found.effects.effect),
            features=[answers.FeatureEffect(**_named(row)) for row in found.strongest(asked.k)],
            pairs=[answers.PairEffect(**_named(row)) for row in found.rows()[: asked.k]],
            check=None if checked is None else answers.Checked(**numbers), faithfulness=faithful,
        )  # fmt: skip

    def steer(self, asked: arguments.Steer) -> answers.SteerAnswer:
        steering = self._steering(asked)
        generation = GenerationSettings(
            max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=asked.seed, chat=asked.chat
        )
        settings = GenerateSettings(generation=generation)
        found = generate(self.model, self.tokenizer, asked.prompts, {"steered": steering}, settings)
        rows = [
            answers.Continuation(
                prompt=number,
                unsteered=found.texts[UNSTEERED][number],
                steered=found.texts["steered"][number],
                perplexity_unsteered=_finite(found.perplexities[UNSTEERED][number]),
                perplexity_steered=_finite(found.perplexities["steered"][number]),
            )
            for number in range(len(asked.prompts))
        ]
        return answers.SteerAnswer(texts=rows, steering=steering.digest)

    def evaluate_steering(self, asked: arguments.EvaluateSteering) -> answers.EvaluateAnswer:
        steering, scorer = self._steering(asked), get_scorer(asked.scorer)
        generation = GenerationSettings(
            max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=asked.seed
        )
        settings = ReceiptSettings(receipt_goal=asked.goal, scorer_name=asked.scorer, generation=generation)
        texts = ReceiptTexts(asked.prompts, asked.neutral)
        receipt = measure_receipt(self.model, self.tokenizer, steering, texts, scorer, settings)
        told = receipt.to_dict()
        if told["about"].get("base"):
            told["about"]["base"] = _public(told["about"]["base"])
        numbers = {name: answers.Measured(**number._asdict()) for name, number in receipt.numbers.items()}
        return answers.EvaluateAnswer(numbers=numbers, level=settings.receipt_level, receipt=told)

    def save_steering(self, asked: arguments.SaveSteering) -> answers.SaveAnswer:
        if self.write_to is None:
            raise ValueError("Nothing may be written. Start the server with --allow-write FOLDER.")
        steering = self._steering(asked)
        if asked.receipt is not None:
            try:
                steering = Receipt.from_dict(asked.receipt).signed(steering)
            except TypeError as error:
                raise ValueError("`receipt` must be one that evaluate_steering gave. Received: another.") from error
        path = self.write_to / f"{asked.name}.json"
        try:
            with path.open("x", encoding="utf-8") as file:  # never over a file that is there, nor through a link
                file.write(steering.to_json())
        except FileExistsError as error:
            raise ValueError(f"There is a file {path.name} already: give another `name`.") from error
        return answers.SaveAnswer(file=path.name, sha256=steering.digest, with_receipt=steering.receipt is not None)

    def _config(self, sae: int) -> Any:
        configs = self.model.config.sae_configs
        if not 0 <= sae < len(configs):
            raise ValueError(f"`sae` must be from 0 to {len(configs) - 1}. Received: sae={sae}.")
        return self.model.saes[sae].config

    def _sae_facts(self, number: int) -> answers.SaeFacts:
        config = self._config(number)
        names = dict(config.concepts) | {label: int(latent) for latent, label in config.feature_names.items()}
        notes = config.annotations
        facts = {} if notes is None else {_told(name): _told(value) for name, value in notes.facts.items()}
        return answers.SaeFacts(
            sae=number, place=config.read_at, d_in=config.d_in, n_features=config.d_sae,
            activation=config.activation, has_maxima=bool((self.model.saes[number].feature_max > 0).any()),
            names={_told(name): names[name] for name in list(names)[: limits.MAX_NAMES]}, n_names=len(names),
            described=None if notes is None else len(notes.described), annotations=facts, licence=facts.get("licence"),
        )  # fmt: skip

    def _name(self, sae: int, feature: int) -> str:
        """A feature's name or description, empty where it has none."""
        config = self._config(sae)
        known = {number: name for name, number in config.concepts.items()}
        known |= {int(number): name for number, name in config.feature_names.items()}
        notes = config.annotations
        return _told(known.get(feature) or (notes.names([feature]).get(feature, "") if notes is not None else ""))

    def _check_read(self, texts: list[str], skip_first: int) -> None:
        if skip_first >= self._length:
            raise ValueError(f"`skip_first` must be below {self._length}. Received: skip_first={skip_first}.")
        if blank := [number for number, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"Expected texts with a word in them. Received: none in text {blank[0]}.")

    def _steering(self, asked: arguments.Steered) -> Steering:
        """The steering of a call, checked against the model."""
        if (asked.edits is None) == (asked.steering is None):
            received = "none" if asked.edits is None else "both"
            raise ValueError(f"Expected one of `edits` and `steering`. Received: {received}.")
        if asked.steering is not None and asked.positions is not None:
            raise ValueError("`positions` are of `edits`; a `steering` says its own. Received: positions of both.")
        value = asked.steering
        if asked.edits is not None:
            edits = [edit.model_dump(exclude_none=True) for edit in asked.edits]
            value = {"edits": edits, "positions": asked.positions or PAST_THE_FIRST}
        widths = [config.d_sae for config in self.model.config.sae_configs]
        steering = read_steering(value, widths, self.model.prepare_steering, self.tokenizer)
        if not steering:
            raise ValueError("Expected a steering that does something. Received: one without an edit.")
        return steering


def _public(name: str) -> str:
    """A Hub id, or the last part of a folder's path."""
    return Path(name).resolve().name if Path(name).is_absolute() or Path(name).exists() else name


def _told(text: Any) -> str:
    """Words of others: of bounded length, and without what a terminal would obey."""
    text = visible(str(text))
    return text if len(text) <= limits.LONGEST_TOLD else f"{text[: limits.LONGEST_TOLD - 1]}…"


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose name is told as words of others are."""
    return {**row, "name": _told(row["name"])}


def _finite(value: Any) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else float(value)
