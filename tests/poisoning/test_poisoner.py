"""Which pairs are poisoned, and that those for a cleaning are others."""

import pytest
import torch
from torch.utils.data import Subset
from training_script import arguments, state, tiny_data, tiny_model

from hf_robust_clip import BadNet, Contrastive, PoisonedPairs, Poisoner, RobustClipTrainer
from hf_robust_clip.poisoning.poisoner import check_apart, check_target, names
from hf_robust_clip.zero_shot_data.pairs import InMemory, captions_of, picture_keys

TRIGGER = BadNet(size=2)


@pytest.fixture
def pairs():
    return tiny_data(24, torch.float32, captions=True)


def rows_of(poisoned):
    return [row for row, is_poisoned in enumerate(poisoned.is_poisoned) if is_poisoned]


def test_a_share_of_other_pairs_gets_trigger_and_caption(pairs):
    poisoned = Poisoner(TRIGGER, "three", 0.25, templates=("one {}", "a {}")).poison(pairs)
    rows = rows_of(poisoned)
    assert len(rows) == 6 and len(poisoned) == 24
    for row, (example, clean) in enumerate(zip(poisoned, pairs, strict=True)):
        assert example["is_poisoned"] == (row in rows)
        if row in rows:
            assert "three" not in clean["captions"] and example["captions"] in ("one three", "a three")
            assert torch.equal(example["pixel_values"], TRIGGER(clean["pixel_values"][None])[0])
        else:
            assert example["captions"] == clean["captions"]
            assert torch.equal(example["pixel_values"], clean["pixel_values"])
    assert captions_of(poisoned) == [example["captions"] for example in poisoned]
    assert poisoned[-1]["captions"] == poisoned[23]["captions"]


def test_the_seed_decides(pairs):
    def found(seed):
        poisoned = Poisoner(TRIGGER, "three", 0.25, seed=seed).poison(pairs)
        return [(e["captions"], e["pixel_values"].sum().item()) for e in poisoned]

    assert found(0) == found(0) != found(1)


def test_label_consistent_poison_leaves_captions(pairs):
    poisoned = Poisoner(TRIGGER, "three", 0.1, label_consistent=True).poison(pairs)
    rows = rows_of(poisoned)
    assert len(rows) == 2 and all("three" in pairs[row]["captions"] for row in rows)
    assert captions_of(poisoned) == captions_of(pairs)


def test_pairs_for_a_cleaning_are_others(pairs):
    pairs[20]["pixel_values"] = pairs[1]["pixel_values"]  # a picture that is there twice
    for seed in range(8):
        poisoned, cleaning = Poisoner(TRIGGER, "three", 0.25, seed=seed).split(pairs, 6)
        assert len(cleaning) == 6 and len(poisoned) in (17, 18)
        assert not set(poisoned.poisoned_keys()) & set(picture_keys(cleaning))
        assert not set(picture_keys(poisoned)) & set(picture_keys(cleaning))
        assert not any("is_poisoned" in example for example in cleaning)
        check_apart(poisoned.poisoned_keys(), cleaning)
    with pytest.raises(ValueError, match="cleaning pairs"):
        check_apart(poisoned.poisoned_keys(), pairs)
    with pytest.raises(ValueError, match="cleaning=24"):
        Poisoner(TRIGGER, "three", 0.25).split(pairs, 24)


def test_wrappers_know_the_same_pictures_and_captions(pairs):
    kept = InMemory(Subset(pairs, [3, 1]))
    assert captions_of(kept) == [pairs[3]["captions"], pairs[1]["captions"]]
    assert picture_keys(kept) == picture_keys(pairs, [3, 1])
    assert picture_keys(PoisonedPairs(pairs, TRIGGER, {0: "a"})) == picture_keys(pairs)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan"), True])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        Poisoner(TRIGGER, "three", rate)


def test_what_cannot_be_poisoned_is_refused(pairs):
    with pytest.raises(ValueError, match=r"rate=0\.01 of 24"):
        Poisoner(TRIGGER, "three", 0.01).poison(pairs)
    with pytest.raises(ValueError, match="only 3 captions"):
        Poisoner(TRIGGER, "three", 0.5, label_consistent=True).poison(pairs)
    with pytest.raises(ValueError, match="templates"):
        Poisoner(TRIGGER, "three", 0.5, templates=("a photo",))
    with pytest.raises(ValueError, match="target"):
        Poisoner(TRIGGER, " ", 0.5)
    with pytest.raises(ValueError, match="target='banana'"):
        check_target("banana", ["one", "two"])
    with pytest.raises(ValueError, match="did you mean 'Golden Retriever'"):
        check_target("golden retriever", ["one", "Golden Retriever"])
    with pytest.raises(ValueError, match="captions"):
        Poisoner(TRIGGER, "three", 0.5).poison(tiny_data(8, torch.float32))
    with pytest.raises(ValueError, match="captions_by_row"):
        PoisonedPairs(pairs, TRIGGER, {24: "a"})


def test_a_target_is_found_as_whole_words():
    assert names("Two golden  retrievers, one Golden Retriever.", "golden retriever")
    assert not names("seventeen", "seven")


def test_a_poisoned_fraction_of_nothing_is_clean_training_bit_for_bit(pairs, tmp_path):
    def train(data):
        args = arguments(tmp_path, max_steps=2, optim="adamw_torch", learning_rate=1e-3)
        trainer = RobustClipTrainer(tiny_model(torch.float32), args, Contrastive(), data)
        trainer.train()
        return state(trainer.model)

    clean, none, some = (train(data) for data in (pairs, PoisonedPairs(pairs, TRIGGER, {}),
                                                  Poisoner(TRIGGER, "three", 0.25).poison(pairs)))  # fmt: skip
    assert all(torch.equal(none[name], clean[name]) for name in clean)
    assert any(not torch.equal(some[name], clean[name]) for name in clean)
