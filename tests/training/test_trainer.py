import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from training_script import Kill, arguments, digits, long_run, state, tiny_data, tiny_model, tiny_prompts
from transformers import CLIPModel, TrainerCallback, TrainingArguments, default_data_collator

from hf_robust_clip import (
    APT,
    FARE,
    PMGAFT,
    TRADES,
    Clean,
    CleanTrainer,
    CLIPForZeroShotClassification,
    FARETrainer,
    PMGAFTTrainer,
    RobustClipConfig,
    RobustClipTrainer,
    TeCoA,
    TeCoATrainer,
    ThreatModel,
    TRADESTrainer,
    pgd,
)
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.runs.train import plain_model
from hf_robust_clip.training.trainer import robust_accuracy

METHODS = {
    "pmg-aft paper": (PMGAFTTrainer, PMGAFT.paper_preset()),
    "pmg-aft released": (PMGAFTTrainer, PMGAFT.released_preset()),
    "tecoa": (TeCoATrainer, TeCoA()),
    "fare": (FARETrainer, FARE()),
    "trades": (TRADESTrainer, TRADES()),
    "clean": (CleanTrainer, Clean()),
}
# a bias on the keys adds the same to all scores of a query; softmax leaves it without a gradient
KEY_BIASES = {f"vision_model.encoder.layers.{i}.self_attn.k_proj.bias" for i in range(2)}


def moved(model, before):
    return {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


# ---- what is trained


@pytest.mark.parametrize("method", METHODS)
def test_vision_encoder_trains_and_nothing_else(method, tmp_path):
    trainer_cls, objective = METHODS[method]
    model = tiny_model()
    before = state(model)
    trainer = trainer_cls(model, arguments(tmp_path), objective, tiny_data())
    assert ("teacher" in objective.needs) == (trainer.teacher is not None)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in before if name.startswith(("vision_model", "visual_projection"))}
    assert moved(model, before) | KEY_BIASES == trained
    if trainer.teacher is not None:
        assert not moved(trainer.teacher, before)
        assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
        assert torch.equal(trainer.teacher.image_mean, model.image_mean)
    trainer.save_model()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(CLIPModel(model.config).state_dict())


