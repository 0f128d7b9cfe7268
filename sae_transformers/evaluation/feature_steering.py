"""Steer with one feature's decoder row and see what it writes, beside what the model writes without."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..modeling import FeatureEdit, Steering

ALL_BUT_LAST_OF_PROMPT = ((0, -1),)
ALL_BUT_FIRST = ((1, None),)


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
    *,
    samples: int = 3,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    top_p: float = 1.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> SideBySide:
    """Continue a prompt `samples` times each way.

    Args:
        model: `SaeForCausalLM`.
        samples: continuations each way, drawn together.
        temperature: 0 is greedy, and gives one sample.
        frequency_penalty: see `FrequencyPenalty`.
        seed: of both ways; the process's own random state is left alone.
        chat: put the prompt into the tokenizer's chat template, as a user's message.

    Raises:
        ValueError: an option out of range, an empty prompt, one that leaves no room in the context, or `chat` without
            a chat template.
    """
    if samples < 1 or max_new_tokens < 1:
        raise ValueError(
            f"`samples` and `max_new_tokens` must be 1 or more. "
            f"Received: samples={samples!r}, max_new_tokens={max_new_tokens!r}."
        )
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"`temperature` must be 0 or more, `top_p` in (0, 1]. "
            f"Received: temperature={temperature!r}, top_p={top_p!r}."
        )
    if temperature == 0 and samples > 1:
        raise ValueError(f"Without temperature all samples are the same: ask for one. Received: samples={samples!r}.")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("`chat` needs a tokenizer with a chat template. Received: one without.")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=not chat)["input_ids"]], device=model.device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    if not ids.shape[1] or ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"A prompt must have a token and leave room for {max_new_tokens} new ones in a context of {limit}. "
            f"Received: {ids.shape[1]} tokens."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options: dict[str, Any] = {"do_sample": temperature > 0, "top_k": 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "num_return_sequences": samples}
    else:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if frequency_penalty:
        options["logits_processor"] = LogitsProcessorList([FrequencyPenalty(frequency_penalty)])
    found = []
    devices = [model.device] if model.device.type == "cuda" else []
    for way in (steering, False):
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), steering=way, pad_token_id=pad, **options)
        found.append([tokenizer.decode(row, skip_special_tokens=True) for row in rows[:, ids.shape[1] :]])
    return SideBySide(*found)
