"""Wilson's interval holds the share that it is of."""

import pytest

from hf_robust_clip.metrics import wilson_interval


@pytest.mark.parametrize("trials", [11, 60, 100, 500, 1880, 10_000])
def test_none_and_all_are_in_their_interval(trials):
    low, high = wilson_interval(0, trials)
    assert low == 0 < high
    low, high = wilson_interval(trials, trials)
    assert low < 1 == high
