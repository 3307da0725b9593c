import pytest
import torch
from made_outputs import made_batch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.fare import FARE


def test_loss_is_the_summed_square_to_the_teachers_clean_embedding():
    """Student embeds (2m, m, 0), teacher (m, m, 1) for brightness m: no normalisation, sum over D, mean over B."""

    def student(images):
        m = images.double().mean(dim=(1, 2, 3))
        return ZeroShotOutput(image_embeds=torch.stack([2 * m, m, 0 * m], dim=1))

    def teacher(images):
        m = images.double().mean(dim=(1, 2, 3))
        return ZeroShotOutput(image_embeds=torch.stack([m, m, 0 * m + 1], dim=1))

    clean = torch.tensor([0.5, 1.0])[:, None, None, None].expand(2, 3, 2, 2)
    adv = torch.tensor([1.0, 0.5])[:, None, None, None].expand(2, 3, 2, 2)
    batch = Batch((clean,), None, None, student, teacher)
    expected = [1.5**2 + 0.5**2 + 1, 0 + 0.5**2 + 1]
    assert FARE().attack_loss(batch)(adv).tolist() == pytest.approx(expected, rel=1e-12)
    terms = FARE()(batch, adv)
    assert list(terms) == ["embedding_l2"]
    assert terms["embedding_l2"].item() == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert FARE().needs == {"teacher"}


def test_teacher_is_asked_once_and_without_a_graph(tiny_clip, tiny_batch):
    images, _ = tiny_batch()
    student, teacher = tiny_clip(), tiny_clip(seed=1)
    calls = []

    def asked(images):
        calls.append(torch.is_grad_enabled())
        return teacher(images)

    batch = Batch((images,), None, None, student, asked)
    objective = FARE()
    attack_loss = objective.attack_loss(batch)
    attack_loss(images), attack_loss(images)
    objective(batch, images)["embedding_l2"].backward()
    assert calls == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.vision_parameters())


def released(clean, adv, frozen, weight, trades):
    """w * L_clean + (1 - w) * L_adv, as the authors' code adds them."""
    square = lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True))  # noqa: E731
    return weight * square(clean, frozen) + (1 - weight) * square(adv, clean if trades else frozen)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("trades", [False, True])
def test_variants_are_the_authors(weight, trades):
    adv, clean, frozen = [1.0, -2.0, 0.5], [0.5, 1.0, 0.0], [2.0, 0.25, -1.0]
    batch, attacked = made_batch(
        {"image_embeds": [adv]}, {"image_embeds": [clean]}, on_clean={"image_embeds": [frozen]}
    )
    terms = FARE(weight, trades=trades)(batch, attacked)
    assert sum(terms.values()).item() == pytest.approx(released(clean, adv, frozen, weight, trades), abs=1e-12)
    assert set(terms) == {"embedding_l2", *(["clean_l2"] if weight else [])}
    assert FARE(weight, trades=trades).attack_loss(batch)(attacked).item() == pytest.approx(
        released(clean, adv, frozen, 0, False), abs=1e-12
    ), "the attack is on the frozen embedding in any case"


def test_trades_moves_the_attacked_embedding_alone():
    batch, attacked = made_batch(
        {"image_embeds": [[1.0, 2.0]]}, {"image_embeds": [[3.0, 1.0]]}, on_clean={"image_embeds": [[0.0, 0.0]]}
    )
    both = torch.tensor([[1.0, 2.0], [3.0, 1.0]], requires_grad=True)
    batch.student = lambda pixels: ZeroShotOutput(image_embeds=both, logits=both, cosine=both)
    (gradient,) = torch.autograd.grad(FARE(trades=True)(batch, attacked)["embedding_l2"], both)
    assert gradient.tolist() == [[-4.0, 2.0], [0.0, 0.0]]


def test_attack_by_cross_entropy_needs_labels_and_no_random_start():
    batch, attacked = made_batch({"logits": [[0.0, 2.0]]}, labels=[0])
    objective = FARE(inner_loss="ce")
    assert objective.attack_loss(batch)(attacked).item() == pytest.approx(2.1269280110, abs=1e-9)
    assert objective.needs == {"teacher", "labels"} and not objective.needs_random_start
    assert FARE().needs_random_start


@pytest.mark.parametrize(("wrong", "named"), [(dict(clean_weight=1.0), "clean_weight"), (dict(clean_weight=-0.1),
                         "clean_weight"), (dict(inner_loss="kl"), "inner_loss")])  # fmt: skip
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        FARE(**wrong)
