"""AutoAttack: the authors' own suite, any number of classes, batches, random state, fast classifiers."""

import copy
import json
import logging
import warnings
from dataclasses import replace

import pytest
import torch
from pyautoattack.autoattack import AutoAttack as AuthorsAutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from training_script import digits
from victims import NORMS, Curved, curved, fallen, linear

from hf_robust_clip.attacks.auto_attack import STANDARD, AutoAttack, auto_attack
from hf_robust_clip.attacks.losses import cw_margin
from hf_robust_clip.attacks.suites import PGD, Member, is_optimising, is_randomised, plain_victim, run_member
from hf_robust_clip.threat_model import ThreatModel

EVERY = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
RADII = {"linf": ThreatModel(0.01), "l2": ThreatModel(0.1, "l2")}
TINY = dict(num_steps=4, num_targets=2, num_queries=15)
each_norm = pytest.mark.parametrize("norm", RADII)
each_member = pytest.mark.parametrize("member", EVERY)


def authors_suite(logits_fn, images, labels, threat_model, *, num_steps, num_targets, num_queries):
    """Their `run_standard_evaluation`, an image at a time, with the members' budgets cut."""
    warnings.simplefilter("ignore")
    shared = dict(norm=NORMS[threat_model.norm], eps=threat_model.eps, seed=0, device="cpu")
    suite = AuthorsAutoAttack(
        logits_fn, attacks=list(STANDARD), version="custom",
        **{name: shared[name] for name in ("norm", "eps", "seed", "device")},
    )  # fmt: skip
    suite.apgd = APGDAttack(logits_fn, n_iter=num_steps, **shared)
    suite.apgd_targeted = APGDAttack_targeted(logits_fn, n_iter=num_steps, n_target_classes=num_targets, **shared)
    suite.fab = FABAttack_PT(logits_fn, n_iter=num_steps, n_target_classes=num_targets, **shared)
    suite.square = SquareAttack(logits_fn, n_queries=num_queries, p_init=0.8, resc_schedule=False, **shared)
    with torch.random.fork_rng(devices=[]):
        return suite.run_standard_evaluation(images, labels, batch_size=1)[0]


def victim_of(member, classes, **settings):
    return AutoAttack((member,), **{**TINY, **settings}).members(classes)[0]


# ---- the authors' code


@each_norm
def test_the_same_images_fall_as_in_the_authors_suite(norm):
    logits, images, labels = curved(size=14, dtype=torch.float32)
    own, left = auto_attack(logits, images, labels, RADII[norm], version=AutoAttack(**TINY), batch_size=7)
    theirs = authors_suite(logits, images, labels, RADII[norm], **TINY)
    broken = fallen(logits, own, labels)
    assert broken.tolist() == fallen(logits, theirs, labels).tolist()
    assert 0 < broken.sum() < len(images)
    assert torch.equal(own[~broken], images[~broken])
    assert left["square"] == float((~broken).double().mean())


@each_norm
@each_member
def test_each_member_alone_fells_what_the_authors_fells(member, norm):
    """At radii where it breaks some images but not all."""
    logits, images, labels = curved(size=10, dtype=torch.float32, seed=4)
    eps = {"linf": 0.012, "l2": 0.12}[norm]
    budget = dict(num_steps=6, num_targets=3, num_queries=60)
    shared = dict(norm=NORMS[norm], eps=eps, seed=0, device="cpu")
    theirs = {
        "apgd-ce": lambda: APGDAttack(logits, n_iter=6, **shared),
        "apgd-dlr": lambda: APGDAttack(logits, n_iter=6, loss="dlr", **shared),
        "apgd-t": lambda: APGDAttack_targeted(logits, n_iter=6, n_target_classes=3, **shared),
        "fab-t": lambda: FABAttack_PT(logits, n_iter=6, n_target_classes=3, targeted=True, **shared),
        "square": lambda: SquareAttack(logits, n_queries=60, p_init=0.8, resc_schedule=False, **shared),
    }[member]()
    with torch.random.fork_rng(devices=[]):
        broken = [
            bool(fallen(logits, theirs.perturb(images[i : i + 1], labels[i : i + 1]), labels[i : i + 1]))
            for i in range(len(images))
        ]
    attack = victim_of(member, 10, **budget)
    adv, stands = run_member(attack, plain_victim(logits), images, labels, ThreatModel(eps, norm))
    assert (~stands).tolist() == broken == fallen(logits, adv, labels).tolist()
    assert 0 < sum(broken) < len(broken)


