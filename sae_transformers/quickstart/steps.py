"""The steps of the quickstart, each a function from what is known to what was measured. Nothing is shown here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..create_training_data.labelled_text import LabelledTexts
from ..evaluation.detection.metrics import auroc, mean_by_text
from ..evaluation.generation.continuations import continue_prompts
from ..evaluation.settings import GenerationSettings
from ..latents.diffmean import fit_diffmean
from ..latents.hidden_states import HiddenStates, read_hidden_states
from ..modeling import FeatureEdit, SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig, Steering
from ..training.sae.in_memory import fit_conditioned_sae
from ..training.sae.initialization import usual_norm
from .settings import CONCEPT, Prepared, Settings

Report = Callable[[int, int], None]
ROWS_AT_ONCE = 96  # continuations made together: beyond, a CPU does no more of them a second


@dataclass(frozen=True)
class Point:
    """One steering strength, measured.

    strength: in multiples of each hidden state's norm, along the latent's decoder row; 0 is unsteered.
    sentiment: mean VADER compound score, -1 to 1; sentiment_error: its standard error.
    perplexity: of the unsteered model on the continuations.
    repetition: share of word trigrams that repeat earlier ones.
    texts: the continuations, prompt by prompt.
    """

    strength: float
    sentiment: float
    sentiment_error: float
    perplexity: float
    repetition: float
    texts: tuple[str, ...]

    def numbers(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "texts"}


# -- the model -------------------------------------------------------------------------------------------------------


def load_base(prepared: Prepared) -> tuple[Any, Any, dict[str, float]]:
    """The base in the dtype that is faster here, its tokenizer, and the measured tokens per second of each dtype."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.base.name, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, speed = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = AutoModelForCausalLM.from_pretrained(prepared.base.name, dtype=dtype)
        model = model.to(device).eval()
        name = str(dtype).removeprefix("torch.")
        models[name], speed[name] = model, _tokens_per_second(model)
    # A small gain is not worth the precision.
    chosen = "bfloat16" if speed["bfloat16"] > 1.3 * speed["float32"] else "float32"
    return models[chosen], tokenizer, speed


@torch.inference_mode()
def _tokens_per_second(model: Any, rows: int = 8, width: int = 32) -> float:
    ids = torch.arange(rows * width, device=model.device).view(rows, width) % model.config.vocab_size
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False)[0][0, 0, 0].item()  # item() waits for a GPU
        times.append(time.perf_counter() - start)
    return rows * width / min(times)


def put_sae_into(base: Any, prepared: Prepared) -> SaeForCausalLM:
    """The base with a new SAE, whose latent 0 will detect the concept."""
    width = prepared.config.get_text_config().hidden_size
    d_sae = prepared.settings.size.latents_per_dimension * width
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=width,
            d_sae=d_sae,
            activation="topk",
            k=min(32, d_sae),
            normalization="layer_norm",
            layer=prepared.layer,
            site="resid_post",
            concepts={CONCEPT: 0},
            feature_names={"0": CONCEPT},
            metadata={"training_data": prepared.train.origin, "training_texts": len(prepared.train.texts)},
        )
    )
    model = SaeForCausalLM.from_base(base, saes=[sae])
    model.config.base_model_name_or_path = prepared.base.name
    return model.eval()


def harvest_texts(model: Any, tokenizer: Any, texts: LabelledTexts, report: Report) -> HiddenStates:
    return read_hidden_states(model, tokenizer, texts.texts, report=report)


def train(model: Any, states: HiddenStates, texts: LabelledTexts, prepared: Prepared, report: Report) -> dict:
    """Fit the SAE; every token carries its text's label."""
    labels = torch.tensor(texts.labels)[states.text_index][:, None]
    settings = prepared.settings
    return fit_conditioned_sae(
        model.saes[0], states.hidden, labels, steps=settings.size.steps, seed=settings.seed, report=report
    )


