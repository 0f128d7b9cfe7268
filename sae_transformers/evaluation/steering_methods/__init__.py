"""Methods of steering that the suite `steering` compares. A new one is a file here and a line below.

suite = SteeringSuite(prompts, [Latents([(0, 1311)]), DiffMean(with_it, without)], scorer)
result = suite(model, tokenizer)
"""

from __future__ import annotations

from .default_steering import ScaledSteering
from .diffmean import DiffMean
from .latents import Latents, OtherLatents
from .method import (
    METHODS,
    MethodInputs,
    MethodMaker,
    PreparedMethods,
    prepare_methods,
    read_methods,
    register_steering_method,
)
from .prompting import Prompting

# In the order in which they are measured.
register_steering_method("latent", Latents)
register_steering_method("steering", ScaledSteering)
register_steering_method("diffmean", DiffMean)
register_steering_method("prompt", Prompting)
register_steering_method("other latents", OtherLatents)

__all__ = [
    "METHODS",
    "DiffMean",
    "Latents",
    "MethodInputs",
    "MethodMaker",
    "OtherLatents",
    "PreparedMethods",
    "Prompting",
    "ScaledSteering",
    "prepare_methods",
    "read_methods",
    "register_steering_method",
]
