"""What PGD owes every objective and loss, and what every attack owes its caller. New ones add their row here."""

import copy
import importlib
import inspect
import itertools
import pkgutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from tiny import CLASS_NAMES
from tiny_siglip import tiny_siglip

import hf_robust_clip.objectives
from hf_robust_clip.attacks import losses
from hf_robust_clip.attacks.apgd import APGDSettings, apgd, apgd_targeted
from hf_robust_clip.attacks.auto_attack import LEAST_CLASSES, AutoAttack
from hf_robust_clip.attacks.losses import cross_entropy, cw_margin, dlr, dlr_targeted, kl_divergence
from hf_robust_clip.attacks.pgd import pgd, pgd_until_misclassified
from hf_robust_clip.attacks.suites import plain_victim, run_member
from hf_robust_clip.objectives.acl import ACL
from hf_robust_clip.objectives.adv_cl import AdvCL
from hf_robust_clip.objectives.agft import AGFT
from hf_robust_clip.objectives.apt import APT
from hf_robust_clip.objectives.ascl import ASCL
from hf_robust_clip.objectives.base import Batch, Objective
from hf_robust_clip.objectives.c_avp import CAVP
from hf_robust_clip.objectives.caw import CAW
from hf_robust_clip.objectives.clean import Clean
from hf_robust_clip.objectives.clean_clip import CleanCLIP
from hf_robust_clip.objectives.cleaner_clip import CleanerCLIP
from hf_robust_clip.objectives.comp_tga import CompTGA
from hf_robust_clip.objectives.contrastive import Contrastive
from hf_robust_clip.objectives.coop import CoOp
from hf_robust_clip.objectives.fap import FAP
from hf_robust_clip.objectives.fare import FARE
from hf_robust_clip.objectives.pmg_aft import PMGAFT
from hf_robust_clip.objectives.saft import SAFT
from hf_robust_clip.objectives.sim_clip import SimCLIP
from hf_robust_clip.objectives.simple_at import SimpleAT
from hf_robust_clip.objectives.tecoa import TeCoA
from hf_robust_clip.objectives.tga_zsr import TGAZSR
from hf_robust_clip.objectives.trades import TRADES
from hf_robust_clip.poisoning.captions import GrammarEditor
from hf_robust_clip.prompts import ClipPromptConfig
from hf_robust_clip.prompts.access import prompts_of
from hf_robust_clip.threat_model import ThreatModel

OBJECTIVES = {
    "Clean": Clean(),
    "TeCoA": TeCoA(),
    "FARE": FARE(),
    "FARE-trades": FARE(0.5, "ce", trades=True),
    "TRADES": TRADES(),
    "PMGAFT-paper": PMGAFT.paper_preset(),
    "PMGAFT-released": PMGAFT.released_preset(),
    "APT-adv-half": APT(),
    "APT-adv-full": APT("adv_full"),
    "APT-clean": APT("clean"),
    "APT-trades": APT("trades"),
    "FAP": FAP(),
    "CoOp": CoOp(),
    "Contrastive": Contrastive(),
    "CleanCLIP": CleanCLIP(),
    "CleanCLIP-symmetric": CleanCLIP(0.5, 2.0, symmetric=True, edited_once=False),
    "CleanerCLIP": CleanerCLIP(editor=GrammarEditor()),
    "AGFT": AGFT(),
    "CAW": CAW(),
    "SimCLIP-released": SimCLIP(),
    "SimCLIP-siamese": SimCLIP("student"),
    "SimpleAT": SimpleAT(),
    "TGAZSR": TGAZSR(),
    "CompTGA": CompTGA(),
    "SAFT": SAFT(),
    "ASCL": ASCL(text_anchors=True),
    "ACL-DS": ACL(),
    "ACL-A2S": ACL("A2S", "agft"),
    "AdvCL": AdvCL(),
    "CAVP": CAVP(),
}
CONTRASTS = ("Contrastive", "CleanCLIP", "CleanCLIP-symmetric", "CleanerCLIP", "ASCL", "ACL-DS", "ACL-A2S", "AdvCL",
             "CAVP")  # fmt: skip  # images of a batch are told apart together,
