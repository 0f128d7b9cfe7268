"""What one call of a tool may ask for. `describe_model` tells these numbers."""

from __future__ import annotations

LONGEST_TEXT = 20_000  # characters of a text or a prompt
LONGEST_QUERY = 256
LONGEST_NAME = 256  # characters of a feature's name
LONGEST_FILE = 80  # characters of the name of a file
LONGEST_TOLD = 500  # characters of a description or of an error's part
MAX_K = 50  # features of one answer
MAX_READ = 16  # features that are read at once
MAX_TOKENS = 512  # of a text that is read; the rest is cut off
MAX_TEXTS = 64  # of `detect`
MAX_ABLATED = 128  # pairs of feature and token that `attribute` takes out one by one
MAX_PROMPTS = 8  # of `steer`
MAX_NEW_TOKENS = 256  # of `steer`
MAX_EVALUATED = 32  # prompts of `evaluate_steering`, and neutral texts
MAX_EVALUATED_TOKENS = 64  # new ones of each
MAX_EDITS = 64
MAX_NAMES = 100  # that `describe_model` lists of an SAE
MAX_SAES = 64  # that it lists
