import json
import logging
import os
import signal
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import pytest
import torch
from torch.utils.data import Subset
from training_script import digits

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    EvaluationSettings,
    ThreatModel,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.losses import cross_entropy, cw_margin
from hf_robust_clip.attacks.pgd import pgd_until_misclassified
from hf_robust_clip.attacks.suites import PGD, Suite
from hf_robust_clip.digests import unsigned
from hf_robust_clip.evaluation.state import Found

NAMES = dict(name="name", task="task", model_id="id")
TINY = AutoAttack(num_steps=2, num_targets=2, num_queries=5)


@pytest.fixture(scope="module")
def undefended():
    """The embedded model, which never saw an adversarial image, and the test digits."""
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False)
    data = load_image_dataset("digits", "test", model.processor)
    model.set_classes(data.class_names)
    return model, data


def test_attack_breaks_an_undefended_model(undefended):
    """Accurate when clean, next to nothing left under a strong attack, and no gradient hidden from it."""
    report = evaluate_robustness(*undefended, EvaluationSettings(["24/255", "32/255"], attack=PGD(20)), **NAMES)
    assert report.num_images == 500
    assert report.clean_accuracy > 0.95
    assert report.robust_accuracy[24 / 255] < 0.05
    assert report.robust_accuracy[32 / 255] < 0.01
    assert report.zero_gradient_share < 0.001


def test_batch_size_changes_no_image(undefended):
    model, data = undefended
    reports = [
        evaluate_robustness(
            model, data.first(60), EvaluationSettings(["8/255", "16/255"], attack=PGD(5), batch_size=size), **NAMES
        )
        for size in (1, 16, 512)
    ]
    own = {(r.clean_accuracy, *r.robust_accuracy.values(), *r.per_class.values()) for r in reports}
    assert len(own) == 1
    assert 0.1 < reports[0].robust_accuracy[16 / 255] < reports[0].robust_accuracy[8 / 255] < 0.95


def test_counts_equal_an_attack_written_out(undefended):
    """One radius: right when clean, and right on every iterate of sign ascent from the seeded random start."""
    model, data = digits(40)
    images = torch.stack([data[i]["pixel_values"] for i in range(40)])
    labels = torch.tensor([data[i]["labels"] for i in range(40)])
    model.eval()
    threat_model, step = ThreatModel("12/255"), 2.5 * 12 / 255 / 5

    def right(pixels):
        return model(pixels).logits.argmax(1) == labels

    clean = right(images)
    adv = threat_model.random_start(images, seed=4)
    robust = clean & right(adv)
    for _ in range(5):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(adv).logits, labels).sum(), adv)
        adv = (adv.detach() + step * grad.sign()).clamp(images - 12 / 255, images + 12 / 255).clamp(0, 1)
        robust &= right(adv)
    report = evaluate_robustness(model, data, EvaluationSettings(["12/255"], attack=PGD(5), seed=4), **NAMES)
    assert report.clean_accuracy == float(clean.double().mean())
    assert report.robust_accuracy == {12 / 255: float(robust.double().mean())}
    assert report.after_each == {12 / 255: {"pgd": report.robust_accuracy[12 / 255]}}
    assert 0.1 < report.robust_accuracy[12 / 255] < 0.9
    assert report.outcomes_at(0).tolist() == clean.tolist()
    assert report.outcomes_at(12 / 255).tolist() == robust.tolist()
    for index, name in enumerate(model.class_names):
        own = labels == index
        expected = tuple(int(x.sum()) for x in (own, own & clean, own & robust))
        assert report.per_class[name] == expected
    assert sum(row[0] for row in report.per_class.values()) == 40


def test_radii_in_any_order_give_an_accuracy_that_never_rises(undefended):
    model, data = undefended
    given = ["16/255", 4 / 255, "12/255", "8/255"]
    reports = [
        evaluate_robustness(model, data.first(30), EvaluationSettings(radii, attack=PGD(2)), **NAMES)
        for radii in (given, sorted(given, key=lambda radius: ThreatModel(radius).eps))
    ]
    assert list(reports[0].robust_accuracy) == [4 / 255, 8 / 255, 12 / 255, 16 / 255]
    assert reports[0].robust_accuracy == reports[1].robust_accuracy
    values = [reports[0].clean_accuracy, *reports[0].robust_accuracy.values()]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    steps = [2.5 * radius / 2 for radius in reports[0].robust_accuracy]
    assert reports[0].attack_parameters["step_size"] == pytest.approx(steps)


