"""A server of a steered model with OpenAI's interface; requests of different steering share one running batch."""
