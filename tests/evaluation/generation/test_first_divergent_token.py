import pytest
import torch

from sae_transformers.evaluation.generation.first_divergent_token import (
    first_divergent_token,
    mean_first_divergent_token,
)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([5, 6, 7], [5, 6, 7], 3), ([5, 6, 7], [5, 9, 7], 1), ([5], [6], 0), ([5, 6], [5, 6, 7], 2), ([], [], 0)],
)
def test_index_of_the_first_difference(first: list[int], second: list[int], expected: int) -> None:
    assert first_divergent_token(first, second) == first_divergent_token(second, first) == expected
    assert first_divergent_token(torch.tensor(first), second) == expected  # pyright: ignore[reportArgumentType]


def test_mean_over_prompts() -> None:
    assert mean_first_divergent_token([[1, 2], [3, 4]], [[1, 2], [5, 4]]) == 1.0
    with pytest.raises(ValueError, match="1 and 2"):
        mean_first_divergent_token([[1]], [[1], [2]])
    with pytest.raises(ValueError, match="0 and 0"):
        mean_first_divergent_token([], [])
