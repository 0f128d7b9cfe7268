"""Sparse autoencoders as working parts of Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .create_training_data.chat_roles import chat_tokens
    from .create_training_data.concept_recipe import ConceptRecipe
    from .create_training_data.concept_sets import read_concept_sets
    from .create_training_data.harvest.settings import HarvestSettings
    from .evaluation.canary import CanarySettings, FeatureCanary
    from .evaluation.classification import classification_metrics
    from .evaluation.detection.metrics import auroc, code_aurocs, fit_linear_probe
    from .evaluation.fairness.data import read_bias_data
    from .evaluation.generation.continuations import chat_prompts, continue_prompts, prompt_ids
    from .evaluation.journal import Journal
    from .evaluation.metrics.space import write_metric
    from .evaluation.reconstruction.cross_layer import cross_layer_outputs
    from .evaluation.reconstruction.metrics import ce_loss_recovered, measure_reconstruction
    from .evaluation.scorers.registry import get_scorer
    from .evaluation.settings import BootstrapSettings, FluencyBudget, GenerationSettings
    from .evaluation.steering.axbench import OfflineJudge, SteeringMethod, evaluate_concept_steering
    from .evaluation.steering.early_signs import difference_agreement, early_signs
    from .evaluation.steering.receipt import Receipt, ReceiptTexts, measure_receipt
    from .evaluation.steering.recovery import RecoverySettings, Suppression, TargetPairs, measure_recovery
    from .evaluation.steering.will_it_work import (
        SteeringForecaster,
        on_unseen_concepts,
        steering_outcome,
        will_it_work,
    )
    from .evaluation.steering_methods import DiffMean, Latents, Prompting
    from .evaluation.suites import (
        CapabilitySuite,
        DetectionSuite,
        FairnessSuite,
        InterventionSuite,
        ReceiptSuite,
        ReconstructionSuite,
        ScarSuite,
        SpeedSuite,
        SteeringSuite,
        register_suite,
    )
    from .evaluation.suites.settings import ReceiptSettings, SteeringSuiteSettings
    from .evaluation.topics.settings import TopicGenerationSettings
    from .latents.annotations.table import FeatureAnnotations
    from .latents.diffmean import fit_diffmean
    from .latents.hidden_states import HiddenStateReader
    from .latents.settings import ReadingSettings
    from .latents.sparse_codes import encode_texts
    from .latents.texts import open_text
    from .latents.vector_saes import direction_sae
    from .mcp_server.server import tool_server
    from .modeling import (
        Detection,
        FeatureEdit,
        FeaturePenalty,
        FeatureReweighting,
        Gate,
        GroupPenalty,
        LossWeights,
        SaeConfig,
        SaeForCausalLM,
        SaeForSequenceClassification,
        SaeModel,
        SparseAutoencoder,
        SparseAutoencoderConfig,
        SparseAutoencoderOutput,
        SparseFeatures,
        Steering,
        SteeringPlan,
        Strength,
        TopFeatures,
    )
    from .modeling.conversion.attach import attach
    from .serving.limits import ServeLimits
    from .training.canary_callback import watch_canary
    from .training.feature_reward import FeatureReward, FeatureRewardSettings
    from .training.heads.choice import choose_on_validation
    from .training.heads.comparison import swap_measures
    from .training.heads.erasure import difference_sae, leace, project_out, swap_directions
    from .training.heads.settings import HeadSettings
    from .training.heads.train import train_heads
    from .training.heads.unintended import counterfactual_features
    from .training.loss_terms import log_loss_terms
    from .training.penalty_fitting import fit_penalty
    from .training.sae.arguments import SaeTrainingArguments
    from .training.sae.dataset import HiddenStateShards, TensorTokens
    from .training.sae.end_to_end import EndToEndTrainer
    from .training.sae.trainer import SaeTrainer
    from .training.steering.effect_scores import generated_correlations, outcome_correlations
    from .training.steering.feature_search import search_features
    from .training.steering.gate_fitting import fit_gate
    from .training.steering.settings import LearnSteeringSettings, SearchSettings, StrengthSettings
    from .workflows.classify import classify, load_classifier_base, read_labelled
    from .workflows.concept_data import concept_data
    from .workflows.convert import convert
    from .workflows.evaluate import evaluate
    from .workflows.harvest import harvest
    from .workflows.loading import load, load_base, load_saes
    from .workflows.publish import card, push
    from .workflows.reading.annotations import annotate, open_annotations
    from .workflows.reading.ask_features import ask_features
    from .workflows.reading.attribute import attribute
    from .workflows.reading.dashboard import dashboard
    from .workflows.reading.dashboard_sources import DashboardSources
    from .workflows.reading.detect import detect
    from .workflows.reading.explain import explain
    from .workflows.reading.feature_table import feature_table
    from .workflows.reading.find import find
    from .workflows.reading.judge import judge
    from .workflows.reading.spans import spans
    from .workflows.reading.top_features import top_features
    from .workflows.selfreg_classifier import selfreg_classifier
    from .workflows.serve import serve
    from .workflows.settings.align_topic import (
        TopicEmbeddingSettings,
        TopicMeasuringSettings,
        TopicScoringSettings,
        TopicSettings,
    )
    from .workflows.settings.annotation import AnswerSettings, ExplainSettings, JudgeSettings
    from .workflows.settings.ask_features import AskFeaturesSettings
    from .workflows.settings.classify import ClassifySettings, ComparisonSettings, LabelSettings
    from .workflows.settings.concept_set import ConceptDataSettings, ConceptSetSettings
    from .workflows.settings.dashboard import DashboardSettings, ExportSettings
    from .workflows.settings.detect import AttributionSettings, DetectSettings
    from .workflows.settings.evaluate import EvaluateSettings
    from .workflows.settings.feature_table import FeatureTableSettings
    from .workflows.settings.generate import GenerateSettings
    from .workflows.settings.llm import LLMSettings, SendSettings
    from .workflows.settings.publish import CardSettings, PushSettings, ServeSettings, SpaceSettings
    from .workflows.settings.reduce_bias import BiasSettings
    from .workflows.settings.select_behaviour import SelectBehaviourSettings
    from .workflows.settings.select_knowledge import (
        FeatureSelectionSettings,
        PublishedKnowledgeSettings,
        QuestionSplitSettings,
        SelectKnowledgeSettings,
    )
    from .workflows.settings.spans import SpanSettings
    from .workflows.settings.steer import ScoringSettings, SteerSettings
    from .workflows.settings.steer_feature import SteerFeatureSettings
    from .workflows.settings.texts import TextSettings
    from .workflows.space import space
    from .workflows.steering.align_topic import TopicTexts, align_topic
    from .workflows.steering.concept_set import concept_set
    from .workflows.steering.export.export_steering import export_steering
    from .workflows.steering.export.load_control_vector import load_control_vector
    from .workflows.steering.generate import generate
    from .workflows.steering.knowledge.published import select_published_knowledge
    from .workflows.steering.learn_steering import learn_steering
    from .workflows.steering.reduce_bias import reduce_bias
    from .workflows.steering.select_behaviour import select_behaviour
    from .workflows.steering.select_knowledge import select_knowledge
    from .workflows.steering.steer import steer
    from .workflows.steering.steer_feature import steer_feature
    from .workflows.train import train, train_concept, train_recipe
    from .workflows.unintended import make_swaps, read_unintended

__all__ = [
    "AnswerSettings", "AskFeaturesSettings", "AttributionSettings", "BiasSettings", "BootstrapSettings",
    "CanarySettings", "CapabilitySuite", "CardSettings", "ClassifySettings", "ComparisonSettings",
    "ConceptDataSettings", "ConceptRecipe", "ConceptSetSettings", "DashboardSettings", "DashboardSources",
    "DetectSettings", "Detection", "DetectionSuite", "DiffMean", "EndToEndTrainer", "EvaluateSettings",
    "ExplainSettings", "ExportSettings", "FairnessSuite", "FeatureAnnotations", "FeatureCanary", "FeatureEdit",
    "FeaturePenalty", "FeatureReward", "FeatureRewardSettings", "FeatureReweighting",
    "FeatureSelectionSettings", "FeatureTableSettings", "FluencyBudget", "Gate", "GenerateSettings",
    "GenerationSettings", "GroupPenalty", "HarvestSettings", "HeadSettings", "HiddenStateReader",
    "HiddenStateShards", "InterventionSuite", "Journal", "JudgeSettings", "LLMSettings", "LabelSettings",
    "Latents", "LearnSteeringSettings", "LossWeights", "OfflineJudge", "Prompting",
    "PublishedKnowledgeSettings", "PushSettings", "QuestionSplitSettings", "ReadingSettings", "Receipt",
    "ReceiptSettings", "ReceiptSuite", "ReceiptTexts", "ReconstructionSuite", "RecoverySettings", "SaeConfig",
    "SaeForCausalLM", "SaeForSequenceClassification", "SaeModel", "SaeTrainer", "SaeTrainingArguments",
    "ScarSuite", "ScoringSettings", "SearchSettings", "SelectBehaviourSettings", "SelectKnowledgeSettings",
    "SendSettings", "ServeLimits", "ServeSettings", "SpaceSettings", "SpanSettings", "SparseAutoencoder",
    "SparseAutoencoderConfig", "SparseAutoencoderOutput", "SparseFeatures", "SpeedSuite",
    "SteerFeatureSettings", "SteerSettings", "Steering", "SteeringForecaster", "SteeringMethod", "SteeringPlan",
    "SteeringSuite", "SteeringSuiteSettings", "Strength", "StrengthSettings", "Suppression", "TargetPairs",
    "TensorTokens", "TextSettings", "TopFeatures", "TopicEmbeddingSettings", "TopicGenerationSettings",
    "TopicMeasuringSettings", "TopicScoringSettings", "TopicSettings", "TopicTexts", "__version__",
    "align_topic", "annotate", "ask_features", "attach", "attribute", "auroc", "card", "ce_loss_recovered",
    "chat_prompts", "chat_tokens", "choose_on_validation", "classification_metrics", "classify", "code_aurocs",
    "concept_data", "concept_set", "continue_prompts", "convert", "counterfactual_features",
    "cross_layer_outputs", "dashboard", "detect", "difference_agreement", "difference_sae", "direction_sae",
    "early_signs", "encode_texts", "evaluate", "evaluate_concept_steering", "explain", "export_steering",
    "feature_table", "find", "fit_diffmean", "fit_gate", "fit_linear_probe", "fit_penalty", "generate",
    "generated_correlations", "get_scorer", "harvest", "judge", "leace", "learn_steering", "load", "load_base",
    "load_classifier_base", "load_control_vector", "load_saes", "log_loss_terms", "make_swaps",
    "measure_receipt", "measure_reconstruction", "measure_recovery", "on_unseen_concepts", "open_annotations",
    "open_text", "outcome_correlations", "project_out", "prompt_ids", "push", "read_bias_data",
    "read_concept_sets", "read_labelled", "read_unintended", "reduce_bias", "register_suite", "search_features",
    "select_behaviour", "select_knowledge", "select_published_knowledge", "selfreg_classifier", "serve",
    "space", "spans", "steer", "steer_feature", "steering_outcome", "swap_directions", "swap_measures",
    "tool_server", "top_features", "train", "train_concept", "train_heads", "train_recipe", "watch_canary",
    "will_it_work", "write_metric",
]  # fmt: skip
HOMES = {  # module -> the names that are there; `modeling` has all others
    ".create_training_data.chat_roles": "chat_tokens",
    ".create_training_data.concept_recipe": "ConceptRecipe",
    ".create_training_data.concept_sets": "read_concept_sets",
    ".create_training_data.harvest.settings": "HarvestSettings",
    ".evaluation.canary": "CanarySettings FeatureCanary",
    ".evaluation.classification": "classification_metrics",
    ".evaluation.detection.metrics": "auroc code_aurocs fit_linear_probe",
    ".evaluation.fairness.data": "read_bias_data",
    ".evaluation.generation.continuations": "chat_prompts continue_prompts prompt_ids",
    ".evaluation.journal": "Journal",
    ".evaluation.metrics.space": "write_metric",
    ".evaluation.reconstruction.cross_layer": "cross_layer_outputs",
    ".evaluation.reconstruction.metrics": "ce_loss_recovered measure_reconstruction",
    ".evaluation.scorers.registry": "get_scorer",
    ".evaluation.settings": "BootstrapSettings FluencyBudget GenerationSettings",
    ".evaluation.steering.axbench": "OfflineJudge SteeringMethod evaluate_concept_steering",
    ".evaluation.steering.early_signs": "difference_agreement early_signs",
    ".evaluation.steering.receipt": "Receipt ReceiptTexts measure_receipt",
    ".evaluation.steering.recovery": "RecoverySettings Suppression TargetPairs measure_recovery",
    ".evaluation.steering.will_it_work": "SteeringForecaster on_unseen_concepts steering_outcome will_it_work",
    ".evaluation.steering_methods": "DiffMean Latents Prompting",
    ".evaluation.suites": "CapabilitySuite DetectionSuite FairnessSuite InterventionSuite ReceiptSuite "
    "ReconstructionSuite ScarSuite SpeedSuite SteeringSuite register_suite",
    ".evaluation.suites.settings": "ReceiptSettings SteeringSuiteSettings",
    ".evaluation.topics.settings": "TopicGenerationSettings",
    ".latents.annotations.table": "FeatureAnnotations",
    ".latents.diffmean": "fit_diffmean",
    ".latents.hidden_states": "HiddenStateReader",
    ".latents.settings": "ReadingSettings",
    ".latents.sparse_codes": "encode_texts",
    ".latents.texts": "open_text",
    ".latents.vector_saes": "direction_sae",
    ".mcp_server.server": "tool_server",
    ".modeling.conversion.attach": "attach",
    ".serving.limits": "ServeLimits",
    ".training.canary_callback": "watch_canary",
    ".training.feature_reward": "FeatureReward FeatureRewardSettings",
    ".training.heads.choice": "choose_on_validation",
    ".training.heads.comparison": "swap_measures",
    ".training.heads.erasure": "difference_sae leace project_out swap_directions",
    ".training.heads.settings": "HeadSettings",
    ".training.heads.train": "train_heads",
    ".training.heads.unintended": "counterfactual_features",
    ".training.loss_terms": "log_loss_terms",
    ".training.penalty_fitting": "fit_penalty",
    ".training.sae.arguments": "SaeTrainingArguments",
    ".training.sae.dataset": "HiddenStateShards TensorTokens",
    ".training.sae.end_to_end": "EndToEndTrainer",
    ".training.sae.trainer": "SaeTrainer",
    ".training.steering.effect_scores": "generated_correlations outcome_correlations",
    ".training.steering.feature_search": "search_features",
    ".training.steering.gate_fitting": "fit_gate",
    ".training.steering.settings": "LearnSteeringSettings SearchSettings StrengthSettings",
    ".workflows.classify": "classify load_classifier_base read_labelled",
    ".workflows.loading": "load load_base load_saes",
    ".workflows.publish": "card push",
    ".workflows.reading.annotations": "annotate open_annotations",
    ".workflows.reading.dashboard_sources": "DashboardSources",
    ".workflows.settings.align_topic": "TopicEmbeddingSettings TopicMeasuringSettings TopicScoringSettings "
    "TopicSettings",
    ".workflows.settings.annotation": "AnswerSettings ExplainSettings JudgeSettings",
    ".workflows.settings.ask_features": "AskFeaturesSettings",
    ".workflows.settings.classify": "ClassifySettings ComparisonSettings LabelSettings",
    ".workflows.settings.concept_set": "ConceptDataSettings ConceptSetSettings",
    ".workflows.settings.dashboard": "DashboardSettings ExportSettings",
    ".workflows.settings.detect": "AttributionSettings DetectSettings",
    ".workflows.settings.evaluate": "EvaluateSettings",
    ".workflows.settings.feature_table": "FeatureTableSettings",
    ".workflows.settings.generate": "GenerateSettings",
    ".workflows.settings.llm": "LLMSettings SendSettings",
    ".workflows.settings.publish": "CardSettings PushSettings ServeSettings SpaceSettings",
    ".workflows.settings.reduce_bias": "BiasSettings",
    ".workflows.settings.select_behaviour": "SelectBehaviourSettings",
    ".workflows.settings.select_knowledge": "FeatureSelectionSettings PublishedKnowledgeSettings "
    "QuestionSplitSettings SelectKnowledgeSettings",
    ".workflows.settings.spans": "SpanSettings",
    ".workflows.settings.steer": "ScoringSettings SteerSettings",
    ".workflows.settings.steer_feature": "SteerFeatureSettings",
    ".workflows.settings.texts": "TextSettings",
    ".workflows.steering.align_topic": "TopicTexts align_topic",
    ".workflows.steering.knowledge.published": "select_published_knowledge",
    ".workflows.train": "train train_concept train_recipe",
    ".workflows.unintended": "make_swaps read_unintended",
}
NAMESAKES = {  # folder -> functions that are in the file of their name
    ".workflows": "concept_data convert evaluate harvest selfreg_classifier serve space",
    ".workflows.reading": "ask_features attribute dashboard detect explain feature_table find judge spans "
    "top_features",
    ".workflows.steering": "concept_set generate learn_steering reduce_bias select_behaviour select_knowledge steer "
    "steer_feature",
    ".workflows.steering.export": "export_steering load_control_vector",
}
ELSEWHERE = {name: module for module, names in HOMES.items() for name in names.split()}
ELSEWHERE |= {name: f"{folder}.{name}" for folder, names in NAMESAKES.items() for name in names.split()}


def __getattr__(name: str) -> Any:  # lazily: `sae-transformers --help` and `__version__` do not wait for torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = getattr(import_module(ELSEWHERE.get(name, ".modeling"), __name__), name)
    return globals()[name]  # the next look-up does not come here


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
