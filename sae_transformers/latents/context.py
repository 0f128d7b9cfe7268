"""How long a text a model reads."""

from __future__ import annotations

from transformers import PreTrainedModel


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for; None where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, max_length: int, least: int = 2) -> None:
    """
    Raises:
        ValueError: the model does not read texts of `max_length` tokens, or they would be shorter than `least`.
    """
    limit = context_length(model)
    if max_length < least or (limit and max_length > limit):
        raise ValueError(
            f"`max_length` must be from {least} to {limit} for this model. Received: max_length={max_length!r}."
        )


def reading_length(model: PreTrainedModel, max_length: int | None, default: int) -> int:
    """`max_length` where it is given and fits, else `default` or what the model reads, if that is less.

    Raises:
        ValueError: the model does not read texts of `max_length` tokens.
    """
    if max_length is None:
        return min(default, context_length(model) or default)
    check_length(model, max_length)
    return max_length
