"""Max-activating examples of features."""
