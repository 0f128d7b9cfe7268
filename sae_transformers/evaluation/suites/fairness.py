"""The suite `fairness`: stereotypes before and after steering, what steering costs, and swapped attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.settings import check_integers
from ..results import DataFile, SuiteResult, data_file
from .lambada import LambadaOptions
from .settings import FairnessSettings
from .suite import CardFacts, Report, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..fairness.stereotypes import SentencePair


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
    """See `fairness_suite`.

    Args:
        pairs: name of a data set -> pairs, as `bias.read_winobias` and `read_crows_pairs` give them.
        last_words: passages of LAMBADA.
        swapped: the same texts twice, with an attribute of the second swapped.
        settings: how they are read.
    """

    Options: ClassVar[type] = FairnessOptions
    needs: ClassVar[tuple[str, ...]] = ("winobias", "crows_pairs", "lambada", "original")
    texts_of: ClassVar[tuple[str, ...]] = ("pairs", "last_words", "swapped")
    card: ClassVar[CardFacts] = CardFacts("text-classification")

    pairs: Mapping[str, Sequence[SentencePair]] = field(default_factory=dict)
    last_words: Sequence[str] = ()
    swapped: tuple[Sequence[str], Sequence[str]] | None = None
    settings: FairnessSettings = FairnessSettings()

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

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: object = None,
    ) -> SuiteResult:  # fmt: skip
        """Measure without steering and with the model's default."""
        from ..fairness.suite import fairness_suite

        return fairness_suite(
            model, tokenizer, self.pairs, self.last_words, self.swapped, self.settings, report=report
        )
