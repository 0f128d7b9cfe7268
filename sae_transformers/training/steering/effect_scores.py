"""What a latent does to the next token, and how it goes along with what the model writes: scores that selection uses.

Three scores of a latent's effect, none of which needs a backward pass: the output score, and the delta token
confidence, each from one forward pass of a neutral prompt in which the latent is raised; and the correlation of the
latent with an outcome of texts that the model has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...evaluation.features.unembedding import final_norm
from ...evaluation.generation.continuations import continue_prompts, prompt_ids
from ...evaluation.journal import Journal
from ...evaluation.scorers.registry import Scorer, checked_scores
from ...evaluation.settings import GenerationSettings
from ...latents.sparse_codes import SparseCodes, encode_texts
from ...latents.text_latents import batches_of, sae_of
from ...modeling import FeatureEdit, Steering
from .settings import OutputScoreSettings

ROUNDING = 1e-24  # of float64: centred squares below this share of n * mean^2 are no variation


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


# -- the next token ---------------------------------------------------------------------------------------------------


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
    _check_features(model, features, sae)
    own = logit_lens_tokens(model, features, sae=sae, top=settings.top_tokens)
    found = []
    for members, logits in _raised_logits(model, tokenizer, features, settings, sae, rows_at_once):
        probabilities = logits.softmax(-1)
        best = probabilities.gather(1, own[members]).amax(1)
        rank = (probabilities > best[:, None]).sum(1)
        found.append((1 - rank / probabilities.shape[1]) * best)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def delta_confidences(
    model: Any,
    tokenizer: Any,
    features: Tensor,
    settings: OutputScoreSettings | None = None,
    *,
    sae: int = 0,
    rows_at_once: int = 64,
) -> Tensor:
    """How much a raised latent changes the confidence of the next token: the delta token confidence.

        C_k(p) = -1/k * sum over i = 1..k of log p_(i),  p_(1) >= p_(2) >= ... the sorted probabilities
        dC_k   = C_k(p raised) - C_k(p)

    of the next token after a neutral prompt, where at the last token the latent is raised as for `output_scores`.
    "Does higher interpretability imply better utility?" (https://huggingface.co/papers/2510.03659), appendix D, which
    takes k = 1 and ranks by the magnitude. C_k is high where the model is unsure, so a positive value is a confidence
    that was lost. The paper sets the other latents to 0; here, as for the output score, they stay as they are.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base.
        features: (m,) int64.
        settings: prompt, amplification, and `confidence_tokens`, which is k.
        sae: number of the SAE.
        rows_at_once: latents in a forward pass.

    Returns:
        (m,) float64 on the CPU, in nats, of either sign.

    Raises:
        ValueError: a latent that the SAE does not have, or no latent is active at the last token.
    """
    settings = settings or OutputScoreSettings()
    _check_features(model, features, sae)
    k = settings.confidence_tokens
    ids = tokenizer(settings.prompt, return_tensors="pt")["input_ids"].to(model.device)
    base = model(input_ids=ids, steering=False, logits_to_keep=1).logits[:, -1].double().cpu()
    found = [
        token_confidences(logits, k) - token_confidences(base, k)
        for _, logits in _raised_logits(model, tokenizer, features, settings, sae, rows_at_once)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def token_confidences(logits: Tensor, k: int) -> Tensor:
    """-1/k times the sum of the k greatest log-probabilities of each row (m, vocab): (m,), in nats."""
    return -logits.log_softmax(-1).topk(k).values.mean(-1)


def _raised_logits(
    model: Any, tokenizer: Any, features: Tensor, settings: OutputScoreSettings, sae: int, rows_at_once: int
) -> Iterator[tuple[slice, Tensor]]:
    """Of some latents at a time, their places and the next token's logits (rows, vocab) float64, each raised alone."""
    ids = tokenizer(settings.prompt, return_tensors="pt")["input_ids"].to(model.device)
    with model.steered(False):
        seen = model(input_ids=ids, output_features=True, stop_at_last_sae=True).sae_features[sae]
    peak = float(seen.values[0, -1].max())
    if not peak > 0:
        raise ValueError(f"No latent is active at the last token of the prompt. Received: prompt={settings.prompt!r}.")
    value = settings.amplification * peak
    for start in range(0, len(features), rows_at_once):
        members = features[start : start + rows_at_once]
        steering = [
            Steering([FeatureEdit(sae, feature, "add", value)], positions="last_prompt")
            for feature in members.tolist()
        ]
        logits = model(input_ids=ids.expand(len(members), -1), steering=steering, logits_to_keep=1).logits[:, -1]
        yield slice(start, start + len(members)), logits.double().cpu()


def _check_features(model: Any, features: Tensor, sae: int) -> None:
    d_sae = sae_of(model, sae).config.d_sae
    if len(features) and not 0 <= int(features.min()) <= int(features.max()) < d_sae:
        raise ValueError(
            f"Latents of SAE {sae} are in [0, {d_sae}); are the features of another one? "
            f"Received: {int(features.min())} to {int(features.max())}."
        )


# -- what the model writes --------------------------------------------------------------------------------------------


class OutcomeMoments:
    """Correlation of every latent with a number that each row has, from rows that are seen once and not kept.

        r_i = sum (x_i - mean x_i)(y - mean y) / sqrt(sum (x_i - mean x_i)^2 * sum (y - mean y)^2)

    over rows; x_i is latent i's value in a row, y the row's outcome. Of a batch only the latents that are not zero are
    read; batches are joined by Chan's update of means and centred sums, so that an outcome far from 0 loses no digits.

    Args:
        d_sae: latents. What is held is three numbers of each, float64, whatever the number of rows.
    """

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self._mean, self._squares, self._products = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(3))
        self._outcome_mean, self._outcome_squares = 0.0, 0.0

    def add(self, codes: SparseCodes, outcomes: Tensor) -> None:
        """See more rows.

        Args:
            codes: (n, d_sae) without zeros.
            outcomes: (n,), of each row.

        Raises:
            ValueError: another number of outcomes than rows, or of latents than before; an outcome is not finite.
        """
        outcomes = outcomes.detach().double().cpu()
        if codes.d_sae != len(self._mean) or outcomes.shape != (codes.n_rows,):
            raise ValueError(
                f"Expected codes of {len(self._mean)} latents and an outcome for each row. Received: {codes.d_sae} "
                f"latents, {codes.n_rows} rows, outcomes {tuple(outcomes.shape)}."
            )
        if not bool(torch.isfinite(outcomes).all()):
            raise ValueError(
                f"Outcomes must be finite. Received: {int((~torch.isfinite(outcomes)).sum())} that are not."
            )
        if not (n := codes.n_rows):
            return
        outcome_mean = float(outcomes.mean())
        apart = outcomes - outcome_mean
        mean = codes.sums() / n
        # sum over rows of (x - mean)^2: rows where the latent is zero are n - count of them
        squares = codes._replace(values=(codes.values - mean[codes.latents]).square()).sums()
        squares += (n - codes.counts()) * mean.square()
        products = codes.sums(apart)  # the mean of `apart` is 0
        total = self.n + n
        weight, step, outcome_step = self.n * n / total, mean - self._mean, outcome_mean - self._outcome_mean
        self._squares += squares + weight * step.square()
        self._products += products + weight * step * outcome_step
        self._outcome_squares += float(apart.square().sum()) + weight * outcome_step**2
        self._mean += step * (n / total)
        self._outcome_mean += outcome_step * n / total
        self.n = total

    def correlations(self) -> Tensor:
        """(d_sae,) float64 in [-1, 1]; 0 where a latent has one value in all rows.

        Raises:
            ValueError: fewer than two rows, or the outcome is the same in all.
        """
        if self.n < 2 or not self._outcome_squares > ROUNDING * self.n * self._outcome_mean**2:
            raise ValueError(
                f"A correlation needs rows of different outcomes: more of them, or another scorer. Received: {self.n} "
                f"rows, of which the outcome is {self._outcome_mean:g} at a sum of squares of "
                f"{self._outcome_squares:g}."
            )
        varies = self._squares > ROUNDING * self.n * self._mean.square()
        scale = torch.where(varies, self._squares * self._outcome_squares, 1.0).sqrt()
        return torch.where(varies, self._products / scale, 0.0).clamp(-1, 1)


