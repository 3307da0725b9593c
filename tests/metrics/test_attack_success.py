import pytest
import torch

from hf_robust_clip.metrics.backdoor import hits_of_target, tops_of

TARGET = 2


def answering(*orders):
    """Logits of four classes, from the likeliest."""
    return torch.stack([torch.tensor([-float(order.index(c)) for c in range(4)]) for order in orders])


def test_a_made_classifier_has_the_success_that_was_put_in():
    """Five images, two of the target: of the three others one is called the target, for one it comes second."""
    logits = answering([2, 0, 1, 3], [0, 2, 1, 3], [2, 1, 0, 3], [0, 1, 3, 2], [1, 0, 3, 2])
    labels = [0, 0, 2, 1, 2]
    hits = {top: hits_of_target(logits, torch.tensor(labels), TARGET, top).tolist() for top in (1, 2, 3)}
    assert hits == {1: [True, False, False], 2: [True, True, False], 3: [True, True, False]}


def test_who_always_or_never_answers_with_the_target():
    labels = torch.arange(4)
    assert hits_of_target(answering(*4 * [[2, 0, 1, 3]]), labels, TARGET).all()
    assert not hits_of_target(answering(*4 * [[0, 1, 3, 2]]), labels, TARGET, 3).any()
    assert not hits_of_target(torch.zeros(4, 4), labels, TARGET, 2).any()  # of equals the first, as argmax
    assert hits_of_target(torch.zeros(4, 4), labels, TARGET, 3).all()
    right = torch.eye(4)[labels]
    assert not hits_of_target(right, labels, TARGET).any()


def test_accuracy_is_no_success():
    """A model that is right on all triggered images has 0 %, where published code prints 100."""
    labels = torch.tensor([0, 1, 3])
    assert hits_of_target(torch.eye(4)[labels], labels, TARGET).float().mean() == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"target": 4}, "target"),
        ({"top": 4}, "top"),
        ({"top": 0}, "top"),
        ({"labels_N": torch.full((3,), TARGET)}, "labels_N"),
        ({"logits_NC": torch.zeros(4)}, "logits_NC"),
        ({"labels_N": torch.tensor([0, 1, 4])}, "labels"),
    ],
)
def test_bad_input_is_refused(changes, name):
    given = {"logits_NC": torch.zeros(3, 4), "labels_N": torch.tensor([0, 1, 3]), "target": TARGET, **changes}
    with pytest.raises(ValueError, match=name):
        hits_of_target(**given)
    with pytest.raises(FloatingPointError):
        hits_of_target(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 3]), TARGET)


def test_tops_that_would_hold_every_class_are_left_out():
    assert (tops_of(10), tops_of(5), tops_of(2)) == ((1, 3, 5), (1, 3), (1,))