ATTACKED_TOGETHER = ("ACL-DS", "ACL-A2S", "AdvCL")  # under attack too
STOPPED = ("FARE-trades", "SimCLIP-released", "SimCLIP-siamese")  # gradients aren't those of the value
LOSSES = {
    "cross_entropy": lambda batch: lambda x: cross_entropy(batch.student(x).logits, batch.labels),
    "cw_margin": lambda batch: lambda x: cw_margin(batch.student(x).logits, batch.labels),
    "dlr": lambda batch: lambda x: dlr(batch.student(x).logits, batch.labels),
    "dlr_targeted": lambda batch: (
        lambda x: dlr_targeted(batch.student(x).logits, batch.labels, (batch.labels + 3) % 7)
    ),
    "embedding_l2": FARE().attack_loss,
    "kl_divergence": lambda batch: lambda x: kl_divergence(batch.teacher_on_clean.logits, batch.student(x).logits),
}
ROWS = {**{f"objective-{name}": objective.attack_loss for name, objective in OBJECTIVES.items()}, **LOSSES}
THREAT_MODELS = {"linf": ThreatModel("4/255"), "l2": ThreatModel(0.3, "l2")}
STEP_SIZES = {"linf": "2/255", "l2": 0.1}

each_row = pytest.mark.parametrize("row", ROWS)
each_norm = pytest.mark.parametrize("norm", THREAT_MODELS)


def ids_of(student, texts):
    """Token ids of one length."""
    return student.processor.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids


def batch_of(objective, views, labels, student, teacher):
    """What the trainer makes: with a text for each image, and the objective's further views and texts."""
    texts = [f"{CLASS_NAMES[label]} {'ab'[i % 2]}" for i, label in enumerate(labels.tolist())]
    further_views, further = ((), ()) if objective is None else (
        objective.further_views(views[0], 5), objective.edited_captions(texts, 5))  # fmt: skip
    further_ids = tuple(ids_of(student, own) for own in further)
    return Batch((*views, *further_views), labels, ids_of(student, texts), student, teacher,
                 further_captions=further_ids, num_classes=len(CLASS_NAMES))  # fmt: skip


def asked(forward, texts, pixel_values):
    """What the trainer gives to objectives that look at more than images and classes."""
    output = forward(pixel_values, output_patches=True)
    if texts is not None:
        output["text_embeds"] = texts
    return output


def world_of(family, tiny_batch):
    """A student apart from its teacher; `of(row, rows, size)` gives the row's batch, of several views those rows that
    are attacked.
    """
    student, teacher = family(), family().requires_grad_(False)
    with torch.no_grad():
        for i, parameter in enumerate(student.vision_parameters()):
            parameter.mul_(1 + 0.02 * (i % 3 - 1))

    def of(row, rows=slice(None), size=7):
        objective = OBJECTIVES.get(row.removeprefix("objective-"))
        if objective is not None and objective.normalisation is not None:
            student.set_normalisation(*objective.normalisation)
            teacher.set_normalisation(*objective.normalisation)
        if objective is not None and objective.judged_by is not None and not prompts_of(student):
            get_peft_model(student, ClipPromptConfig(design="pixel", per_class=True, border_width=1))
            for parameter in student.vision_parameters():
                parameter.requires_grad_(True)
        images, labels = tiny_batch(size)
        if objective is not None and "patches" in objective.needs:
            for model in (student, teacher):
                if "texts" in objective.needs:
                    model.set_classes(CLASS_NAMES, ("a {}.", "one {}."))
                further = objective.templates or "texts" in objective.needs
                texts = model.text_embeds(objective.templates or None) if further else None
                model.forward = partial(asked, partial(type(model).forward, model), texts)
        if objective is None or objective.num_views == 1:
            return batch_of(objective, (images[rows],), labels[rows], student, teacher)
        student.train()  # a high-pass view has values outside [0, 1], at which it doesn't look then
        views = (images[rows], images[rows].flip(3), images[rows].flip(2))[: objective.num_views]
        whole = batch_of(objective, views, labels[rows], student, teacher)
        return whole.rows(objective.attacked_rows(len(whole.stacked)))

    return of


