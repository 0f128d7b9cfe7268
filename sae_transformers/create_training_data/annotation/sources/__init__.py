"""Annotations of features as others publish them."""