def test_trainable_layers_trains_the_last_ones_with_norm_and_projection(tmp_path):
    model = tiny_model()
    trainer = TeCoATrainer(model, arguments(tmp_path, trainable_layers=1), train_dataset=tiny_data())
    before = state(model)
    expected = {
        name
        for name in before
        if name.startswith(("vision_model.encoder.layers.1.", "vision_model.post_layernorm.", "visual_projection."))
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    trainer.train()
    assert moved(model, before) | (KEY_BIASES & expected) == expected


@pytest.fixture
def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def test_adapter_trains_alone_and_merges_into_a_plain_checkpoint(lora, tmp_path, tiny_batch):
    model = tiny_model(torch.float32)
    trainer = PMGAFTTrainer(model, arguments(tmp_path), train_dataset=tiny_data(dtype=torch.float32), peft_config=lora)
    assert lora.exclude_modules is None  # the caller's config stays as it was
    before = state(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 2 * 2  # A and B, of two projections, in two layers
    assert all("vision_model" in name for name in changed)
    images, _ = tiny_batch(dtype=torch.float32)
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=images).logits
        untrained = trainer.teacher(images).logits
    assert (expected - untrained).abs().max() > 1e-3
    plain = trainer.model.merge_and_unload()
    assert type(plain) is CLIPForZeroShotClassification
    plain.save_pretrained(tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(CLIPModel(model.config).state_dict())
    loaded = CLIPForZeroShotClassification.from_pretrained(tmp_path / "merged").eval()
    loaded.set_classes(model.class_names)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapter_resumes_bitwise(lora, tmp_path):
    def train(folder, resume=None, **changes):
        torch.manual_seed(0)
        args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **changes)
        trainer = PMGAFTTrainer(tiny_model(), args, train_dataset=tiny_data(), peft_config=lora)
        trainer.train(resume)
        return state(trainer.model)

    expected = train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    found = train(tmp_path, resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_optimizer_is_the_published_sgd_unless_told(tmp_path):
    def optimizer(optimizers=(None, None), **settings):
        trainer = TeCoATrainer(tiny_model(), arguments(tmp_path, **settings), optimizers=optimizers)
        trainer.create_optimizer()
        return trainer.optimizer

    sgd = optimizer()
    assert isinstance(sgd, torch.optim.SGD)
    assert {(group["momentum"], group["lr"]) for group in sgd.param_groups} == {(0.9, 1e-2)}
    assert {group["momentum"] for group in optimizer(momentum=0.5).param_groups} == {0.5}
    assert isinstance(optimizer(optim="adamw_torch"), torch.optim.AdamW)
    own = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer((own, None)) is own


# ---- the same training however the batch is split


@pytest.mark.parametrize("preset", [PMGAFT.released_preset(), PMGAFT.paper_preset()], ids=["sum", "batch_mean"])
def test_accumulated_single_images_equal_one_batch(preset, tmp_path):
    """21 images in batches of eight: two whole updates, and one of five. Another model as teacher: a large KL."""

    def train(batch, accumulation):
        model = tiny_model()
        args = arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=1,
            learning_rate=0.1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer = PMGAFTTrainer(model, args, preset, tiny_data(21), teacher=tiny_model(seed=5))
        start = state(model)
        trainer.train()
        assert trainer.state.global_step == 3
        return start, state(model)

    start, whole = train(8, 1)
    _, split = train(1, 8)
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-10, msg=name)


DIVISIONS = {
    "6 images": (6, [(6, 1), (4, 2), (2, 3)], 1),
    "7 images, the last update of one": (7, [(6, 1), (2, 3)], 2),
    "11 images, the last update of five": (11, [(6, 1), (3, 2)], 2),
}


@pytest.mark.parametrize(
    ("method", "images"),
    [
        *((name, "11 images, the last update of five") for name in METHODS if name != "clean"),
        *itertools.product(("pmg-aft released", "tecoa"), [*DIVISIONS][:2]),  # what is summed, and what is averaged
    ],
)
def test_an_update_is_that_of_all_its_images_however_they_are_divided(method, images, tmp_path):
    """Batches of unequal size, in an epoch's last update too, weigh as many images as they have."""
    trainer_cls, objective = METHODS[method]
    count, divisions, updates = DIVISIONS[images]
    ends = []
    for batch, accumulation in divisions:
        args = arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=1,
            learning_rate=0.1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        teacher = tiny_model(seed=5) if "teacher" in objective.needs else None
        trainer = trainer_cls(tiny_model(), args, objective, tiny_data(count), teacher=teacher)
        trainer.train()
        assert trainer.state.global_step == updates
        logs = [{name: log[name] for name in log if name != "epoch"} for log in trainer.state.log_history[:updates]]
        ends.append((state(trainer.model), logs))
    assert max(float((ends[0][0][name] - tensor).abs().max()) for name, tensor in state(tiny_model()).items()) > 1e-4
    for weights, logs in ends[1:]:
        for name, tensor in ends[0][0].items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-10, msg=name)
        for log, expected in zip(logs, ends[0][1], strict=True):
            assert log == pytest.approx(expected, rel=1e-6)


def test_batches_that_no_update_counts_are_taken_as_they_are(tmp_path):
    """`compute_loss` by itself: the plain mean over the batch."""
    trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data())
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    batch = trainer.make_batch(inputs, trainer.model)
    with trainer.attacking(trainer.model):
        loss_fn = trainer.training_objective.attack_loss(batch)
        adv = trainer.perturb(loss_fn, batch.images, 2, trainer.seed_of_step())
    assert loss.item() == pytest.approx(cross_entropy(trainer.model(adv).logits, inputs["labels"]).mean().item())


def test_incomplete_batches_train(tmp_path):
    """21 images by (8, 8) and (5): micro-batches and updates both incomplete."""
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer = PMGAFTTrainer(tiny_model(), args, PMGAFT.released_preset(), tiny_data(21))
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


