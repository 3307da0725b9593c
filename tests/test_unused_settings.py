"""Settings that would do nothing where they stand are refused by their name and value."""

import re
from pathlib import Path

import pytest
from command_words import last_of_each

from hf_robust_clip.runs import evaluate, train

CONFIGS = Path(__file__).parent.parent / "recipes/configs"
EVALUATION = CONFIGS / "evaluate.yaml"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    Path("model").mkdir()


def recipe(method, *words):
    return train.read(last_of_each(*words), CONFIGS / f"digits-clip/{method}.yaml")


def evaluation(*words):
    return evaluate.read(last_of_each(*words), EVALUATION)


TRAINING = [
    ("pmg_aft", "--model_revision abc", "model_revision='abc' 'digits-clip'"),
    ("pmg_aft", "--model_name_or_path ./model --model_revision abc", "model_revision='abc' './model'"),
    ("pmg_aft", "--lora_alpha 32", "lora_alpha=32 use_peft"),
    ("pmg_aft", "--lora_r 4", "lora_r=4 use_peft"),
    ("pmg_aft", "--use_peft --lora_r 0", "lora_r=0"),
    ("pmg_aft", "--shots_seed 3", "shots_seed=3 shots"),
    ("pmg_aft", "--tasks [{dataset: digits, shots_seed: 3}]", "shots_seed=3"),
    ("pmg_aft", "--data_root sets", "data_root='sets' digits"),
    ("pmg_aft", "--resize 9 --augment", "resize=9 augment"),
    ("pmg_aft", "--tasks []", "tasks=[]"),
    ("pmg_aft", "--compare [pmg_aft]", "compare 'pmg_aft'"),
    ("pmg_aft", "--compare [tecoa, tecoa]", "compare 'tecoa'"),
    ("pmg_aft", "--compare [apt] --use_peft", "compare apt use_peft"),
    ("tapt", "--compare [apt]", "compare 'apt'"),
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
    ("pmg_aft", "--resume_from_checkpoint x", "resume_from_checkpoint='x'"),
    ("pmg_aft", "--eval_attack_steps 50", "eval_attack_steps=50"),
    ("pmg_aft", "--eval_steps 5", "eval_steps=5"),
    ("pmg_aft", "--do_eval true", "do_eval=True"),
    ("pmg_aft", "--metric_for_best_model x", "metric_for_best_model='x'"),
    ("pmg_aft", "--per_device_eval_batch_size 2", "per_device_eval_batch_size=2"),
    ("pmg_aft", "--hub_model_id a/b", "hub_model_id='a/b' push_to_hub"),
    ("pmg_aft", "--hub_private_repo true", "hub_private_repo=True push_to_hub"),
    ("pmg_aft", "--hub_strategy end", "hub_strategy='end' push_to_hub"),
    ("pmg_aft", "--evaluation.view adaptive", "evaluation.view"),
    ("pmg_aft", "--evaluation.attack AdaptiveWorst", "evaluation.attack AdaptiveWorst"),
    ("pmg_aft", "--evaluation.eot 4", "evaluation.eot"),
    ("tapt", "--evaluation.eot 4", "evaluation.eot"),
    ("pmg_aft", "--evaluation.attacks [pgd-3]", "--evaluation.attacks"),
    ("pmg_aft", "--fit_images 9", "fit_images=9 defence"),
    ("pmg_aft", "--defence_evaluation.eot 2", "defence_evaluation --defence"),
    ("tapt", "--defence_evaluation.presets [paper]", "presets 'paper'"),
    ("tapt", "--defence.align_weight 0 --defence.gamma 0.2", "gamma=0.2 align_weight=0"),
    ("tapt", "--defence.random_seed 3", "random_seed=3 reset_to"),
    ("pmg_aft", "--overwrite --resume_from_checkpoint true", "overwrite resume_from_checkpoint"),
    ("pmg_aft", "--model_name_or_path ./model --output_dir model", "output_dir='model'"),
]
EVALUATIONS = [
    ("--evaluation.attacks []", "evaluation.attacks=[]"),
    ("--evaluation.attacks [pgd-20, PGD-20]", "evaluation.attacks 'PGD-20'"),
    ("--evaluation.eot 4", "evaluation.eot=4 'static'"),
    ("--defence ttc --evaluation.eot 4", "evaluation.eot=4 'defence_blind'"),
    ("--evaluation.attacks AdaptiveWorst --defence ttc --evaluation.view bpda", "evaluation.view=BPDA("),
    ("--evaluation.attacks AdaptiveWorst --defence ttc --evaluation.step_size 1/255", "step_size='1/255'"),
    ("--evaluation.attacks apgd --evaluation.step_size 1/255", "evaluation.step_size='1/255'"),
    ("--defence tapt --defence.random_seed 3", "random_seed=3"),
    ("--use_peft", "use_peft"),
    ("--lora_alpha 2", "lora_alpha"),
    ("--model_revision abc", "model_revision='abc'"),
    ("--compare [digits-clip]", "compare 'digits-clip'"),
    ("--model_name_or_path ./model --compare [model/]", "compare 'model/'"),
    ("--compare [org/a, org/a]", "compare 'org/a'"),
    ("--dataset_name digits --shots_seed 3", "shots_seed=3"),
    ("--max_images 3", "max_images=3 tasks"),
    ("--overwrite --resume", "overwrite resume"),
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
    ("pmg_aft", "--use_peft --lora_r 2 --lora_alpha 32"),
    ("pmg_aft", "--model_name_or_path org/clip --model_revision abc"),
    ("pmg_aft", "--shots 2 --shots_seed 3"),
    ("pmg_aft", "--lora_alpha 16"),  # the default asks for nothing
    ("apt", "--prompts.design V"),  # the config speaks of texts too, for its own design
    ("apt", "--prompts.design T --prompts.text_depth 2"),
    ("apt", "--prompts.design pixel --prompts.border_width 3"),
    ("tapt", "--per_device_eval_batch_size 2"),
    ("tapt", "--defence_evaluation.eot 2"),
    ("tapt", "--defence.reset_to random --defence.random_seed 3"),
    ("tapt", "--compare [coop]"),
    ("pmg_aft", "--push_to_hub --hub_strategy end --hub_model_id a/b --hub_private_repo true --hub_revision dev"),
    ("pmg_aft", "--hub_private_repo true --report_to trackio"),
]


