"""Settings that would do nothing where they stand are refused by their name and value."""

import re
from pathlib import Path

import pytest

from hf_robust_clip import cli
from hf_robust_clip.cli import parse_arguments, read_evaluation, read_recipe

CONFIGS = Path(__file__).parent.parent / "recipes/configs"
EVALUATION = CONFIGS / "evaluate.yaml"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    Path("model").mkdir()


def recipe(method, *words):
    return read_recipe(method, parse_arguments(words, CONFIGS / f"digits-clip/{method}.yaml"))


def evaluation(*words):
    return read_evaluation(parse_arguments(words, EVALUATION, cli.EVALUATION_SECTIONS))


TRAINING = [
    ("pmg_aft", "--model.revision abc", "model.revision='abc' 'digits-clip'"),
    ("pmg_aft", "--model.name ./model --model.revision abc", "model.revision='abc' './model'"),
    ("pmg_aft", "--model.lora_alpha 32", "model.lora_alpha=32 lora_rank"),
    ("pmg_aft", "--model.lora_rank 0", "model.lora_rank=0"),
    ("pmg_aft", "--data.name mine", "data.name='mine'"),
    ("pmg_aft", "--data.shots_seed 3", "data.shots_seed=3 data.shots"),
    ("pmg_aft", "--tasks [{dataset: digits, shots_seed: 3}]", "tasks[0].shots_seed=3"),
    ("pmg_aft", "--data.data_root sets", "data.data_root='sets' digits"),
    ("pmg_aft", "--tasks []", "tasks=[]"),
    ("pmg_aft", "--compare [pmg_aft]", "compare 'pmg_aft'"),
    ("pmg_aft", "--compare [tecoa, tecoa]", "compare 'tecoa'"),
    ("pmg_aft", "--compare [apt] --model.lora_rank 2", "compare apt lora_rank"),
    ("tapt", "--compare [apt]", "compare APT-VLI"),
    ("apt", "--prompts.border_width 3", "prompts.border_width=3 'VLI'"),
    ("apt", "--prompts.design V --prompts.text_depth 2", "prompts.text_depth=2 'V'"),
    ("apt", "--prompts.design V --prompts.context_init x", "prompts.context_init='x' 'V'"),
    ("apt", "--prompts.design T --prompts.num_vision_tokens 3", "prompts.num_vision_tokens=3 'T'"),
    ("apt", "--prompts.design pixel --prompts.init_std 0.1", "prompts.init_std=0.1 'pixel'"),
    ("apt", "--prompts.design pixel --prompts.pixel_region full --prompts.border_width 3", "border_width=3 'full'"),
    ("apt", "--prompts.design T --prompts.text_depth 1 --prompts.init_std 0.1", "init_std=0.1 context_init"),
    ("apt", "--prompts.num_text_tokens 0 --prompts.context_init words", "prompts.context_init='words'"),
    ("apt", "--prompts.inference_mode true", "inference_mode"),
    ("apt", "--prompts.base_model_name_or_path x", "base_model_name_or_path"),
    ("pmg_aft", "--training.output_dir elsewhere", "training.output_dir='elsewhere' run.output_dir"),
    ("pmg_aft", "--training.use_cpu true", "training.use_cpu=True run.device"),
    ("pmg_aft", "--training.resume_from_checkpoint x", "training.resume_from_checkpoint='x' run.resume"),
    ("pmg_aft", "--training.eval_attack_steps 50", "training.eval_attack_steps=50"),
    ("pmg_aft", "--training.eval_steps 5", "training.eval_steps=5"),
    ("pmg_aft", "--training.do_eval true", "training.do_eval=True"),
    ("pmg_aft", "--training.metric_for_best_model x", "training.metric_for_best_model='x'"),
    ("pmg_aft", "--training.per_device_eval_batch_size 2", "training.per_device_eval_batch_size=2"),
    ("pmg_aft", "--training.hub_model_id a/b", "training.hub_model_id='a/b' push_to_hub"),
    ("pmg_aft", "--training.hub_private_repo true", "training.hub_private_repo=True push_to_hub"),
    ("pmg_aft", "--run.push_to_hub a/b --training.hub_strategy end", "training.hub_strategy='end'"),
    ("pmg_aft", "--run.push_to_hub a/b --training.hub_model_id c/d", "run.push_to_hub='a/b' 'c/d'"),
    ("pmg_aft", "--evaluation.target adaptive", "evaluation.target='adaptive'"),
    ("pmg_aft", "--evaluation.attack worst", "attack='worst'"),
    ("pmg_aft", "--evaluation.eot 4", "evaluation.eot=4"),
    ("tapt", "--evaluation.eot 4", "evaluation.eot=4 defence_evaluation.eot"),
    ("pmg_aft", "--evaluation.attacks [pgd-3]", "'attacks'"),
    ("tapt", "--defence_evaluation.worst worst-0-0-5 --defence_evaluation.eot 2", "defence_evaluation.eot=2"),
    ("tapt", "--defence_evaluation.presets [paper]", "presets 'paper'"),
    ("tapt", "--adaptation.align_weight 0 --adaptation.gamma 0.2", "adaptation.gamma=0.2 align_weight=0"),
    ("tapt", "--adaptation.random_seed 3", "adaptation.random_seed=3 reset_to"),
    ("pmg_aft", "--overwrite --resume", "run.overwrite run.resume"),
    ("pmg_aft", "--model.name ./model --output_dir model", "output_dir='model'"),
]
EVALUATIONS = [
    ("--evaluation.attack pgd-3", "evaluation.attack='pgd-3' evaluation.attacks"),
    ("--attacks []", "evaluation.attacks=[]"),
    ("--attacks [pgd-20, PGD-20]", "evaluation.attacks 'PGD-20'"),
    ("--evaluation.eot 4", "evaluation.eot=4 'static'"),
    ("--defence.method ttc --evaluation.eot 4", "evaluation.eot=4 'defence_blind'"),
    ("--attacks worst --defence.method ttc --evaluation.target bpda", "evaluation.target='bpda'"),
    ("--attacks worst --defence.method ttc --evaluation.step_size 1/255", "evaluation.step_size='1/255'"),
    ("--attacks apgd --evaluation.step_size 1/255", "evaluation.step_size='1/255'"),
    ("--defence.method tapt --defence.random_seed 3", "defence.random_seed=3"),
    ("--model.lora_rank 2", "model.lora_rank=2"),
    ("--model.lora_alpha 2", "model.lora_alpha=2"),
    ("--revision abc", "model.revision='abc'"),
    ("--compare [digits-clip]", "compare 'digits-clip'"),
    ("--model ./model --compare [model/]", "compare 'model/'"),
    ("--compare [org/a, org/a]", "compare 'org/a'"),
    ("--dataset digits --shots_seed 3", "tasks[0].shots_seed=3"),
    ("--overwrite --resume", "run.overwrite run.resume"),
]


