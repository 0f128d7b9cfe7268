"""Which blocks of tokens may share keys and values: those with the same tokens, steered alike, up to their end."""

import itertools

import pytest

from sae_transformers import FeatureEdit, Steering
from sae_transformers.vllm.asked import NOTHING, Asked
from sae_transformers.vllm.cache_key import steering_key

SET = [FeatureEdit(feature=5, op="set", value=8.0)]
BLOCK = 4
POSITIONS = ["all", "prompt", "generated", "last_prompt", [(1, 3)], [(0, 2), (-3, None)], [(-5, -1)]]


def keys(steering: Steering, prompt_length: int, length: int = 24) -> list:
    asked = Asked(steering)
    return [steering_key(asked, prompt_length, start, start + BLOCK) for start in range(0, length, BLOCK)]


def steered(steering: Steering, prompt_length: int, length: int = 24) -> list[bool]:
    return [any(a <= position < b for a, b in steering.ranges(prompt_length)) for position in range(length)]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(POSITIONS, POSITIONS)))
def test_chains_are_equal_exactly_as_far_as_the_same_tokens_are_steered(one, other):
    """Also of prompts of different lengths, one the beginning of the other."""
    for first, second in itertools.product((6, 11, 16), (6, 11, 16)):
        a, b = Steering(SET, positions=one), Steering(SET, positions=other)
        left, right = keys(a, first), keys(b, second)
        tokens_left, tokens_right = steered(a, first), steered(b, second)
        for block in range(len(left)):
            stop = (block + 1) * BLOCK
            assert (left[: block + 1] == right[: block + 1]) == (tokens_left[:stop] == tokens_right[:stop])


def test_other_edits_are_another_key():
    others = [
        Steering([FeatureEdit(feature=5, op="set", value=8.5)]),
        Steering([FeatureEdit(feature=6, op="set", value=8.0)]),
        Steering([FeatureEdit(feature=5, op="add", value=8.0)]),
        Steering([FeatureEdit(sae=1, feature=5, op="set", value=8.0)]),
        Steering(SET, keep_error=False),
        Steering(SET, balance=True),
        Steering(SET, reconstruct=(1,)),
    ]
    assert len({keys(steering, 8)[0] for steering in [Steering(SET), *others]}) == 8


def test_what_is_not_steered_has_vllms_own_key():
    assert steering_key(NOTHING, 8, 0, 4) is None
    assert keys(Steering(SET, positions="generated"), 9)[:2] == [None, None]
