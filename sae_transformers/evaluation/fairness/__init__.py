"""Stereotypes, and what depends on an attribute that should not matter."""