@pytest.mark.parametrize("training", [False, True])
def test_model_comes_back_as_it_was(training, undefended):
    model, data = digits(6)
    model.train(training)
    model.visual_projection.weight.grad = torch.ones_like(model.visual_projection.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    evaluate_robustness(model, data, EvaluationSettings(["8/255"], attack=PGD(2)), **NAMES)
    assert model.training == model.vision_model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {"visual_projection.weight"}
    assert (grads["visual_projection.weight"] == 1).all()


def test_data_that_cannot_be_evaluated_are_refused(undefended):
    model, data = digits(6)
    settings = EvaluationSettings(["8/255"], attack=PGD(2))
    empty = replace(undefended[1], rows=undefended[1].rows.select([]))
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluate_robustness(model, empty, settings, **NAMES)
    with pytest.raises(TypeError, match="dataset_id"):
        evaluate_robustness(model, Subset(data, range(3)), settings, **NAMES)
    model.train()
    model.set_classes(["zero", "one"])
    with pytest.raises(ValueError, match="classes"):
        evaluate_robustness(model, data, settings, **NAMES)
    assert model.training
    model.set_classes(data.class_names)
    model.processor.image_processor.crop_size = {"height": 4, "width": 4}
    with pytest.raises(ValueError, match="shape"):
        evaluate_robustness(model, data, settings, **NAMES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": []}, "at least one radius"),
        ({"radii": "8/255"}, "must be a list"),
        ({"radii": ["8/255", 0]}, "hold 0"),
        ({"radii": ["8"]}, "8/255"),
        ({"radii": ["1/255"], "norm": "l1"}, "norm='l1' is unknown"),
        ({"radii": ["1/255"], "batch_size": 0}, "batch_size=0"),
        ({"radii": ["1/255"], "precision": "fp16"}, "precision='fp16'"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message, undefended):
    model, data = undefended
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, data.first(2), EvaluationSettings(**settings), **NAMES)


# ---- AutoAttack, batches, what is left after each attack


@pytest.mark.parametrize("suite", [PGD(3), TINY], ids=["PGD", "AutoAttack"])
def test_batch_size_changes_nothing_in_the_report(suite):
    model, data = digits(12)
    settings = EvaluationSettings(["4/255", "10/255"], attack=suite)
    reports = [evaluate_robustness(model, data, replace(settings, batch_size=size), **NAMES) for size in (1, 7, 64)]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].robust_accuracy[10 / 255] < reports[0].clean_accuracy


