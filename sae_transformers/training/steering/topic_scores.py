"""A score for every latent: how near to a topic are the texts in which it is active. And the steering made of it.

"Enabling precise topic alignment in large language models via sparse autoencoders"
(https://huggingface.co/papers/2506.12576). Its code loses all scores as soon as one latent is active in no reference
text (NaN in a minimum); here such latents have no cost and score 0.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...evaluation.topics.settings import METHODS, SUMMARIES
from ...latents.output_files import whole_file
from ...latents.safe_texts import to_cell
from ...latents.sparse_codes import SparseCodes, encode_texts
from ...modeling import FeatureEdit, FeatureReweighting, SparseAutoencoder, Steering

AFTER_FIRST = ((1, None),)
SCORE_NAMES, FEATURE_NAMES = ("score", "scores"), ("feature", "feature_id", "featureid", "index", "latent", "")


class TopicScores(NamedTuple):
    """scores: (d_sae,) float64, 0 to 1, 1 the most aligned; 0 for latents that were active in no reference text.
    costs: (d_sae,) float64, mean squared distance to the topic, weighted by activity; NaN for those latents."""

    scores: Tensor
    costs: Tensor

    @property
    def scored(self) -> Tensor:
        """Latents that were active in a reference text, (d_sae,) bool."""
        return ~self.costs.isnan()

    @property
    def coverage(self) -> float:
        """Their share: the paper's code counts it and calls it a measure of uncertainty."""
        return float(self.scored.double().mean())


