"""What the base's forward pass takes and gives, in its own words: transformers renamed the cache in 5.24, recurrent
families have one of their own, and a name that nobody reads would be swallowed without a word."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

# A cache's names as arguments: since transformers 5.24, before it, and before it in recurrent families.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
# And in outputs; the last three are not `Cache` objects (RWKV, XLNet, Reformer).
CACHE_FIELDS = (*CACHE_ARGUMENTS, "state", "mems", "past_buckets_states")
# What attention kernels and continuous batching read, deep inside, and no signature names.
ATTENTION_ARGUMENTS = (
    "attention_mask", "token_type_ids",  # what tokenizers give
    "block_table", "cache_position", "cu_seqlens_k", "cu_seqlens_q", "logits_indices", "max_seqlen_k", "max_seqlen_q",
    "read_index", "return_dict", "write_index", "use_cache",
    "next_sequence_length", "is_first_iteration",  # some families hand all of `generate`'s on (OpenAI GPT)
)  # fmt: skip


def cache_argument(base: nn.Module) -> str:
    """The name under which the forward pass of `base` takes its cache."""
    known = inspect.signature(base.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[1])


def cache_of(outputs: Any) -> Any:
    """The cache in a model's outputs, whatever the family and the release call it; None where there is none."""
    names = list(outputs.keys())  # not by attribute: reading an old name is a warning since 5.24
    return next((outputs[name] for name in CACHE_FIELDS if name in names), None)


def cached_tokens(cache: Any) -> Any:
    """How many tokens a cache holds, an int or a tensor (); None where it cannot tell, as purely recurrent states."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        return cache.get_seq_length()
    except ValueError:  # only recurrent layers, which have no length
        return None


def room_of(cache: Any) -> int | None:
    """How many columns a cache of fixed size has; None of one that grows, or that keeps windows alone."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    sizes = [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")]
    return max(sizes) if sizes else None


# Layers of a cache that hold keys and values of tokens, and nothing that a token has changed.
PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def continues(cache: Any) -> bool:
    """Whether several tokens at once may follow those in a cache, and be taken away again: true of keys and values.
    Recurrent states are changed by a token for good, and some families restart them with a second chunk (Jamba)."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(type(layer).__name__ in PLAIN_LAYERS for layer in layers)


class BaseArguments:
    """The arguments that a base's forward pass reads.

    named: those of its own signature.
    cache: the name of its cache.
    open: whether it takes further ones, for its parts.
    counts_positions: whether it tells padding by its id, and wants no positions.
    """

    def __init__(self, base: nn.Module) -> None:
        parameters = inspect.signature(base.forward).parameters
        self.named = frozenset(parameters)
        self.cache = cache_argument(base)
        # RoBERTa's kind counts positions from the padding's id itself.
        self.counts_positions = any(hasattr(m, "create_position_ids_from_input_ids") for m in base.modules())
        self.open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        # What goes on by `**kwargs` is read further down: by the body, by a tower, by a block or its attention.
        self.known = self.named | TransformersKwargs.__optional_keys__ | set(ATTENTION_ARGUMENTS)
        if self.open:
            classes = {type(module): module for module in base.modules()}
            for module in classes.values():
                if isinstance(module, PreTrainedModel) or not module._modules or _is_block(module):
                    self.known |= set(inspect.signature(module.forward).parameters)

    def prepared(self, given: Mapping[str, Any], options: tuple[str, ...] = ()) -> dict[str, Any]:
        """What was given and is not None, with the cache under the base's name for it.

        Args:
            options: names that the caller takes besides, told of when a name is misspelt.

        Raises:
            TypeError: a name that nothing here reads, or two caches.
        """
        inputs: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            if name in CACHE_ARGUMENTS:
                name = self.cache
                if name in inputs:
                    raise TypeError(f"The cache was given twice. Received: {name} under two of its names.")
            elif name not in self.known:
                raise TypeError(self._unknown(name, options))
            inputs[name] = value
        return inputs

    def with_positions(self, inputs: dict[str, Any], text_config: Any) -> dict[str, Any]:
        """What a forward pass of our own gives the base: with padding, its mask and positions that begin at a text's
        first real token, as `generate` gives them."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        pad, ends = getattr(text_config, "pad_token_id", None), getattr(text_config, "eos_token_id", None)
        tells = pad is not None and pad not in (ends if isinstance(ends, (list, tuple)) else [ends])
        if mask is None and ids is not None and tells and bool((ids == pad).any()):
            mask = (ids != pad).long()
            mask = None if not bool(mask.any(-1).all()) else mask
        if mask is None:
            return inputs
        inputs = {**inputs, "attention_mask": mask}
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())
        wanted = "position_ids" in self.named and not self.counts_positions
        if padded and wanted and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions_of(mask)
        return inputs

    def of_new_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """For a purely recurrent base with a state, the mask of the new tokens alone: releases before 5.13 multiply
        these by the whole mask."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if self.cache != "cache_params" or mask is None or ids is None or inputs.get(self.cache) is None:
            return inputs
        return {**inputs, "attention_mask": mask[:, -ids.shape[1] :]}

    def _unknown(self, name: str, options: tuple[str, ...]) -> str:
        close = difflib.get_close_matches(name, sorted({*self.known, *options}), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"Neither the SAEs nor this base read an argument of that name. Received: {name!r}.{hint}"


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Layer", "Block", "Attention", "Mixer"))


def positions_of(mask: Tensor) -> Tensor:
    """Positions (batch, seq) of tokens from a (batch, seq) attention mask: the first real token is at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
