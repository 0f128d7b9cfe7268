"""The suite `reconstruction`: what SAEs keep of the hidden states they read, and what the model loses with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.settings import ReadingSettings, check_choice, check_integers
from ..method_ids import MethodId
from ..results import Measurement, SuiteResult
from ..settings import BootstrapSettings
from .labelled import ColumnOptions
from .settings import BOOTSTRAP, READING
from .suite import MAX_LENGTH, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..journal import Watch

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
    """Measures every SAE of a model on texts it was not trained on.

    fvu                  sum |x - xh|^2 / sum |x - mean(x)|^2 over tokens; explained_variance = 1 - fvu
    normalized_mse       mean of |x - xh|^2 / |x|^2;  cosine_similarity: mean of cos(x, xh)
    l0, dead_share       active latents of a token; share of latents that are active on no token
    ce_nats, kl_nats     of next-token predictions, method by method; KL(base || with the replacement)
    recovered            (CE_zero - CE_sae) / (CE_zero - CE_base), zeros at the SAE's place being the worst
    recovered_from_mean  the same with the mean hidden state in place of zeros

    Methods are `SAE 0`, `zeros at SAE 0`, `mean at SAE 0`, ..., and `none`, the base alone; with several SAEs also
    `all SAEs` in place together.

    Args:
        texts: two or more; those without a token to predict after the first ones are left out.
        reading: the first tokens of each text are neither reconstructed nor counted: the first is an outlier in norm
            that SAEs are seldom made for. The logits of a pass and the base's probabilities in float32 are held,
            (predicted tokens of a batch, vocabulary) each.
        bootstrap: over texts.

    Raises:
        ValueError: fewer than two texts of sufficient length, no SAE that writes where it reads, or hidden states that
            do not vary.
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

    def steps(self, model: SaeForCausalLM) -> int:
        """Texts of each pass; fewer where texts are too short."""
        saes = sum(entry.reconstructs for entry in model.config.sae_configs)
        return len(self.texts) * (1 + saes + (saes > 1))

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Every SAE."""
        import torch

        from ...latents.context import reading_length
        from ...latents.text_latents import batches_of, text_ids
        from ..intervals import resample_counts
        from ..reconstruction.measurements import loss_measurements, meter_measurements, read_all
        from ..reconstruction.metrics import replaced_losses

        max_length, skip_first = reading_length(model, self.reading.max_length, MAX_LENGTH), self.reading.skip_first
        configs = model.config.sae_configs
        measured = [i for i, config in enumerate(configs) if config.reconstructs]
        if not measured:
            raise ValueError(f"Expected an SAE that writes where it reads. Received: {len(configs)} SAEs, none such.")
        rows, kept = text_ids(model, tokenizer, self.texts, max_length=max_length, least=skip_first + 2)
        counts = resample_counts(len(rows), **asdict(self.bootstrap))
        batches = list(batches_of(rows, tokens_at_once=self.reading.tokens_per_batch))
        found: list[Measurement] = []
        read = read_all(model, measured, batches, len(rows), skip_first, watch)
        for number, meter in read.items():
            found += meter_measurements(meter, MethodId("sae", f"SAE {number}", number), counts)
        inputs = [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches]
        order = torch.cat([batch.texts for batch in batches])
        sets = [[number] for number in measured] + ([measured] if len(measured) > 1 else [])
        each = replaced_losses(
            model, inputs, sets, {number: meter.mean() for number, meter in read.items()},
            skip_first=skip_first, count_first=False, kl=True, watch=watch,
        )  # fmt: skip
        for place, (members, losses) in enumerate(zip(sets, each, strict=True)):
            alone = members[0] if len(members) == 1 else None
            method = MethodId("sae", "all SAEs" if alone is None else f"SAE {alone}", alone)
            found += loss_measurements(losses, method, counts[:, order], with_base=place == 0)
        notes = [
            f"Left as they are and not counted: the first tokens of each text ({skip_first}), and what is predicted "
            "from them.",
            "The mean hidden state, of variances and of mean-ablation, is that of the same texts.",
            "Dead: active on no token of these texts; more texts find more latents alive.",
        ]
        if len(kept) < len(self.texts):
            notes.append(f"{len(self.texts) - len(kept)} of {len(self.texts)} texts are too short and left out.")
        if others := [i for i in range(len(configs)) if i not in measured]:
            notes.append(f"SAEs {others} write elsewhere than they read (transcoders) and are not measured.")
        record = {
            "max_length": max_length, "skip_first": skip_first, **asdict(self.bootstrap), "texts": len(rows),
        }  # fmt: skip
        return SuiteResult(self.name, record, found, notes=notes)
