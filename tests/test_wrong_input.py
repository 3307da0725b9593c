"""Wrong input to both commands: one line that names argument and value, exit status 2, nothing written."""

import re
from pathlib import Path

import pytest
import yaml

from hf_robust_clip import cli
from hf_robust_clip.command_line import packaged_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TOKEN = "hf_" + "aBcD1234eFgH" * 3
MODULES = {
    "strange": "from hf_robust_clip.defences.base import Defence\nclass Unfinished(Defence):\n    pass\nvalue = 3\n",
    "broken": "1 / 0\n",
    "leaves": "raise SystemExit('good bye')\n",
}

# words, or the lines of a YAML file, which take the place of its own; and what the line says
BOTH = [
    ("--epoch 1", "--epoch"),
    ("--evaluation.radi [1/255]", "did you mean 'evaluation.radii'"),
    ("evaluation: {radi: [1/255]}", "'evaluation.radi'; did you mean 'evaluation.radii'"),
    ("epoch: 1", "'epoch'"),
    ("evaluation: 5", "evaluation='5'"),
    ("--evaluation strange.py", "evaluation='strange.py'"),
    ("--evaluation {radi:[1]}", "did you mean 'evaluation.radii'"),
    ("--evaluation.batch_size many", "evaluation.batch_size.*many"),
    ("evaluation: {radii: [1/255], batch_size: many}", "evaluation.batch_size.*many"),
    ("--use_cpu perhaps", "use_cpu.*perhaps"),
    ("--print_config maybe", "--print_config 'maybe'"),
    ("--config none.yaml", "--config 'none.yaml'"),
    ("output_dir: !!python/object/apply:os.getcwd []", "own.yaml.*tag"),
    ("output_dir: !mine a", "own.yaml.*!mine"),
    ("output_dir: a\noutput_dir: b", "own.yaml.*'output_dir' stands twice"),
    ("evaluation: {seed: 1, seed: 2}", "own.yaml.*'seed' stands twice"),
    ("--defence nowhere.Defence", "defence='nowhere.Defence'"),
    ("--defence strange.Missing", "defence='strange.Missing'"),
    ("--defence strange.value", "defence='strange.value' is no Defence"),
    ("--defence collections.OrderedDict", "defence='collections.OrderedDict' is no Defence"),
    ("--defence strange.Unfinished", "defence='strange.Unfinished' is abstract"),
    ("--defence broken.Defence", r"defence='broken.Defence'.*division by zero"),
    ("--defence leaves.Defence", r"defence='leaves.Defence'.*good bye"),
    ("--evaluation.seed 1 2", "'2' stands alone"),
    ("--evaluation.seed 1 --evaluation.seed 2", "--evaluation.seed is given twice"),
    ("--overwrite --overwrite", "--overwrite is given twice"),
    ("--defence.gamma 1", "--defence.gamma.*--defence CLASS"),
    ("--output_dir=", "missing: output_dir"),
    ("output_dir:", "missing: output_dir"),
    ("--model_name_or_path=", "model_name_or_path=''"),
    ("--evaluation.batch_size [1,2]", "evaluation.batch_size.*'1', '2'"),
    ("output_dir: [a, b]", "output_dir.*'a', 'b'"),
    ("--evaluation.batch_size 010", "evaluation.batch_size='010'"),
    ("evaluation: {radii: [1/255], batch_size: 010}", "evaluation.batch_size='010'"),
    (f"--output_dir {TOKEN}", "output_dir holds an access token"),
    (f"template: '{TOKEN} {{}}'", "template holds an access token"),
]  # fmt: skip
TRAIN = [
    ("{}", r"missing: dataset_name, objective, output_dir, evaluation\.radii"),
    ("--objective nowhere.Objective", "objective='nowhere.Objective'"),
    ("--objective strange.Unfinished", "objective='strange.Unfinished' is no Objective"),
    ("--objective leaves.Objective", "objective='leaves.Objective'.*good bye"),
    ("--objective null", "missing: objective"),
    ("objective: null", "missing: objective"),
    ("--learning_rate [1e-3,1e-4]", "learning_rate.*'1e-3', '1e-4'"),
    ("--fit_on.dataset digits", "--fit_on.dataset"),
    (f"--hub_model_id me/{TOKEN}", "hub_model_id holds an access token"),
]
TRAINED = "--fit_on.dataset digits --fit_on.split train"
FITTED = "--defence PromptAlign --fit_on.dataset digits"
EVALUATE = [
    ("{}", "missing: output_dir"),
    ("output_dir: a\nevaluation:", r"missing: evaluation\.radii"),
    ("--save_adversarial png", "save_adversarial.*png"),
    ("--save_adversarial uint8 --defence BaFTA", "save_adversarial.*bafta"),
    ("--save_adversarial uint8 --dataset_name imagenet", "save_adversarial.*'imagenet'"),
    ("--save_adversarial uint8 --evaluation.attack none", "save_adversarial='uint8' does nothing without an attack"),
    ("--published pmg_aft --evaluation.attack none", "published='pmg_aft' does nothing without an attack"),
    ("--evaluation.attack none --evaluation.radii [1/255]", r"radii=\['1/255'\] do nothing"),
    ("--evaluation.attacks [none,pgd-3]", "evaluation.attacks=.*'none'"),
    ("evaluation: {radii: [1/255]}\noutput_dir: a\ntasks:", "missing: dataset_name, or tasks"),
    ("--dataset_name=", "missing: dataset_name"),
    ("--compare=", "compare=.*''"),
    ("--reference=", "reference=''"),
    ("--evaluation.attacks [nowhere.Attack]", "evaluation.attacks='nowhere.Attack'"),
    ("--evaluation.attack null", "evaluation.attack=null"),
    ("--evaluation.attacks [strange.Unfinished]", "evaluation.attacks='strange.Unfinished' is no Suite"),
    ("--evaluation.view strange.Unfinished", "evaluation.view='strange.Unfinished' is no AttackView"),
    ("--evaluation.view.factor 1", "--evaluation.view.factor.*--evaluation.view CLASS"),
    ("fit_on: digits", "fit_on='digits'"),
    ("fit_on: {spilt: train}", "did you mean 'fit_on.split'"),
    ("--fit_on.split train", "fit_on.dataset is missing"),
    ("--fit_on.name a", "--fit_on.name"),
    (TRAINED, "fit_on.dataset='digits' does nothing without a defence"),
    (f"--defence TTC {TRAINED}", "fit_on.dataset='digits'.*ttc, which learns nothing"),
    (f"--defence TAPT {TRAINED}", "fit_on.dataset='digits'.*needs a clean classifier"),
    (FITTED, "fit_on.split='test' is evaluated too"),
    (f"{FITTED} --fit_on.split test[:5]", "fit_on.split='test.:5.' is evaluated too"),
    ("--defence CLIPure --defence.preset released --evaluation.attacks [apgd]", "lets go of images .apgd-ce"),
    (f"{FITTED} --fit_on.max_images 9", "fit_on.split='test' is evaluated too"),
]  # fmt: skip
ROWS = [(command, *row) for command, own in (("train", TRAIN), ("evaluate", EVALUATE)) for row in (*BOTH, *own)]