def test_digits_fall_as_in_the_authors_suite():
    model, data = digits(5)
    model.float().eval().requires_grad_(False)
    images = torch.stack([data[i]["pixel_values"] for i in range(5)]).float()
    labels = torch.tensor([data[i]["labels"] for i in range(5)])
    budget = dict(num_steps=3, num_targets=2, num_queries=10)

    def logits(pixels):
        return model(pixels).logits

    own, _ = auto_attack(logits, images, labels, ThreatModel("9/255"), version=AutoAttack(**budget))
    theirs = authors_suite(logits, images, labels, ThreatModel("9/255"), **budget)
    broken = fallen(logits, own, labels)
    assert broken.tolist() == fallen(logits, theirs, labels).tolist()
    assert 0 < broken.sum() < 5


# ---- any number of classes


@pytest.mark.parametrize(
    ("classes", "members", "name"),
    [
        (10, EVERY, "APGD-CE+APGD-DLR+APGD-T+FAB-T+SQUARE"),
        (4, EVERY, "APGD-CE+APGD-DLR+APGD-T+FAB-T+SQUARE"),
        (3, ("apgd-ce", "apgd-dlr", "fab-t", "square"), "(apgd-ce, apgd-dlr, fab-t, square only)"),
        (2, ("apgd-ce", "fab-t", "square"), "(apgd-ce, fab-t, square only)"),
    ],
)
def test_members_that_few_classes_allow_run_and_the_others_are_named(classes, members, name):
    suite = AutoAttack(EVERY, **TINY)
    assert tuple(member.name for member in suite.members(classes)) == members
    assert suite.name(classes).endswith(name)
    parameters = suite.parameters([RADII["linf"]], classes)
    assert json.loads(json.dumps(parameters)) == parameters
    assert parameters["num_targets"] == min(2, classes - 1)
    assert set(parameters.get("left_out", {})) == set(EVERY) - set(members)
    assert all(f"there are {classes}" in reason for reason in parameters.get("left_out", {}).values())
    logits, images, labels = curved(classes, size=6)
    for threat_model in RADII.values():
        adv, left = auto_attack(logits, images, labels, threat_model, version=suite)
        assert list(left) == ["clean", *members]
        assert left["clean"] == 1
        assert left[members[-1]] == float((~fallen(logits, adv, labels)).double().mean())


def test_names_of_the_versions():
    assert AutoAttack().name(10) == "AutoAttack"
    assert AutoAttack().name(2) == "AutoAttack (apgd-ce, fab-t, square only)"
    assert AutoAttack.rand().name(10) == "AutoAttack rand"
    assert AutoAttack.rand().parameters([], 10)["eot"] == 20
    assert AutoAttack().parameters([], 10) == {
        "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"], "num_steps": 100, "num_targets": 9, "num_queries": 5000,
        "eot": 1,
    }  # fmt: skip
    assert PGD(20).name(10) == "PGD-20"
    assert PGD(5, loss=cw_margin).name(10) == "CW-5"


@each_norm
@pytest.mark.parametrize("classes", [10, 3, 2])
def test_fab_finds_the_nearest_class_of_a_linear_classifier(classes, norm):
    logits, images, labels, distances = linear(classes, size=3)
    attack = victim_of("fab-t", classes, num_steps=10, num_targets=9)
    for i, distance in enumerate(distances[norm].tolist()):
        for share, stands in ((1.01, False), (0.99, True)):
            threat_model = ThreatModel(share * distance, norm)
            result = run_member(attack, plain_victim(logits), images[i : i + 1], labels[i : i + 1], threat_model)
            assert bool(result[1]) == stands


