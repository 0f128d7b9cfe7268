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
