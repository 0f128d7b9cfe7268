"""Sparse autoencoders as working parts of Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .create_training_data.concept_recipe import ConceptRecipe as ConceptRecipe
    from .create_training_data.harvest.settings import HarvestSettings as HarvestSettings
    from .evaluation.fairness.data import read_bias_data as read_bias_data
    from .evaluation.settings import FluencyBudget as FluencyBudget
    from .evaluation.settings import GenerationSettings as GenerationSettings
    from .evaluation.suites import CapabilitySuite as CapabilitySuite
    from .evaluation.suites import DetectionSuite as DetectionSuite
    from .evaluation.suites import FairnessSuite as FairnessSuite
    from .evaluation.suites import ReconstructionSuite as ReconstructionSuite
    from .evaluation.suites import ScarSuite as ScarSuite
    from .evaluation.suites import SpeedSuite as SpeedSuite
    from .evaluation.suites import SteeringSuite as SteeringSuite
    from .evaluation.suites import register_suite as register_suite
    from .evaluation.topics.settings import TopicGenerationSettings as TopicGenerationSettings
    from .latents.settings import ReadingSettings as ReadingSettings
    from .latents.texts import open_text as open_text
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
    from .modeling import TopFeatures as TopFeatures
    from .modeling.conversion.attach import attach as attach
    from .training.sae.arguments import SaeTrainingArguments as SaeTrainingArguments
    from .training.sae.dataset import HiddenStateShards as HiddenStateShards
    from .training.sae.dataset import TensorTokens as TensorTokens
    from .training.sae.end_to_end import EndToEndTrainer as EndToEndTrainer
    from .training.sae.trainer import SaeTrainer as SaeTrainer
    from .training.steering.settings import SearchSettings as SearchSettings
    from .training.steering.settings import StrengthSettings as StrengthSettings
    from .workflows.classify import classify as classify
    from .workflows.classify import load_classifier_base as load_classifier_base
    from .workflows.classify import read_labelled as read_labelled
    from .workflows.convert import convert as convert
    from .workflows.evaluate import evaluate as evaluate
    from .workflows.harvest import harvest as harvest
    from .workflows.loading import load as load
    from .workflows.loading import load_base as load_base
    from .workflows.publish import card as card
    from .workflows.publish import push as push
    from .workflows.reading.ask_features import ask_features as ask_features
    from .workflows.reading.dashboard import dashboard as dashboard
    from .workflows.reading.dashboard_sources import DashboardSources as DashboardSources
    from .workflows.reading.detect import detect as detect
    from .workflows.reading.explain import explain as explain
    from .workflows.reading.feature_table import feature_table as feature_table
    from .workflows.reading.judge import judge as judge
    from .workflows.reading.spans import spans as spans
    from .workflows.reading.top_features import top_features as top_features
    from .workflows.serve import serve as serve
    from .workflows.settings.align_topic import TopicEmbeddingSettings as TopicEmbeddingSettings
    from .workflows.settings.align_topic import TopicMeasuringSettings as TopicMeasuringSettings
    from .workflows.settings.align_topic import TopicScoringSettings as TopicScoringSettings
    from .workflows.settings.align_topic import TopicSettings as TopicSettings
    from .workflows.settings.annotation import AnswerSettings as AnswerSettings
    from .workflows.settings.annotation import ExplainSettings as ExplainSettings
    from .workflows.settings.annotation import JudgeSettings as JudgeSettings
    from .workflows.settings.ask_features import AskFeaturesSettings as AskFeaturesSettings
    from .workflows.settings.classify import ClassifySettings as ClassifySettings
    from .workflows.settings.classify import ComparisonSettings as ComparisonSettings
    from .workflows.settings.classify import LabelSettings as LabelSettings
    from .workflows.settings.concept_set import ConceptSetSettings as ConceptSetSettings
    from .workflows.settings.dashboard import DashboardSettings as DashboardSettings
    from .workflows.settings.detect import DetectSettings as DetectSettings
    from .workflows.settings.evaluate import EvaluateSettings as EvaluateSettings
    from .workflows.settings.feature_table import FeatureTableSettings as FeatureTableSettings
    from .workflows.settings.llm import LLMSettings as LLMSettings
    from .workflows.settings.llm import SendSettings as SendSettings
    from .workflows.settings.publish import CardSettings as CardSettings
    from .workflows.settings.publish import PushSettings as PushSettings
    from .workflows.settings.publish import ServeSettings as ServeSettings
    from .workflows.settings.publish import SpaceSettings as SpaceSettings
    from .workflows.settings.reduce_bias import BiasSettings as BiasSettings
    from .workflows.settings.select_behaviour import SelectBehaviourSettings as SelectBehaviourSettings
    from .workflows.settings.select_knowledge import FeatureSelectionSettings as FeatureSelectionSettings
    from .workflows.settings.select_knowledge import QuestionSplitSettings as QuestionSplitSettings
    from .workflows.settings.select_knowledge import SelectKnowledgeSettings as SelectKnowledgeSettings
    from .workflows.settings.spans import SpanSettings as SpanSettings
    from .workflows.settings.steer import ScoringSettings as ScoringSettings
    from .workflows.settings.steer import SteerSettings as SteerSettings
    from .workflows.settings.steer_feature import SteerFeatureSettings as SteerFeatureSettings
    from .workflows.settings.texts import TextSettings as TextSettings
    from .workflows.space import space as space
    from .workflows.steering.align_topic import TopicTexts as TopicTexts
    from .workflows.steering.align_topic import align_topic as align_topic
    from .workflows.steering.concept_set import concept_set as concept_set
    from .workflows.steering.reduce_bias import reduce_bias as reduce_bias
    from .workflows.steering.select_behaviour import select_behaviour as select_behaviour
    from .workflows.steering.select_knowledge import select_knowledge as select_knowledge
    from .workflows.steering.steer import steer as steer
    from .workflows.steering.steer_feature import steer_feature as steer_feature
    from .workflows.train import train as train
    from .workflows.train import train_concept as train_concept
    from .workflows.train import train_recipe as train_recipe

__all__ = [
    "AnswerSettings",
    "AskFeaturesSettings",
    "BiasSettings",
    "CapabilitySuite",
    "CardSettings",
    "ClassifySettings",
    "ComparisonSettings",
    "ConceptRecipe",
    "ConceptSetSettings",
    "DashboardSettings",
    "DashboardSources",
    "DetectSettings",
    "Detection",
    "DetectionSuite",
    "EndToEndTrainer",
    "EvaluateSettings",
    "ExplainSettings",
    "FairnessSuite",
    "FeatureEdit",
    "FeatureReweighting",
    "FeatureSelectionSettings",
    "FeatureTableSettings",
    "FluencyBudget",
    "GenerationSettings",
    "HarvestSettings",
    "HiddenStateShards",
    "JudgeSettings",
    "LLMSettings",
    "LabelSettings",
    "LossWeights",
    "PushSettings",
    "QuestionSplitSettings",
    "ReadingSettings",
    "ReconstructionSuite",
    "SaeConfig",
    "SaeForCausalLM",
    "SaeForSequenceClassification",
    "SaeModel",
    "SaeTrainer",
    "SaeTrainingArguments",
    "ScarSuite",
    "ScoringSettings",
    "SearchSettings",
    "SelectBehaviourSettings",
    "SelectKnowledgeSettings",
    "SendSettings",
    "ServeSettings",
    "SpaceSettings",
    "SpanSettings",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderOutput",
    "SparseFeatures",
    "SpeedSuite",
    "SteerFeatureSettings",
    "SteerSettings",
    "Steering",
    "SteeringPlan",
    "SteeringSuite",
    "StrengthSettings",
    "TensorTokens",
    "TextSettings",
    "TopFeatures",
    "TopicEmbeddingSettings",
    "TopicGenerationSettings",
    "TopicMeasuringSettings",
    "TopicScoringSettings",
    "TopicSettings",
    "TopicTexts",
    "__version__",
    "align_topic",
    "ask_features",
    "attach",
    "card",
    "classify",
    "concept_set",
    "convert",
    "dashboard",
    "detect",
    "evaluate",
    "explain",
    "feature_table",
    "harvest",
    "judge",
    "load",
    "load_base",
    "load_classifier_base",
    "open_text",
    "push",
    "read_bias_data",
    "read_labelled",
    "reduce_bias",
    "register_suite",
    "select_behaviour",
    "select_knowledge",
    "serve",
    "space",
    "spans",
    "steer",
    "steer_feature",
    "top_features",
    "train",
    "train_concept",
    "train_recipe",
]
# Where a name is that `modeling` does not have, `module` or `module:name there`.
ELSEWHERE = {
    "dashboard": ".workflows.reading.dashboard",
    "DashboardSources": ".workflows.reading.dashboard_sources",
    "DashboardSettings": ".workflows.settings.dashboard",
    "CapabilitySuite": ".evaluation.suites",
    "DetectionSuite": ".evaluation.suites",
    "FairnessSuite": ".evaluation.suites",
    "ReconstructionSuite": ".evaluation.suites",
    "ScarSuite": ".evaluation.suites",
    "SpeedSuite": ".evaluation.suites",
    "SteeringSuite": ".evaluation.suites",
    "register_suite": ".evaluation.suites",
    "evaluate": ".workflows.evaluate",
    "EvaluateSettings": ".workflows.settings.evaluate",
    "AskFeaturesSettings": ".workflows.settings.ask_features",
    "FeatureTableSettings": ".workflows.settings.feature_table",
    "SteerFeatureSettings": ".workflows.settings.steer_feature",
    "ask_features": ".workflows.reading.ask_features",
    "feature_table": ".workflows.reading.feature_table",
    "steer_feature": ".workflows.steering.steer_feature",
    "ConceptRecipe": ".create_training_data.concept_recipe",
    "ConceptSetSettings": ".workflows.settings.concept_set",
    "concept_set": ".workflows.steering.concept_set",
    "FluencyBudget": ".evaluation.settings",
    "GenerationSettings": ".evaluation.settings",
    "ReadingSettings": ".latents.settings",
    "SearchSettings": ".training.steering.settings",
    "StrengthSettings": ".training.steering.settings",
    "ScoringSettings": ".workflows.settings.steer",
    "SteerSettings": ".workflows.settings.steer",
    "steer": ".workflows.steering.steer",
    "FeatureSelectionSettings": ".workflows.settings.select_knowledge",
    "QuestionSplitSettings": ".workflows.settings.select_knowledge",
    "SelectBehaviourSettings": ".workflows.settings.select_behaviour",
    "SelectKnowledgeSettings": ".workflows.settings.select_knowledge",
    "select_behaviour": ".workflows.steering.select_behaviour",
    "select_knowledge": ".workflows.steering.select_knowledge",
    "EndToEndTrainer": ".training.sae.end_to_end",
    "HiddenStateShards": ".training.sae.dataset",
    "SaeTrainer": ".training.sae.trainer",
    "SaeTrainingArguments": ".training.sae.arguments",
    "TensorTokens": ".training.sae.dataset",
    "DetectSettings": ".workflows.settings.detect",
    "HarvestSettings": ".create_training_data.harvest.settings",
    "attach": ".modeling.conversion.attach",
    "convert": ".workflows.convert",
    "detect": ".workflows.reading.detect",
    "harvest": ".workflows.harvest",
    "open_text": ".latents.texts",
    "SpanSettings": ".workflows.settings.spans",
    "TextSettings": ".workflows.settings.texts",
    "spans": ".workflows.reading.spans",
    "ClassifySettings": ".workflows.settings.classify",
    "ComparisonSettings": ".workflows.settings.classify",
    "LabelSettings": ".workflows.settings.classify",
    "classify": ".workflows.classify",
    "load_classifier_base": ".workflows.classify",
    "read_labelled": ".workflows.classify",
    "load": ".workflows.loading",
    "top_features": ".workflows.reading.top_features",
    "train": ".workflows.train",
    "train_concept": ".workflows.train",
    "explain": ".workflows.reading.explain",
    "judge": ".workflows.reading.judge",
    "ExplainSettings": ".workflows.settings.annotation",
    "JudgeSettings": ".workflows.settings.annotation",
    "AnswerSettings": ".workflows.settings.annotation",
    "LLMSettings": ".workflows.settings.llm",
    "SendSettings": ".workflows.settings.llm",
    "align_topic": ".workflows.steering.align_topic",
    "TopicTexts": ".workflows.steering.align_topic",
    "TopicSettings": ".workflows.settings.align_topic",
    "TopicScoringSettings": ".workflows.settings.align_topic",
    "TopicEmbeddingSettings": ".workflows.settings.align_topic",
    "TopicMeasuringSettings": ".workflows.settings.align_topic",
    "TopicGenerationSettings": ".evaluation.topics.settings",
    "card": ".workflows.publish",
    "push": ".workflows.publish",
    "space": ".workflows.space",
    "serve": ".workflows.serve",
    "CardSettings": ".workflows.settings.publish",
    "PushSettings": ".workflows.settings.publish",
    "SpaceSettings": ".workflows.settings.publish",
    "ServeSettings": ".workflows.settings.publish",
    "reduce_bias": ".workflows.steering.reduce_bias",
    "BiasSettings": ".workflows.settings.reduce_bias",
    "read_bias_data": ".evaluation.fairness.data",
    "load_base": ".workflows.loading",
    "train_recipe": ".workflows.train",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `sae-transformers --help` and `__version__` do not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = ELSEWHERE.get(name, ".modeling").partition(":")
    value = getattr(import_module(module, __name__), attribute or name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
