"""What `select_knowledge` and `select_behaviour` share: the states they read, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...create_training_data.harvest.store import Store
from ...latents.context import context_length
from ...latents.hidden_states import HiddenStateReader
from ...modeling import SaeForCausalLM, Steering
from ...training.steering.functional_features import FunctionalFeatures, save_functional_features, without_selection


def with_activation(model: SaeForCausalLM, activation: str) -> SaeForCausalLM:
    """The model as it is, for `own`; for `relu` its base with SAEs that select nothing.

    The base is shared: both models are there as long as either is.
    """
    if activation == "own":
        return model
    return SaeForCausalLM.from_base(model.lm, saes=[without_selection(sae) for sae in model.saes], force=True)


def last_states(
    model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens_per_batch: int
) -> list[Tensor]:
    """For each SAE the hidden states (n, d_in) of the prompts' last tokens.

    Raises:
        ValueError: a prompt has no token, or more than the model reads.
    """
    ids = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in prompts]
    limit, longest = context_length(model), max(map(len, ids), default=0)
    if limit and longest > limit:
        raise ValueError(f"Prompts must have at most {limit} tokens for this model. Received: one of {longest}.")
    if empty := [text for text, row in zip(prompts, ids, strict=True) if not len(row)]:
        raise ValueError(f"Every prompt needs a token. Received: {empty[0]!r}.")
    places = list(dict.fromkeys(sae.config.read_at for sae in model.saes))
    reader = HiddenStateReader(model.lm, places, config=model.config)
    last = [torch.arange(len(row) - 1, len(row)) for row in ids]
    states = reader.read(ids, last, dtype=torch.float32, tokens_at_once=tokens_per_batch)
    return [states[sae.config.read_at] for sae in model.saes]


def save_steerings(
    folder: str | Path,
    features: Sequence[FunctionalFeatures],
    steering: Mapping[str, Steering],
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write `features-N.safetensors` of each SAE, `towards-SIDE.json` and, where there are any, `results.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    for number, of_sae in enumerate(features):
        tensors = save_functional_features(of_sae)
        store.put(f"features-{number}.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
    for side, towards in steering.items():
        store.write_json(f"towards-{side}.json", towards.to_dict())
    if results is not None:
        store.write_json("results.json", results)


def save_steered_model(
    folder: str | Path, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, steering: Steering
) -> None:
    """Write the model, steered so by default, and its tokenizer; the model itself stays as it is."""
    own = model.steering
    model.steering = steering
    try:
        model.save_pretrained(folder)
    finally:
        model.steering = own
    tokenizer.save_pretrained(folder)