def test_bf16_is_close_to_float32_and_gives_float32_logits(tmp_path):
    losses, dtypes = {}, []
    for bf16 in (False, True):
        model = tiny_model(torch.float32)
        args = arguments(tmp_path, bf16=bf16, per_device_eval_batch_size=8)
        trainer = PMGAFTTrainer(model, args, PMGAFT.released_preset(), tiny_data(dtype=torch.float32))
        layer = model.vision_model.encoder.layers[0].mlp.fc1
        handle = layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        trainer.train()
        losses[bf16] = logged(trainer, "loss")
        assert set(dtypes) == {torch.bfloat16 if bf16 else torch.float32}  # attack included
        handle.remove()
        dtypes.clear()
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.accelerator.autocast():
            output = model(batch["pixel_values"])
        assert output.logits.dtype == output.cosine.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(math.isfinite(loss) for loss in losses[True])
    assert losses[True] != losses[False]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.05)


# ---- interruption


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder that a process killed after step 10 of 12 leaves."""
    folder = tmp_path_factory.mktemp("killed")
    process = os.fork()
    if process == 0:
        try:
            long_run(folder, [Kill()]).train()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = long_run(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def nothing(folder):
    pass


def cut_weights(folder):
    newest = folder / "checkpoint-10"
    shutil.copytree(folder / "checkpoint-8", newest)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_before_the_state(folder):
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-10")
    (folder / "checkpoint-10" / "trainer_state.json").unlink()


@pytest.mark.parametrize("damage", [nothing, cut_weights, cut_before_the_state])
def test_killed_run_ends_as_if_it_had_not_been(damage, killed, uninterrupted, tmp_path):
    """Weights bitwise, and every logged loss: data order, momentum, schedule and the attack's random starts go on."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damage(folder)
    trainer = long_run(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    expected = state(uninterrupted.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(trainer.model).items())
    for key in ("step", "loss", "ce", "kl_general", "kl_clean", "learning_rate"):
        assert logged(trainer, key)[:12] == logged(uninterrupted, key)[:12], key
    assert len(set(logged(uninterrupted, "ce"))) == 12


@pytest.mark.parametrize("damage", [cut_weights, cut_before_the_state])
def test_named_checkpoint_that_is_cut_short_is_refused(damage, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damage(folder)
    with pytest.raises(OSError, match="checkpoint-10' is not whole: "):
        long_run(folder).train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    with pytest.raises(OSError, match="checkpoint-11"):
        long_run(folder).train(resume_from_checkpoint=str(folder / "checkpoint-11"))


def test_resume_needs_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        long_run(tmp_path).train(resume_from_checkpoint=True)


@dataclass(frozen=True)
class Explodes(TeCoA):
    """Two finite terms, the second of which is infinite from the second step on."""

    calls: list = field(default_factory=list)

    def __call__(self, batch, adv_BCHW):
        self.calls.append(1)
        term = super().__call__(batch, adv_BCHW)["ce"]
        return {"ce": term, "second": term * (math.inf if len(self.calls) > 1 else 1)}


def test_non_finite_loss_stops_the_run_before_it_is_saved(tmp_path):
    assert RobustClipConfig(output_dir=str(tmp_path), report_to="none").logging_nan_inf_filter is False
    model = tiny_model()
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = TeCoATrainer(model, args, Explodes(), tiny_data())
    with pytest.raises(FloatingPointError, match="step 2: the loss term 'second' is inf"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in state(model).items() if name in saved)


# ---- evaluation and logs


def test_evaluate_counts_every_image_and_changes_nothing(tmp_path):
    """Twenty digits by batches of three, against accuracy worked out in one batch."""
    model, data = digits(20)
    model.eval()
    images = torch.stack([example["pixel_values"] for example in data])
    labels = torch.tensor([example["labels"] for example in data])
    strong = dict(eps="12/255", attack_step_size="6/255", per_device_eval_batch_size=3)
    trainer = TeCoATrainer(model, arguments(tmp_path, **strong), eval_dataset=data)
    before = state(model)

    def loss(adv):
        return cross_entropy(model(adv).logits, labels)

    adv = pgd(loss, images, ThreatModel("12/255"), num_steps=2, step_size="6/255", seed=3 << 32)
    with torch.no_grad():
        logits, adv_logits = model(images).logits, model(adv).logits
    right, right_adv = (z.argmax(dim=1) == labels for z in (logits, adv_logits))
    clean, robust = float(right.double().mean()), float((right & right_adv).double().mean())
    assert 0 < robust < clean

    metrics = trainer.evaluate()
    assert metrics["eval_clean_accuracy"] == pytest.approx(clean)
    assert metrics["eval_robust_accuracy"] == pytest.approx(robust)
    assert metrics["eval_loss"] == pytest.approx(float(cross_entropy(adv_logits, labels).mean()), rel=1e-5)
    prediction = trainer.predict(data)
    for found, expected in zip(prediction.predictions, (logits, adv_logits), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected.float(), rtol=1e-5, atol=1e-4)
    assert prediction.label_ids.tolist() == labels.tolist()
    assert prediction.metrics["test_robust_accuracy"] == metrics["eval_robust_accuracy"]
    assert not moved(model, before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(("vision_model", "visual_projection"))
    }


def test_a_model_has_one_robust_accuracy_whatever_the_step(tmp_path):
    """Radii at which the random start decides over some images."""
    model, data = digits(60)
    args = arguments(tmp_path, eps="12/255", attack_step_size="1/255", eval_attack_steps=1)
    trainer = TeCoATrainer(model, args, eval_dataset=data)
    found = []
    for step, seed in ((0, 3), (17, 3), (4242, 3), (0, 4)):
        trainer.state.global_step, trainer.args.seed = step, seed
        found.append(trainer.predict(data).predictions[1])
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert (found[0] != found[3]).any()


def test_evaluation_drops_no_image_where_training_does(tmp_path):
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data(), tiny_data(6))
    assert len(trainer.predict(tiny_data(6)).label_ids) == 6
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 6
    assert args.dataloader_drop_last


def test_logits_that_are_not_finite_are_no_accuracy(tmp_path):
    model = tiny_model()
    trainer = TeCoATrainer(model, arguments(tmp_path), None, None, tiny_data(5))
    with torch.no_grad():
        model.logit_scale.fill_(1e4)
    with pytest.raises(FloatingPointError, match="5 of 5"):
        trainer.evaluate()


def test_after_an_interruption_a_trainer_is_not_in_training(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data(), callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.is_in_train


def test_the_order_of_images_follows_the_seed_not_what_ran_before(tmp_path):
    ends = []
    for disturb in (False, True):
        trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data(), tiny_data(5))
        if disturb:
            torch.manual_seed(99)
            trainer.evaluate()
        trainer.train()
        ends.append(state(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---- what cards and logs say


@pytest.mark.parametrize(
    ("objective", "couples"),
    [(APT(), True), (APT("adv_full"), False), (APT("trades"), False), *((o, False) for _, o in METHODS.values())],
)
def test_coupled_images_are_said_where_they_are(objective, couples, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_robust_clip.training.trainer")
    assert objective.couples_images is couples
    for batch, accumulation, said in ((8, 1, False), (4, 2, couples))[not couples :]:
        caplog.clear()
        args = arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        prompts = tiny_prompts() if objective.peft_config else None
        trainer = RobustClipTrainer(tiny_model(), args, objective, tiny_data(), peft_config=prompts)
        trainer.train()
        assert [record.levelname for record in caplog.records if "forward batches" in record.message] == [
            "INFO"
        ] * said
        assert trainer.settings().get("couples_images") == (f"within forward batches of {batch}" if couples else None)


def test_settings_say_what_the_weights_were_trained_by(tmp_path):
    model = tiny_model(torch.float32)
    adam = torch.optim.Adam(model.vision_model.parameters(), lr=0.25, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 / (1 + step))
    trainer = TeCoATrainer(model, arguments(tmp_path), None, tiny_data(), optimizers=(adam, schedule))
    trainer.train()
    found = trainer.settings()
    assert [found[name] for name in ("optimizer", "learning_rate", "weight_decay", "schedule")] == [
        "Adam", 0.25, 0.5, "LambdaLR",
    ]  # fmt: skip
    assert found["precision"] == "float32"
    assert not {"momentum", "warmup_steps"} & found.keys()
    own = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data()).settings()
    assert (own["optimizer"], own["learning_rate"], own["momentum"]) == ("sgd", 1e-2, 0.9)
    assert own["precision"] == "float64"


def test_evaluation_in_training_changes_nothing_of_it(tmp_path):
    ends = []
    for strategy in ("no", "steps"):
        trainer = PMGAFTTrainer(
            tiny_model(), arguments(tmp_path, eval_strategy=strategy, eval_steps=1), None, tiny_data(), tiny_data(5)
        )
        trainer.train()
        ends.append(state(trainer.model))
    assert logged(trainer, "eval_robust_accuracy")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_best_model_by_robust_accuracy_is_loaded_at_the_end(tmp_path):
    values = iter([0.1, 0.9, 0.3])

    def scripted(prediction):
        return {**robust_accuracy(prediction), "robust_accuracy": next(values)}

    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="robust_accuracy",
    )
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data(), tiny_data(5), compute_metrics=scripted)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert (trainer.settings()["updates"], trainer.settings()["weights_of_update"]) == (3, 2)
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3)}
    found = state(trainer.model)
    assert all(torch.equal(found[name], saved[2][name]) for name in saved[2])
    assert any(not torch.equal(found[name], saved[3][name]) for name in saved[3])


