"""Sentiment of a text by rule: VADER, which needs no model and no network."""

from __future__ import annotations

from collections.abc import Callable

from ...latents.optional_packages import needs


def vader_scorer() -> Callable[[str], float]:
    """VADER's compound score: -1 most negative, 0 neutral, 1 most positive.

    "VADER: a parsimonious rule-based model for sentiment analysis of social media text"
    (https://doi.org/10.1609/icwsm.v8i1.14550).

    Returns:
        A function from a text to its score, a number in [-1, 1].

    Raises:
        ImportError: the package vaderSentiment is not installed.
    """
    with needs("Scoring sentiment", "vaderSentiment", "quickstart"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]
