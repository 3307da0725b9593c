"""Suites of datasets: rows that fit together, and what becomes of their names on a command line."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as Picture
from PIL import Image

from hf_robust_clip.cli import main
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, train
from hf_robust_clip.runs.shared import load_data, load_model, load_tasks, templates_of
from hf_robust_clip.zero_shot_data.specs import class_names, find_spec, prompt_templates
from hf_robust_clip.zero_shot_data.suites import SUITES, find_suite, other_pictures


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


RECIPES = Path(__file__).parents[2] / "recipes/configs"
COUNTS = {"pmg_aft_16": 16, "pmg_aft_16_released": 16, "tga_zsr_16": 16, "agft_15": 15, "tecoa_16": 16, "tapt_11": 11,
          "coop_11": 11, "robustvlm_14": 14}  # fmt: skip
NATIVE = ("cifar10", "cifar100", "stl10")
ONLY_TWO = [task.dataset for task in find_suite("tga_zsr_16").tasks if task.dataset not in ("cifar10", "dtd")]


def evaluation(*words):
    return evaluate.read([*words, "--output_dir", "out"], RECIPES / "evaluate.yaml")


# ---- rows


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.key)
def test_row(suite):
    assert len(suite.names) == len(set(suite.names)) == COUNTS[suite.key]
    assert suite.source and suite.note and all(suite.lacks.values())
    for task in suite.tasks:
        spec = find_spec(task.dataset)
        assert spec.key == task.dataset and task.num_images >= 1000
        assert task.split in ("test", *spec.splits)
        assert prompt_templates(task.templates or suite.templates)
        assert task.attack_resolution in (None, "model")
        assert 0 < (task.attacked_images or suite.attacked_images or 1) <= task.num_images
        names = class_names(spec.class_names) if task.without_classes else []
        assert set(task.without_classes) <= set(names.values() if isinstance(names, dict) else names)
    assert {suite.key for suite in SUITES} == COUNTS.keys()


def test_each_paper_attacks_at_its_own_resolution_and_crops_its_own_way():
    """PMG-AFT's code: CIFAR and STL-10 as they are, else Resize(256) and CenterCrop(224). TGA-ZSR's: all at 224 px."""
    pmg_aft, tga_zsr = ({row["dataset"]: row for row in find_suite(key).settings()}
                        for key in ("pmg_aft_16", "tga_zsr_16"))  # fmt: skip
    assert pmg_aft.keys() == tga_zsr.keys()
    for key in pmg_aft:
        rows = pmg_aft[key], tga_zsr[key]
        assert [row.get("attack_resolution") for row in rows] == [None, "model" if key in NATIVE else None]
        assert [row.get("crop_pct") for row in rows] == [None if key in NATIVE else 0.875] * 2
    assert all("crop_pct" not in row for row in find_suite("robustvlm_14").settings())
    assert int(224 / 0.875) == 256


def test_a_suite_that_lacks_a_set_is_refused_unless_that_is_said():
    suite = find_suite("tecoa_16")
    with pytest.raises(ValueError, match="hateful_memes"):
        suite.settings()
    assert len(suite.settings(["hateful_memes"])) == 15


def test_what_differs_from_the_paper_is_said():
    whole = {task.dataset: task.num_images for task in find_suite("pmg_aft_16").tasks}
    assert other_pictures("pmg_aft_16", whole) is None
    remark = other_pictures("pmg_aft_16", {**whole, "sun397": 19850})
    assert "sun397 19850 of 108754" in remark
    assert "cifar10" not in remark
    del whole["imagenet"]
    assert "without imagenet" in other_pictures("pmg_aft_16", whole)


# ---- names on a command line


def test_a_name_is_what_its_tasks_are_when_written_out(tmp_path):
    """By a flag and in a file; in an evaluation and in a training."""
    (tmp_path / "own.yaml").write_text("tasks: coop_11\noutput_dir: out\nevaluation: {radii: [1/255]}\n")
    rows = find_suite("coop_11").settings()
    by_hand = evaluation("--tasks", json.dumps(rows)).tasks
    by_flag = evaluation("--tasks", "coop_11").tasks
    in_file = evaluate.read([], tmp_path / "own.yaml").tasks
    in_training = train.read(["--tasks", "coop_11"], RECIPES / "digits-clip/pmg_aft.yaml").tasks
    assert tuple(by_hand) == tuple(by_flag) == tuple(in_file) == tuple(in_training)
    assert [task.name for task in by_flag] == [task.dataset for task in find_suite("coop_11").tasks]
    assert by_flag[4].template == "coop_aircraft"
    assert len(by_flag[0].classes) == 100 and "centered face" not in by_flag[0].classes


def test_a_list_may_mix_suites_and_tasks_and_say_more_of_a_suite():
    found = evaluation(
        "--tasks", "[{suite: agft_15, data_root: a, max_images: 9, without: [pcam]}, {dataset: b}]"
    ).tasks
    assert len(found) == 15
    assert {(task.data_root, task.max_images) for task in found[:-1]} == {("a", 9)}
    assert (found[-1].dataset, found[-1].max_images) == ("b", None)
    assert "pcam" not in [task.dataset for task in found]
    one = evaluation("--tasks", "tapt_11", "--max_images", "5", "--data_root", "c", "--streaming").tasks
    assert {(task.max_images, task.data_root, task.streaming) for task in one} == {(5, "c", True)}
    both = evaluation("--tasks", "[tapt_11, coop_11]").tasks
    assert [task.name for task in both][::11] == ["caltech101 (tapt_11)", "caltech101 (coop_11)"]


def test_the_prompt_of_the_run_goes_before_that_of_a_suite():
    assert {task.template for task in evaluation("--tasks", "coop_11", "--template", "a {}").tasks} == {None}
    words = ["--tasks", "{suite: coop_11, template: clip_pcam}", "--template", "a {}"]
    assert {task.template for task in evaluation(*words).tasks} == {"clip_pcam"}
    in_training = train.read(["--tasks", "coop_11", "--template", "a {}"], RECIPES / "digits-clip/pmg_aft.yaml")
    assert in_training.tasks[0].template == "coop_caltech101"  # there it is what is trained with


def test_printed_settings_are_those_of_the_same_tasks(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation("--tasks", "robustvlm_14", "--max_images", "1000", "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["tasks"]
    again = evaluation("--tasks", json.dumps(printed)).tasks
    assert again == evaluation("--tasks", "robustvlm_14", "--max_images", "1000").tasks


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ("pmg_aft_61", "pmg_aft_16"),
        ("cifar10", "{dataset: cifar10}"),
        ("[pmg_aft_16, pmg_aft_16]", "twice"),
        ("tecoa_16", "hateful_memes"),
        ("[{suite: tapt_11, resize: 256}]", "resize"),
        ("[{suite: tapt_11, without: [cifar10]}]", "cifar10"),
        ("[{suite: tapt_11, without: [pets, pets]}]", "pets"),
        ("[{suite: tapt_11, max_images: many}]", "max_images"),
        ("[{suite: tapt_11, streaming: perhaps}]", "streaming"),
        ("[{suite: tapt_11, template: clip}]", "template"),
        ("[{suite: tapt_12, dataset: pets}]", "tapt_11"),
        ("[{dataset: pets, crop_pct: 1.5}]", "crop_pct"),
        ("[{dataset: pets, crop_pct: 0.9, resize: 256}]", "crop_pct"),
        ("[{dataset: pets, attack_resolution: 0}]", "attack_resolution"),
        ("[{dataset: pets, attack_resolution: own}]", "attack_resolution"),
    ],
)
def test_a_wrong_suite_is_named_in_one_line(tasks, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--tasks", tasks, "--output_dir", "out"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert list(tmp_path.iterdir()) == []


# ---- runs


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A data root with six pictures of CIFAR-10 and of DTD."""
    of_cifar10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for hub_id, column, names in (
        ("uoft-cs/cifar10", "img", of_cifar10),
        ("tanganke/dtd", "image", class_names("dtd")),
    ):
        folder = tmp_path / "data" / hub_id / "data"
        folder.mkdir(parents=True)
        rows = {column: [Image.new("RGB", (40, 32), (40 * i, 90, 20 * i)) for i in range(6)],
                "label": [0, 1, 2, 3, 4, len(names) - 1]}  # fmt: skip
        features = Features({column: Picture(), "label": ClassLabel(names=names)})
        Dataset.from_dict(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(*left_out, suite="tga_zsr_16"):
    return ["--tasks", f"{{suite: {suite}, without: {list(left_out)}}}", "--data_root", "data", "--evaluation.radii",
            "[8/255]", "--evaluation.attacks", "pgd-1", "--output_dir", "out"]  # fmt: skip


def test_a_suite_is_evaluated_and_gone_on_with(pictures, capsys):
    """Each set with its prompt and at its resolution; with another row, what was found for the first doesn't count."""
    main(["evaluate", *words_of(*ONLY_TWO), "--max_images", "5"])
    own, _ = load_reports("out/report.json")
    assert [(r.task, r.templates, r.attack_resolution, r.num_images) for r in own] == [
        ("cifar10", ("This is a photo of a {}",), 8, 5),
        ("dtd", ("A surface with a {} texture.",), 8, 5),
    ]
    printed = capsys.readouterr().out
    assert "suite tga_zsr_16" in printed and "cifar10 5 of 10000, dtd 5 of 1880" in printed
    main(["evaluate", "--config", "out/recipe.yaml", "--resume"])  # its own recipe is the same run
    assert load_reports("out/report.json")[0] == own
    for other in (["--evaluation.attacks", "pgd-2"], ["--tasks", "[{dataset: digits}]"]):  # would lose these figures
        with pytest.raises(SystemExit):
            main(["evaluate", "--config", "out/recipe.yaml", "--resume", *other])
        assert "PGD-1 on cifar10" in capsys.readouterr().err and load_reports("out/report.json")[0] == own
    state = next(path for path in Path("out/state").iterdir() if "dtd" in path.name)
    kept = {path.name: path.read_bytes() for path in state.iterdir()}
    with pytest.raises(SystemExit):
        main(["evaluate", *words_of(*ONLY_TWO, suite="pmg_aft_16"), "--max_images", "5", "--resume"])
    assert "state of another evaluation" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in state.iterdir()} == kept