def test_what_cannot_be_attacked_is_refused():
    logits, images, labels = curved(size=2)
    with pytest.raises(ValueError, match="images is empty"):
        auto_attack(logits, images[:0], labels[:0], RADII["linf"])
    with pytest.raises(ValueError, match=r"no attack of .* is defined for 1 class\(es\)"):
        auto_attack(lambda pixels: logits(pixels)[:, :1], images, 0 * labels, RADII["linf"])
    with pytest.raises(ValueError, match="no attack of apgd-t is defined for 3"):
        AutoAttack(("apgd-t",)).name(3)
    with pytest.raises(ValueError, match="version='plus' is unknown"):
        auto_attack(logits, images, labels, RADII["linf"], version="plus")
    with pytest.raises(ValueError, match="Did you normalise"):
        auto_attack(logits, images * 4 - 2, labels, RADII["linf"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(attacks=()), "distinct names"),
        (dict(attacks="square"), "distinct names"),
        (dict(attacks=("fab",)), "distinct names"),
        (dict(attacks=("square", "square")), "distinct names"),
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_targets=0), "num_targets=0"),
        (dict(num_queries=1.5), r"num_queries=1\.5"),
        (dict(eot=0), "eot=0"),
    ],
)
def test_settings_of_no_suite_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        AutoAttack(**settings)


# ---- what is left


@each_norm
def test_the_suite_leaves_no_more_than_any_member(norm):
    logits, images, labels = curved(size=24)
    found, left = auto_attack(logits, images, labels, RADII[norm], version=AutoAttack(EVERY, **TINY))
    values = list(left.values())
    assert values == sorted(values, reverse=True)
    for member in EVERY:
        adv, _ = auto_attack(logits, images, labels, RADII[norm], version=AutoAttack((member,), **TINY))
        assert (fallen(logits, found, labels) | ~fallen(logits, adv, labels)).all()


def test_a_classifier_that_takes_no_empty_batch_is_given_none():
    """CLIP is one. Nothing is left before the last member here, and nothing at all where every image is wrong."""
    logits, images, labels = curved(size=3)

    def strict(pixels):
        assert len(pixels) > 0
        return logits(pixels)

    for own in (labels, (labels + 1) % 10):
        _, left = auto_attack(strict, images, own, ThreatModel(0.5), version=AutoAttack(EVERY, **TINY))
        assert set(list(left.values())[1:]) == {0}


@each_norm
@each_member
def test_batches_and_the_global_random_state_play_no_part(member, norm):
    logits, images, labels = curved(size=11)
    labels[6] = (labels[6] + 1) % 10
    results = []
    for size in (1, 5, 250):
        torch.manual_seed(size)
        state = torch.get_rng_state()
        suite = AutoAttack((member,), **{**TINY, "num_queries": 40})
        adv, left = auto_attack(logits, images, labels, RADII[norm], version=suite, batch_size=size)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((fallen(logits, adv, labels).tolist(), left))
        torch.testing.assert_close(adv, results[0][2] if len(results) > 1 else adv, rtol=0, atol=1e-6)
        results[-1] += (adv,)
    assert results[0][:2] == results[1][:2] == results[2][:2]
    assert results[0][1]["clean"] == 10 / 11


def test_the_seed_of_the_victim_is_squares():
    logits, images, labels = curved(size=4)
    attack = victim_of("square", 10)
    runs = [
        run_member(attack, replace(plain_victim(logits), seed=seed), images, labels, ThreatModel(0.01))[0]
        for seed in (0, 0, 1)
    ]
    queried = []

    def watched(pixels):
        queried.append(pixels.clone())
        return logits(pixels)

    streams = []
    for seed in (0, 0, 1):
        queried.clear()
        run_member(attack, replace(plain_victim(watched), seed=seed), images, labels, ThreatModel(0.01))
        streams.append(torch.cat(queried))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(streams[0], streams[1])
    assert streams[0].shape != streams[2].shape or not torch.equal(streams[0], streams[2])


# ---- a fast classifier


@each_norm
@each_member
def test_a_fast_classifier_that_calls_everything_broken_breaks_nothing_by_itself(member, norm):
    """What it claims is looked at by the exact one; FAB and Square, which would stop at once, run again, exactly."""
    logits, images, labels = curved(size=10)

    def broken(pixels):
        shift = torch.zeros(10, dtype=pixels.dtype)
        shift[0] = -1e3
        return logits(pixels) * 0 + shift if pixels.requires_grad is False else logits(pixels) + shift

    suite = AutoAttack((member,), **{**TINY, "num_queries": 40})
    adv, left = auto_attack(logits, images, labels, RADII[norm], version=suite, fast_logits_fn=broken)
    assert left[member] == float((~fallen(logits, adv, labels)).double().mean())
    tiny, left = auto_attack(logits, images, labels, ThreatModel(1e-6, norm), version=suite, fast_logits_fn=broken)
    assert left[member] == 1
    assert torch.equal(tiny, images)


