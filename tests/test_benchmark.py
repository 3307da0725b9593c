"""`recipes/benchmark.py`: every config is read, and a small one ends with tables and cards, nothing done twice."""

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from reports import make_defence, make_report

from hf_robust_clip import paired_difference
from hf_robust_clip.command_line import packaged_config, read_command
from hf_robust_clip.hub import dump_recipe
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, train
from hf_robust_clip.runs.benchmark import Benchmark, run
from hf_robust_clip.runs.benchmark.cells import cells_of, checkpoint_digest, is_evaluated, run_training
from hf_robust_clip.runs.benchmark.earlier import ROWS, Earlier, tries_told
from hf_robust_clip.runs.benchmark.results import check_images
from hf_robust_clip.runs.benchmark.settings import MADE_OF, PICTURES, models_of
from hf_robust_clip.runs.benchmark.single_runs import (
    decisive_settings,
    evaluation_digest,
    evaluation_run,
    training_digest,
    words,
)
from hf_robust_clip.runs.benchmark.tables import check_compared, write_tables

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

RECIPES = Path(__file__).parents[1] / "recipes"
SPEC = spec_from_file_location("benchmark", RECIPES / "benchmark.py")
script = sys.modules["benchmark"] = module_from_spec(SPEC)
SPEC.loader.exec_module(script)
CONFIGS = sorted((RECIPES / "configs").glob("*/*benchmark.yaml"))


def read(config):
    given = read_command(script.COMMAND, [], config)
    return given.group(Benchmark, given.made())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_run_of_a_benchmark_is_read(config):
    benchmark = read(config)
    names = [model.name for model in benchmark.models]
    for model in benchmark.models:
        if model.config:
            flags = {"model_name_or_path": benchmark.start, "output_dir": "new", **model.flags}
            train.read(words(flags), packaged_config(model.config))
    for evaluation in benchmark.evaluations:
        assert set(evaluation.models) <= set(names)
        found = evaluate.read(words({"output_dir": "new", **evaluation.flags}), packaged_config(evaluation.config))
        assert bool(found.defence) == bool(evaluation.title)


SMALL = {
    "name": "small",
    "heading": "Small",
    "start": "digits-clip",
    "start_title": "before",
    "start_id": "digits-clip",
    "output_dir": "out",
    "prefix": "digits-",
    "limits": "One step.",
    "models": [
        {"name": "digits-clip", "title": "before"},
        {
            "name": "te_coa", "title": "TeCoA", "config": "tecoa", "learning_rates": ["1e-4", "1e-3"],
            "flags": {"max_steps": 1, "max_images": 8, "evaluation.attack": "pgd-1", "evaluation.radii": ["8/255"],
                      "tasks": [{"dataset": "digits", "max_images": 4}]},
        },
    ],
    "evaluations": [
        {"name": "pgd", "config": "evaluate", "flags": {
            "evaluation.attacks": "pgd-1", "evaluation.radii": ["8/255"], "dataset_name": "digits", "max_images": 4}},
    ],
    "tuning_steps": 1,
    "tradeoff_radius": "8/255",
}  # fmt: skip


