"""What `classify` gives: the measures of each method, and the classifier to publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.classification import paired_t_test, summary
from ..evaluation.journal import Journal
from ..evaluation.plots import plot_methods
from ..modeling import SaeForSequenceClassification
from ..training.heads.comparison import Rows
from .classifier_candidates import Way
from .classifier_verdict import Verdict
from .going_on import went_on
from .results import Result, save_json
from .settings.classify import ClassifySettings

COLUMNS = ("accuracy", "f1", "auroc", "ece", "delta_logit", "delta_in_std", "flips", "reliance")


@dataclass(frozen=True)
class ClassifyResult(Result):
    """Classifiers that may and may not use some features, compared.

    Args:
        model: the classifier, with the best head of `facts["kept"]`. tokenizer: of its base.
        ways: each method, as strong as it was tried -> a row of measures for each seed.
        verdict: what was chosen on validation.
        lora: measures after the base was tuned; None where it was not.
        facts: names of model and labels, seeds, the method that was kept, the unintended features.
        measured_on: `test rows`, or how many folds.
        settings: how they were made.
        journal: keeps what was read and trained until the result is saved.
    """

    model: SaeForSequenceClassification = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    ways: Mapping[Way, list[dict[str, float]]] = field(repr=False)
    verdict: Verdict = field(repr=False)
    lora: dict[str, float] | None
    facts: Mapping[str, Any] = field(repr=False)
    measured_on: str
    settings: ClassifySettings = field(repr=False)
    journal: Journal | None = field(repr=False, default=None)

    @property
    def methods(self) -> Rows:
        """Method -> a row of measures for each seed, as strong as the rule takes it."""
        return {name: self.ways[way] for name, way in self.verdict.chosen.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One for each method and seed: method, what it takes out, seed, and its measures."""
        return [
            {"method": method, "strength": self.verdict.chosen[method].strength, "seed": seed, **row}
            for method, rows in self.methods.items()
            for seed, row in zip(self.facts["seeds"], rows, strict=True)
        ]

    def table(self) -> list[dict[str, str]]:
        """One for each method: means, half of the 95 % interval over seeds and the standard deviation, and the
        difference in F1 to `plain` with its p."""
        found = []
        for method, rows in self.methods.items():
            means, several = summary(rows), len(rows) > 1
            cells = {name: _cell(rows, name, means[name].high) for name in COLUMNS if name in means}
            versus = ""
            if "plain" in self.methods and method != "plain" and several:
                own, plain = ([row["f1"] for row in one] for one in (rows, self.methods["plain"]))
                test = paired_t_test(own, plain, "two-sided")
                versus = f"{test.difference:+.3f}" + (f" ({test.p:.2f})" if test.p == test.p else "")
            label = str(self.verdict.chosen[method])
            found.append({"method": label, **cells, **({"F1 to plain (p)": versus} if several else {})})
        return found

    def curve(self) -> list[dict[str, Any]]:
        """One for each way: what it does to the F1 and, where a swap was measured, to the score's change under it in
        standard deviations; means over seeds, beside what validation said of it."""
        found = []
        for way, rows in self.ways.items():
            row: dict[str, Any] = {"method": way.method, "strength": way.strength}
            row |= {name: fmean(one[name] for one in rows) for name in ("f1", "delta_in_std") if name in rows[0]}
            if way in self.verdict.compared:
                change, score = self.verdict.compared[way]
                row |= {"validation delta to plain": change, "validation score to plain": score}
            found.append(row)
        return found

    def columns(self) -> list[list[str]]:
        """The columns of `table()` in groups that fit on a terminal."""
        names = [name for name in self.table()[0] if name != "method"]
        return [["method", *names[start : start + 3]] for start in range(0, len(names), 3)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, what `results.json` holds."""
        tuned = {} if self.lora is None else {"lora": self.lora}
        return {"methods": self.methods, **tuned, "curve": self.curve(), "facts": dict(self.facts)}

    def summary(self) -> list[str]:
        """What the table does not say, in lines."""
        said = [*went_on(self.journal), *([self.verdict.sentence] if self.verdict.sentence else [])]
        if self.lora:
            said.append("after LoRA: " + ", ".join(f"{name} {value:.3f}" for name, value in self.lora.items()))
        return said

    def plot(self, path: str | Path) -> Path | None:
        """Draw F1 against the sensitivity to the swap, a point for each method; None without matplotlib."""
        return plot_methods(self.methods, path)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `results.json`, `methods.png` (with matplotlib) and the classifier, `model/`; the paths."""
        target = Path(folder)
        files = save_json(target, {"results.json": self.to_dict()})
        drawn = self.plot(target / "methods.png")
        self.model.save_pretrained(target / "model")
        self.tokenizer.save_pretrained(target / "model")
        if self.journal is not None:
            self.journal.remove()
        return [*files, *([drawn] if drawn else []), target / "model"]


def _cell(rows: Sequence[Mapping[str, float]], name: str, high: float) -> str:
    """mean ± half of the interval / standard deviation; the mean alone of one seed."""
    values = [row[name] for row in rows]
    mean = fmean(values)
    return f"{mean:.3f} ± {high - mean:.3f} / {pstdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"
