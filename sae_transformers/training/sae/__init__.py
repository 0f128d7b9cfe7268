"""Sparse autoencoders: trainer, objective, data."""