def test_a_small_benchmark_is_made_once(monkeypatch, capsys):
    small = json.loads(json.dumps(SMALL))
    small["models"][1]["flags"].pop("max_steps")
    small["models"][1]["flags"]["save_strategy"] = "no"
    Path("own.yaml").write_text(json.dumps(small).replace('"tecoa"', '"digits-clip/tecoa"'))
    seen = []
    real = train.train
    monkeypatch.setattr(train, "train", lambda run: seen.append(run) or real(run))
    monkeypatch.setattr(train, "read", short(train.read))
    script.main(["--config", "own.yaml"])
    assert len(seen) == 3  # two learning rates, and the best of them
    place = Path("out/cards")
    assert {path.name for path in (place / "small").iterdir()} == {
        "reports.json", "report.csv", "table.md", "pgd_1.png", "pgd_1_tradeoff.png", "rows.json",
    }  # fmt: skip
    text = (place / "small/table.md").read_text()
    assert "clean / 8/255" in text and "| TeCoA |" in text and "## Learning rates" in text and "- One step." in text
    own, before = load_reports(place / "hf-robust-clip/digits-te-coa/report.json")
    assert [report.name for report in (*own, *before)] == ["TeCoA", "before"]
    assert (place / "hf-robust-clip/digits-te-coa/README.md").is_file()
    script.main(["--config", "own.yaml"])
    assert len(seen) == 3, "what is finished is not repeated"
    small["models"][1]["flags"]["attack_steps"] = 1
    small["evaluations"][0]["flags"]["max_images"] = 5
    Path("own.yaml").write_text(json.dumps(small).replace('"tecoa"', '"digits-clip/tecoa"'))
    script.main(["--config", "own.yaml"])
    assert len(seen) == 6 and seen[-1].training.attack_steps == 1, "other settings, another training"
    again, _ = load_reports(place / "hf-robust-clip/digits-te-coa/report.json")
    assert [report.num_images for report in again] == [5]
    small["models"][1]["flags"]["attack_steps"] = 2
    Path("own.yaml").write_text(json.dumps({**small, "tuning_steps": None}).replace('"tecoa"', '"digits-clip/tecoa"'))
    script.main(["--config", "own.yaml"])
    assert len(seen) == 8, "of whole trainings the best is not repeated"
    weights = [path.read_bytes() for path in Path("out").glob("tuning/*/model.safetensors")]
    assert weights[0] != weights[1] and Path("out/te_coa/model.safetensors").read_bytes() in weights
    assert "output_dir: out/te_coa\n" in Path("out/te_coa/recipe.yaml").read_text()
    script.main(["--config", "own.yaml"])
    assert len(seen) == 8
    report, before = Path("out/pgd/te_coa/report.json"), (place / "small/table.md").read_bytes()
    images = load_reports(report)[0][0].outcomes.images
    report.write_text(report.read_text().replace(images, "0" * len(images)))
    with pytest.raises(SystemExit):
        script.main(["--config", "own.yaml", "--partial"])
    assert "digits has other images" in capsys.readouterr().err, "a dataset was changed between two cells"
    assert (place / "small/table.md").read_bytes() == before