def words_of(command: str, asked: str) -> list[str]:
    """The words, or those that name a file of the lines, with all that the packaged one says beside."""
    if asked.startswith("--"):
        return asked.split()
    keys = {line.partition(":")[0] for line in asked.splitlines()}
    packaged = yaml.safe_load(packaged_config({"train": "pmg_aft"}.get(command, command)).read_text())
    rest = {} if asked == "{}" else {key: value for key, value in packaged.items() if key not in keys}
    Path("own.yaml").write_text(f"{asked}\n" + (yaml.safe_dump(rest) if rest else ""))
    return ["--config", "own.yaml"]


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize(("command", "asked", "message"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_wrong_input_ends_in_one_line_with_status_2_and_writes_nothing(command, asked, message, capsys, monkeypatch):
    for name, source in MODULES.items():
        Path(f"{name}.py").write_text(source)
    words, before = words_of(command, asked), listing()
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *words])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err) and len(printed.err) < 700, printed.err
    assert printed.out == "" and TOKEN not in printed.err
    assert listing() == before


def test_what_a_defence_is_fitted_on_is_not_what_it_is_judged_on_by_another_name(capsys):
    """The same pictures in a folder; and classes apart are no pictures in common."""
    from PIL import Image

    for split in ("train", "test"):
        for name in ("zero", "one"):
            Path("pictures", split, name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "grey").save(Path("pictures", split, name, "a.png"))
    words = ["--dataset_name", "pictures", "--output_dir", "out", "--evaluation.attacks", "pgd-1", "--defence",
             "PromptAlign", "--fit_on.dataset", "pictures", "--fit_on.split", "train"]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *words])
    assert "error: fit_on.dataset='pictures' has the very images of 'pictures'" in capsys.readouterr().err
