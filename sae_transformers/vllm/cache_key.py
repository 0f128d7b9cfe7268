"""Steering in the key of the prefix cache: keys and values depend on what was done to the tokens before them.

vLLM hashes a block of tokens with the hash of the block before it. Where a block holds steered tokens, which ones and
how goes into its hash, and so into those of all that follow: prompts share what lies before the first steered token,
and what was steered alike.
"""

from __future__ import annotations

from typing import Any

from .asked import Asked, asked_by, digest
from .wrapping import found, wrap

NAME = "generate_block_hash_extra_keys"


def install() -> None:
    """Wrap the function that vLLM makes a block's extra keys with, in both modules that hold it."""
    wrap("vllm.v1.core.kv_cache_utils", NAME, _extra_keys)
    found("vllm.v1.core.block_pool", NAME)
    wrap("vllm.v1.core.block_pool", NAME, _extra_keys)


def _extra_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    own = steering_key(asked_by(request), request.num_prompt_tokens, start_token_idx, end_token_idx)
    return ((*(keys or ()), own) if own is not None else keys), next_mm_idx


def steering_key(asked: Asked, prompt_length: int, start: int, stop: int) -> tuple[str, str] | None:
    """What tells the block of tokens [start, stop) from the same tokens under other steering; None where none of them
    is steered."""
    if not asked.steering:
        return None
    inside = [
        (max(first, start) - start, min(last, stop) - start)
        for first, last in asked.steering.ranges(prompt_length)
        if max(first, start) < min(last, stop)
    ]
    return ("sae_steering", f"{digest(asked.steering)}{inside}") if inside else None