def test_what_was_measured_of_an_earlier_training_is_deleted(monkeypatch):
    Path("own.yaml").write_text(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    own, old = read("own.yaml"), Path("out/pgd/te_coa/report.json")
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    monkeypatch.setattr(train, "train", lambda run: None)
    run_training(own, own.models[1], own.out / "te_coa", dict)
    assert not old.parent.exists()


def test_a_model_is_trained_once_with_each_seed(monkeypatch):
    small = json.loads(json.dumps(SMALL))
    trained = small["models"][1]
    trained["flags"].pop("max_steps")
    trained["learning_rates"] = []
    small |= {"seeds": [3, 4], "flags": {"save_strategy": "no", "learning_rate": "1e-2"}}
    small |= {"baseline": "before", "groups": {"all of them": ["digits"]}}
    Path("own.yaml").write_text(json.dumps(small).replace('"tecoa"', '"digits-clip/tecoa"'))
    seen = []
    real = train.train
    monkeypatch.setattr(train, "train", lambda run: seen.append(run) or real(run))
    monkeypatch.setattr(train, "read", short(train.read))
    script.main(["--config", "own.yaml"])
    assert [(run.training.seed, run.training.learning_rate) for run in seen] == [(3, 0.01), (4, 0.01)]
    runs, _ = load_reports("out/cards/small/reports.json")
    assert [report.name for report in runs] == ["before", "TeCoA, seed 3", "TeCoA, seed 4"]
    mean = sum(report.clean_accuracy for report in runs[1:]) / 2
    text = Path("out/cards/small/table.md").read_text()
    assert f"| TeCoA | {100 * mean:.1f} ± " in text and "over the seeds 3, 4" in text
    assert "### Paired differences to before" in text and "digits (n=4): clean / 8/255" in text
    difference = paired_difference([[run] for run in runs[1:]], [[runs[0]]])
    assert text.count(f"| TeCoA | {difference} / ") == 1 and "all of them" not in text, "the group has the only task"
    (of_first,), (start,) = load_reports("out/cards/hf-robust-clip/digits-te-coa/report.json")
    assert (of_first.outcomes, start.outcomes) == (runs[1].outcomes, runs[0].outcomes)
    assert of_first.model == "hf-robust-clip/digits-te-coa"
    card = Path("out/cards/hf-robust-clip/digits-te-coa/README.md").read_text()
    assert "One step." in card and "This is the model of seed 3" in card
    recipe = Path("out/cards/hf-robust-clip/digits-te-coa/recipe.yaml").read_text()
    assert "output_dir: out/small/te_coa-seed3\n" in recipe, "wherever it was trained"
    more = {**small, "evaluations": [*small["evaluations"], {**small["evaluations"][0], "name": "later"}]}
    Path("more.yaml").write_text(json.dumps(more).replace('"tecoa"', '"digits-clip/tecoa"'))
    shutil.rmtree("out/cards")
    script.main(["--config", "more.yaml", "--partial"])
    assert Path("out/cards/hf-robust-clip/digits-te-coa/README.md").read_text() == card, "cards of what is finished"
    assert "left out of the tables: later: all rows." in Path("out/cards/small/table.md").read_text()
    Path("out/pgd/te_coa-seed4/report.json").unlink()
    script.main(["--config", "own.yaml", "--partial"])
    text = Path("out/cards/small/table.md").read_text()
    assert "Unfinished, and left out of the tables: pgd: TeCoA." in text
    assert "| before |" in text and "| TeCoA |" not in text
    assert len(seen) == 2 and not Path("out/pgd/te_coa-seed4/report.json").exists(), "nothing is run"
    own = read("own.yaml")
    with pytest.raises(ValueError, match="seeds="):
        cells_of(replace(own, seeds=(1, 1)))


def table(place="out/cards/small"):
    """Each row of a table's first part, by title."""
    lines = (Path(place) / "table.md").read_text().split("###")[0].splitlines()
    return {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}


def test_a_row_is_added_to_those_that_another_run_has_made():
    small = json.loads(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    small |= {"seeds": [3, 4], "flags": {"save_strategy": "no"}, "baseline": "before"}
    small["models"][1]["learning_rates"] = ["1e-3"]
    mine = {**small["models"][1], "name": "mine", "title": "Mine", "config": "digits-clip/fare"}
    both = {**small, "models": [*small["models"], mine]}
    Path("own.yaml").write_text(json.dumps(small))
    Path("both.yaml").write_text(json.dumps({**both, "output_dir": "new"}))
    script.main(["--config", "own.yaml"])
    shutil.move("out/cards/small", "published")
    shutil.rmtree("out")
    script.main(["--config", "both.yaml", "--only", "[mine]"])
    words = ["--config", "both.yaml", "--partial", "--cards_dir", "there", "--earlier"]
    script.main([*words, "published"])
    found, old = table("there/small"), table("published")
    assert found.keys() >= {"before", "TeCoA", "Mine"}
    assert [found[name] for name in ("before", "TeCoA")] == [old[name] for name in ("before", "TeCoA")]
    text = Path("there/small/table.md").read_text()
    assert "Unfinished" not in text and "| TeCoA | " in text.split("## Learning rates")[1]
    assert [path.name for path in Path("there/hf-robust-clip").iterdir()] == ["digits-mine"], "cards of what is new"
    card, before = load_reports("there/hf-robust-clip/digits-mine/report.json")
    assert [report.name for report in (*card, *before)] == ["Mine", "before"], "the start is an earlier row, too"
    reports, _ = load_reports("there/small/reports.json")
    assert [report.name for report in reports] == [
        "before", "TeCoA, seed 3", "Mine, seed 3", "TeCoA, seed 4", "Mine, seed 4",
    ]  # fmt: skip
    script.main([*words, "there/small"])
    assert Path("there/small/table.md").read_text() == text, "a folder may be read and written anew"


def test_what_another_run_has_measured_otherwise_is_left_out(capsys):
    small = json.loads(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    small["models"] = small["models"][:1]
    Path("own.yaml").write_text(json.dumps(small))
    script.main(["--config", "own.yaml"])
    shutil.copytree("out/cards/small", "published")
    flags = small["evaluations"][0]["flags"]
    for other in ({"max_images": 3}, {"evaluation.radii": ["4/255", "8/255"]}, {"evaluation.seed": 1}, {
        "evaluation.attacks": "pgd-2"}, {"template": "a {}"}, {"dataset_name": "fashion_mnist"}):  # fmt: skip
        changed = {**small, "output_dir": "new", "evaluations": [{**small["evaluations"][0], "flags": flags | other}]}
        Path("new.yaml").write_text(json.dumps(changed))
        with pytest.raises(SystemExit):
            script.main(["--config", "new.yaml", "--partial", "--earlier", "published"])
        assert "no evaluation is finished" in capsys.readouterr().err, other
    reports, _ = load_reports("published/reports.json")
    of_other = replace(reports[0], name="TeCoA", outcomes=replace(reports[0].outcomes, images="0" * 16))
    with pytest.raises(ValueError, match="other images"):
        check_images([reports[0], of_other])


def test_what_another_run_has_trained_otherwise_is_left_out(monkeypatch):
    small = json.loads(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    Path("own.yaml").write_text(json.dumps({**small, "seeds": [0, 1]}))
    own = read("own.yaml")
    model, (evaluation,) = own.models[1], own.evaluations
    earlier = Earlier(None)
    earlier.rows = {model.title: {
        "trained": training_digest(own, model), "learning_rates": {"1e-4": (1.0, 0.5)},
        "evaluated": {evaluation.name: evaluation_digest(own, evaluation, model)},
    }}  # fmt: skip
    (settings,) = evaluation_run(own, evaluation, model).evaluations
    report = make_report(robust_accuracy={8 / 255: 0.5}, name="TeCoA, seed 1", task="digits", attack="PGD-1")
    parameters = settings.attack_parameters(len(report.class_names))
    earlier.reports = [replace(report, attack_parameters=own) for own in ({"num_steps": 9}, parameters)]
    assert [report.name for report in earlier.reports_of(own, evaluation, model, 1)] == ["TeCoA"]
    assert earlier.reports_of(own, evaluation, model, 0) == [], "of another seed"
    assert earlier.reports_of(own, evaluation, model, 1)[0].attack_parameters == parameters, "not of another attack"
    moved = replace(own, output_dir="elsewhere", seeds=(3, 1))
    assert earlier.reports_of(moved, evaluation, moved.runs_of(model)[1], 1), "in another folder, beside another seed"
    for changed in (
        replace(own, models=[own.models[0], replace(model, flags={**model.flags, "attack_steps": 1})]),
        replace(own, models=[own.models[0], replace(model, learning_rates=["1e-4"])]),
        replace(own, tuning_steps=2),
        replace(own, flags={"eps": "1/255"}),
        replace(own, start="elsewhere"),
    ):
        assert earlier.reports_of(changed, evaluation, changed.models[1], 1) == []
        assert tries_told(changed, changed.models[1], [], earlier) == {}
    assert tries_told(own, model, [], earlier) == {"1e-4": (1.0, 0.5)}
    for rates, same in ((model.learning_rates, True), ([], False)):  # another stands in the place of the config's own
        two = [
            replace(model, learning_rates=rates, flags={**model.flags, "learning_rate": r}) for r in ("1e-3", "1e-2")
        ]
        digests = {training_digest(replace(own, models=[own.models[0], row]), row) for row in two}
        assert (len(digests) == 1) == same
    monkeypatch.setattr(
        "hf_robust_clip.runs.benchmark.single_runs.library_versions", lambda: {"hf_robust_clip": "0.0.1"}
    )
    assert earlier.reports_of(own, evaluation, model, 1) == []


def test_committed_tables_are_of_the_configs_as_they_are(monkeypatch):
    """Whoever changes a config makes the tables of it anew."""
    monkeypatch.chdir(RECIPES.parent)
    own = read(packaged_config("mini-clip/benchmark"))
    earlier = Earlier("hub_cards/mini-benchmark")
    monkeypatch.setattr(
        "hf_robust_clip.runs.benchmark.single_runs.library_versions", lambda: earlier.reports[0].library_versions
    )
    for evaluation in own.evaluations:
        for model in models_of(own, evaluation):
            for number, seeded in enumerate(own.runs_of(model)[: evaluation.first_seeds]):
                assert earlier.reports_of(own, evaluation, seeded, number), (evaluation.name, seeded.name)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"trained": "", "evaluated": {}}}',
    '{"a": {"trained": "", "evaluated": {}, "learning_rates": {"1e-3": [1]}}}'])  # fmt: skip
