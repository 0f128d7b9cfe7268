"""What `attribute` found: effects of features at tokens, as rows, as a coloured text, and how far they hold."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.attribution.effects import ABLATION, Effects
from ...evaluation.attribution.faithfulness import Agreement, FaithfulnessCurve
from ...evaluation.plots import plot_lines
from ...modeling.output_files import write_whole
from ..results import Result, html_table, save_csv
from ..settings.detect import AttributionSettings

CURVES = {
    "keep": "strongest kept", "keep_random": "random kept", "remove": "strongest removed",
    "remove_random": "random removed",
}  # fmt: skip
RAISES, LOWERS = "0,150,136", "211,47,47"


@dataclass(frozen=True)
class AttributionResult(Result):
    """Effects of features at the tokens of one text.

    Args:
        text: that was given. tokens: the n tokens that were read, as text; later ones do not reach the target.
        target: what the effects are on, such as `' Paris' - ' London'`. method: how they were measured.
        effects: of P pairs of feature and token; `effects.value` is the target.
        names: (SAE, feature) -> what it is called, of those that have a name.
        agreement: with another method, over the pairs that were checked; None where none was.
        curve: what the strongest pairs are enough for; None where it was not measured.
        settings: how they were measured.
    """

    text: str
    tokens: list[str]
    target: str
    method: str
    effects: Effects = field(repr=False)
    names: dict[tuple[int, int], str]
    agreement: Agreement | None
    curve: FaithfulnessCurve | None = field(repr=False)
    settings: AttributionSettings = field(repr=False)

    def _pairs(self, order: Tensor) -> Iterator[tuple[int, int, int, float, float]]:
        """SAE, feature, position, activation and effect of pairs."""
        pairs = self.effects.pairs.take(order)
        columns = (pairs.sae, pairs.feature, pairs.position, pairs.activation, self.effects.effect[order])
        return zip(*(column.tolist() for column in columns), strict=True)

    def rows(self) -> list[dict[str, Any]]:
        """One for each pair, the largest effect by magnitude first: position, token, sae, feature, name, activation,
        effect."""
        order = self.effects.effect.abs().argsort(descending=True, stable=True)
        return [
            {
                "position": position, "token": self.tokens[position], "sae": sae, "feature": feature,
                "name": self.names.get((sae, feature), ""), "activation": activation, "effect": effect,
            }
            for sae, feature, position, activation, effect in self._pairs(order)
        ]  # fmt: skip

    def strongest(self, k: int = 10) -> list[dict[str, Any]]:
        """The features by their effects summed over tokens, the largest by magnitude first: sae, feature, name,
        effect, tokens (how many), at (the token of the largest effect)."""
        pairs, effect = self.effects.pairs, self.effects.effect
        keys = torch.stack([pairs.sae, pairs.feature], 1)
        unique, of = keys.unique(dim=0, return_inverse=True)
        sums = torch.zeros(len(unique), dtype=effect.dtype).index_add_(0, of, effect)
        counts = torch.bincount(of, minlength=len(unique))
        found = []
        for number in sums.abs().argsort(descending=True, stable=True)[:k].tolist():
            own = (of == number).nonzero()[:, 0]
            best = int(own[effect[own].abs().argmax()])
            sae, feature = unique[number].tolist()
            row = {"sae": sae, "feature": feature, "name": self.names.get((sae, feature), "")}
            row |= {"effect": float(sums[number]), "tokens": int(counts[number])}
            found.append({**row, "at": self.tokens[int(pairs.position[best])]})
        return found

    def per_token(self) -> list[float]:
        """The sum of the effects at each token, (n,)."""
        sums = torch.zeros(len(self.tokens), dtype=self.effects.effect.dtype)
        return sums.index_add_(0, self.effects.pairs.position, self.effects.effect).tolist()

    def summary(self) -> list[str]:
        """What was measured, and how far it holds."""
        n = len(self.effects.effect)
        lines = [f"{self.target} = {self.effects.value:.4g}, {n:,} pairs of feature and token, {self.method}"]
        if self.method == ABLATION and n == self.settings.max_pairs:
            lines[0] += f" of the {n:,} strongest by gradient x latent (max_pairs)"
        if (found := self.agreement) is not None:
            lines.append(
                f"With {found.against} over {found.pairs:,} pairs: rank correlation {found.spearman:.3f}, correlation "
                f"{found.pearson:.3f}, same sign {found.same_sign:.0%}"
            )
        if self.curve is not None:
            between, needed = self.curve.whole - self.curve.none, self.curve.needed()
            lines.append(
                f"All pairs move the target by {between:.4g}. Kept alone, the strongest recover "
                f"{self.curve.area('keep'):.2f} of it over the curve, random pairs "
                f"{self.curve.area('keep_random'):.2f}; 80 % takes {f'{needed:,}' if needed is not None else 'more'}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "text": self.text, "tokens": self.tokens, "target": self.target, "value": self.effects.value,
            "method": self.method, "pairs": self.rows(),
            "agreement": None if self.agreement is None else self.agreement._asdict(),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "settings": dataclasses.asdict(self.settings),
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write `rows()` as .csv; or, where the path ends in .json, `to_dict()`."""
        if Path(path).suffix == ".json":
            write_whole(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        else:
            save_csv(path, self.rows())

    def plot(self, path: str | Path) -> Path | None:
        """The faithfulness curve; None without matplotlib.

        Raises:
            ValueError: it was not measured.
        """
        if self.curve is None:
            raise ValueError("The curve was not measured. Set `curve=True`.")
        lines = {
            label: list(zip(self.curve.n, self.curve.shares(name), strict=True)) for name, label in CURVES.items()
        }
        return plot_lines(lines, path, "pairs of feature and token", "share of the target recovered")

    def _repr_html_(self) -> str:
        """The tokens, coloured by the sum of their features' effects, teal where they raise the target and red where
        they lower it; each names its strongest features when pointed at. Then the strongest features."""
        sums = self.per_token()
        top = max(map(abs, sums), default=0.0) or 1.0
        told: dict[int, list[str]] = {}
        for row in self.rows():
            told.setdefault(row["position"], []).append(f"{row['name'] or row['feature']} {row['effect']:+.3g}")
        shown = []
        for number, (token, total) in enumerate(zip(self.tokens, sums, strict=True)):
            title = html.escape(f"{total:+.3g}: {', '.join(told.get(number, [])[:5])}", quote=True)
            colour, share = RAISES if total >= 0 else LOWERS, abs(total) / top
            share = 0.0 if math.isnan(share) else share
            shown.append(
                f'<span title="{title}" style="background:rgba({colour},{share:.2f})">{html.escape(token)}</span>'
            )
        lines = "<br>".join(map(html.escape, self.summary()))
        text = f'<p style="line-height:1.8;white-space:pre-wrap">{"".join(shown)}</p>'
        return f"<p>{lines}</p>{text}{html_table(self.strongest())}"
