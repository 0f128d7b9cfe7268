"""What features stand for, by a language model."""
