"""The parts of `select_knowledge`: answers that are kept, features, the choice of a setting, the comparison."""