def test_accuracy_after_each_attack_never_rises(undefended):
    model, data = undefended[0], undefended[1].first(24)
    settings = EvaluationSettings(["4/255", "8/255"], attack=AutoAttack(num_steps=3, num_targets=1, num_queries=10))
    report = evaluate_robustness(model, data, settings, **NAMES)
    assert report.model_flags == {"randomised": False, "optimising": False}
    assert list(report.after_each[4 / 255]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    values = [report.clean_accuracy, *(share for left in report.after_each.values() for share in left.values())]
    assert values == sorted(values, reverse=True)
    assert report.robust_accuracy == {eps: left["square"] for eps, left in report.after_each.items()}
    assert report.precision == "float32"
    alone = replace(settings, attack=AutoAttack(("apgd-ce",), num_steps=3))
    first = evaluate_robustness(model, data, alone, **NAMES)
    assert first.after_each[4 / 255]["apgd-ce"] == report.after_each[4 / 255]["apgd-ce"]
    assert all(report.robust_accuracy[eps] <= first.robust_accuracy[eps] for eps in first.robust_accuracy)
    assert min(report.robust_accuracy.values()) < min(report.clean_accuracy, 1.0)


def test_l2_and_the_cw_margin_are_evaluated_too(undefended):
    settings = EvaluationSettings([0.3], "l2", PGD(3, loss=cw_margin))
    report = evaluate_robustness(undefended[0], undefended[1].first(16), settings, **NAMES)
    assert report.norm == "l2"
    assert report.attack == "CW-3"
    assert list(report.after_each[0.3]) == ["cw"]
    assert 0 < report.robust_accuracy[0.3] < report.clean_accuracy


# ---- interrupted runs


@dataclass(frozen=True)
class Watched(Suite):
    """A suite that keeps the images of every batch its attacks get, and runs `stop` in place of batch `fails_at`."""

    inner: Suite
    fails_at: int = 10**6
    stop: object = None
    seen: list = field(default_factory=list)

    @property
    def is_standard(self):
        return self.inner.is_standard

    def members(self, num_classes):
        def run(member, victim, images, labels, threat_model):
            if len(self.seen) == self.fails_at:
                self.stop()
            self.seen.append([(member.name, threat_model.eps, hash(image.numpy().tobytes())) for image in images])
            return member.run(victim, images, labels, threat_model)

        return [replace(member, run=partial(run, member)) for member in self.inner.members(num_classes)]

    def name(self, num_classes):
        return self.inner.name(num_classes)

    def parameters(self, threat_models, num_classes):
        return self.inner.parameters(threat_models, num_classes)


def crash():
    raise RuntimeError("the power went")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


SETTINGS = EvaluationSettings(["4/255", "10/255"], attack=TINY, batch_size=4)


@pytest.mark.parametrize("fails_at", [0, 2, 6])
def test_an_interrupted_run_goes_on_to_the_same_report(fails_at, tmp_path):
    """Nothing that was finished is attacked again, and nothing is left out."""
    model, data = digits(11)
    whole = Watched(TINY)
    expected = evaluate_robustness(model, data, replace(SETTINGS, attack=whole), **NAMES)
    left = [expected.clean_accuracy, *(share for own in expected.after_each.values() for share in own.values())]
    assert left[-1] < left[0]
    assert sum(map(len, whole.seen)) == round(11 * sum(left[:-1]))  # who fell is not attacked again
    before, after = Watched(TINY, fails_at, crash), Watched(TINY)
    with pytest.raises(RuntimeError, match="the power went"):
        evaluate_robustness(model, data, replace(SETTINGS, attack=before), state_dir=tmp_path, **NAMES)
    report = evaluate_robustness(model, data, replace(SETTINGS, attack=after), state_dir=tmp_path, **NAMES)
    assert asdict(report) == asdict(expected)
    assert before.seen + after.seen == whole.seen
    assert len(before.seen) == fails_at
    again = Watched(TINY)
    report = evaluate_robustness(model, data, replace(SETTINGS, attack=again), state_dir=tmp_path, **NAMES)
    assert asdict(report) == asdict(expected)
    assert again.seen == []


def test_a_killed_process_leaves_a_state_to_go_on_from(tmp_path):
    """SIGKILL in the middle of the second radius, twice, the second time with another batch size."""
    model, data = digits(11)
    whole, rest = Watched(PGD(2)), Watched(PGD(2))
    expected = evaluate_robustness(model, data, replace(SETTINGS, attack=whole), **NAMES)
    for fails_at, size in ((4, 4), (1, 3)):
        child = os.fork()
        if child == 0:
            try:
                attack = Watched(PGD(2), fails_at, kill)
                settings = replace(SETTINGS, attack=attack, batch_size=size)
                evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    report = evaluate_robustness(model, data, replace(SETTINGS, attack=rest), state_dir=tmp_path, **NAMES)
    assert asdict(report) == asdict(expected)
    assert sum(map(len, rest.seen)) == sum(map(len, whole.seen)) - (11 + 4) - 3


def test_a_state_cut_at_any_place_gives_the_same_report(tmp_path):
    model, data = digits(5)
    settings = replace(SETTINGS, attack=PGD(1), batch_size=2)
    expected = asdict(evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES))
    file = tmp_path / "state-0.jsonl"
    text = file.read_text()
    first = text.index("\n")
    for cut in (0, 10, first, first + 1, first + 2, len(text) // 2, len(text) - 1):
        file.write_text(text[:cut])
        assert asdict(evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES)) == expected
        assert file.read_text() == text


