from dataclasses import dataclass, fields

import pytest
import torch
from torch.utils.data import Subset
from training_script import arguments, tiny_data, tiny_model, tiny_prompts

from hf_robust_clip import FARE, RobustClipConfig, RobustClipTrainer, TeCoATrainer
from hf_robust_clip.objectives.apt import APT
from hf_robust_clip.objectives.fap import FAP
from hf_robust_clip.objectives.trades import TRADES
from hf_robust_clip.training.config import FREE, REFUSED, _names, compared_arguments, gives_whole_pictures

# What changes what is trained: a new field of the Trainer's is in no group until somebody looks at it.
COMPARED = _names("""
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay momentum adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode
    seed data_seed full_determinism dataloader_drop_last train_sampling_strategy
    eps norm attack_steps attack_step_size attack_random_start attack_bf16 trainable_layers crop_scale flip ema_decay
    jitter brightness contrast saturation hue greyscale erasing
    load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience
    eval_strategy eval_steps eval_delay eval_attack_steps save_strategy save_steps
""")


def test_every_setting_is_in_one_group():
    """A field that a new version of transformers brings must be decided about."""
    names = {f.name for f in fields(RobustClipConfig)}
    groups = [COMPARED, FREE, frozenset(REFUSED)]
    assert names <= frozenset.union(*groups)
    assert sum(map(len, groups)) == len(frozenset.union(*groups))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 0), ("seed", -1), ("seed", 2**32), ("data_seed", 0.5),
        ("dataloader_num_workers", -1), ("log_level", "loud"), ("lr_scheduler_kwargs", {"no_such": 1}),
        ("report_to", "wandb"), ("report_to", ["none", "mlflow"]), ("report_to", "no_such"),
        ("deepspeed", "zero3.json"), ("optim", "adamw_8bit"), ("optim", "galore_adamw"), ("optim", "lion_32bit"),
    ],
)  # fmt: skip
def test_what_would_end_in_an_error_of_a_library_is_refused_before(name, value, tmp_path):
    """None of these packages is installed here."""
    more = {"optim_target_modules": "all-linear"} if value == "galore_adamw" else {}
    if name == "lr_scheduler_kwargs":
        more = {"lr_scheduler_type": "cosine"}
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*$"):
        arguments(tmp_path, **{name: value, **more})


def test_a_setting_in_no_group_is_compared(tmp_path):
    @dataclass
    class Newer(RobustClipConfig):
        brand_new: int = 3

    assert compared_arguments(Newer(str(tmp_path), use_cpu=True, brand_new=4))["brand_new"] == 4


USELESS = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "auto_find_batch_size": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "logging_nan_inf_filter": True,
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "ignore_data_skip": True,
    "dataloader_in_order": False,
    "remove_unused_columns": True,
    "label_names": ["label"],
    "length_column_name": "size",
    "accelerator_config": {"split_batches": True},
    "parallelism_config": "tensor parallel",
    "ddp_static_graph": True,
    "deepspeed": {},
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2},
}


def test_every_refused_setting_is_tried():
    assert USELESS.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", USELESS)
def test_settings_that_do_nothing_or_harm_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, **{name: USELESS[name]})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"accelerator_config": {"even_batches": False}}, "even_batches"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"train_sampling_strategy": "shuffled"}, "train_sampling_strategy='shuffled'"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics"),
        ({"fp16": True}, "fp16"),
        ({"optim_args": "momentum=0.5"}, "optim_args='momentum=0.5'"),
        ({"adam_beta2": 0.9}, "adam_beta2=0.9"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules='all-linear'"),
        ({"optim": "adamw_torch", "momentum": 0.5}, "momentum=0.5"),
        ({"optim": "adamw_torch", "optim_args": "eps=1e-7"}, "optim_args='eps=1e-7'"),
        ({"optim": "adagrad", "optim_args": "eps=1e-7,rho=2"}, "optim_args='rho=2'"),
        ({"optim": "rmsprop", "optim_args": "eps"}, "optim_args='eps'"),
        ({"optim": "rmsprop", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06"),
        ({"optim": "schedule_free_sgd"}, "optim='schedule_free_sgd'"),
        ({"optim": "adalomo"}, "optim='adalomo'"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps=3 .*constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 1}}, "lr_scheduler_kwargs"),
        ({"brightness": 0.2}, "brightness=0.2 .*jitter"),
        ({"saturation": 0.0, "greyscale": 0.2}, "saturation=0.0 .*jitter"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True .*eval_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "ema_decay": 0.9},
            "ema_decay=0.9 .*load_best_model_at_end",
        ),
    ],
)
def test_settings_that_do_nothing_beside_others_are_refused(settings, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_config": {"non_blocking": True}},
        {"train_sampling_strategy": "sequential"},
        {"optim": "adamw_torch", "adam_beta2": 0.9},
        {"optim": "adagrad", "optim_args": "eps=1e-7, lr_decay=0.1"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}, "warmup_steps": 0.25},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"learning_rate": 0},
    ],
)
def test_settings_that_act_are_taken(settings, tmp_path):
    arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value)
          for name in ("learning_rate", "weight_decay", "warmup_steps", "momentum", "max_grad_norm")
          for value in (float("nan"), float("inf"), -1e-3)),
        ("momentum", 1.0),
        ("warmup_steps", 1.5),
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", 2.5),
        ("per_device_eval_batch_size", 0),
        ("eval_attack_steps", 0),
        ("attack_steps", 1.5),
        ("max_steps", 0),
        ("max_steps", -2),
        ("trainable_layers", 1.5),
        ("crop_scale", float("nan")),
        ("flip", -0.1),
        *((name, value) for name in ("jitter", "greyscale", "erasing") for value in (-0.1, 1.1)),
        ("hue", 0.6),
        ("contrast", -1.0),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(name, value, tmp_path):
    shown = "scale" if name == "crop_scale" else name
    with pytest.raises(ValueError, match=f"{shown}=.*{value if name != 'crop_scale' else 'nan'}"):
        arguments(tmp_path, **{"lr_scheduler_type": "cosine", name: value})


