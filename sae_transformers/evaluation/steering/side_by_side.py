"""Steer with one feature's decoder row and see what it writes, beside what the model writes without."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ...modeling import FeatureEdit, Steering
from ..generation.continuations import chat_prompts
from ..settings import GenerationSettings

ALL_BUT_LAST_OF_PROMPT = ((0, -1),)
ALL_BUT_FIRST = ((1, None),)
SIDE_BY_SIDE = GenerationSettings(max_new_tokens=50, temperature=1.0, samples_per_prompt=3)


def vector_steering(
    feature: int | str,
    coefficient: float,
    *,
    unit: str = "absolute",
    legacy: bool = False,
    sae: int = 0,
    positions: Any = ALL_BUT_FIRST,
) -> Steering:
    """Add `coefficient * W_dec[feature]` to the hidden state; nothing is encoded.

    Args:
        feature: latent or concept of the SAE.
        coefficient: 0 changes nothing; negative ones push the other way.
        unit: of the coefficient: `absolute`, times the decoder row as it is; `norm`, in lengths of the hidden state,
            which means the same at every layer of every model; `max`, in typical maxima of the latent.
        legacy: steer as seansica/sae-vector-steering does: every token of the prompt but the last, none of the
            generated ones, so that the text is steered through the cached keys and values alone. A prompt of one
            token is not steered.
        sae: number of the SAE in the model.
        positions: see `Steering`; without `legacy` every token but the first of the text, generated ones included.

    Raises:
        ValueError: `legacy` with another unit.
    """
    if legacy and unit != "absolute":
        raise ValueError(f"`legacy` adds the decoder row as it is and needs unit='absolute'. Received: unit={unit!r}.")
    edit = FeatureEdit(sae, feature, "direction", coefficient, unit)
    return Steering([edit], positions=ALL_BUT_LAST_OF_PROMPT if legacy else positions)


def check_layer(config: Any, layer: int | None, site: str | None = None) -> None:
    """Refuse to steer at another place than the one the SAE was trained at.

    Args:
        config: of the SAE.
        layer, site: what was asked for; None is whatever the SAE says.

    Raises:
        ValueError: the SAE stands elsewhere: its decoder rows mean nothing there.
    """
    for name, asked in (("layer", layer), ("site", site)):
        own = getattr(config, name)
        if asked is not None and asked != own:
            raise ValueError(
                f"The SAE was trained at {config.write_at if config.placed else 'a place that it does not name'}; its "
                f"decoder rows mean nothing elsewhere. Received: {name}={asked!r}. Leave {name} out, or give the SAE "
                f"of that {name}."
            )


class FrequencyPenalty(LogitsProcessor):
    """Lower the logit of each token by `penalty` times the number of its occurrences so far, prompt included.

    What OpenAI's interface and TransformerLens call frequency penalty; `generate` has a repetition penalty only, which
    divides, whatever the count.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        once = torch.full(input_ids.shape, self.penalty, dtype=scores.dtype, device=scores.device)
        return scores - torch.zeros_like(scores).scatter_add_(-1, input_ids, once)


class SideBySide(NamedTuple):
    """The same prompt continued with steering and without, from the same seed: texts without the prompt."""

    steered: list[str]
    unsteered: list[str]


@torch.no_grad()
def side_by_side(
    model: Any,
    tokenizer: Any,
    prompt: str,
    steering: Steering,
    settings: GenerationSettings = SIDE_BY_SIDE,
    *,
    frequency_penalty: float = 0.0,
) -> SideBySide:
    """Continue a prompt several times each way.

    Args:
        model: `SaeForCausalLM`.
        settings: its samples are drawn together, so that `batch_size` does not count; the seed is of both ways, and
            the process's own random state is left alone.
        frequency_penalty: see `FrequencyPenalty`.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the context.
    """
    max_new_tokens, temperature = settings.max_new_tokens, settings.temperature
    templated = settings.chat and bool(getattr(tokenizer, "chat_template", None))
    (prompt,) = chat_prompts(tokenizer, [prompt]) if settings.chat else [prompt]
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=not templated)["input_ids"]], device=model.device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    if not ids.shape[1] or ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"A prompt must have a token and leave room for {max_new_tokens} new ones in a context of {limit}. "
            f"Received: {ids.shape[1]} tokens."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options: dict[str, Any] = {"do_sample": temperature > 0, "top_k": 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        samples = settings.samples_per_prompt
        options |= {"temperature": temperature, "top_p": settings.top_p, "num_return_sequences": samples}
    else:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if frequency_penalty:
        options["logits_processor"] = LogitsProcessorList([FrequencyPenalty(frequency_penalty)])
    found = []
    devices = [model.device] if model.device.type == "cuda" else []
    for way in (steering, False):
        with torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), steering=way, pad_token_id=pad, **options)
        found.append([tokenizer.decode(row, skip_special_tokens=True) for row in rows[:, ids.shape[1] :]])
    return SideBySide(*found)
