"""Steering out to what other programs run, and in from there."""