def test_robust_needs_both_clean_and_adversarial_right():
    clean = torch.eye(4).numpy()
    adv = torch.eye(4)[[0, 1, 3, 3]].numpy()  # the third falls; the fourth was wrong before and is right now
    labels = torch.tensor([0, 1, 2, 3]).numpy()
    clean[3] = [1, 0, 0, 0]
    prediction = type("P", (), {"predictions": (clean, adv), "label_ids": labels})
    assert robust_accuracy(prediction) == {"clean_accuracy": 0.75, "robust_accuracy": 0.5}


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("pmg-aft released", ["ce", "kl_general", "kl_clean"]),
        ("trades", ["ce", "kl"]),
        ("fare", ["embedding_l2"]),
        ("clean", ["ce"]),
    ],
)
def test_logs_name_the_terms_that_make_up_the_loss(method, names, tmp_path):
    trainer_cls, objective = METHODS[method]
    args = arguments(tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    teacher = tiny_model(seed=5) if "teacher" in objective.needs else None  # another model: no term is near 0
    trainer = trainer_cls(tiny_model(), args, objective, tiny_data(64), teacher=teacher)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert sum(log[name] for name in names) == pytest.approx(log["loss"], abs=2e-4)
        assert all(log[name] > 0 for name in names)
    trainer.save_state()
    assert names[0] in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]


