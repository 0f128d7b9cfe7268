"""What each tool answers: the schemas that clients are told."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class SaeFacts(BaseModel):
    sae: int
    place: str = Field(description="Where it reads, such as layers.14.resid_post.")
    d_in: int
    n_features: int
    activation: str
    has_maxima: bool = Field(description="Whether the unit max can be used.")
    names: dict[str, int] = Field(description="Names that features have -> their numbers; the first ones.")
    n_names: int
    described: int | None = Field(description="Features with a description; null without annotations.")
    annotations: dict[str, str] = Field(description="Of the descriptions: source, licence, model, ...")
    licence: str | None = Field(description="Of the descriptions; null where none is told: ask before publishing.")


class ModelFacts(BaseModel):
    name: str
    base: str | None
    n_saes: int
    saes: list[SaeFacts]
    context: int | None = Field(description="Tokens that the model reads at most.")
    chat_template: bool
    steered_by_default: bool
    can_write: bool
    limits: dict[str, int]


class Found(BaseModel):
    sae: int
    feature: int
    description: str
    frequency: float | None
    output_score: float | None
    maximum: float | None
    explainer: str | None
    score: float | None


class FindAnswer(BaseModel):
    query: str
    by: str
    features: list[Found]


class Strongest(BaseModel):
    feature: int
    name: str = Field(description="Empty where it has none.")
    max: float
    tokens: int = Field(description="At how many it is active.")
    at: str = Field(description="The token where it is strongest.")


class TopAnswer(BaseModel):
    sae: int
    n_tokens: int
    cut: bool = Field(description="Whether the text was longer than is read.")
    features: list[Strongest]


class Activations(BaseModel):
    feature: int
    name: str
    max: float
    values: list[float] = Field(description="One a token; 0 at tokens that do not count.")


class ReadAnswer(BaseModel):
    sae: int
    tokens: list[str]
    cut: bool
    features: list[Activations]


class DetectAnswer(BaseModel):
    feature: int
    name: str
    sae: int
    scores: list[float | None] = Field(description="Null where a text has no token that counts.")
    cut: int = Field(description="How many texts were longer than is read.")
    quality: dict[str, float] = Field(description="auroc and f1, where there are labels of both kinds.")


class FeatureEffect(BaseModel):
    sae: int
    feature: int
    name: str = Field(description="Empty where it has none.")
    effect: float = Field(description="On the target, summed over tokens; what it would lose without the feature.")
    tokens: int = Field(description="At how many the feature is active.")
    at: str = Field(description="The token of the largest effect.")


class PairEffect(BaseModel):
    position: int
    token: str
    sae: int
    feature: int
    name: str
    activation: float
    effect: float


class Checked(BaseModel):
    against: str = Field(description="The method that the effects were compared with.")
    pairs: int = Field(description="How many were compared, half of them the strongest and half at random.")
    spearman: float | None
    pearson: float | None
    same_sign: float | None


class Faithful(BaseModel):
    pairs_move: float = Field(description="What all pairs together move the target by.")
    kept: float | None = Field(description="Share of that which the strongest alone keep, a mean over the curve.")
    kept_at_random: float | None = Field(description="Likewise as many pairs at random.")
    for_80_percent: int | None = Field(description="Pairs that keep 80 % of it; null where no number does.")


class AttributeAnswer(BaseModel):
    target: str
    value: float = Field(description="Of the target, on the text as it is.")
    method: str
    n_tokens: int = Field(description="That were read: later ones do not reach the target.")
    n_pairs: int = Field(description="Active features at tokens.")
    features: list[FeatureEffect] = Field(description="Largest effect by magnitude first.")
    pairs: list[PairEffect] = Field(description="Likewise, of each token.")
    check: Checked | None = Field(description="How far the effects are those of taking features out. Tell it.")
    faithfulness: Faithful | None


class Continuation(BaseModel):
    prompt: int = Field(description="Number of the prompt, from 0.")
    unsteered: str
    steered: str
    perplexity_unsteered: float | None
    perplexity_steered: float | None


class SteerAnswer(BaseModel):
    texts: list[Continuation]
    steering: str = Field(description="Digest of what was done.")


class Measured(BaseModel):
    value: float
    low: float | None
    high: float | None
    n: int


class EvaluateAnswer(BaseModel):
    numbers: dict[str, Measured]
    level: float = Field(description="Share of repeats on fresh prompts that an interval is to hold.")
    receipt: dict[str, Any] = Field(description="All of it, for save_steering.")


class SaveAnswer(BaseModel):
    file: str
    sha256: str
    with_receipt: bool
