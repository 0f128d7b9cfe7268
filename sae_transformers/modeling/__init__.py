"""Models with sparse autoencoders inside. Every file of this folder is what the Hub receives as remote code: flat, and
with no import but torch, transformers (with what it brings) and the standard library.

Importing it registers the classes with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import LossWeights, SparseAutoencoderConfig
from .feature_edits import FeatureEdit, FeatureReweighting
from .feature_penalty import FeaturePenalty
from .gates import Gate
from .group_penalty import GroupPenalty
from .modeling_sae import SaeModel
from .modeling_sae_causal_lm import SaeForCausalLM
from .modeling_sae_sequence_classification import SaeForSequenceClassification
from .outputs import Detection, SparseAutoencoderOutput, SparseFeatures, TopFeatures
from .sparse_autoencoder import SparseAutoencoder
from .steering import Steering
from .steering_plan import SteeringPlan
from .strength import Strength

__all__ = [
    "Detection",
    "FeatureEdit",
    "FeaturePenalty",
    "FeatureReweighting",
    "Gate",
    "GroupPenalty",
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
    "Strength",
    "TopFeatures",
]

AutoConfig.register(SaeConfig.model_type, SaeConfig, exist_ok=True)
AutoModel.register(SaeConfig, SaeModel, exist_ok=True)
AutoModelForCausalLM.register(SaeConfig, SaeForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(SaeConfig, SaeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SaeConfig, SaeForSequenceClassification, exist_ok=True)