@pytest.fixture
def world(tiny_clip, tiny_batch):
    """Of CLIPs."""
    return world_of(tiny_clip, tiny_batch)


def attack(row, norm, batch, images=None, **settings):
    return pgd(
        ROWS[row](batch),
        batch.images if images is None else images,
        THREAT_MODELS[norm],
        **{"num_steps": 3, "step_size": STEP_SIZES[norm], "seed": 11, **settings},
    )


def terms(name, batch, adv, **changes):
    """An objective's terms; of several views with those rows attacked that are."""
    objective, whole = OBJECTIVES[name], replace(batch.whole, **changes)
    if batch.whole is batch:
        return objective(whole, adv)
    count = len(whole.stacked)
    return objective(whole, whole.stacked.index_copy(0, torch.arange(count)[objective.attacked_rows(count)], adv))


def test_every_objective_and_loss_has_a_row():
    modules = pkgutil.iter_modules(hf_robust_clip.objectives.__path__, "hf_robust_clip.objectives.")
    members = [value for module in modules for value in vars(importlib.import_module(module.name)).values()]
    classes = {value for value in members if inspect.isclass(value) and issubclass(value, Objective)}
    assert classes - {Objective} == {type(objective) for objective in OBJECTIVES.values()}
    functions = {name for name, value in vars(losses).items() if inspect.isfunction(value) and name[0] != "_"}
    assert functions == set(LOSSES)


@each_norm
@each_row
def test_adversarial_images_lie_in_ball_and_range_and_raise_the_loss(world, row, norm):
    batch = world(row)
    adv = attack(row, norm, batch)
    change = (adv - batch.images).flatten(1)
    radii = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (radii <= THREAT_MODELS[norm].eps * (1 + 1e-12)).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert adv.dtype == batch.images.dtype
    assert not adv.requires_grad
    loss_fn = ROWS[row](batch)
    start = THREAT_MODELS[norm].random_start(batch.images, 11)
    assert (loss_fn(adv) > loss_fn(start)).all()