@pytest.mark.parametrize(("method", "line"), ACTING, ids=[f"{row[0]} {row[1]}" for row in ACTING])
def test_what_acts_passes(method, line, monkeypatch):
    monkeypatch.setattr("hf_robust_clip.training.config.get_available_reporting_integrations", lambda: ["trackio"])
    recipe(method, *words_of(line))


def test_another_design_takes_nothing_of_the_configs_own():
    found = recipe("apt", "--prompts.design", "V", "--prompts.vision_depth", "2")
    prompts = found.method.adapter
    assert (prompts.design, prompts.vision_depth, prompts.num_vision_tokens) == ("V", 2, 2)
    assert "text_depth" not in found.source["prompts"]
    assert "text_depth" in recipe("apt").source["prompts"]


def test_a_reference_may_be_one_of_the_checkpoints_however_it_is_written():
    found = evaluation("--compare", "[./model]", "--reference", "model/")
    assert found.reference == "./model"
    assert evaluation("--reference", "digits-clip").reference == "digits-clip"


def test_where_a_push_goes():
    assert recipe("pmg_aft").push is None
    words = ["--push_to_hub", "--hub_model_id", "a/b", "--hub_private_repo", "true", "--hub_token", "mine"]
    push = recipe("pmg_aft", *words).push
    assert (push.repo_id, push.private, push.token) == ("a/b", True, "mine")
    assert recipe("pmg_aft", "--push_to_hub", "true", "--output_dir", "here/new").push.repo_id == "new"


def test_a_push_that_must_fail_is_refused_before_anything_is_loaded(monkeypatch):
    words = ["--push_to_hub", "--hub_model_id", "a/b"]
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
    recipe("pmg_aft", *words, "--hub_token", "mine")
    with pytest.raises(ValueError, match=r"base model.*'\./model'"):
        recipe("apt", *words, "--hub_token", "mine", "--model_name_or_path", "./model")
