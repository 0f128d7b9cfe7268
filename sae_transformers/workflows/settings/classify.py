"""Settings of `classify`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

from ...create_training_data.template_texts import PLACEHOLDER, check_template
from ...latents.settings import check_choice, check_integers, check_numbers
from ...training.heads.settings import AGAINST_SWAPS, ALIGNMENTS, COMPARED, HeadSettings, LoraSettings

PAPER_SEEDS = (14592, 3278, 36048, 32098, 29256, 18289)  # SelfReg's (https://huggingface.co/papers/2502.14133)
POOLINGS = ("last", "mean")
REMOVALS = ("own", "relu", "none")
NEED_SWAPS = ("pairing", "projection", "leace")


@dataclass(frozen=True)
class LabelSettings:
    """Which columns hold a task.

    Args:
        text_column: column of the text.
        label_column: column of the label; a,b,c for several yes-or-no labels.
        classes: labels that are kept apart, all others become "other"; by default all labels.
        pairs: chosen,rejected: columns of pairs, in place of labels.
        prompt_column: column of the text before both of a pair.
    """

    PANEL: ClassVar[str] = "Data"

    text_column: str = "text"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    pairs: tuple[str, ...] | None = None
    prompt_column: str | None = None

    def __post_init__(self) -> None:
        if self.pairs is not None and len(self.pairs) != 2:
            raise ValueError(f"`pairs` must be two columns, chosen and rejected. Received: pairs={self.pairs!r}.")


@dataclass(frozen=True)
class ComparisonSettings:
    """Which heads are compared, and how each is trained.

    Args:
        methods: those that are compared, of `training.heads.settings.COMPARED`. What needs swapped texts is left out
            without them, unless it is asked for.
        seeds: one head of each method per seed; the default is SelfReg's.
        folds: of the cross-validation, without test rows.
        pooling: state of a text: `last` token or `mean` over its tokens.
        removal: how SelfReg takes unintended features out of the states: `own`, `relu` or `none`.
        alignment: what SelfReg's penalty keeps small: `affine` (the paper's code), `encoder` or `decoder`.
        penalty: weight of SelfReg's penalty.
        learning_rate: of all heads.
        legacy: losses as in SelfReg's code.
        top: without a list of unintended features: so many that react to the swap; the rule chooses among several.
        directions: how many principal directions of swapped texts are erased; the rule chooses among several.
        pairing: penalties on how far the logits of swapped texts are apart; the rule chooses among several.
        max_f1_loss: what the rule may give up of the validation F1.
        keep: the method whose best head becomes the classifier; by default the one that the rule recommends, and
            without swaps selfreg.
    """

    PANEL: ClassVar[str] = "Heads"

    methods: tuple[str, ...] = tuple(COMPARED)
    seeds: tuple[int, ...] = PAPER_SEEDS
    folds: int = 5
    pooling: str = "mean"
    removal: str = "own"
    alignment: str = "decoder"
    penalty: float = 0.3
    learning_rate: float = 3e-3
    legacy: bool = False
    top: tuple[int, ...] = (50, 100, 200)
    directions: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    pairing: tuple[float, ...] = (0.3, 1.0, 3.0)
    max_f1_loss: float = 0.01
    keep: str | None = None

    def __post_init__(self) -> None:
        check_integers(self, folds=2)
        check_numbers(self, "max_f1_loss", least=0)
        for name, least in (("top", "1 or more"), ("directions", "1 or more"), ("pairing", "above 0")):
            values = getattr(self, name)
            if not values or not min(values) > 0:
                raise ValueError(f"`{name}` must be numbers of {least}. Received: {name}={values!r}.")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        check_choice(self, "pooling", POOLINGS)
        check_choice(self, "removal", REMOVALS)
        check_choice(self, "alignment", ALIGNMENTS)
        if not self.methods or not self.seeds:
            raise ValueError(
                f"Expected one method and one seed or more. Received: methods={self.methods!r}, seeds={self.seeds!r}."
            )
        self.heads()
        if self.keep is not None and self.keep not in self.methods:
            raise ValueError(f"`keep` must be one of the methods. Received: keep={self.keep!r}, {self.methods!r}.")

    def heads(self) -> dict[str, HeadSettings]:
        """Method -> how its heads are trained.

        Raises:
            ValueError: an unknown method, or a number out of its range.
        """
        base = HeadSettings(learning_rate=self.learning_rate, legacy=self.legacy)
        removal = "none" if self.removal == "none" else "relu"  # what is done is in the states already
        selfreg = replace(base, method="selfreg", penalty=self.penalty, alignment=self.alignment, removal=removal)
        for name in self.methods:
            if name not in COMPARED:
                close = get_close_matches(name, COMPARED, 1)
                raise ValueError(
                    f"`methods` are of {', '.join(COMPARED)}. Received: {name!r}."
                    + (f" Did you mean {close[0]!r}?" if close else "")
                )
        pairing = replace(selfreg, alignment="decoder", removal="none")
        others = {"selfreg": selfreg, "random": selfreg, "pairing": pairing, "projection": base, "leace": base}
        return {name: others[name] if name in others else replace(base, method=name) for name in self.methods}

    def possible(self, *, swaps: bool) -> tuple[str, ...]:
        """The methods that can be compared: those that need swapped texts only with them, or as they were asked for.

        Raises:
            ValueError: one that needs swapped texts was asked for, and there are none.
        """
        asked = self.methods != tuple(COMPARED)
        if not swaps and asked and (needing := [name for name in self.methods if name in NEED_SWAPS]):
            raise ValueError(f"{', '.join(needing)} needs texts with an attribute swapped. Received: swaps=None.")
        return tuple(name for name in self.methods if swaps or asked or name not in AGAINST_SWAPS)


@dataclass(frozen=True)
class ClassifySettings:
    """How classifiers are compared.

    Args:
        template: what the model reads, with {text} where a row goes; toxicity, helpfulness or disease for ours.
        max_length: tokens; longer texts are cut, the template is not. By default 256, or what the model reads.
        tokens_per_batch: tokens of a forward pass, padding counted. It changes results by rounding only.
        comparison: which heads are compared.
        lora: how the base is tuned afterwards.
        journal: file that keeps the parts of a run that is stopped, so that the same call goes on from there.
    """

    template: str = PLACEHOLDER
    max_length: int | None = None
    tokens_per_batch: int = 4096
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    journal: Path | None = None

    def __post_init__(self) -> None:
        check_integers(self, max_length=1, tokens_per_batch=1)
        check_template(self.template)


@dataclass(frozen=True)
class ClassifyOptions:
    """Which columns are read, and how classifiers are compared: the options of the command line.

    Args:
        columns: which hold texts and labels.
        settings: how classifiers are compared.
    """

    columns: LabelSettings = field(default_factory=LabelSettings)
    settings: ClassifySettings = field(default_factory=ClassifySettings)