@each_row
def test_everything_is_left_as_found(world, row):
    """Gradients (absent or filled), modes, requires_grad flags, values, images and the global random state."""
    batch = world(row)
    student = batch.student
    parameters = list(student.parameters())
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.25 * i) if i % 2 else None
    student.train()
    student.vision_model.encoder.layers[0].eval()
    parameters[-1].requires_grad_(not parameters[-1].requires_grad)

    def state():
        grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        modes = [module.training for model in (student, batch.teacher) for module in model.modules()]
        flags = [parameter.requires_grad for model in (student, batch.teacher) for parameter in model.parameters()]
        values = [value.clone() for value in (*student.state_dict().values(), batch.images)]
        return grads, modes, flags, values, torch.get_rng_state()

    before = state()
    attack(row, "linf", batch)
    after = state()
    assert before[1:3] == after[1:3]
    for old, new in zip(before[0], after[0], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for old, new in zip((*before[3], before[4]), (*after[3], after[4]), strict=True):
        assert torch.equal(old, new)
    assert not batch.images.requires_grad
    assert batch.images.grad is None
    assert all(parameter.grad is None for parameter in batch.teacher.parameters())


@each_norm
@each_row
def test_an_image_does_not_depend_on_its_batch(world, row, norm):
    """Alone, third of seven and third of 64: the same adversarial image."""
    if row.removeprefix("objective-") in ATTACKED_TOGETHER:
        pytest.skip("images of a batch are attacked by what tells them apart")
    alone, few, many = world(row, slice(2, 3), 64), world(row, slice(7), 64), world(row, slice(None), 64)
    threat_model = THREAT_MODELS[norm]
    starts = [threat_model.random_start(batch.images, 11)[i] for batch, i in ((alone, 0), (few, 2), (many, 2))]
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    expected = attack(row, norm, alone)[0]
    for batch in (few, many):
        torch.testing.assert_close(attack(row, norm, batch)[2], expected, rtol=0, atol=1e-9)


@each_norm
@each_row
def test_seed_decides_the_result(world, row, norm):
    batch = world(row)
    first = attack(row, norm, batch)
    torch.rand(3)  # moves the global state, which must play no part
    assert torch.equal(first, attack(row, norm, batch))
    other = attack(row, norm, batch, seed=12)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


@each_row
@pytest.mark.parametrize("random_start", [True, False])
def test_radius_zero_returns_the_images(world, row, random_start):
    batch = world(row)
    for norm in THREAT_MODELS:
        adv = pgd(
            ROWS[row](batch), batch.images, ThreatModel(0, norm), num_steps=2, step_size=0.1, random_start=random_start
        )
        assert torch.equal(adv, batch.images)
        assert adv.data_ptr() != batch.images.data_ptr()


@each_norm
@each_row
def test_more_steps_never_lower_the_best_loss(world, row, norm):
    """With steps too long to settle, so that the last iterate does get worse at times."""
    batch = world(row)
    loss_fn = ROWS[row](batch)
    settings = dict(step_size=2 * THREAT_MODELS[norm].eps)
    reached = [
        loss_fn(attack(row, norm, batch, num_steps=k, keep_best=True, **settings)).detach() for k in range(1, 6)
    ]
    for shorter, longer in itertools.pairwise(reached):
        assert (longer >= shorter - 1e-12 * shorter.abs()).all()
    last = [loss_fn(attack(row, norm, batch, num_steps=k, **settings)).detach() for k in range(1, 6)]
    best_of_last = torch.stack(last).amax(0)
    assert (reached[-1] >= best_of_last - 1e-12 * best_of_last.abs()).all()


@each_norm
@each_row
def test_works_without_gradients_around_it(world, row, norm):
    batch = world(row)
    expected = attack(row, norm, batch)
    batch = world(row)  # nothing computed beforehand is reused
    with torch.no_grad():
        assert torch.equal(attack(row, norm, batch), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_are_finite_scalars_and_train_the_whole_image_encoder(tiny_clip, tiny_batch, family, name):
    """Every vision parameter gets a gradient; the frozen text tower, the logit scale and the teacher get none."""
    world = world_of({"clip": tiny_clip, "siglip": tiny_siglip}[family], tiny_batch)
    batch = world(f"objective-{name}")
    adv = attack(f"objective-{name}", "linf", batch)
    assert not torch.equal(adv, batch.images)
    found = terms(name, batch, adv)
    assert all(value.shape == () and value.isfinite() for value in found.values())
    sum(found.values()).backward()
    student = batch.student
    assert all(parameter.grad is not None for parameter in student.vision_parameters())
    others = [*student.text_parameters(), student.logit_scale, *batch.teacher.parameters()]
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_update_against_the_gradient_lowers_the_loss(world, name):
    batch = world(f"objective-{name}")
    adv = attack(f"objective-{name}", "linf", batch)
    loss = sum(terms(name, batch, adv).values())
    grads = torch.autograd.grad(loss, batch.student.vision_parameters())
    size = sum(grad.square().sum() for grad in grads).sqrt()
    moved = copy.deepcopy(batch.student)
    with torch.no_grad():
        for parameter, grad in zip(moved.vision_parameters(), grads, strict=True):
            parameter.sub_(1e-4 * grad / size)
        after = sum(terms(name, batch, adv, student=moved).values())
    if name in STOPPED:
        assert after < loss
    else:
        assert after.item() == pytest.approx(loss.item() - 1e-4 * size.item(), rel=0, abs=1e-5 * size.item())


def slope(function, step=1e-6):
    """Central difference of a function of one number at 0."""
    return ((function(step) - function(-step)) / (2 * step)).item()


@each_row
def test_gradients_of_attack_losses_are_those_of_finite_differences(world, row):
    """By the images, in float64, in two directions."""
    batch, generator = world(row, size=4), torch.Generator().manual_seed(4)
    loss_fn, images = ROWS[row](batch), THREAT_MODELS["linf"].random_start(batch.images, 11).clamp(0.01, 0.99)
    (gradient,) = torch.autograd.grad(loss_fn(images.requires_grad_()).sum(), images)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        for _ in range(2):
            direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
            found = slope(lambda step, way=direction: loss_fn(images + step * way).sum())
            assert found == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_losses_are_those_of_finite_differences(world, name):
    """By the trained weights, in float64, in two directions; where gradients are stopped they aren't the value's."""
    if name in STOPPED:
        pytest.skip("gradients are stopped in places")
    batch, generator = world(f"objective-{name}", size=4), torch.Generator().manual_seed(4)
    adv = THREAT_MODELS["linf"].random_start(batch.images, 11)
    parameters = batch.student.vision_parameters()
    with torch.no_grad():
        for parameter in parameters:  # far from the teacher, so that what compares them weighs
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    gradients = torch.autograd.grad(sum(terms(name, batch, adv).values()), parameters)
    at = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for _ in range(2):
            ways = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in at]

            def loss(step, ways=ways):
                for parameter, value, way in zip(parameters, at, ways, strict=True):
                    parameter.copy_(value + step * way)
                return sum(terms(name, batch, adv).values())

            expected = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True)).item()
            assert slope(loss) == pytest.approx(expected, rel=1e-5, abs=1e-7)