# ---- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": "8"}, "8/255"),
        ({"eps": "-1/255"}, "at least 0"),
        ({"eps": "one"}, "not a number or a fraction"),
        ({"norm": "l3"}, "norm='l3' is unknown"),
        ({"attack_step_size": "0"}, "step_size=0"),
        ({"attack_steps": 0}, "attack_steps=0"),
    ],
)
def test_settings_that_no_attack_can_have_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_things_of_another_class_are_refused(tmp_path):
    clip = CLIPModel(tiny_model().config)
    with pytest.raises(TypeError, match="model is a CLIPModel"):
        PMGAFTTrainer(clip, arguments(tmp_path))
    with pytest.raises(TypeError, match="args is a TrainingArguments; give a RobustClipConfig"):
        PMGAFTTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    with pytest.raises(TypeError, match="teacher is a CLIPModel"):
        PMGAFTTrainer(tiny_model(), arguments(tmp_path), teacher=clip)
    with pytest.raises(ValueError, match="objective is missing"):
        RobustClipTrainer(tiny_model(), arguments(tmp_path))


def test_model_without_classes_is_refused_unless_labels_are_not_needed(tmp_path):
    with pytest.raises(ValueError, match=r"no classes; call model\.set_classes"):
        PMGAFTTrainer(tiny_model(classes=None), arguments(tmp_path))
    unlabelled = [{"pixel_values": example["pixel_values"]} for example in tiny_data()]
    ends = []
    for model, data in ((tiny_model(classes=None), unlabelled), (tiny_model(), tiny_data())):
        FARETrainer(model, arguments(tmp_path), train_dataset=data).train()
        ends.append(state(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_teacher_of_another_architecture_is_refused(tmp_path):
    for change in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"patch_size": 4}, {"image_size": 16}):
        config = tiny_model().config
        for name, value in change.items():
            setattr(config.vision_config, name, value)
        teacher = CLIPForZeroShotClassification(config)
        with pytest.raises(ValueError, match=f"another architecture: its vision {next(iter(change))}"):
            PMGAFTTrainer(tiny_model(), arguments(tmp_path), teacher=teacher)