@each_member
def test_a_slightly_noisy_fast_classifier_agrees_nearly_and_never_counts_a_false_break(member):
    model, images, labels = curved(size=24, dtype=torch.float32)
    half = Curved(dtype=torch.float32).bfloat16().requires_grad_(False)

    def fast(pixels):
        return half(pixels.bfloat16()).float()

    suite = AutoAttack((member,), **TINY)
    exact, _ = auto_attack(model, images, labels, RADII["linf"], version=suite)
    found, left = auto_attack(model, images, labels, RADII["linf"], version=suite, fast_logits_fn=fast)
    broken = fallen(model, found, labels)
    assert left[member] == pytest.approx(1 - float(broken.double().mean()))
    assert torch.equal(found[~broken], images[~broken])
    assert (broken != fallen(model, exact, labels)).sum() <= 3


# ---- float64, and what the suite says of classifiers


@each_norm
def test_images_of_any_precision_can_be_attacked(norm):
    """The authors' FAB mixes its own float32 with what it is given."""
    logits, images, labels = curved(size=12)
    adv, left = auto_attack(logits, images, labels, RADII[norm], version=AutoAttack(EVERY, **TINY))
    assert adv.dtype == torch.float64
    assert left["square"] < 1
    single = copy.deepcopy(logits).float()
    other, _ = auto_attack(single, images.float(), labels, RADII[norm], version=AutoAttack(EVERY, **TINY))
    assert fallen(logits, adv, labels).tolist() == fallen(single, other, labels).tolist()


@each_norm
def test_an_attack_that_leaves_the_ball_is_stopped(norm):
    logits, images, labels = curved(size=3)
    further = 0.3 if norm == "linf" else 3.0

    def too_far(victim, images, labels, threat_model):
        adv = images.clone()
        adv[2] = (adv[2] + further).clamp(0, 1)
        return adv

    def outside(victim, images, labels, threat_model):
        return torch.full_like(images, 1 + 1e-6)

    with pytest.raises(RuntimeError, match="an attack left"):
        run_member(Member("far", too_far), plain_victim(logits), images, labels, RADII[norm])
    with pytest.raises(RuntimeError, match="an attack left"):
        run_member(Member("outside", outside), plain_victim(logits), torch.ones_like(images), labels, RADII[norm])
    adv, stands = run_member(
        Member("still", lambda v, x, y, t: x.clone()), plain_victim(logits), images, labels, RADII[norm]
    )
    assert stands.all() and torch.equal(adv, images)


def test_randomised_classifiers_are_told_from_plain_ones():
    logits, images, _ = curved(size=4)

    def dropout(pixels):
        return torch.nn.functional.dropout(logits(pixels), 0.1, training=True)

    def rounding(pixels):
        return logits(pixels) * (1 + 1e-7 * torch.rand(1))

    assert is_randomised(dropout, images)
    assert not is_randomised(logits, images)
    assert not is_randomised(rounding, images)


def test_optimising_classifiers_are_told_from_plain_ones():
    model, images, _ = curved(size=4)

    def purified(pixels):
        with torch.enable_grad():
            pixels = pixels.detach().requires_grad_()
            (grad,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
        return model(pixels - 0.01 * grad)

    assert is_optimising(purified, images)
    assert not is_optimising(model, images)
    assert not is_optimising(Curved(), images)  # parameters that ask for gradients are no optimisation


@pytest.mark.parametrize("member", ["apgd-ce", "fab-t"])
def test_attacks_that_see_no_gradient_warn(member, caplog):
    logits, images, labels = curved(size=6, dtype=torch.float32)

    def stepped(pixels):
        return logits(pixels) + 0 * pixels.sum() - (logits(pixels) - logits(pixels.detach()))

    for function, blind in ((logits, False), (stepped, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_robust_clip"):
            auto_attack(function, images, labels, RADII["linf"], version=AutoAttack((member,), **TINY))
        assert any("blind" in record.message for record in caplog.records) == blind
