"""Everything that measures: pure functions of tensors and texts, and the models that score texts."""