def test_other_files_than_those_of_tables_are_refused(text):
    Path("there").mkdir()
    with pytest.raises(ValueError, match="earlier="):
        Earlier("there")
    shutil.copy(Path(__file__).parents[1] / "hub_cards/mini-benchmark/reports.json", "there")
    (Path("there") / ROWS).write_text(text)
    with pytest.raises(ValueError, match="earlier="):
        Earlier("there")


def test_an_evaluation_is_of_so_many_seeds_from_the_first():
    small = json.loads(json.dumps(SMALL)) | {"seeds": [3, 4]}
    (every,) = small["evaluations"]
    small["evaluations"].append({**every, "name": "few", "first_seeds": 1, "flags": {"evaluation.attacks": ["pgd-2"]}})
    Path("own.yaml").write_text(json.dumps(small).replace('"tecoa"', '"digits-clip/tecoa"'))
    own = read("own.yaml")
    cells = [cell.name for cell in cells_of(own)]
    assert [name for name in cells if name.startswith("few")] == ["few of digits-clip", "few of te_coa-seed3"]
    for first_seeds, seeds in ((0, (3, 4)), (3, (3, 4)), (1, ())):
        wrong = replace(own.evaluations[1], first_seeds=first_seeds)
        with pytest.raises(ValueError, match="first_seeds="):
            replace(own, evaluations=(wrong,), seeds=seeds)
    every = [[make_report(name="TeCoA", attack=attack) for attack in ("PGD-2", "PGD-1")[-count:]] for count in (2, 1)]
    groups = {"all of them": [every[0][0].task]}
    write_tables(replace(own, tradeoff_radius=None, baseline="before", groups=groups), every, {})
    text = Path("out/cards/small/table.md").read_text()
    assert "Paired differences" not in text, "of the baseline there is no report"
    assert "all of them" not in text, "the mean over one task is told already"
    one, both = text[text.index("## PGD-2") : text.index("## PGD-1")], text[text.index("## PGD-1") :]
    assert "models of seed 3" in one and "±" not in one and "over the seeds 3, 4" in both and "±" in both


