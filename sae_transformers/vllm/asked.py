"""What one request asks of the SAEs, as it travels inside vLLM: in `SamplingParams.extra_args`, resolved and checked.

steering    `Steering.to_dict()`, or its JSON text (`vllm_xargs` of vLLM's HTTP interface takes texts only)
sae_read    what `/v1/detect` wants to know of the prompt: {"key", "sae", "feature", "pre_activations"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..modeling import Steering

STEERING, READ = "steering", "sae_read"


@dataclass(frozen=True)
class Reading:
    """A latent whose value at every token of a prompt is wanted.

    Args:
        key: under which the values are kept until they are fetched.
        sae: number of the SAE.
        feature: index of the latent.
        pre_activations: its pre-activation in place of its activation.
    """

    key: str
    sae: int
    feature: int
    pre_activations: bool = False


@dataclass(frozen=True)
class Asked:
    """The steering of a request, which may be none, and what it reads."""

    steering: Steering
    reading: Reading | None = None


NOTHING = Asked(Steering())


def asked_of(extra_args: Mapping[str, Any] | None) -> Asked:
    """What a request asks that has passed the door (see `admission`): nothing is checked again."""
    if not extra_args or not (extra_args.get(STEERING) or extra_args.get(READ)):
        return NOTHING
    reading = extra_args.get(READ)
    return Asked(_steering(json.dumps(extra_args.get(STEERING) or False)), Reading(**reading) if reading else None)


def asked_by(holder: Any) -> Asked:
    """`asked_of` the sampling parameters of one of vLLM's requests, kept on it: it is looked up at every pass."""
    asked = getattr(holder, "_sae_asked", None)
    if asked is None:
        params = holder.sampling_params
        asked = holder._sae_asked = asked_of(None if params is None else params.extra_args)
    return asked


@lru_cache(maxsize=256)
def _steering(text: str) -> Steering:
    return Steering.coerce(json.loads(text))


@lru_cache(maxsize=1024)
def digest(steering: Steering) -> str:
    """A name for what steering does to a token, wherever it is applied: positions are no part of it."""
    values = {name: value for name, value in steering.to_dict().items() if name not in ("positions", "receipt")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
