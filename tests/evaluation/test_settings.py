"""Settings that measurements share: what they refuse, by the name of the field."""

from __future__ import annotations

from typing import Any

import pytest

from sae_transformers.evaluation.settings import BootstrapSettings, FluencyBudget, GenerationSettings


@pytest.mark.parametrize(
    ("settings", "values", "told"),
    [
        (GenerationSettings, {"max_new_tokens": 0}, "`max_new_tokens` must be an integer of 1 or more"),
        (GenerationSettings, {"batch_size": 1.5}, "Received: batch_size=1.5"),
        (GenerationSettings, {"temperature": -1.0}, "Received: temperature=-1.0"),
        (GenerationSettings, {"top_p": 0.0}, "Received: top_p=0.0"),
        (GenerationSettings, {"top_p": 1.5}, r"`top_p` must be in \(0, 1\]. Received: top_p=1.5"),
        (GenerationSettings, {"temperature": 0, "samples_per_prompt": 2}, "Received: samples_per_prompt=2"),
        (FluencyBudget, {"perplexity_ratio": 0}, "Received: perplexity_ratio=0"),
        (BootstrapSettings, {"resamples": 0}, "Received: resamples=0"),
    ],
)
def test_what_is_refused(settings: Any, values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**values)