@torch.no_grad()
def generated_correlations(
    model: Any,
    before: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    outcomes: Tensor,
    *,
    pooling: str = "max",
    tokens_at_once: int = 2048,
    report: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Correlation of each latent with an outcome of generated texts, each latent pooled over a text's tokens.

    "CorrSteer" (https://huggingface.co/papers/2508.12535) selects by it: a latent's greatest activation where a text
    is written, against what became of the text. It counts the positions that give the text's tokens: from the prompt's
    last token to the text's last but one.

    Args:
        model: a `SaeForCausalLM`; it reads without steering, up to its last SAE.
        before: token ids of n prompts, one or more each.
        generated: token ids of what was written after each, one or more.
        outcomes: (n,), finite.
        pooling: of `latents.sparse_codes.encode_texts`.
        tokens_at_once: of a forward pass, padding counted.
        report: called with the number of texts of each batch.

    Returns:
        Of each SAE (d_sae,) float64 in [-1, 1].

    Raises:
        ValueError: numbers that differ, a prompt or a text without a token, or outcomes that are all the same.
    """
    if not len(before) == len(generated) == len(outcomes) or not all(map(len, before)) or not all(map(len, generated)):
        raise ValueError(
            f"Expected a prompt, a generated text and an outcome of each row, no text without a token. Received: "
            f"{len(before)} prompts, {len(generated)} texts, {len(outcomes)} outcomes, "
            f"{sum(not len(row) for row in (*before, *generated))} without a token."
        )
    moments = [OutcomeMoments(sae.config.d_sae) for sae in model.saes]
    rows = [[*given, *new[:-1]] for given, new in zip(before, generated, strict=True)]
    first = torch.tensor([len(given) - 1 for given in before])
    for batch in batches_of(rows, tokens_at_once=tokens_at_once):
        states = model(
            input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
            output_sae_inputs=True, stop_at_last_sae=True,
        ).sae_inputs  # fmt: skip
        writes = batch.mask.bool() & (torch.arange(batch.mask.shape[1]) >= first[batch.texts][:, None])
        line = writes.nonzero()[:, 0]  # of each token that counts, its text in the batch
        for number, sae in enumerate(model.saes):
            hidden = states[number][writes.to(states[number].device)]
            codes = encode_texts(sae, hidden, line, len(batch.texts), pooling=pooling)
            moments[number].add(codes, outcomes[batch.texts])
        if report is not None:
            report(len(batch.texts))
    return [one.correlations() for one in moments]


def outcome_correlations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    settings: GenerationSettings | None = None,
    *,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> list[Tensor]:
    """Continue prompts without steering, score what is written, and correlate latents with the scores.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base.
        prompts: as the model reads them (`chat_prompts`): those that choose, never those that report.
        scorer: continuations -> a finite number each, higher for more of the concept.
        settings: of the continuations; `samples_per_prompt` of each prompt.
        report: called with the number of continuations of each batch.
        journal: has the continuations of a run that was stopped, and gets the others.

    Returns:
        Of each SAE (d_sae,) float64 in [-1, 1].

    Raises:
        ValueError: prompts that do not fit, or scores that do not, or are all the same.
    """
    settings = settings or GenerationSettings()
    rows = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    made = continue_prompts(model, tokenizer, rows, None, settings, report=report, journal=journal)
    scores = checked_scores(scorer, made.texts)
    return generated_correlations(model, prompt_ids(model, tokenizer, rows, 0), made.ids, scores)
