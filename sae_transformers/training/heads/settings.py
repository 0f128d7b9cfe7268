"""What one classification head on cached states is trained with."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

from ...latents.settings import check_integers, check_numbers

METHODS = {
    "plain": "The task loss alone: a linear probe (https://huggingface.co/papers/1610.01644).",
    "dropout": "Inputs dropped at random (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).",
    "l2": "A squared-norm penalty on the weights (Hoerl and Kennard 1970, "
    "https://doi.org/10.1080/00401706.1970.10488634).",
    "overfit": "No early stop, the last epoch is taken: the lower end of SelfReg's comparison "
    "(https://huggingface.co/papers/2502.14133).",
    "focal": "Focal loss, easy examples count less (https://huggingface.co/papers/1708.02002, equation 5).",
    "label_smoothing": "Targets mixed with the uniform one (https://huggingface.co/papers/1512.00567, section 7).",
    "spectral_norm": "A penalty on the squared top singular value of the weights "
    "(https://huggingface.co/papers/1705.10941, section 3).",
    "selfreg": "Unintended SAE features removed from the state, and a penalty on the weights' alignment with them "
    "(https://huggingface.co/papers/2502.14133).",
}
AGAINST_SWAPS = {
    "random": "As `selfreg`, with as many features drawn at random: a control.",
    "pairing": "Without an SAE: a penalty on how far the logits of swapped texts are apart, counterfactual logit "
    "pairing (https://huggingface.co/papers/1809.10610, section 4.4).",
    "projection": "Without an SAE: the principal directions of the differences of swapped texts projected out of the "
    "state (https://huggingface.co/papers/1607.06520, section 6).",
    "leace": "The same directions erased with the least change of the states "
    "(https://huggingface.co/papers/2306.03819, theorem 4.3).",
}
COMPARED = {**METHODS, **AGAINST_SWAPS}
SELECTIONS = ("f1", "macro_f1", "accuracy", "auroc")
REMOVALS = ("none", "relu")
REDUCTIONS = ("mean", "sum")
ALIGNMENTS = ("affine", "encoder", "decoder")
PAIR_LOSSES = ("pointwise", "bradley_terry")


@dataclass(frozen=True)
class HeadSettings:
    """How one head is trained. The defaults are those of SelfReg's toxicity task, but for its penalty of 31.

    Args:
        method: one of `METHODS`, which say where each is from.
        epochs: at most; `overfit_epochs` for `overfit`.
        batch_size: texts or pairs in a batch.
        learning_rate: of AdamW, betas 0.9 and 0.999, eps 1e-8, no decoupled weight decay.
        decay: factor of the learning rate when `patience` is spent; training goes on from the best epoch.
        max_decays: how often; the next time training stops.
        patience: epochs without improvement until then.
        min_improvement: of the validation score for an epoch to be the best so far.
        dropout: share of the state's coordinates dropped (`dropout`).
        l2: factor of the weights' squared norm (`l2`).
        focal_gamma: exponent of 1 - p (`focal`).
        focal_alpha: weight of positives, 1 - alpha that of negatives (`focal`); None for 1 and 1.
        label_smoothing: share of the uniform target (`label_smoothing`).
        spectral: factor of half the squared top singular value (`spectral_norm`).
        penalty: SelfReg's lambda (`selfreg`): 31 for toxicity, 3 for rewards, 1 for diseases in its code.
        penalty_reduction: of the penalty over unintended features: `mean`, as its code, or `sum`, as its paper.
        alignment: of weights w with feature j, which the penalty keeps small: `affine`, (w - b_dec) @ W_enc[:, j] +
            b_enc[j], as SelfReg's code, so that w = 0 is not its minimum; `encoder`, w @ W_enc[:, j]; or `decoder`,
            w @ W_dec[j], what the feature adds to the logit.
        removal: `relu` takes unintended features out of the states, at test time too; `none` does not. None is `relu`
            for `selfreg` and `none` for the others.
        subtract_b_dec: whether the removal takes the SAE's `b_dec` out too, as SelfReg's code does.
        class_weights: weight of each class (binary: of 0 and of 1) or of each label; a weighted mean is taken.
        overfit_epochs: of `overfit`.
        select_by: validation score of an epoch. `f1` is that of class 1 for two classes, else the mean over classes.
        hidden_size: width of a hidden layer with ReLU; None for a linear head.
        pair_loss: of pairs: `pointwise`, binary cross-entropy of [chosen; rejected], as SelfReg; or `bradley_terry`,
            -log sigmoid(chosen - rejected) (Bradley and Terry 1952, https://doi.org/10.2307/2334029).
        legacy: SelfReg's code as it is: label smoothing is a softmax over the batch, `l2` and `spectral_norm` penalise
            norms and not their squares, classes go through softmax twice, three classes weigh 2.5, 2.5 and 1 and are
            selected by the mean F1 of the first two, pairs have focal_alpha=0.2, `b_dec` is subtracted with the
            removal, and a decay lasts one batch.
        reshuffle: new batches each epoch; False repeats those of the first, as SelfReg's loader.

    Raises:
        ValueError: an unknown choice, or a number out of its range.
    """

    method: str = "plain"
    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    decay: float = 0.5
    max_decays: int = 2
    patience: int = 3
    min_improvement: float = 1e-4
    dropout: float = 0.1
    l2: float = 1e-3
    focal_gamma: float = 2.0
    focal_alpha: float | None = None
    label_smoothing: float = 0.1
    spectral: float = 0.02
    penalty: float = 1.0
    penalty_reduction: str = "mean"
    alignment: str = "affine"
    removal: str | None = None
    subtract_b_dec: bool = False
    class_weights: tuple[float, ...] | None = None
    overfit_epochs: int = 70
    select_by: str = "f1"
    hidden_size: int | None = None
    pair_loss: str = "pointwise"
    legacy: bool = False
    reshuffle: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", tuple(METHODS)),
            ("select_by", SELECTIONS),
            ("penalty_reduction", REDUCTIONS),
            ("alignment", ALIGNMENTS),
            ("removal", (None, *REMOVALS)),
            ("pair_loss", PAIR_LOSSES),
        ):
            value = getattr(self, name)
            if value not in choices:
                close = get_close_matches(str(value), [c for c in choices if c], 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}.{hint}"
                )
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_decays", 0), ("patience", 1), ("hidden_size", 1)):
            self._check_integer(name, least)
        self._check_integer("overfit_epochs", 1)
        for name, low, high in (
            ("learning_rate", 0.0, None),
            ("decay", 0.0, 1.0),
            ("min_improvement", 0.0, None),
            ("dropout", 0.0, 0.99),
            ("l2", 0.0, None),
            ("focal_gamma", 0.0, None),
            ("focal_alpha", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
            ("spectral", 0.0, None),
            ("penalty", 0.0, None),
        ):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                bound = f"at least {low:g}" + ("" if high is None else f" and at most {high:g}")
                raise ValueError(f"`{name}` must be {bound}. Received: {name}={value!r}.")
        if self.class_weights is not None and (not self.class_weights or min(self.class_weights) <= 0):
            raise ValueError(f"`class_weights` must be above 0. Received: class_weights={self.class_weights!r}.")
        if self.legacy and self.pair_loss != "pointwise":
            raise ValueError(
                f"SelfReg's code has no Bradley-Terry loss: drop legacy or use pair_loss='pointwise'. "
                f"Received: legacy=True, pair_loss={self.pair_loss!r}."
            )

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name == "hidden_size":
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}.")

    @property
    def total_epochs(self) -> int:
        return self.overfit_epochs if self.method == "overfit" else self.epochs

    @property
    def removes(self) -> bool:
        """Whether unintended features are taken out of the states."""
        return (self.removal or ("relu" if self.method == "selfreg" else "none")) == "relu"

    @property
    def removes_b_dec(self) -> bool:
        return self.removes and (self.subtract_b_dec or self.legacy)


@dataclass(frozen=True)
class LoraSettings:
    """How the base is tuned with LoRA, together with the head.

    Args:
        lora_epochs: epochs of tuning the base, after heads were compared; 0 leaves it as it is.
        lora_rank: rank of the changes.
        state_weight: weight of the activity of unintended features in the states that the head reads.
        lora_learning_rate: of AdamW.
        lora_batch_size: texts or pairs in a batch.
        lora_seed: of batches and weights.
    """

    PANEL: ClassVar[str] = "Tuning the base"

    lora_epochs: float = 0.0
    lora_rank: int = 8
    state_weight: float = 0.1
    lora_learning_rate: float = 2e-4
    lora_batch_size: int = 16
    lora_seed: int = 42

    def __post_init__(self) -> None:
        check_integers(self, lora_rank=1, lora_batch_size=1)
        check_numbers(self, "lora_epochs", "state_weight", least=0)
        check_numbers(self, "lora_learning_rate", above=0)