@dataclass
class Rank:
    """One of several processes, as far as an evaluation asks; `gather_object` of a lone process returns its own."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self):
        pass


def test_files_of_two_ranks_are_read_by_one_process_and_by_three(tmp_path):
    """Also where a file was copied: what is known already counts once, gradients included; outcomes are by image."""
    model, data = digits(9)
    expected = asdict(evaluate_robustness(model, data, SETTINGS, **NAMES))
    assert len(set(expected["outcomes"]["right"].values())) == 3
    for rank in range(2):
        evaluate_robustness(model, data, SETTINGS, processes=Rank(rank, 2), state_dir=tmp_path, **NAMES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state-0.jsonl", "state-1.jsonl"]
    (tmp_path / "state-7.jsonl").write_text((tmp_path / "state-1.jsonl").read_text())
    for processes in (None, Rank(2, 3)):
        nothing = Watched(TINY)
        settings = replace(SETTINGS, attack=nothing)
        report = evaluate_robustness(model, data, settings, processes=processes, state_dir=tmp_path, **NAMES)
        assert asdict(report) == expected
        assert nothing.seen == []


def test_a_batch_that_is_known_counts_once():
    found = Found()
    for _ in range(2):
        found.add({"stage": 0, "rows": [(0, 4, 1), (1, 2, 0)], "zeros": 3, "total": 7})
    assert (found.levels, found.zeros, found.total) == ({0: (4, 1), 1: (2, 0)}, 3, 7)


def test_what_other_ranks_read_of_their_own_folders_is_gathered(tmp_path, monkeypatch):
    """Machines without a shared disk: each rank has its own lines only; the report counts all images, and none is
    evaluated again.
    """
    model, data = digits(9)
    expected = asdict(evaluate_robustness(model, data, SETTINGS, **NAMES))
    for rank in range(2):
        evaluate_robustness(model, data, SETTINGS, processes=Rank(rank, 2), state_dir=tmp_path / f"{rank}", **NAMES)
    texts = (tmp_path / "1" / "state-1.jsonl").read_bytes().splitlines()[1:]
    lines = [json.loads(unsigned(text)) for text in texts]
    both = lambda own: [*own, lines] if own[0] and isinstance(own[0], list) else own  # noqa: E731
    monkeypatch.setattr("accelerate.utils.gather_object", both)
    nothing = Watched(TINY)
    settings, where = replace(SETTINGS, attack=nothing), dict(processes=Rank(1, 3), state_dir=tmp_path / "0")
    assert asdict(evaluate_robustness(model, data, settings, **where, **NAMES)) == expected
    assert nothing.seen == []


DAMAGES = {
    "garbage": lambda lines: [*lines[:2], b"garbage", *lines[2:]],
    "blank line": lambda lines: [*lines[:2], b"", *lines[2:]],
    "number": lambda lines: [*lines[:2], b"42", *lines[2:]],
    "empty object": lambda lines: [*lines[:2], b"{}", *lines[2:]],
    "without digest": lambda lines: [*lines[:2], lines[2].rpartition(b" ")[0], *lines[3:]],
    "another image": lambda lines: [*lines[:2], lines[2].replace(b'"rows": [[', b'"rows": [[1'), *lines[3:]],
    "a verdict": lambda lines: [*lines[:2], lines[2].replace(b", 1]", b", 0]", 1), *lines[3:]],
    "binary": lambda lines: [*lines[:2], bytes(range(128, 256)), *lines[2:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_and_can_be_deleted(damage, tmp_path):
    """File, line and mend; without that line the report is the same."""
    model, data = digits(5)
    settings = replace(SETTINGS, attack=PGD(1), batch_size=2)
    expected = asdict(evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES))
    file = tmp_path / "state-0.jsonl"
    lines = DAMAGES[damage](file.read_bytes().splitlines())
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"state-0\.jsonl, line 3 .*delete this line"):
        evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES)
    file.write_bytes(b"\n".join([*lines[:2], *lines[3:]]) + b"\n")
    assert asdict(evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES)) == expected


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"PK\x03\x04\xff\n\n", b'{"format": 2}\n{"stage": 0}\n'])
def test_a_state_file_of_something_else_is_named(content, tmp_path):
    model, data = digits(2)
    (tmp_path / "state-3.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"state-3\.jsonl, line 1 .*delete the file"):
        evaluate_robustness(model, data, SETTINGS, state_dir=tmp_path, **NAMES)


def other_std(model, data):
    model.image_std = 1.1 * model.image_std
    return model, data, SETTINGS


def other_weights(model, data):
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    return model, data, SETTINGS


def other_classes(model, data):
    model.set_classes(data.class_names, "a {}")
    return model, data, SETTINGS


NEAR = 10 / 255 + 1e-9  # printed, it is 10/255
CHANGES = {
    "weights": (other_weights, "model"),
    "std": (other_std, "model"),
    "prompt": (other_classes, "model"),
    "number of images": (lambda model, data: (model, digits(5)[1], SETTINGS), "dataset"),
    "draw of images": (lambda model, data: (model, another_draw(data), SETTINGS), "dataset"),
    "resolution": (lambda model, data: (model, resolved(data, 4), SETTINGS), "dataset"),
    "seed": (lambda model, data: (model, data, replace(SETTINGS, seed=1)), "attack"),
    "radius": (lambda model, data: (model, data, replace(SETTINGS, radii=["4/255", "11/255"])), "attack"),
    "radius by a hair": (lambda model, data: (model, data, replace(SETTINGS, radii=["4/255", NEAR])), "attack"),
    "norm": (lambda model, data: (model, data, replace(SETTINGS, norm="l2")), "attack"),
    "precision": (lambda model, data: (model, data, replace(SETTINGS, precision="fast")), "attack"),
    "attack": (lambda model, data: (model, data, replace(SETTINGS, attack=replace(TINY, num_queries=6))), "attack"),
}  # fmt: skip


def resolved(data, side):
    """The digits attacked at a smaller resolution."""
    return type(data)(replace(data.data, attack_resolution=side))


def another_draw(data):
    whole = load_image_dataset("digits", "test", data.processor)
    return type(data)(whole.first(len(data), seed=1))


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_of_another_evaluation_is_refused_and_kept(change, tmp_path):
    model, data = digits(6)
    settings = SETTINGS
    with pytest.raises(RuntimeError, match="the power went"):
        evaluate_robustness(
            model, data, replace(settings, attack=Watched(TINY, 0, crash)), state_dir=tmp_path, **NAMES
        )
    text = (tmp_path / "state-0.jsonl").read_text()
    changed, what = CHANGES[change]
    model, data, settings = changed(model, data)
    with pytest.raises(ValueError, match=f"state of another evaluation: its {what} is .*Delete the folder"):
        evaluate_robustness(model, data, settings, state_dir=tmp_path, **NAMES)
    assert (tmp_path / "state-0.jsonl").read_text() == text


def test_rounding_of_class_embeddings_is_no_other_evaluation(tmp_path):
    """Another device or number of threads gives others in their last digits."""
    model, data = digits(4)
    assert not model.requires_grad_(False).class_embeds.requires_grad
    first = evaluate_robustness(model, data, replace(SETTINGS, attack=PGD(1)), state_dir=tmp_path, **NAMES)
    key, embeds = model._known
    model._known = key, embeds * (1 + 1e-15)
    attack = Watched(PGD(1))
    report = evaluate_robustness(model, data, replace(SETTINGS, attack=attack), state_dir=tmp_path, **NAMES)
    assert attack.seen == []
    assert asdict(report) == asdict(first)


# ---- the model, the images and the classes


@pytest.mark.parametrize("fails_at", [0, 10**6])
def test_model_comes_back_at_its_own_input_size(fails_at, undefended):
    """With and without a crash, and where the size itself is refused."""
    model, data = digits(6)
    model.train().requires_grad_(True).set_input_size(5)
    data = resolved(data, 4)
    settings = replace(SETTINGS, attack=Watched(TINY, fails_at, crash))
    try:
        report = evaluate_robustness(model, data, settings, **NAMES)
    except RuntimeError:
        assert fails_at == 0
    else:
        assert report.attack_resolution == 4
    with pytest.raises(ValueError, match="side=0 must be in"):
        evaluate_robustness(model, resolved(data, 0), SETTINGS, **NAMES)
    assert model.input_size == 5
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_attack_at_a_smaller_resolution_is_upsampling_and_attack_written_out(undefended):
    model, data = digits(12)
    data = resolved(data, 4)
    examples = [data[i] for i in range(12)]
    images = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    assert images.shape == (12, 3, 4, 4)
    report = evaluate_robustness(model, data, EvaluationSettings(["12/255"], attack=PGD(3)), **NAMES)
    assert report.attack_resolution == 4
    assert evaluate_robustness(
        model, digits(2)[1], EvaluationSettings(["1/255"], attack=PGD(1)), **NAMES
    ).attack_resolution == 8  # fmt: skip
    model.eval()

    def logits(pixels):
        larger = torch.nn.functional.interpolate(pixels, size=(8, 8), mode="bicubic", align_corners=False)
        return (
            model.logit_scale.exp()
            * torch.nn.functional.normalize(
                model.get_image_features(pixel_values=(larger - model.image_mean) / model.image_std).pooler_output
            )
            @ model.class_embeds.T
        )

    adv = pgd_until_misclassified(
        logits, images, labels, ThreatModel("12/255"), loss=cross_entropy, num_steps=3, step_size=2.5 * 12 / 255 / 3
    )
    with torch.no_grad():
        assert report.clean_accuracy == float((logits(images).argmax(1) == labels).double().mean())
        assert report.robust_accuracy[12 / 255] == float((logits(adv).argmax(1) == labels).double().mean())
    assert report.clean_accuracy > report.robust_accuracy[12 / 255]


def test_images_that_were_normalised_are_refused():
    model, data = digits(4)

    class Normalised(type(data)):
        def __getitems__(self, indices):
            return [
                {**example, "pixel_values": (example["pixel_values"] - 0.5) / 0.25}
                for example in super().__getitems__(indices)
            ]

    with pytest.raises(ValueError, match="Did you normalise"):
        evaluate_robustness(model, Normalised(data.data), SETTINGS, **NAMES)


def test_one_class_is_refused_and_any_two_names_work():
    model, data = digits(40)
    model.set_classes(["zero"])
    with pytest.raises(ValueError, match="one class, 'zero'"):
        evaluate_robustness(model, type(data)(data.data.only(["zero"])), SETTINGS, **NAMES)
    names = ["žluťoučký", "acht 八 🎱"]
    two = type(data)(replace(data.data.only(["zero", "eight"]), class_names=tuple(names)))
    model.set_classes(names, "{}")
    report = evaluate_robustness(model, two, SETTINGS, **NAMES)
    assert list(report.per_class) == names
    assert report.attack == "AutoAttack (apgd-ce, fab-t, square only)"
    assert report.attack_parameters["left_out"] == {"apgd-t": "needs 4 classes, there are 2"}
    assert list(report.after_each[4 / 255]) == ["apgd-ce", "fab-t", "square"]


# ---- precision, and classifiers that an attack overrates


def test_fast_gradients_are_named_and_break_nothing_falsely(undefended):
    model, data = undefended[0], undefended[1].first(12)
    settings = EvaluationSettings(["10/255"], attack=AutoAttack(("apgd-ce", "square"), num_steps=2, num_queries=2))
    exact = evaluate_robustness(model, data, settings, **NAMES)
    fast = evaluate_robustness(model, data, replace(settings, precision="fast"), **NAMES)
    assert fast.precision == "float32, gradients in bfloat16"
    assert fast.clean_accuracy == exact.clean_accuracy
    assert exact.robust_accuracy[10 / 255] - 0.1 <= fast.robust_accuracy[10 / 255] < fast.clean_accuracy
    nothing = evaluate_robustness(model, data, replace(settings, radii=[1e-6], precision="fast"), **NAMES)
    assert nothing.robust_accuracy[1e-6] == nothing.clean_accuracy


@pytest.mark.parametrize("kind", ["randomised", "optimising"])
def test_classifiers_that_the_attack_overrates_are_flagged(kind, caplog):
    model, data = digits(6)

    def change(module, inputs, output):
        if kind == "randomised":
            return output + 0.1 * torch.randn_like(output)
        with torch.enable_grad():
            point = output.detach().requires_grad_()
            (grad,) = torch.autograd.grad(point.square().sum(), point)
        return output - 1e-9 * grad

    hook = model.visual_projection.register_forward_hook(change)
    settings = EvaluationSettings(["4/255"], attack=PGD(2))
    with caplog.at_level(logging.WARNING, "hf_robust_clip"):
        report = evaluate_robustness(model, data, settings, **NAMES)
    assert report.model_flags == {"randomised": kind == "randomised", "optimising": kind == "optimising"}
    assert [f"the classifier looks {kind}:" in record.message for record in caplog.records] == [True]
    hook.remove()
    caplog.clear()
    assert not any(evaluate_robustness(model, data, settings, **NAMES).model_flags.values())
    assert caplog.records == []
