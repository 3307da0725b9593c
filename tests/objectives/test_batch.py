"""What attack and loss share in a step: views, rows of them, the teacher's clean pass."""

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch


def views(count=2, images=3):
    """One value for each view and image: 10 * view + image."""
    return tuple(
        torch.arange(images, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) + 10 * view
        for view in range(count)
    )


def values(images):
    return images[:, 0, 0, 0].tolist()


def embedded(images):
    return ZeroShotOutput(image_embeds=images.flatten(1), class_embeds=torch.eye(2), logits=images.flatten(1)[:, :2])


def test_views_are_stacked_one_after_the_other_with_their_labels_and_captions():
    batch = Batch(views(), torch.tensor([4, 5, 6]), torch.tensor([[1, 0], [2, 0], [3, 0]]), embedded)
    assert values(batch.images) == [0, 1, 2]
    assert values(batch.stacked) == [0, 1, 2, 10, 11, 12]
    assert batch.whole is batch
    part = batch.rows(slice(1, 5))
    assert values(part.images) == values(part.stacked) == [1, 2, 10, 11]
    assert part.labels.tolist() == [5, 6, 4, 5]
    assert part.captions[:, 0].tolist() == [2, 3, 1, 2]
    assert part.whole is batch
    assert Batch(views(), None, None, embedded).rows(slice(2)).labels is None


@pytest.mark.parametrize("count", [1, 2])
def test_the_teacher_sees_clean_images_once_for_attack_and_loss(count):
    calls = []

    def teacher(images):
        calls.append(len(images))
        return embedded(images)

    batch = Batch(views(count), None, None, embedded, teacher)
    part = batch.rows(slice(1, None))
    torch.testing.assert_close(part.teacher_on_clean.image_embeds, batch.stacked.flatten(1)[1:])
    torch.testing.assert_close(batch.teacher_on_clean.image_embeds, batch.stacked.flatten(1))
    assert calls == [3 * count]


def test_both_outputs_keep_every_field():
    batch = Batch(views(), None, None, embedded)
    adv, clean = batch.student_on_both(batch.stacked + 100)
    assert values(adv.image_embeds.view(6, 3, 2, 2)) == [100, 101, 102, 110, 111, 112]
    assert values(clean.image_embeds.view(6, 3, 2, 2)) == [0, 1, 2, 10, 11, 12]
    assert torch.equal(adv.class_embeds, torch.eye(2))


def test_one_process_gathers_its_own_rows():
    batch = Batch(views(), None, None, embedded)
    rows = torch.rand(3, 2)
    assert batch.gathered(rows) is rows
