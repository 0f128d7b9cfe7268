"""Which latents stand for a concept: by labelled texts, and by what they do to the model's output.

A latent that answers to a concept need not bring it about. "SAEs are good for steering if you select the right
features" (https://huggingface.co/papers/2505.20063) measures both, and finds that hardly any latent scores high on
both; leaving out those with a low output score made steering on AxBench two to three times better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...evaluation.detection.metrics import code_aurocs
from ...evaluation.features.unembedding import final_norm
from ...latents.sparse_codes import SparseCodes
from ...latents.text_latents import sae_of
from ...modeling import FeatureEdit, Steering
from .settings import STATISTICS, OutputScoreSettings, SearchSettings


@dataclass(frozen=True)
class FeatureSearch:
    """Candidates of one SAE, best first.

    features: (m,) int64. input_scores: (m,) float64 by the statistic. output_scores: (m,) float64, None where they
    were not asked for. statistic, selection: how they were ranked. sae: number of the SAE.
    """

    features: Tensor
    input_scores: Tensor
    output_scores: Tensor | None
    statistic: str
    selection: str
    sae: int = 0

    def rows(self) -> list[dict[str, float]]:
        """A mapping for each candidate: sae, feature, the statistic's name, output_score."""
        found = []
        for place, feature in enumerate(self.features.tolist()):
            row = {"sae": self.sae, "feature": feature, self.statistic: float(self.input_scores[place])}
            if self.output_scores is not None:
                row["output_score"] = float(self.output_scores[place])
            found.append(row)
        return found


def labels_of_scores(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Labels from a judge's scores: 1 where a score is above the threshold, (n,) int64.

    Raises:
        ValueError: a score is not finite, or one class is missing.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"Scores must be finite. Received: {int((~torch.isfinite(scores)).sum())} that are not.")
    return checked_labels((scores > threshold).long(), len(scores))


def checked_labels(labels: Tensor, n_rows: int) -> Tensor:
    """(n,) int64 on the CPU.

    Raises:
        ValueError: another number of labels than rows, one that is neither 0 nor 1, or one class is missing.
    """
    if labels.shape != (n_rows,):
        raise ValueError(f"`labels` must have one entry for each of {n_rows} rows. Received: {tuple(labels.shape)}.")
    labels = labels.detach().cpu()
    counts = [int((labels == value).sum()) for value in (0, 1)]
    if sum(counts) != n_rows or not all(counts):
        raise ValueError(
            f"`labels` must be 0 or 1, and texts with and without the concept are needed. "
            f"Received: {counts[1]} with, {counts[0]} without, {n_rows - sum(counts)} neither."
        )
    return labels.long()


def activity_information(codes: SparseCodes, labels: Tensor) -> Tensor:
    """Mutual information of "the latent is active in the row" and the label, in nats, (d_sae,) float64.

    sum over on/off and 1/0 of p(x, y) log(p(x, y) / (p(x) p(y))), with shares of rows for probabilities.

    Args:
        codes: (n, d_sae).
        labels: (n,), 0 or 1; both must occur.
    """
    labels = checked_labels(labels, codes.n_rows)
    n, positives = codes.n_rows, int(labels.sum())
    on_positive = (codes._replace(values=torch.ones_like(codes.values))).sums(labels)
    on = codes.counts().double()
    joint = torch.stack([on_positive, on - on_positive, positives - on_positive, n - positives - on + on_positive])
    active, present = torch.stack([on, on, n - on, n - on]), torch.tensor([positives, n - positives] * 2)
    expected = active * present[:, None].double() / n
    return (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, expected)).sum(0).clamp(min=0) / n


def mean_differences(codes: SparseCodes, labels: Tensor) -> Tensor:
    """Mean of each latent over rows of label 1 less that over rows of label 0, (d_sae,) float64."""
    labels = checked_labels(labels, codes.n_rows).double()
    return codes.sums(labels / labels.sum()) - codes.sums((1 - labels) / (1 - labels).sum())


