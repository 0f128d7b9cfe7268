"""Sparse autoencoders as working parts of Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .modeling import Detection as Detection
    from .modeling import FeatureEdit as FeatureEdit
    from .modeling import FeatureReweighting as FeatureReweighting
    from .modeling import LossWeights as LossWeights
    from .modeling import SaeConfig as SaeConfig
    from .modeling import SaeForCausalLM as SaeForCausalLM
    from .modeling import SaeForSequenceClassification as SaeForSequenceClassification
    from .modeling import SaeModel as SaeModel
    from .modeling import SparseAutoencoder as SparseAutoencoder
    from .modeling import SparseAutoencoderConfig as SparseAutoencoderConfig
    from .modeling import SparseAutoencoderOutput as SparseAutoencoderOutput
    from .modeling import SparseFeatures as SparseFeatures
    from .modeling import Steering as Steering
    from .modeling import SteeringPlan as SteeringPlan

__all__ = [
    "Detection",
    "FeatureEdit",
    "FeatureReweighting",
    "LossWeights",
    "SaeConfig",
    "SaeForCausalLM",
    "SaeForSequenceClassification",
    "SaeModel",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderOutput",
    "SparseFeatures",
    "Steering",
    "SteeringPlan",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that `sae-transformers --help` and `__version__` do not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(".modeling", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