def test_no_epochs_and_no_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs=0"):
        arguments(tmp_path, max_steps=-1, num_train_epochs=0)
    with pytest.raises(TypeError, match="learning_rate='1e-5'"):
        arguments(tmp_path, learning_rate="1e-5")


def test_settings_are_asked_again_where_training_starts(tmp_path):
    trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data())
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        trainer.train()


# ---- what goes with a dataset, an adapter, an objective


@pytest.mark.parametrize(
    "change",
    [{"crop_scale": 0.5}, {"flip": 0.0}, {"jitter": 0.8, "hue": 0.2}, {"erasing": 1.0}],
)
def test_crops_that_nobody_makes_are_refused(change, tmp_path):
    """At once where the dataset says that it gives no whole pictures, else with its first batch."""
    name = "jitter" if "jitter" in change else next(iter(change))

    class Pictures(torch.utils.data.Dataset):
        augment = False

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return tiny_data(8)[i]

    for data in (Pictures(), Subset(Pictures(), [0, 1])):
        assert gives_whole_pictures(data) is False
        with pytest.raises(ValueError, match=name):
            TeCoATrainer(tiny_model(), arguments(tmp_path, **change), None, data)
    trainer = TeCoATrainer(tiny_model(), arguments(tmp_path, **change), None, tiny_data())
    with pytest.raises(ValueError, match=name):
        trainer.train()
    assert trainer.state.global_step == 0


def test_crops_of_whole_pictures_follow_the_settings(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 3, 12, 12), generator=generator, dtype=torch.uint8)
    data = [{"picture": picture, "labels": i % 7} for i, picture in enumerate(pictures)]
    seen = []

    class Watched(TeCoATrainer):
        def compute_loss(self, model, inputs, *rest, **more):
            seen.append(inputs["pixel_values"])
            return super().compute_loss(model, inputs, *rest, **more)

    for change in ({}, {"crop_scale": 0.9}, {"jitter": 1.0, "greyscale": 1.0, "erasing": 1.0}):
        Watched(tiny_model(torch.float32), arguments(tmp_path, **change, max_steps=1), None, data).train()
    plain, larger, distorted = seen
    assert not torch.equal(plain, larger)
    weights, black = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1), distorted[:, :1] == 0
    greys = (plain * weights).sum(dim=1, keepdim=True)
    torch.testing.assert_close(distorted[:, :2], distorted[:, 1:])
    assert black.flatten(1).any(dim=1).all() and not black.all()
    assert ((distorted[:, :1] - greys).abs().masked_fill(black, 0).flatten(1).amax(dim=1) > 0.02).all()


def test_layers_and_an_adapter_are_refused_together(tmp_path):
    from peft import LoraConfig

    args = arguments(tmp_path, trainable_layers=1)
    with pytest.raises(ValueError, match=r"trainable_layers=1 .*peft_config"):
        TeCoATrainer(tiny_model(), args, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("objective", [FARE(), TRADES(), FAP(), APT("trades")], ids=lambda o: type(o).__name__)
def test_attacks_that_begin_without_a_gradient_need_a_random_start(objective, tmp_path):
    args = arguments(tmp_path, attack_random_start=False)
    with pytest.raises(ValueError, match=f"attack_random_start=False.*{type(objective).__name__}"):
        RobustClipTrainer(tiny_model(), args, objective, tiny_data())
    TeCoATrainer(tiny_model(), args, APT("adv_full"), tiny_data(), peft_config=tiny_prompts())
