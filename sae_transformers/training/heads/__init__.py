"""Classifiers on hidden states, kept off unintended features."""
