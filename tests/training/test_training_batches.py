import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from hf_robust_clip.training.batches import count_images, own_images_of_last_batch, share_of_update, without_fill


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_fill_of_last_batches_is_what_accelerate_deals_twice(processes, batch_size):
    for images in range(1, 3 * batch_size * processes + 2):
        dealt = [
            list(BatchSamplerShard(BatchSampler(SequentialSampler(range(images)), batch_size, False), processes, i))
            for i in range(processes)
        ]
        own = [own_images_of_last_batch(images, batch_size, processes, i) for i in range(processes)]
        kept = [[*batches[:-1], batches[-1][:n]] for batches, n in zip(dealt, own, strict=True)]
        assert sorted(image for batches in kept for batch in batches for image in batch) == list(range(images))


def test_a_batch_without_fill_keeps_what_belongs_to_its_images():
    batch = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.arange(4), "names": list("abcd"), "scale": 2}
    for own, left in ((3, 3), (1, 1), (0, 1)):
        kept = without_fill(batch, own)
        assert count_images(kept) == own
        assert torch.equal(kept["labels"], batch["labels"][:left]) and kept["pixel_values"].shape[0] == left
        assert (kept["names"], kept["scale"]) == (list("abcd")[:left], 2)
    assert count_images(batch) == count_images({"pictures": [0] * 4}) == 4


def test_shares_add_up_to_the_mean_over_all_images():
    """Batches of 4, 2 and 1 on two processes, whose gradients are averaged."""
    parts = [[torch.rand(4), torch.rand(2)], [torch.rand(1)]]
    everything = torch.cat([batch for process in parts for batch in process])
    shares = [sum(share_of_update(len(batch), 7, 2) * batch.mean() for batch in process) for process in parts]
    torch.testing.assert_close(sum(shares) / 2, everything.mean())