NOTHING_MOVED = {"embedding_l2", "clean_l2", "kl", "kl_general", "kl_clean", "kl_cos", "guide", "distance",
                 "attention_adv", "attention_clean"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "CAVP"])  # whose prompts no teacher has
def test_a_student_that_is_its_teacher_and_no_attack_give_known_terms(world, name):
    """Distances and divergences are 0, cosines 1; what is left are clean images' own cross-entropies and contrasts."""
    objective, batch = OBJECTIVES[name], world(f"objective-{name}")
    batch.teacher.train(batch.student.training)  # a high-pass view has values outside [0, 1]
    found = {key: value.item() for key, value in terms(name, batch, batch.images, student=batch.teacher).items()}
    output = batch.teacher(batch.whole.images)
    known = {**dict.fromkeys(NOTHING_MOVED, 0.0), "cosine": -1.0, "nt_adv": found.get("nt_clean")}
    if batch.labels is not None and not isinstance(objective, SAFT):
        known["ce"] = cross_entropy(objective.scores(output) if isinstance(objective, PMGAFT) else output.logits,
                                    batch.whole.labels).mean().item()  # fmt: skip
    known["square"] = SimpleAT().square(output.logits, batch.whole.labels).mean().item()
    known["pseudo_ce"] = 0.2 * cross_entropy(output.logits, output.logits.argmax(1)).mean().item()
    soft, sharp = (180 * output.cosine).log_softmax(1), (72 * output.cosine).softmax(1)
    known["soft_ce"] = -(sharp * soft).sum(1).mean().item()
    for key, value in found.items():
        if known.get(key) is not None:
            assert value == pytest.approx(known[key], abs=1e-9), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_of_a_batch_is_the_average_over_its_parts(world, name):
    """What gradient accumulation and several processes rely on."""
    objective = OBJECTIVES[name]
    if name in CONTRASTS:
        pytest.skip("images of a batch are one another's negatives")
    whole = world(f"objective-{name}", slice(None), 8)
    adv = attack(f"objective-{name}", "linf", whole)

    def loss(rows):
        part = replace(whole.rows(rows), images_per_update=8)
        return sum(objective(part, adv[rows]).values()).item()

    assert (loss(slice(4)) + loss(slice(4, 8))) / 2 == pytest.approx(loss(slice(8)), rel=1e-12)
    assert sum(loss(slice(i, i + 1)) for i in range(8)) / 8 == pytest.approx(loss(slice(8)), rel=1e-10)


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_batch_in_another_order_has_the_same_attack_and_loss(world, name):
    row, order = f"objective-{name}", torch.tensor([3, 0, 6, 2, 5, 1, 4])
    batch = world(row)
    moved = {key: getattr(batch.whole, key)[order] for key in ("labels", "captions")}
    moved["further_captions"] = tuple(ids[order] for ids in batch.whole.further_captions)
    other = replace(batch.whole, views=tuple(view[order] for view in batch.whole.views), **moved)
    if batch.whole is not batch:
        other = other.rows(OBJECTIVES[name].attacked_rows(len(other.stacked)))
    adv, adv_of_other = attack(row, "linf", batch), attack(row, "linf", other)
    places = torch.cat([order + start for start in range(0, len(adv), 7)])
    torch.testing.assert_close(adv_of_other, adv[places], rtol=0, atol=1e-9)
    loss, loss_of_other = (sum(terms(name, *pair).values()).item() for pair in ((batch, adv), (other, adv_of_other)))
    assert loss_of_other == pytest.approx(loss, rel=1e-9)


