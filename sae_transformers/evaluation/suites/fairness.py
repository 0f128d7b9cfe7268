"""The suite `fairness`: stereotypes before and after steering, what steering costs, and swapped attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.settings import check_integers
from ..method_ids import MethodId, baseline_method
from ..results import DataFile, Measurement, SuiteResult, data_file, with_methods
from .lambada import LambadaOptions
from .settings import FairnessSettings
from .suite import MAX_LENGTH, CardFacts, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM, Steering
    from ..fairness.stereotypes import SentencePair
    from ..journal import Watch


@dataclass(frozen=True)
class FairnessOptions:
    """Pairs of sentences, last words, and texts with an attribute swapped.

    Args:
        winobias: folder of WinoBias, {pro,anti}_stereotyped_type{1,2}_test.txt.
        crows_pairs: csv file of CrowS-Pairs.
        max_pairs: pairs of each set, the first ones; by default all.
        original: texts, ...
        swapped: ... and the same with an attribute swapped.
        max_swapped: pairs of these texts, the first ones.
        swapped_column: column of the text of both.
    """

    PANEL: ClassVar[str] = "Suite fairness"

    winobias: Path | None = None
    crows_pairs: Path | None = None
    max_pairs: int | None = None
    original: str | None = None
    swapped: str | None = None
    max_swapped: int = 500
    swapped_column: str = "text"
    words: LambadaOptions = LambadaOptions()

    def __post_init__(self) -> None:
        check_integers(self, max_pairs=1, max_swapped=1)
        if (self.original is None) != (self.swapped is None):
            given, other = ("original", "swapped") if self.swapped is None else ("swapped", "original")
            raise ValueError(f"`{given}` needs `{other}`, the same texts. Received: `{given}` alone.")

    def pairs(self, files: list[DataFile]) -> dict[str, Sequence[SentencePair]]:
        """Name of a data set -> its pairs; what was read is added to `files`."""
        from ..fairness.stereotypes import read_crows_pairs, read_winobias

        pairs: dict[str, Sequence[SentencePair]] = {}
        if self.winobias is not None:
            for kind in (1, 2):
                paths = [self.winobias / f"{side}_stereotyped_type{kind}_test.txt" for side in ("pro", "anti")]
                pairs[f"WinoBias type {kind}"] = read_winobias(paths[0], paths[1])[: self.max_pairs]
                files += [data_file(path, split="test") for path in paths]
        if self.crows_pairs is not None:
            found = read_crows_pairs(self.crows_pairs)
            pairs["CrowS-Pairs gender"] = [pair for pair in found if pair.kind == "gender"][: self.max_pairs]
            pairs["CrowS-Pairs other"] = [pair for pair in found if pair.kind != "gender"][: self.max_pairs]
            files.append(data_file(self.crows_pairs, rows=len(found)))
        return {name: some for name, some in pairs.items() if some}

    def both(self, files: list[DataFile]) -> tuple[list[str], list[str]] | None:
        """The original texts and the swapped ones."""
        from ...latents.texts import read_column

        if self.original is None or self.swapped is None:
            return None
        paths = [self.original, self.swapped]
        sides = [read_column(path, self.swapped_column, keep_empty=True) for path in paths]
        if len(sides[0]) != len(sides[1]):
            counts = f"{len(sides[0])}, {len(sides[1])}"
            raise ValueError(f"`original` and `swapped` need as many rows. Received: {counts}.")
        files += [source_file(path, side, len(side)) for path, side in zip(paths, sides, strict=True)]
        return sides[0][: self.max_swapped], sides[1][: self.max_swapped]


@dataclass(frozen=True)
class FairnessSuite(Suite):
    """Measures a model without steering (`none`) and with it (`steered`); differences are paired.

    stereotype_share, stereotype_gap_nats  of each set of pairs, by the whole sentence, and by the marked words where
                                           the data marks them (see `PairScores`); `_change` is steered - none
    lambada_accuracy, lambada_perplexity   of last words, and lambada_log_p_change, in nats a word
    score_move, score_move_in_std          mean |change| of a feature's score when the attribute is swapped, and the
                                           same in standard deviations of the scores; methods are features, and
                                           `random latent of SAE 0` for scale

    Args:
        pairs: name of a data set -> pairs, as `read_winobias` and `read_crows_pairs` give them.
        last_words: passages of LAMBADA, two words or more each.
        swapped: the same texts twice, with an attribute of the second swapped (names, gender, dialect).
        settings: the lengths are of the swapped texts; the seed also draws the random latent.
        steering: the model's default by default. Without any, only `none` is measured.

    Raises:
        ValueError: there is nothing to measure, a text is too short or too long, or the swapped texts are not paired.
    """

    Options: ClassVar[type] = FairnessOptions
    needs: ClassVar[tuple[str, ...]] = ("winobias", "crows_pairs", "lambada", "original")
    texts_of: ClassVar[tuple[str, ...]] = ("pairs", "last_words", "swapped")
    card: ClassVar[CardFacts] = CardFacts("text-classification")

    pairs: Mapping[str, Sequence[SentencePair]] = field(default_factory=dict)
    last_words: Sequence[str] = ()
    swapped: tuple[Sequence[str], Sequence[str]] | None = None
    settings: FairnessSettings = FairnessSettings()
    steering: Steering | None = None

    @classmethod
    def read(cls, options: FairnessOptions, inputs: SuiteInputs) -> FairnessSuite:
        """Every set that is given."""
        from ...latents.texts import read_column

        files: list[DataFile] = []
        pairs = options.pairs(files)
        words: list[str] = []
        if (path := options.words.lambada) is not None:
            words = read_column(str(path), "text", keep_empty=True)
            files.append(source_file(path, words, len(words)))
            words = words[: options.words.limit]
        both = options.both(files)
        asked: dict[str, Any] = {
            **inputs.told(), "feature": inputs.feature_texts, "max_pairs": options.max_pairs,
            "limit": options.words.limit, "max_swapped": options.max_swapped,
            "swapped_column": options.swapped_column, "pairs": list(pairs),
        }  # fmt: skip
        settings = FairnessSettings(inputs.features, inputs.reading, inputs.bootstrap)
        return cls(pairs, words, both, settings, asked=asked, data=files)

    def steps(self, model: SaeForCausalLM) -> int:
        """Texts, without steering and with it; fewer where swapped ones are too short."""
        runs = 2 if self._steering(model) else 1
        scored = 2 * sum(map(len, self.pairs.values())) + len(self.last_words)
        return runs * scored + (0 if self.swapped is None else 2 * len(self.swapped[0]))

    def _steering(self, model: SaeForCausalLM) -> Steering | None:
        return model.steering if self.steering is None else self.steering

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Every set, without steering and with it."""
        from ...latents.context import reading_length
        from ..fairness.measurements import NONE, STEERED, pair_measurements, swap_measurements, word_measurements
        from ..fairness.stereotypes import score_last_words, score_pairs

        if not self.pairs and not self.last_words and self.swapped is None:
            raise ValueError("Expected pairs, last words or swapped texts. Received: none of them.")
        settings, steering = self.settings, self._steering(model)
        scoring: dict[str, Any] = {"tokens_at_once": settings.reading.tokens_per_batch, **watch._asdict()}
        runs = {NONE: False, **({STEERED: steering} if steering else {})}
        found: list[Measurement] = []
        for name, pairs in self.pairs.items():
            scores = {way: score_pairs(model, tokenizer, pairs, steering=run, **scoring) for way, run in runs.items()}
            found += pair_measurements(name, scores, settings.bootstrap)
        if self.last_words:
            words = {
                way: score_last_words(model, tokenizer, self.last_words, steering=run, **scoring)
                for way, run in runs.items()
            }
            found += word_measurements(words, settings.bootstrap)
        found = with_methods(found, [baseline_method("none", NONE), MethodId("steered", STEERED)])
        notes = ["All texts stand after the token that begins or ends texts, so that their first word counts."]
        if not steering:
            notes.append("No steering with an edit, the model's default or a given one: nothing is compared.")
        length = reading_length(model, settings.reading.max_length, MAX_LENGTH)
        if self.swapped is not None:
            moved, paired = swap_measurements(model, tokenizer, self.swapped, settings, length, watch)
            found += moved
            if short := len(self.swapped[0]) - paired:
                notes.append(f"{short} of {len(self.swapped[0])} swapped pairs are too short and left out.")
        features = settings.features
        record = {
            "steering": steering.to_dict() if steering else None, "max_length": length,
            "skip_first": settings.reading.skip_first,
            "features": None if features is None else [list(feature) for feature in features],
            "pairs": {name: len(some) for name, some in self.pairs.items()}, "last_words": len(self.last_words),
            "swapped": len(self.swapped[0]) if self.swapped else 0, **asdict(settings.bootstrap),
        }  # fmt: skip
        return SuiteResult(self.name, record, found, notes=notes)