def test_sets_that_are_missing_are_all_named_before_any_is_evaluated(pictures, capsys):
    left_out = [key for key in ONLY_TWO if key not in ("pets", "pcam")]
    with pytest.raises(SystemExit):
        main(["evaluate", *words_of(*left_out)])
    found = capsys.readouterr()
    assert found.err.splitlines()[-1].startswith("error: 2 of 4 tasks can't be loaded: pets, pcam; ")
    assert "images" not in found.out and not Path("out/report.json").exists()


def test_resolution_and_crop_of_a_task_reach_its_pictures(pictures):
    model = load_model("digits-clip")  # 8 x 8 pixels
    text = "[{dataset: cifar10, name: own}, {dataset: cifar10, name: small, attack_resolution: 4}, " \
           "{dataset: dtd, crop_pct: 0.5}, {dataset: dtd, name: whole, template: 'a {} thing'}]"  # fmt: skip
    run = evaluation("--tasks", text.replace("cifar10,", "cifar10, data_root: data,").replace(
        "dtd,", "dtd, data_root: data,"))  # fmt: skip
    found = load_tasks({task.name or task.dataset: task for task in run.tasks}, model)
    assert [data.resolution for data in found.values()] == [8, 4, 8, 8]
    assert [data.resize for data in found.values()] == [None, None, 16, None]
    assert found["whole"].templates == ("a {} thing",)
    for number, otherwise, expected in (
        (3, ["z {}"], "a {} thing"),
        (2, ["z {}"], "z {}"),
        (2, [], "This is a photo of a {}"),
    ):
        title = run.tasks[number].name or run.tasks[number].dataset
        assert list(templates_of(run.tasks[number], found[title], otherwise)) == [expected]
    (small,) = evaluation("--tasks", "[{dataset: cifar10, data_root: data, attack_resolution: 4, crop_pct: 1}]").tasks
    with pytest.raises(ValueError, match="resize=8 does nothing"):
        load_data(small, model)


def test_a_training_evaluates_each_task_with_its_own_prompt(pictures):
    suite = f"{{suite: tga_zsr_16, data_root: data, without: {ONLY_TWO}}}"
    words = [
        "--tasks",
        f"[{{dataset: digits}}, {suite}]",
        "--template",
        "z {}",
        "--output_dir",
        "trained",
        "--use_cpu",
    ]
    prepared = train.prepare(train.read(words, RECIPES / "digits-clip/tecoa.yaml"))
    assert {title: data.templates for title, data in prepared.tasks.items()} == {
        "digits": ("z {}",),
        "cifar10": ("This is a photo of a {}",),
        "dtd": ("A surface with a {} texture.",),
    }
