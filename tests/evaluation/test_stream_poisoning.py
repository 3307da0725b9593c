"""A stream state that is written down, what reports say of a stream, and attacked images at its head."""

import logging
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from test_defence_evaluation import NAMES, Images, make_base, plain
from test_evaluation import Rank, Watched, crash

from hf_robust_clip.arguments import EvaluationRunArguments
from hf_robust_clip.attacks.suites import PGD, find_adversarial
from hf_robust_clip.defences.bafta import BaFTA
from hf_robust_clip.evaluation.attack_views import Adaptive, DefenceBlind, Scene
from hf_robust_clip.evaluation.loop import evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.evaluation.streams import stream_poisoning
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs.evaluate import evaluate, read
from hf_robust_clip.threat_model import ThreatModel

DEFENCE = BaFTA(num_views=3)


def evaluated(attack=None, data=None, radii=("4/255", "8/255"), **where):
    model = make_base()
    settings = EvaluationSettings(radii, attack=attack or PGD(1), view=Adaptive(), batch_size=2)
    data = data or Images(model, 5)
    return evaluate_robustness(model, data, settings, defence=DEFENCE, **NAMES, **where)


def learned(model):
    """Images that the defence is right on in their order."""
    data = Images(model, 10)
    data.labels = DEFENCE.predict(model, data.images, seed=5).logits.argmax(1)
    return data


def poisoned(num_poisoned, attack=None, defence=DEFENCE, permutations=2, **where):
    model = make_base()
    settings = EvaluationSettings(["4/255", "8/255"], attack=attack or PGD(2), view=Adaptive(), batch_size=3, seed=5)
    return stream_poisoning(
        model,
        learned(model),
        settings,
        defence=defence,
        num_poisoned=num_poisoned,
        permutations=permutations,
        **where,
    )


