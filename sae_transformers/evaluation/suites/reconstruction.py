"""The suite `reconstruction`: what SAEs keep of the hidden states they read, and what the model loses with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.settings import ReadingSettings, check_choice, check_integers
from ..results import SuiteResult
from ..settings import BootstrapSettings
from .labelled import ColumnOptions
from .settings import BOOTSTRAP, READING
from .suite import Report, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM

ROWS = ("paragraph", "line", "file")


@dataclass(frozen=True)
class ReconstructionOptions:
    """Texts.

    Args:
        texts: texts that the SAE was not trained on.
        max_texts: texts that are read, the first ones.
        txt_rows: a row of a .txt file: paragraph, line or file.
    """

    PANEL: ClassVar[str] = "Suite reconstruction"

    texts: str | None = None
    max_texts: int = 500
    txt_rows: str = "paragraph"
    columns: ColumnOptions = ColumnOptions()

    def __post_init__(self) -> None:
        check_integers(self, max_texts=2)
        check_choice(self, "txt_rows", ROWS)


@dataclass(frozen=True)
class ReconstructionSuite(Suite):
    """See `reconstruction_suite`.

    Args:
        texts: two or more that the SAEs were not trained on.
        reading: how they are read.
        bootstrap: over texts.
    """

    Options: ClassVar[type] = ReconstructionOptions
    needs: ClassVar[tuple[str, ...]] = ("texts",)
    texts_of: ClassVar[tuple[str, ...]] = ("texts",)

    texts: Sequence[str]
    reading: ReadingSettings = READING
    bootstrap: BootstrapSettings = BOOTSTRAP

    @classmethod
    def read(cls, options: ReconstructionOptions, inputs: SuiteInputs) -> ReconstructionSuite:
        """The first texts of a file that are not empty."""
        from ...latents.texts import open_text

        source = open_text(str(options.texts), column=options.columns.text_column, txt_rows=options.txt_rows)
        texts: list[str] = []
        start = 0
        while len(texts) < options.max_texts and (rows := source.read(start, 1024).texts):
            start += len(rows)
            texts += [text for text in rows if text.strip()]
        texts = texts[: options.max_texts]
        if not texts:
            raise ValueError(f"`texts`: there is no text in {options.texts!r}.")
        same = {"max_texts": options.max_texts, "text_column": options.columns.text_column}
        asked: dict[str, Any] = {**inputs.told(), **same, "txt_rows": options.txt_rows}
        files = [source_file(str(options.texts), texts, len(texts))]
        return cls(texts, inputs.reading, inputs.bootstrap, asked=asked, data=files)

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: object = None,
    ) -> SuiteResult:  # fmt: skip
        """Measure every SAE."""
        from ..reconstruction.suite import reconstruction_suite

        return reconstruction_suite(model, tokenizer, self.texts, self.reading, self.bootstrap, report=report)

    def steps(self, model: SaeForCausalLM) -> int:
        """Texts of each pass; fewer where texts are too short."""
        saes = sum(entry.read_at == entry.write_at for entry in model.config.sae_configs)
        return len(self.texts) * (1 + saes + (saes > 1))
