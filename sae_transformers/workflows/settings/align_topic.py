"""Settings of `align_topic`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...evaluation.topics.settings import SUMMARIES, TopicGenerationSettings, TopicMethod
from ...latents.settings import ReadingSettings, check_choice, check_integers, check_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...create_training_data.sentence_embeddings import SentenceEmbedder
    from ...evaluation.scorers.acceptability import AcceptabilityClassifier

LONG_TEXTS = ("truncate", "chunks")


@dataclass(frozen=True)
class TopicScoringSettings:
    """How latents are scored, and what is made of the scores.

    Args:
        method: method whose steering is the result: `swap`, `weight`, `clamp` or `SAE`. Settings of its own may
            follow: `swap:replace`, `swap:4`.
        compare: methods that are measured beside it.
        keep_error: keep what the SAE does not reconstruct, or, as in the paper, replace the hidden state.
        strength: exponent of the scores; 1 is the paper's.
        summary: how a reference text's latents are summed up: `avg`, `max` or `counts`.
        clamp_top: number of latents that `clamp` raises.
        clamp_value: what `clamp` adds to each.
        clamp_unit: unit of that value: `absolute`, `max` or `norm`.
        all_positions: steer the first token too.
    """

    PANEL: ClassVar[str] = "Method"

    method: str = "swap"
    compare: tuple[str, ...] = ("SAE", "weight", "clamp")
    keep_error: bool = True
    strength: float = 1.0
    summary: str = "avg"
    clamp_top: int = 5
    clamp_value: float = 10.0
    clamp_unit: str = "absolute"
    all_positions: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "summary", tuple(SUMMARIES))
        check_numbers(self, "strength", least=0)
        check_integers(self, clamp_top=1)
        self.methods()

    def methods(self) -> list[TopicMethod]:
        """`method` and then those of `compare`, each once."""
        names = dict.fromkeys([self.method, *self.compare])
        return [TopicMethod.parse(name, keep_error=self.keep_error, strength=self.strength) for name in names]


@dataclass(frozen=True)
class TopicEmbeddingSettings:
    """What says how near texts are to the topic, and when a warning is due.

    Args:
        embedder: sentence-transformers model, a folder or a Hub id; by default all-MiniLM-L6-v2.
        long_texts: what becomes of texts beyond the embedder's limit: `truncate`, or the mean over `chunks`.
        embedding_tokens: that limit; by default the embedder's own.
        quantile: share of the reference texts' own topics that are less uncertain than the threshold of the warning.
    """

    PANEL: ClassVar[str] = "Embedding and uncertainty"

    embedder: str | None = None
    long_texts: str = "truncate"
    embedding_tokens: int | None = None
    quantile: float = 0.95

    def __post_init__(self) -> None:
        check_choice(self, "long_texts", LONG_TEXTS)
        check_integers(self, embedding_tokens=1)
        check_numbers(self, "quantile", above=0)
        if self.quantile >= 1:
            raise ValueError(f"`quantile` must be in (0, 1). Received: quantile={self.quantile!r}.")

    def load(self, say: Callable[[str], None] = lambda text: None) -> SentenceEmbedder:
        """The embedder; `say` is told what takes long.

        Raises:
            ImportError, OSError, ValueError: see `SentenceEmbedder`.
        """
        from ...create_training_data.sentence_embeddings import SentenceEmbedder

        return SentenceEmbedder(self.embedder, long_texts=self.long_texts, max_tokens=self.embedding_tokens, say=say)


@dataclass(frozen=True)
class TopicMeasuringSettings:
    """How methods are compared by what they write.

    Args:
        prompt_count: number of prompts, at most; with 0 nothing is generated.
        prompt_tokens: tokens of each beginning of a reference text, where no prompts are given.
        topic_prompt: text put before each prompt by the baseline; by default the beginning of a topic text.
        lora_epochs: epochs of a fine-tuning on the topic's texts with LoRA, which is then measured too.
        lora_rank: rank of LoRA.
        acceptability: a text classifier, such as one of CoLA; by default SLOR under the base.
        acceptability_label: label of that classifier that means acceptable.
        generation: how prompts are continued.
    """

    PANEL: ClassVar[str] = "Measuring"

    prompt_count: int = 32
    prompt_tokens: int = 12
    topic_prompt: str | None = None
    lora_epochs: float = 0.0
    lora_rank: int = 8
    acceptability: str | None = None
    acceptability_label: str | None = None
    generation: TopicGenerationSettings = field(default_factory=TopicGenerationSettings)

    def __post_init__(self) -> None:
        check_integers(self, prompt_count=0, prompt_tokens=1, lora_rank=1)
        check_numbers(self, "lora_epochs", least=0)

    def classifier(self) -> AcceptabilityClassifier | None:
        """What judges acceptability, if it is not SLOR.

        Raises:
            OSError, ValueError: see `AcceptabilityClassifier`.
        """
        if self.acceptability is None:
            return None
        from ...evaluation.scorers.acceptability import AcceptabilityClassifier

        return AcceptabilityClassifier(self.acceptability, label=self.acceptability_label)


@dataclass(frozen=True)
class TopicFiles:
    """Texts beside those of the reference and the topic, and the columns of all.

    Args:
        topic_test: other texts of the topic, that similarity is measured to; by default the topic's.
        prompts: texts to continue, or one prompt as it is; by default beginnings of reference texts.
        reference_column: column of the reference texts; by default text, or the only one.
        topic_column: column of the topic's texts, likewise.
        topic_test_column: column of the other texts of the topic, likewise.
        prompts_column: column of the prompts, likewise.
    """

    PANEL: ClassVar[str] = "Texts"

    topic_test: str | None = None
    prompts: str | None = None
    reference_column: str | None = None
    topic_column: str | None = None
    topic_test_column: str | None = None
    prompts_column: str | None = None

    def read(self, reference: str, topic: str) -> dict[str, list[str] | None]:
        """The texts by the names that `TopicTexts` has. `prompts` that is several words and no file is a prompt.

        Raises:
            OSError, ValueError: see `read_column`.
        """
        from ...latents.texts import read_column

        names = {"reference": reference, "topic": topic, "topic_test": self.topic_test, "prompts": self.prompts}
        texts = {}
        for part, name in names.items():
            if part == "prompts" and name is not None and len(name.split()) > 1 and not Path(name).exists():
                texts[part] = [name]
            else:
                texts[part] = read_column(name, getattr(self, f"{part}_column")) if name else None
        return texts


@dataclass(frozen=True)
class TopicSettings:
    """How a model is steered towards a topic, and how that is measured.

    Args:
        scoring: scores and methods.
        embedding: distances to the topic.
        measuring: continuations.
        reading: which tokens of the texts count.
        journal: file that keeps the parts of a run that is stopped, so that the same call goes on from there.
    """

    scoring: TopicScoringSettings = field(default_factory=TopicScoringSettings)
    embedding: TopicEmbeddingSettings = field(default_factory=TopicEmbeddingSettings)
    measuring: TopicMeasuringSettings = field(default_factory=TopicMeasuringSettings)
    reading: ReadingSettings = field(default_factory=lambda: ReadingSettings(tokens_per_batch=4096))
    journal: Path | None = None


@dataclass(frozen=True)
class TopicOptions:
    """What the verb `align-topic` takes.

    Args:
        files: further texts, and columns.
        settings: how the model is steered.
    """

    files: TopicFiles = field(default_factory=TopicFiles)
    settings: TopicSettings = field(default_factory=TopicSettings)