# ---- a stream that was stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an evaluation that nobody stopped attacked, of five images, one by one, at two radii; what it said; and the
    last state that it wrote down.
    """
    suite, folder = Watched(PGD(1)), tmp_path_factory.mktemp("whole")
    report = evaluated(suite, state_dir=folder)
    assert len(suite.seen) == 10
    return suite.seen, plain(report), written(folder)


def written(folder):
    """The one stream state in a folder: its name is the digest of its file."""
    (kept,) = folder.glob("stream-*.safetensors")
    return kept.name


def test_a_stage_that_was_cut_short_goes_on_from_the_state(tmp_path, whole):
    seen, expected, last = whole
    with pytest.raises(RuntimeError, match="the power went"):
        evaluated(Watched(PGD(1), 8, crash), state_dir=tmp_path)
    assert written(tmp_path) != last
    after = Watched(PGD(1))
    assert plain(evaluated(after, state_dir=tmp_path)) == expected
    assert after.seen == seen[7:]  # the batch in which the power went, and no other
    assert written(tmp_path) == last


def test_a_state_that_is_lost_or_of_another_place_is_not_gone_on_from(tmp_path, whole):
    """The second run begins the stage anew, and is stopped earlier than the first: its state is not that after the
    images that the first one finished."""
    seen, expected, last = whole
    with pytest.raises(RuntimeError):
        evaluated(Watched(PGD(1), 9, crash), state_dir=tmp_path)
    kept = tmp_path / written(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    second, third = Watched(PGD(1), 3, crash), Watched(PGD(1))
    with pytest.raises(RuntimeError):
        evaluated(second, state_dir=tmp_path)
    assert second.seen == seen[5:8]
    assert plain(evaluated(third, state_dir=tmp_path)) == expected
    assert third.seen == seen[5:]
    assert written(tmp_path) == last


def test_a_stream_of_several_processes_is_refused():
    with pytest.raises(ValueError, match="2 processes"):
        evaluated(processes=Rank(0, 2))


# ---- what is said of an order


def test_the_order_is_in_the_report(caplog, whole):
    by_class, mixed = (Images(make_base(), 5) for _ in range(2))
    order = torch.tensor([1, 0, 2, 3, 4])
    mixed.images, mixed.labels = mixed.images[order], mixed.labels[order]
    with caplog.at_level(logging.WARNING):
        told, other = (evaluated(data=own, radii=["1/255"]).defence["stream"] for own in (by_class, mixed))
    assert told == whole[1]["defence"]["stream"]
    assert told["images_in_order"] != other["images_in_order"]
    assert by_class.labels.tolist() == [5, 4, 4, 4, 3] and told["class_changes"] == 2
    assert mixed.labels.tolist() == [4, 5, 4, 4, 3] and other["class_changes"] == 3
    assert caplog.text.count("class by class") == 1


# ---- attacked images first


def test_poisoning_is_written_out():
    model, radius = make_base(), 8 / 255
    data, found = learned(model), poisoned(4)
    assert [(run.order, run.eps) for run in found.runs] == [(o, e) for o in (5, 6) for e in (0.0, 4 / 255, radius)]
    (member,) = PGD(2).members(6)
    with DEFENCE.prepared(model):
        for run in found.runs:
            rows = torch.randperm(10, generator=torch.Generator().manual_seed(run.order))
            state, fell, right = DEFENCE.start(model), 0, 0
            for place, row in enumerate(rows.tolist()):
                image, label = data.images[row : row + 1], data.labels[row : row + 1]
                if place < 4 and run.eps:
                    victim = Adaptive().victim(Scene(DEFENCE, model, state=state, seed=5), image)
                    threat = ThreatModel(run.eps)
                    image = find_adversarial(member, victim, image, label, threat)
                verdict = DEFENCE.predict(model, image, state=state, seed=5)
                state, stands = verdict.state, bool(verdict.logits.argmax(1) == label)
                fell, right = (fell + (not stands), right) if place < 4 else (fell, right + stands)
            assert (run.fell, run.right) == (fell, right)
    assert found.num_clean == 6
    shares = {eps: [run.right / 6 for run in found.runs if run.eps == eps] for eps in (0.0, 4 / 255, radius)}
    figures = {(own.metric, own.eps): own.value for own in found.measurements}
    for eps, own in shares.items():
        name = "after_poisoning" if eps else "after_clean"
        assert figures[name, eps] == mean(own) and figures[f"{name}_sd", eps] == stdev(own)
    assert any(run.right != own.right for run, own in zip(found.runs[::3], found.runs[2::3], strict=True))


def test_no_attacked_image_leaves_the_deviation_of_orders():
    found = poisoned(0, permutations=3)
    assert [run.eps for run in found.runs] == [0.0] * 3 and found.num_clean == 10
    assert [own.metric for own in found.measurements] == ["after_clean", "after_clean_sd"]
    assert [own.metric for own in poisoned(0, permutations=1).measurements] == ["after_clean"]


def test_finished_orders_are_not_run_again(tmp_path):
    whole = Watched(PGD(2))
    expected = poisoned(2, whole)
    with pytest.raises(RuntimeError):
        poisoned(2, Watched(PGD(2), 5, crash), state_dir=tmp_path)
    after, nothing = Watched(PGD(2)), Watched(PGD(2))
    assert poisoned(2, after, state_dir=tmp_path) == expected and after.seen == whole.seen[4:]
    assert poisoned(2, nothing, state_dir=tmp_path) == expected and nothing.seen == []
    with pytest.raises(ValueError, match="its poisoning is"):
        poisoned(3, state_dir=tmp_path)


def test_poisoning_that_means_nothing_is_refused():
    for wrong in (-1, 10, 1.5):
        with pytest.raises(ValueError, match="stream_poisoning"):
            poisoned(wrong)
    with pytest.raises(ValueError, match="permutations"):
        poisoned(1, permutations=0)
    with pytest.raises(ValueError, match="stream_poisoning"):
        poisoned(1, defence=BaFTA(num_views=3, beta=0))
    for defence in (None, BaFTA(beta=0)):
        with pytest.raises(ValueError, match="stream_poisoning"):
            EvaluationRunArguments(defence=defence, stream_poisoning=3)


CONFIG = Path(__file__).parents[2] / "recipes/configs/evaluate.yaml"
WORDS = ["--dataset_name", "digits", "--max_images", "6", "--evaluation.radii", "[16/255]",
         "--evaluation.attacks", "[pgd-1]", "--defence", "BaFTA", "--defence.num_views", "3",
         "--permutations", "2"]  # fmt: skip


def test_the_command_line_adds_it_to_the_report(tmp_path, capsys):
    evaluate(read([*WORDS, "--stream_poisoning", "2", "--output_dir", str(tmp_path / "out")], CONFIG))
    (report,), _ = load_reports(tmp_path / "out" / "report.json")
    figures = {own.metric: own for own in report.measurements if own.metric.startswith("after_")}
    assert set(figures) == {"after_clean", "after_clean_sd", "after_poisoning", "after_poisoning_sd"}
    assert figures["after_poisoning"].eps == 16 / 255 and figures["after_poisoning"].n == 4
    told = report.defence["stream_poisoning"]
    assert (told["num_poisoned"], told["num_clean"], told["orders"], len(told["runs"])) == (2, 4, [0, 1], 4)
    assert report.defence["traits"]["episodic"] is False and report.defence["stream"]["class_changes"] > 0
    printed = capsys.readouterr().out
    assert "after poisoning" in printed and "random orders" in printed
    csv = (tmp_path / "out" / "report.csv").read_text()
    assert "after_poisoning_sd" in csv


def test_permutations_without_poisoning_do_nothing(tmp_path):
    with pytest.raises(ValueError, match="permutations"):
        read([*WORDS, "--output_dir", str(tmp_path / "out")], CONFIG)


def test_a_blind_attack_poisons_too():
    found = stream_poisoning(
        model := make_base(),
        Images(model, 6),
        EvaluationSettings(["8/255"], attack=PGD(2), view=DefenceBlind()),
        defence=DEFENCE,
        num_poisoned=2,
        permutations=1,
    )
    assert [run.eps for run in found.runs] == [0.0, 8 / 255]