def test_other_weights_are_measured_anew():
    Path("own.yaml").write_text(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    own = read("own.yaml")
    evaluation = next(cell for cell in cells_of(own) if cell.name == "pgd of te_coa")
    weights = Path("out/te_coa/model.safetensors")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"these")
    run = evaluation_run(own, own.evaluations[0], own.models[1])
    evaluation.folder.mkdir(parents=True)
    for name, text in (("report.json", "{}"), ("recipe.yaml", dump_recipe(run.source)),
                       (MADE_OF, checkpoint_digest(own, own.models[1]))):  # fmt: skip
        (evaluation.folder / name).write_text(text)
    assert evaluation.finished()
    weights.write_bytes(b"those")
    os.utime(weights, ns=(1, 1))
    assert not evaluation.finished()
    weights.write_bytes(b"these")
    assert evaluation.finished()
    Path("out").rename("elsewhere")
    moved = replace(own, output_dir="elsewhere")
    assert is_evaluated(moved, moved.evaluations[0], moved.models[1]), "what is moved is still finished"
    assert not is_evaluated(replace(moved, pictures={"cat": [1]}), moved.evaluations[0], moved.models[1])
    for key, value, same in (("batch_size", 7, True), ("radii", ["4/255"], False)):
        asked = replace(moved.evaluations[0], flags={**moved.evaluations[0].flags, f"evaluation.{key}": value})
        assert is_evaluated(moved, asked, moved.models[1]) == same
    few, many = (f"defence: BaFTA\nevaluation: {{batch_size: {size}}}\n" for size in (1, 2))
    assert decisive_settings(few) != decisive_settings(many), "its figures may depend on which images come together"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--jobs", "0"], "jobs"),
        (["--jobs", "x"], "jobs"),
        (["--only", "[nobody]"], "nobody"),
        (["--partial", "--only", "[te_coa]"], "partial"),
        (["--earlier", "published"], "earlier"),
        (["--partial", "--earlier", "nowhere"], "earlier"),
        (["--start", "nowhere"], "nowhere"),
        (["--models", "[{name: pgd, title: a, config: tecoa}]"], "pgd"),
        (["--models", "[{name: ../a, title: a, config: tecoa}]"], "../a"),
        (["--tradeoff_radius", "3/255"], "tradeoff_radius"),
        (["--groups", "{all: [letters]}"], "letters"),
        (["--groups", "{all: []}"], "groups"),
        (["--models", "[{name: a, title: b}, {name: a, title: c}]", "--evaluations", "[{name: e, config: f}]"], "'a'"),
        (["--models", "[{name: a, title: b}, {name: c, title: b}]", "--evaluations", "[{name: e, config: f}]"], "'b'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_run(words, name, capsys):
    Path("own.yaml").write_text(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    with pytest.raises(SystemExit) as end:
        script.main(["--config", "own.yaml", *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and name in line
    assert not Path("out").exists()


def test_a_baseline_and_tasks_that_are_not_there_are_refused():
    Path("own.yaml").write_text(json.dumps(SMALL))
    own = read("own.yaml")
    with pytest.raises(ValueError, match="baseline: there is no model 'after'"):
        run(replace(own, baseline="after"))
    defended = make_report(attack_target="adaptive", defence=make_defence())
    with pytest.raises(ValueError, match="baseline and groups"):
        check_compared(replace(own, baseline="before"), [defended])


def short(real):
    """Trainings of two steps: that of the chosen rate has no number of its own."""

    def read(words, config):
        steps = [] if any(word.startswith("--max_steps") for word in words) else ["--max_steps=2"]
        return real([*words, *steps], config)

    return read


def test_pictures_are_those_that_this_run_makes():
    own = replace(read(packaged_config("mini-clip/benchmark")), output_dir="elsewhere")
    (run,) = [evaluation_run(own, one, own.models[0]) for one in own.evaluations if one.name == "pgd"]
    made = [task.dataset for task in run.tasks if "pictures" in task.dataset]
    assert made == [str(Path("elsewhere") / PICTURES)] and len(run.tasks) == 6
