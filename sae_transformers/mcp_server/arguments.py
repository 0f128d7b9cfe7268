"""The arguments of each tool. Their docstrings are what an agent reads of the tool; unknown arguments are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import limits

Text = Annotated[str, Field(min_length=1, max_length=limits.LONGEST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=limits.LONGEST_NAME)]
Feature = Annotated[
    int | Name, Field(description="Number of a feature, its name, or a whole description that find_features gave.")
]
Token = Annotated[int | Name, Field(description="A token's text, with its leading space, or its id.")]
Sae = Annotated[int, Field(ge=0, description="Number of the SAE, from 0; see describe_model.")]
SkipFirst = Annotated[int, Field(ge=0, description="Leading tokens that do not count: the first is an outlier.")]


class Arguments(BaseModel):
    """Of one tool."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DescribeModel(Arguments):
    """What is loaded: the model, its SAEs (where they read, how many features, which have names, under what licence
    their descriptions are), whether it is steered by default, and what one call may ask for. Call it first."""


class FindFeatures(Arguments):
    """Find features by a few words, in what is known of them. Needs SAEs with annotations; see describe_model."""

    query: str = Field(min_length=1, max_length=limits.LONGEST_QUERY, description="A few words, such as sarcasm.")
    k: int = Field(10, ge=1, le=limits.MAX_K, description="Features, at most.")
    sae: int | None = Field(None, ge=0, description="Number of one SAE; by default all.")


class TopFeatures(Arguments):
    """The strongest features of a text, each with the token where it is strongest."""

    text: Text
    k: int = Field(10, ge=1, le=limits.MAX_K, description="Features, at most.")
    sae: Sae = 0
    skip_first: SkipFirst = 1


class ReadFeatures(Arguments):
    """How strongly some features are active at each token of a text."""

    text: Text
    features: list[Feature] = Field(min_length=1, max_length=limits.MAX_READ)
    sae: Sae = 0
    skip_first: SkipFirst = 1


class Detect(Arguments):
    """Score texts by one feature. With labels, also how well the score tells them apart."""

    texts: list[Text] = Field(min_length=1, max_length=limits.MAX_TEXTS)
    feature: Feature
    labels: list[Literal[0, 1] | None] | None = Field(None, description="0, 1 or null for unknown, one a text.")
    sae: Sae = 0
    pooling: Literal["mean", "max", "last"] = Field("mean", description="Of a text's tokens.")
    skip_first: SkipFirst = 1


class Attribute(Arguments):
    """Which features, at which tokens, raise or lower the logit of the token that would come next, or the difference
    of two tokens' logits; with a check by taking some features out. Effects are on the unsteered model."""

    text: Text
    target: list[Token] | None = Field(
        None, min_length=1, max_length=2,
        description="One token, or two whose logits are subtracted, such as [' Paris', ' London']; by default the "
        "likeliest one.",
    )  # fmt: skip
    position: int | Name | None = Field(
        None,
        description="Number of the token after which the target would come, from the end where negative; or a token "
        "of the text: why it is said there. By default the end.",
    )
    method: Literal["gradient x latent", "integrated gradients", "ablation"] = Field(
        "gradient x latent",
        description=f"ablation takes the {limits.MAX_ABLATED} strongest pairs of feature and token out one by one.",
    )
    k: int = Field(10, ge=1, le=limits.MAX_K, description="Features, and pairs of feature and token, at most.")
    sae: int | None = Field(None, ge=0, description="Number of one SAE; by default all.")
    skip_first: SkipFirst = 1
    faithfulness: bool = Field(
        False, description="Also run the model with only the strongest pairs, and with as many at random."
    )


class Edit(Arguments):
    """A change of one feature.

    `direction` adds the feature's decoder row, value long in the unit: `norm` is of the hidden state's length, and
    0.2 to 0.6 is usual. `add`, `set`, `scale` change its activation; `max` is its largest. `ablate` sets it to 0."""

    feature: Feature
    op: Literal["direction", "add", "set", "scale", "ablate", "erase", "at_least", "at_most", "shrink"] = "direction"
    value: float | None = Field(None, allow_inf_nan=False, description="Not given for ablate and erase.")
    unit: Literal["absolute", "max", "norm"] = "absolute"
    sae: Sae = 0


class Steered(Arguments):
    """How the model is steered: by `edits`, or by a whole `steering`."""

    edits: list[Edit] | None = Field(None, min_length=1, max_length=limits.MAX_EDITS)
    positions: Literal["all", "prompt", "generated", "last_prompt"] | None = Field(
        None, description="Where the edits act; by default generated."
    )
    steering: dict[str, Any] | None = Field(
        None, description="In place of edits: a whole steering, as this library's steering.json files have it."
    )


class Steer(Steered):
    """Continue prompts without and with a steering, side by side, from the same random numbers; with the perplexity
    of each text under the unsteered model: far above the unsteered one's, the text is breaking."""

    prompts: list[Text] = Field(min_length=1, max_length=limits.MAX_PROMPTS)
    max_new_tokens: int = Field(40, ge=1, le=limits.MAX_NEW_TOKENS)
    temperature: float = Field(0.0, ge=0, le=5, allow_inf_nan=False, description="0 is greedy.")
    seed: int = Field(0, ge=0, lt=2**31)
    chat: bool = Field(True, description="Put prompts into the chat template, where the model has one.")


class EvaluateSteering(Steered):
    """Measure what a steering does: its effect on a score of the continuations of prompts, and its damage
    (perplexity, repetition, refusals; on neutral texts the divergence from the unsteered model), with intervals for
    fresh prompts of the same kind. Give 4 prompts or more for intervals; 16 or more are better."""

    prompts: list[Text] = Field(min_length=1, max_length=limits.MAX_EVALUATED)
    neutral: list[Text] = Field(
        default_factory=list, max_length=limits.MAX_EVALUATED, description="Texts in which nothing should change."
    )
    scorer: Literal["sentiment", "profanity", "refusal"] = Field(
        "sentiment", description="sentiment: -1 to 1. profanity: probability. refusal: 1 where a text refuses."
    )
    goal: Literal["raise", "lower"] = Field("raise", description="What is wanted of the score.")
    max_new_tokens: int = Field(24, ge=1, le=limits.MAX_EVALUATED_TOKENS)
    temperature: float = Field(0.7, ge=0, le=5, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**31)


class SaveSteering(Steered):
    """Write a steering as a new .json file into the folder that the server was allowed to write to, with its receipt
    where it was evaluated."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        max_length=limits.LONGEST_FILE,
        description="Of the file, without .json.",
    )
    receipt: dict[str, Any] | None = Field(None, description="The receipt that evaluate_steering gave for it.")