def test_given_teacher_is_used_and_left_alone(tmp_path):
    teacher = tiny_model(seed=5)
    teacher.set_classes(["a", "b"])
    before, mean = state(teacher), teacher.image_mean.clone()
    ends = []
    for given in (None, teacher):
        trainer = PMGAFTTrainer(
            tiny_model(), arguments(tmp_path), PMGAFT.released_preset(), tiny_data(), teacher=given
        )
        trainer.train()
        ends.append(state(trainer.model))
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not moved(teacher, before)
    assert torch.equal(teacher.image_mean, mean)
    assert teacher.class_names == ("a", "b")


@pytest.mark.parametrize("layers", [0, -1, 3])
def test_layers_that_the_encoder_lacks_are_refused(layers, tmp_path):
    with pytest.raises(ValueError, match=rf"trainable_layers={layers} must be None or in 1 \.\. 2"):
        PMGAFTTrainer(tiny_model(), arguments(tmp_path, trainable_layers=layers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 7}, r"labels lie in .* 7, but there are 7 classes"),
        ({"labels": -1}, r"labels lie in -1"),
        ({"labels": None}, "needs labels"),
        ({"pixel_values": torch.full((3, 8, 8), 1.5)}, r"outside \[0.0, 1.0\]"),
        ({"pixel_values": torch.full((3, 8, 8), -0.5)}, r"outside \[0.0, 1.0\]"),
        ({"pixel_values": torch.zeros(1, 8, 8)}, "shape"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, "shape"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_the_first_step(change, message, tmp_path):
    data = [{**example, **change} for example in tiny_data()]
    data = [{key: value for key, value in example.items() if value is not None} for example in data]
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        PMGAFTTrainer(model, arguments(tmp_path), train_dataset=data).train()
    assert not moved(model, before)


def test_values_are_checked_without_an_attack_and_the_own_collator(tmp_path):
    data = [{**example, "pixel_values": 255 * example["pixel_values"]} for example in tiny_data()]
    trainer = CleanTrainer(tiny_model(), arguments(tmp_path), None, data, data_collator=default_data_collator)
    with pytest.raises(ValueError, match="Did you normalise them"):
        trainer.train()


def test_evaluation_without_labels_is_refused(tmp_path):
    unlabelled = [{"pixel_values": example["pixel_values"]} for example in tiny_data()]
    with pytest.raises(ValueError, match="labels"):
        FARETrainer(tiny_model(), arguments(tmp_path)).evaluate(unlabelled)


def test_adapter_that_reaches_the_text_tower_is_refused(tmp_path):
    config = LoraConfig(target_modules=r".*text_model.*\.q_proj", exclude_modules="nothing")
    with pytest.raises(ValueError, match="peft_config reaches the text tower"):
        PMGAFTTrainer(tiny_model(), arguments(tmp_path), peft_config=config)


def test_compiled_training_gives_the_same_losses(tmp_path):
    losses = []
    for compiled in (False, True):
        args = arguments(
            tmp_path / str(compiled), max_steps=2, torch_compile=compiled, torch_compile_backend="aot_eager"
        )
        trainer = PMGAFTTrainer(tiny_model(), args, None, tiny_data())
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
        assert any(parameter.requires_grad for parameter in trainer.model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_model_of_a_bf16_run_is_evaluated_in_float32(tmp_path):
    data = tiny_data(dtype=torch.float32)
    trainer = TeCoATrainer(tiny_model(torch.float32), arguments(tmp_path, max_steps=1, bf16=True), None, data)
    trainer.train()
    plain = plain_model(trainer)[0].eval()
    plain.save_pretrained(tmp_path / "saved")
    again = CLIPForZeroShotClassification.from_pretrained(tmp_path / "saved").eval()
    again.set_classes(plain.class_names, plain.templates)
    images = data[0]["pixel_values"][None]
    with torch.no_grad():
        torch.testing.assert_close(plain(images).image_embeds, again(images).image_embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain(images).logits, again(images).logits, rtol=1e-5, atol=1e-5)
