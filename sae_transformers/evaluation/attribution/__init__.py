"""What a model's features do to one of its outputs: targets, effects of features at tokens, and how far they hold."""