def input_scores(codes: SparseCodes, labels: Tensor, statistic: str = "auroc") -> Tensor:
    """How well each latent tells rows with the concept from rows without it, (d_sae,) float64, higher is better.

    Args:
        codes: (n, d_sae), such as `latents.sparse_codes.encode_texts` makes of texts.
        labels: (n,), 0 or 1; both must occur.
        statistic: `auroc` (`evaluation.detection.metrics.code_aurocs`), `mean_difference`, or `mutual_information`.
            The last does not tell for from against, so latents that are active in fewer rows of label 1 than of label
            0, by share, score -information.

    Raises:
        ValueError: an unknown statistic, or labels that do not fit.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}. Received: statistic={statistic!r}.")
    labels = checked_labels(labels, codes.n_rows)
    if statistic == "auroc":
        return code_aurocs(codes, labels)
    if statistic == "mean_difference":
        return mean_differences(codes, labels)
    sign = mean_differences(codes._replace(values=torch.ones_like(codes.values)), labels).sign()
    return sign * activity_information(codes, labels)


@torch.no_grad()
def logit_lens_tokens(model: Any, features: Tensor, *, sae: int = 0, top: int = 20, at_once: int = 256) -> Tensor:
    """The tokens that each latent's decoder row points to: the greatest of `lm_head(final_norm(W_dec[i]))`.

    Args:
        model: a `SaeForCausalLM`.
        features: (m,) int64.
        top: tokens of each.
        at_once: latents whose logits are held at a time.

    Returns:
        (m, top) int64 on the CPU, the greatest first.

    Raises:
        ValueError: the model has no final norm that can be found, or the SAE does not write to its residual stream.
    """
    head, norm = model.get_output_embeddings(), final_norm(model.lm)
    of = sae_of(model, sae)
    rows = of.W_dec[features.to(of.device)]
    if rows.shape[1] != model.config.get_text_config().hidden_size:
        raise ValueError(f"The SAE must write hidden states. Received: rows of width {rows.shape[1]} of SAE {sae}.")
    like = head.weight
    found = [head(norm(part.to(like.device, like.dtype))).float().topk(top).indices for part in rows.split(at_once)]
    return torch.cat(found).cpu()


@torch.no_grad()
def output_scores(
    model: Any,
    tokenizer: Any,
    features: Tensor,
    settings: OutputScoreSettings | None = None,
    *,
    sae: int = 0,
    rows_at_once: int = 64,
) -> Tensor:
    """How much a latent does what its decoder row says: 0 to 1.

        S_out = (1 - rank / |V|) * probability

    of the next token after a neutral prompt, where at the last token the latent is raised by `amplification` times the
    greatest activation that any latent has there. `rank` (from 0) and `probability` are the best that one of the
    latent's own `top_tokens` logit-lens tokens gets. https://huggingface.co/papers/2505.20063, as its code computes
    it, from which the default settings are.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base.
        features: (m,) int64.
        settings: prompt, amplification and tokens.
        sae: number of the SAE.
        rows_at_once: latents in a forward pass.

    Returns:
        (m,) float64 on the CPU.

    Raises:
        ValueError: a latent that the SAE does not have, or no latent is active at the last token.
    """
    settings = settings or OutputScoreSettings()
    prompt, d_sae = settings.prompt, sae_of(model, sae).config.d_sae
    if len(features) and not 0 <= int(features.min()) <= int(features.max()) < d_sae:
        raise ValueError(
            f"Latents of SAE {sae} are in [0, {d_sae}); are the features of another one? "
            f"Received: {int(features.min())} to {int(features.max())}."
        )
    own = logit_lens_tokens(model, features, sae=sae, top=settings.top_tokens)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    with model.steered(False):
        seen = model(input_ids=ids, output_features=True, stop_at_last_sae=True).sae_features[sae]
    peak = float(seen.values[0, -1].max())
    if not peak > 0:
        raise ValueError(f"No latent is active at the last token of the prompt. Received: prompt={prompt!r}.")
    found = []
    for members, tokens in zip(features.split(rows_at_once), own.split(rows_at_once), strict=True):
        value = settings.amplification * peak
        steering = [
            Steering([FeatureEdit(sae, feature, "add", value)], positions="last_prompt")
            for feature in members.tolist()
        ]
        logits = model(input_ids=ids.expand(len(members), -1), steering=steering, logits_to_keep=1).logits[:, -1]
        probabilities = logits.double().softmax(-1).cpu()
        best = probabilities.gather(1, tokens).amax(1)
        rank = (probabilities > best[:, None]).sum(1)
        found.append((1 - rank / probabilities.shape[1]) * best)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def search_features(
    codes: SparseCodes,
    labels: Tensor,
    model: Any = None,
    tokenizer: Any = None,
    settings: SearchSettings | None = None,
    *,
    sae: int = 0,
    effect: OutputScoreSettings | None = None,
) -> FeatureSearch:
    """Rank latents for a concept.

    Args:
        codes: (n, d_sae) of texts.
        labels: (n,), 0 or 1; both must occur.
        model, tokenizer: for output scores; needed unless `selection` is `input`.
        settings: its `selection` is `input`, by the statistic alone; `output`, of the `pool` best by the statistic, by
            output score alone; `combined`, of the `pool` best by the statistic, those with an output score of
            `effect.least` or more first, as the paper leaves out low ones, each group by the mean of its ranks by
            both scores. `top` does not count: `best_of` takes the first.
        sae: number of the SAE in the model.
        effect: how output scores are measured.

    Returns:
        At most `pool` latents, of those that are active in a text and whose statistic speaks for the concept.

    Raises:
        ValueError: one class only, a model that is missing or has another SAE, or no latent is left.
    """
    settings, effect = settings or SearchSettings(), effect or OutputScoreSettings()
    statistic, selection = settings.statistic, settings.selection
    scores = input_scores(codes, labels, statistic)
    live = codes.live()
    live = live[scores[live] > (0.5 if statistic == "auroc" else 0.0)]
    if not len(live):
        raise ValueError(f"No latent is more active where the concept is. Received: {codes.d_sae} latents.")
    features = live[scores[live].argsort(descending=True, stable=True)][: settings.pool]
    if selection == "input":
        return FeatureSearch(features, scores[features], None, statistic, selection, sae)
    if model is None or tokenizer is None:
        raise ValueError(f"Output scores need `model` and `tokenizer`. Received: selection={selection!r}.")
    if (d_sae := sae_of(model, sae).config.d_sae) != codes.d_sae:
        raise ValueError(
            f"The codes must be of SAE {sae}, which has {d_sae} latents. Received: codes of {codes.d_sae}."
        )
    by_output = output_scores(model, tokenizer, features, effect, sae=sae)
    if selection == "output":
        order = by_output.argsort(descending=True, stable=True)
    else:
        places = torch.arange(len(features), dtype=torch.float64)  # by the statistic
        mean_rank = (places + _ranks(by_output)) / 2
        order = (mean_rank + len(features) * (by_output < effect.least)).argsort(stable=True)
    features, by_output = features[order], by_output[order]
    return FeatureSearch(features, scores[features], by_output, statistic, selection, sae)


class HeldOutF1(NamedTuple):
    """f1: on one half of the rows. threshold: scores above it count as 1; the best on the other half.
    always_yes: F1, on the first of these halves, of calling every row 1."""

    f1: float
    threshold: float
    always_yes: float


def held_out_f1(scores: Tensor, labels: Tensor, *, seed: int = 0) -> HeldOutF1:
    """F1 of a score at a threshold that was chosen on other rows; nan where one half lacks a class.

    Args:
        scores: (n,), finite.
        labels: (n,), 0 or 1; both must occur.
        seed: of the halves.
    """
    labels = checked_labels(labels, len(scores)).bool()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    fitted, held = order[: len(order) // 2], order[len(order) // 2 :]
    if not all(0 < int(labels[half].sum()) < len(half) for half in (fitted, held)):
        return HeldOutF1(*3 * [float("nan")])
    values, places = scores[fitted].double().sort(descending=True)
    hits = labels[fitted][places].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(values) + 1) + hits[-1])
    last = torch.cat([values[:-1] > values[1:], torch.tensor([True])])  # of rows with equal scores
    best = int(torch.where(last, f1, -1.0).argmax())
    below = values[best + 1] if best + 1 < len(values) else values[best] - 1
    threshold = float((values[best] + below) / 2)
    predicted, truth = scores[held].double() > threshold, labels[held]
    found = 2 * int((predicted & truth).sum()) / (int(predicted.sum()) + int(truth.sum()))
    return HeldOutF1(found, threshold, 2 * int(truth.sum()) / (len(truth) + int(truth.sum())))


def _ranks(values: Tensor) -> Tensor:
    """Place of each value, the greatest 0, (n,) float64."""
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[values.argsort(descending=True, stable=True)] = torch.arange(len(values), dtype=torch.float64)
    return ranks


def best_of(searches: Sequence[FeatureSearch], count: int) -> list[tuple[int, int]]:
    """(SAE, feature) of the best candidates of several SAEs, `count` of each, SAE by SAE in turn."""
    if count < 1 or not searches:
        raise ValueError(f"Expected searches and a count of 1 or more. Received: {len(searches)}, count={count!r}.")
    longest = min(count, max(len(search.features) for search in searches))
    return [
        (search.sae, int(search.features[place]))
        for place in range(longest)
        for search in searches
        if place < len(search.features)
    ]