def words_of(line):
    """`--a b --c [d, e]` as a command line has it."""
    return [
        word for pair in re.findall(r"(--\S+)(?: ((?!--)[^\[\s]\S*|\[.*?\](?=$| --)))?", line) for word in pair if word
    ]


@pytest.mark.parametrize(("method", "line", "parts"), TRAINING, ids=[f"{row[0]} {row[1]}" for row in TRAINING])
def test_of_a_training(method, line, parts):
    with pytest.raises((ValueError, OSError)) as caught:
        recipe(method, *words_of(line))
    assert all(part in str(caught.value) for part in parts.split()), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("line", "parts"), EVALUATIONS, ids=[row[0] for row in EVALUATIONS])
def test_of_an_evaluation(line, parts):
    with pytest.raises((ValueError, OSError)) as caught:
        evaluation(*words_of(line))
    assert all(part in str(caught.value) for part in parts.split()), caught.value


ACTING = [
    ("pmg_aft", "--model.lora_rank 2 --model.lora_alpha 32"),
    ("pmg_aft", "--model.name org/clip --model.revision abc"),
    ("pmg_aft", "--data.shots 2 --data.shots_seed 3"),
    ("pmg_aft", "--model.lora_alpha 16"),  # the default asks for nothing
    ("apt", "--prompts.design V"),  # the config speaks of texts too, for its own design
    ("apt", "--prompts.design T --prompts.text_depth 2"),
    ("apt", "--prompts.design pixel --prompts.border_width 3"),
    ("tapt", "--training.per_device_eval_batch_size 2"),
    ("tapt", "--defence_evaluation.eot 2"),
    ("tapt", "--adaptation.reset_to random --adaptation.random_seed 3"),
    ("tapt", "--compare [coop]"),
    ("pmg_aft", "--run.push_to_hub a/b --training.hub_private_repo true --training.hub_revision dev"),
    ("pmg_aft", "--training.push_to_hub true --training.hub_strategy end --training.hub_model_id a/b"),
    ("pmg_aft", "--training.hub_private_repo true --training.report_to trackio"),
]


@pytest.mark.parametrize(("method", "line"), ACTING, ids=[f"{row[0]} {row[1]}" for row in ACTING])
def test_what_acts_passes(method, line, monkeypatch):
    monkeypatch.setattr("hf_robust_clip.training.config.get_available_reporting_integrations", lambda: ["trackio"])
    recipe(method, *words_of(line))


def test_another_design_takes_nothing_of_the_configs_own():
    found = recipe("apt", "--prompts.design", "V", "--prompts.vision_depth", "2")
    assert (found.prompts.design, found.prompts.vision_depth, found.prompts.num_vision_tokens) == ("V", 2, 2)
    assert "text_depth" not in found.source["prompts"]
    assert "text_depth" in recipe("apt").source["prompts"]


def test_a_reference_may_be_one_of_the_checkpoints_however_it_is_written():
    found = evaluation("--compare", "[./model]", "--reference", "model/")
    assert found.reference == "./model"
    assert evaluation("--reference", "digits-clip").reference == "digits-clip"


def test_where_a_push_goes():
    assert recipe("pmg_aft").push is None
    words = ["--run.push_to_hub", "a/b", "--training.hub_private_repo", "true", "--training.hub_token", "mine"]
    push = recipe("pmg_aft", *words).push
    assert (push.repo_id, push.private, push.token) == ("a/b", True, "mine")
    assert recipe("pmg_aft", "--training.push_to_hub", "true", "--output_dir", "here/new").push.repo_id == "new"


@pytest.mark.parametrize("option", ["--run.push_to_hub", "--training.hub_model_id"])
def test_a_push_that_must_fail_is_refused_before_anything_is_loaded(option, monkeypatch):
    words = [option, "a/b", *(["--training.push_to_hub", "true"] if "hub_model_id" in option else [])]
    recipe("pmg_aft", *words)
    with pytest.raises(ValueError, match="a b/c"):
        recipe("pmg_aft", *[word.replace("a/b", "a b/c") for word in words])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'a/b'.*HF_HUB_OFFLINE"):
        recipe("pmg_aft", *words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OSError, match=r"'a/b'.*token"):
        recipe("pmg_aft", *words)
    recipe("pmg_aft", *words, "--training.hub_token", "mine")
    with pytest.raises(ValueError, match=r"base model.*'\./model'"):
        recipe("apt", *words, "--training.hub_token", "mine", "--model.name", "./model")
