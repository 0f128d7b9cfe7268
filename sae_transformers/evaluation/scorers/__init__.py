"""Texts -> scores: sentiment, toxicity, acceptability, a classifier or a judge."""