def prompt_summaries(
    sae: SparseAutoencoder,
    hidden: Tensor,
    text_index: Tensor,
    n_texts: int,
    *,
    summary: str = "avg",
    tokens_at_once: int = 2048,
) -> SparseCodes:
    """What share each latent has in the activity of each text.

    avg:     A_rj = sum_t z_tj / sum_tj z_tj
    max:     A_rj = max_t z_tj / sum_j max_t z_tj
    counts:  A_rj = #{t: z_tj > 0} / sum_j #{t: z_tj > 0}

    Args:
        sae: whose latents are not negative.
        hidden: (n_tokens, d_in). Leave first tokens out, as the paper's code does.
        text_index: (n_tokens,) int64, the text of each token.
        n_texts: number of texts, each with a token.
        summary: `avg`, `max` or `counts`.
        tokens_at_once: of an encoding.

    Returns:
        (n_texts, d_sae) without zeros. A row sums to 1, or to 0 where no latent is active.

    Raises:
        ValueError: an unknown summary, a negative latent, no latent active at all, or what `encode_texts` refuses.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"`summary` must be one of {', '.join(SUMMARIES)}. Received: summary={summary!r}.")
    codes = encode_texts(sae, hidden, text_index, n_texts, pooling=SUMMARIES[summary], tokens_at_once=tokens_at_once)
    if bool((codes.values < 0).any()):
        raise ValueError(
            f"Shares need latents that are not negative. Received: activation={sae.config.activation!r} with negative "
            f"ones."
        )
    if not len(codes.values):
        raise ValueError(f"No latent of the SAE is active in any text. Received: {n_texts} texts, coverage 0.")
    totals = torch.zeros(n_texts, dtype=torch.float64).index_add_(0, codes.rows, codes.values)
    return codes._replace(values=codes.values / totals[codes.rows])


def topic_distances(embeddings: Tensor, topic: Tensor) -> Tensor:
    """Distance of each text to the nearest text of the topic, (n,) float64: 0 to 2 for unit embeddings.

    Args:
        embeddings: (n, d). topic: (m, d), m at least 1.

    Raises:
        ValueError: shapes do not fit or a value is not finite.
    """
    if embeddings.ndim != 2 or topic.ndim != 2 or not len(topic) or embeddings.shape[1] != topic.shape[1]:
        raise ValueError(
            f"Expected embeddings (n, d) and those of a topic (m, d), m of at least 1. "
            f"Received: {tuple(embeddings.shape)} and {tuple(topic.shape)}."
        )
    if not bool(embeddings.isfinite().all()) or not bool(topic.isfinite().all()):
        raise ValueError("Embeddings must be finite. Received: some that are not.")
    exact = "donot_use_mm_for_euclid_dist"  # products would cancel where texts are the same
    return torch.cdist(embeddings.double(), topic.double(), compute_mode=exact).amin(-1).cpu()


def topic_scores(summaries: SparseCodes, distances: Tensor) -> TopicScores:
    """Score latents by the distances of the texts in which they are active.

    c_j = sum_r d_r^2 A_rj / sum_r A_rj        s_j = 1 - (c_j - min c) / (max c - min c)

    Args:
        summaries: A, (n, d_sae) of the reference texts.
        distances: d, (n,), to the topic.

    Raises:
        ValueError: a distance is missing, negative or not finite; or all active latents cost the same, so that there
            is nothing to choose between, as with a single reference text.
    """
    if distances.shape != (summaries.n_rows,) or not bool((distances.isfinite() & (distances >= 0)).all()):
        raise ValueError(
            f"`distances` must hold a finite distance for each of {summaries.n_rows} texts. "
            f"Received: {tuple(distances.shape)}, {int((~(distances.isfinite() & (distances >= 0))).sum())} of them "
            f"not finite or negative."
        )
    costs = summaries.sums(distances.double().square()) / summaries.sums()  # 0 / 0 where never active
    known = costs[~costs.isnan()]
    if not len(known) or float(known.max() - known.min()) <= 1e-12 * float(known.max()):
        raise ValueError(
            f"Latents can only be told apart by reference texts at different distances from the topic; give more of "
            f"them. Received: {summaries.n_rows} reference texts, {len(known)} active latents, all of one cost."
        )
    scores = 1 - (costs - known.min()) / (known.max() - known.min())
    return TopicScores(scores.nan_to_num(0.0), costs)


# -- steering --------------------------------------------------------------------------------------------------------


def topic_steering(
    method: str,
    scores: Tensor | Sequence[float],
    *,
    sae: int = 0,
    keep_error: bool = False,
    strength: float = 1.0,
    top: int = 5,
    value: float = 10.0,
    unit: str = "absolute",
    positions: Any = AFTER_FIRST,
    legacy: bool = False,
) -> Steering:
    """The paper's methods as a `Steering`.

    orig    nothing
    SAE     h' = decode(z); with the error kept the same as `orig`
    clamp   z_j + value for the `top` best scores (the paper's name; nothing is clamped)
    weight  z' = act(p * s)
    swap    the support of act(p * s) with the values p

    Args:
        method: one of `METHODS`.
        scores: (d_sae,), NaN where a latent has none: it counts as 0.
        sae: number of the SAE in the model.
        keep_error: whether what the SAE does not reconstruct stays. The paper's code replaces the hidden state.
        strength: exponent of the scores of `weight` and `swap`: 1 is the paper's, 0 chooses as the SAE does.
        top, value, unit: of `clamp`; the paper's are 5, 10 and "absolute".
        positions: as `Steering` takes them; "all" as the paper's code does. The first token is left alone by
            default: its hidden state is an outlier that SAEs do not reconstruct.
        legacy: `weight` with the original's statistics, see `FeatureReweighting`.

    Raises:
        ValueError: an unknown method, no score above 0, an infinite or negative score, or a setting out of range.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: method={method!r}.")
    if not math.isfinite(strength) or strength < 0:
        raise ValueError(f"`strength` must be 0 or more. Received: strength={strength!r}.")
    if method == "orig" or (method == "SAE" and keep_error):
        return Steering()
    if method == "SAE":
        return Steering(reconstruct=(sae,), keep_error=False, positions=positions)
    known = torch.as_tensor(scores, dtype=torch.float64).nan_to_num(nan=0.0, posinf=math.inf)
    if known.ndim != 1 or not bool((known > 0).any()):
        raise ValueError(f"`scores` must hold a number above 0. Received: {tuple(known.shape)}, none above 0.")
    if method == "clamp":
        if not 1 <= top <= int((known > 0).sum()):
            raise ValueError(
                f"`top` must be at least 1 and at most the number of latents with a score above 0, "
                f"{int((known > 0).sum())}. Received: top={top!r}."
            )
        best = known.argsort(descending=True, stable=True)[:top].tolist()
        edits: list[Any] = [FeatureEdit(sae, feature, "add", value, unit) for feature in best]
    else:
        edits = [FeatureReweighting(sae, known.pow(strength).tolist(), method, legacy)]
    return Steering(edits, keep_error=keep_error, positions=positions)


# -- tables ----------------------------------------------------------------------------------------------------------


def write_topic_scores(path: str | Path, scores: TopicScores, columns: dict[str, Sequence[Any]] | None = None) -> Path:
    """Write a table with a row a latent: feature, score (empty where there is none), cost, and further columns.

    Args:
        path: .csv or .parquet. It appears whole or not at all.
        columns: name -> d_sae values.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    told = [None if math.isnan(cost) else cost for cost in scores.costs.tolist()]
    table: dict[str, Sequence[Any]] = {
        "feature": range(len(told)),
        "score": [None if cost is None else s for s, cost in zip(scores.scores.tolist(), told, strict=True)],
        "cost": told,
        **(columns or {}),
    }
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"A table of scores is .csv or .parquet. Received: {path.name!r}.")
    with whole_file(path) as draft:
        if path.suffix == ".csv":
            with draft.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(map(to_cell, table))
                writer.writerows(map(to_cell, row) for row in zip(*table.values(), strict=True))
        else:
            import pyarrow as pa
            import pyarrow.parquet

            pyarrow.parquet.write_table(pa.table({name: list(values) for name, values in table.items()}), draft)
    return path


def read_topic_scores(path: str | Path, d_sae: int | None = None) -> TopicScores:
    """Scores from a table: ours, or the original's csv (row number, score).

    The scores are the column `score`, or the only one besides `feature` or an unnamed row number. A missing one or
    NaN is a latent that was active in no reference text. Costs that the table does not have are `1 - score`, which
    orders latents alike.

    Args:
        path: .csv or .parquet.
        d_sae: latents of the SAE.

    Raises:
        ValueError: no column of scores or several, a score that is no number in [0, 1], or another number of latents.
    """
    path = Path(path)
    rows = _rows_of(path)
    names = list(rows[0]) if rows else []
    places = [name for name in names if name.lower() in FEATURE_NAMES]
    found = [n for n in names if n.lower() in SCORE_NAMES] or [name for name in names if name not in places]
    if len(found) != 1:
        raise ValueError(f"Expected one column `score`. Received: columns {names} in {path.name}.")
    count = len(rows) if d_sae is None else d_sae
    if len(rows) != count:
        raise ValueError(
            f"Expected a score for each of {count} latents; is the table of another SAE? "
            f"Received: {len(rows)} in {path.name}."
        )
    scores, costs = torch.full((2, count), math.nan, dtype=torch.float64)
    for number, row in enumerate(rows):
        feature = int(row[places[0]]) if places and row[places[0]] not in ("", None) else number
        score = _number(row[found[0]])
        if not 0 <= feature < count or not (math.isnan(score) or 0 <= score <= 1):
            raise ValueError(
                f"Expected a latent below {count} and a score from 0 to 1. "
                f"Received: {feature} and {score} in row {number} of {path.name}."
            )
        scores[feature] = score
        costs[feature] = _number(row["cost"]) if "cost" in row else 1 - score
    return TopicScores(scores.nan_to_num(0.0), costs.where(~scores.isnan(), math.nan))


def _number(value: Any) -> float:
    try:
        return math.nan if value in ("", None) else float(value)
    except ValueError:
        raise ValueError(f"Scores are numbers. Received: {value!r}.") from None


def _rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix != ".csv":
        raise ValueError(f"A table of scores is .csv or .parquet. Received: {path.name!r}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))
