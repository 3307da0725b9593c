"""Which images of one split may also be those of another, by what settings say."""

import pytest

from hf_robust_clip.arguments import Images


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train[:10]", "train", True),
        ("train[:10]", "train[10:]", False),
        ("train[:11]", "train[10:]", True),
        ("train[:10%]", "train[10%:]", False),
        ("train[:10%]", "train[10:]", True),
        ("train[-10:]", "train[:5]", True),  # nobody knows how many there are
        ("train+test", "test", True),
        ("train[:5]+test", "train[5:]", False),
        ("all", "test", True),
    ],
)
def test_splits_that_may_share_rows(one, other, overlap):
    for left, right in ((one, other), (other, one)):
        assert Images("cifar10", left).overlaps(Images("cifar10", right)) == overlap
        assert not Images("cifar10", left).overlaps(Images("cifar100", right))