# -- detection -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_detection(
    sae: SparseAutoencoder, train: tuple[HiddenStates, LabelledTexts], test: tuple[HiddenStates, LabelledTexts]
) -> dict[str, float]:
    """AUROC of held-out texts, each scored by its mean over tokens: the latent's pre-activation, and DiffMean."""
    states, texts = train
    usual = usual_norm(states.hidden)  # the same tokens as the SAE was fitted to
    direction = fit_diffmean(states.hidden[usual], torch.tensor(texts.labels)[states.text_index][usual])
    states, texts = test
    latent = torch.zeros(1, dtype=torch.long, device=sae.device)
    scores: dict[str, Tensor] = {
        "latent": torch.cat(
            [sae.encode_pre_acts(h.to(sae.device), features=latent)[:, 0].cpu() for h in states.hidden.split(4096)]
        ),
        "diffmean": states.hidden.float() @ direction,
    }
    labels = torch.tensor(texts.labels)
    return {name: auroc(mean_by_text(s, states.text_index, len(labels)), labels) for name, s in scores.items()}


@torch.no_grad()
def explained_variance(sae: SparseAutoencoder, states: HiddenStates, rows: int = 4096) -> float:
    """1 - residual variance / variance of held-out hidden states, over rows of usual norm."""
    hidden = states.hidden[usual_norm(states.hidden)]
    hidden = hidden[torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:rows]].float()
    rebuilt = sae(hidden.to(sae.device)).reconstruction.cpu()
    return float(1 - (hidden - rebuilt).square().sum() / (hidden - hidden.mean(0)).square().sum())


# -- steering --------------------------------------------------------------------------------------------------------


def steering_of(strength: float) -> Steering:
    """Add `strength` times each hidden state's norm along the concept latent's decoder row."""
    return Steering([FeatureEdit(feature=CONCEPT, op="direction", value=strength, unit="norm")])


def measure_strengths(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    strengths: Sequence[float],
    settings: Settings,
    score: Callable[[str], float],
    *,
    samples: int,
) -> list[Point]:
    """Sample continuations under each strength, from the same random numbers for every strength, and judge them."""
    size, n = settings.size, len(prompts) * samples
    found = continue_prompts(
        model,
        tokenizer,
        [prompt for _ in strengths for prompt in prompts for _ in range(samples)],
        [steering_of(strength) if strength else None for strength in strengths for _ in range(n)],
        GenerationSettings(
            max_new_tokens=size.new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            batch_size=ROWS_AT_ONCE,
            seed=settings.seed,
        ),
        draws=[draw for _ in strengths for draw in range(n)],
    )
    points = []
    for number, strength in enumerate(strengths):
        texts = found.take(range(number * n, (number + 1) * n))
        scores = torch.tensor([score(text) for text in texts.texts])
        error = float(scores.std() / n**0.5) if n > 1 else 0.0
        points.append(
            Point(strength, float(scores.mean()), error, texts.perplexity, texts.repetition, tuple(texts.texts))
        )
    return points


def search_strengths(
    measure: Callable[[Sequence[float]], list[Point]], strengths: Sequence[float], perplexity_limit: float
) -> tuple[dict[int, Point], list[Point]]:
    """On each side, the strength that moves the sentiment most while the text stays likely.

    Strengths are tried upwards until one exceeds `perplexity_limit` times the unsteered perplexity, on both sides at
    once. Where already the weakest does, that one is kept: a side always has a result, and its perplexity is shown.

    Args:
        measure: the points of some strengths.

    Returns:
        {-1: point, 1: point}, and every point that was measured, the unsteered one first.
    """
    tried: list[Point] = []
    allowed: dict[int, list[Point]] = {1: [], -1: []}
    last: dict[int, Point] = {}
    sides = [1, -1]
    for strength in strengths:
        points = measure([*([] if tried else [0.0]), *(side * strength for side in sides)])
        tried += points
        last.update(zip(sides, points[-len(sides) :], strict=True))
        sides = [side for side in sides if last[side].perplexity <= perplexity_limit * tried[0].perplexity]
        for side in sides:
            allowed[side].append(last[side])
        if not sides:
            break
    best = {side: max(found or [last[side]], key=lambda p: side * p.sentiment) for side, found in allowed.items()}
    return best, tried


def strengths_to_report(best: dict[int, Point]) -> Iterator[float]:
    """From the negative best over half of it and 0 to the positive best."""
    down, up = best[-1].strength, best[1].strength
    yield from (down, down / 2, 0.0, up / 2, up)