# ---- attacks on a classifier: images and labels to images that it gets wrong


def until_misclassified(logits_fn, images, labels, threat_model):
    step = threat_model.eps / 2 or 0.1
    return pgd_until_misclassified(
        logits_fn, images, labels, threat_model, loss=cross_entropy, num_steps=4, step_size=step
    )


def by_apgd(loss):
    return lambda logits_fn, images, labels, threat_model: apgd(
        logits_fn, images, labels, threat_model, APGDSettings(4), loss=loss
    )


def by_targets(logits_fn, images, labels, threat_model):
    return apgd_targeted(logits_fn, images, labels, threat_model, APGDSettings(4), num_targets=2)


def by_member(name):
    member = AutoAttack((name,), num_steps=4, num_targets=2, num_queries=15).members(len(CLASS_NAMES))[0]
    return lambda logits_fn, images, labels, threat_model: run_member(
        member, plain_victim(logits_fn), images, labels, threat_model
    )[0]


ATTACKS = {
    "pgd_until_misclassified": until_misclassified,
    "apgd-ce": by_apgd(cross_entropy),
    "apgd-dlr": by_apgd(dlr),
    "apgd_targeted": by_targets,
    **{f"member {name}": by_member(name) for name in LEAST_CLASSES},
}
BALLS = {"linf": ThreatModel("8/255"), "l2": ThreatModel(0.4, "l2")}
each_attack = pytest.mark.parametrize("attack_name", ATTACKS)


@pytest.fixture
def victim(tiny_clip, tiny_batch):
    """A frozen CLIP, logits that differ between images, images, labels: wrong ones for the third and the last."""
    model = tiny_clip().requires_grad_(False)
    images, _ = tiny_batch(6)
    usual = model(images).logits.mean(0)

    def logits(pixels):
        return model(pixels).logits - usual

    labels = logits(images).argmax(1)
    labels[[2, 5]] = (labels[[2, 5]] + 1) % 7
    return model, logits, images, labels


@each_norm
@each_attack
def test_attacks_stay_in_the_threat_model_and_leave_everything_as_found(victim, attack_name, norm):
    model, logits, images, labels = victim
    before, state = images.clone(), torch.get_rng_state()
    with torch.no_grad():
        adv = ATTACKS[attack_name](logits, images, labels, BALLS[norm])
        assert not torch.is_grad_enabled()
    assert (BALLS[norm].distance(adv, images) <= BALLS[norm].eps + 1e-7).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert adv.dtype == images.dtype
    assert not adv.requires_grad
    assert torch.equal(adv[[2, 5]], images[[2, 5]])
    assert torch.equal(images, before)
    assert images.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@each_norm
@each_attack
def test_what_an_attack_finds_for_an_image_does_not_depend_on_others(victim, attack_name, norm):
    _, logits, images, labels = victim

    def found(rows):
        adv = ATTACKS[attack_name](logits, images[rows], labels[rows], BALLS[norm])
        return adv, logits(adv).argmax(1) != labels[rows]

    together, broken = found(slice(None))
    for i in (0, 2, 4):
        alone, own = found(slice(i, i + 1))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
        assert bool(own) == bool(broken[i])
    torch.rand(3)  # nor on the global random state
    assert torch.equal(found(slice(None))[0], together)


@each_norm
@each_attack
def test_large_balls_break_images_and_radius_zero_none(victim, attack_name, norm):
    _, logits, images, labels = victim
    wrong = logits(images).argmax(1) != labels
    assert wrong.tolist() == [False, False, True, False, False, True]
    adv = ATTACKS[attack_name](logits, images, labels, ThreatModel(0, norm))
    assert torch.equal(adv, images)
    adv = ATTACKS[attack_name](logits, images, labels, ThreatModel(0.6 if norm == "linf" else 8.0, norm))
    assert (logits(adv).argmax(1) != labels).sum() > wrong.sum()
