import json
import random
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from training_script import arguments, state, tiny_data, tiny_model, tiny_prompts

from hf_robust_clip import APT, FARE, PMGAFT, TRADES, FARETrainer, RobustClipTrainer, TeCoA
from hf_robust_clip.training.checkpoints import RUN_FILE, NothingToResume
from hf_robust_clip.training.identity import data_identity, differences, plain, training_identity, weights_digest


def make(
    folder, objective=None, data=None, eval_data=None, model=None, teacher=None, optimizers=(None, None), lora=None,
    **changes,
):  # fmt: skip
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine", warmup_steps=1)
    return RobustClipTrainer(
        tiny_model() if model is None else model,
        arguments(folder, **{**settings, **changes}),
        PMGAFT() if objective is None else objective,
        tiny_data(16) if data is None else data,
        eval_data,
        teacher=teacher,
        peft_config=lora,
        optimizers=optimizers,
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A training that ended early, and the weights with which it would have ended."""
    folder = tmp_path_factory.mktemp("begun")
    trainer = make(folder)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-4")
    return folder, state(trainer.model)


@pytest.fixture
def folder(begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "run")
    return tmp_path / "run"


def other_images():
    data = tiny_data(16)
    data[7] = {**data[7], "pixel_values": data[7]["pixel_values"].flip(0)}
    return data


def other_label():
    data = tiny_data(16)
    data[3] = {**data[3], "labels": 0}
    return data


def other_classes():
    model = tiny_model()
    model.set_classes([*model.class_names[:-1], "ten"])
    return model


def with_descriptions(last):
    """A model whose classes have several texts each."""
    model = tiny_model()
    names = model.class_names
    model.set_classes(names, descriptions={name: [f"a {name}", f"{name} {last}"] for name in names})
    return model


def other_weights():
    model = tiny_model()
    with torch.no_grad():
        model.text_model.final_layer_norm.bias[0] += 1e-6
    return model


def other_heads():
    """The same weights, read by twice as many heads."""
    model = tiny_model()
    model.vision_model.config.num_attention_heads *= 2
    return model


OTHERS = {
    "method": (dict(objective=TeCoA()), "method was 'PMG-AFT', is 'TeCoA' now"),
    "fare": (dict(objective=FARE()), "method was 'PMG-AFT', is 'FARE' now"),
    "objective": (dict(objective=PMGAFT(alpha=0.5)), "objective.alpha was 1.0, is 0.5 now"),
    "normalisation": (dict(objective=PMGAFT(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)), "objective.image_mean"),
    "eps": (dict(eps="24/255"), "arguments.eps was '8/255', is '24/255' now"),
    "norm": (dict(norm="l2"), "arguments.norm was 'linf', is 'l2' now"),
    "steps of the attack": (dict(attack_steps=3), "arguments.attack_steps was 2, is 3 now"),
    "learning rate": (dict(learning_rate=0.02), "arguments.learning_rate was 0.01, is 0.02 now"),
    "seed": (dict(seed=4), "arguments.seed was 3, is 4 now"),
    "optimizer": (dict(optim="adamw_torch"), "arguments.optim was 'sgd', is 'adamw_torch' now"),
    "fewer steps": (dict(max_steps=3), "arguments.max_steps was 4, is 3 now"),
    "more steps": (dict(max_steps=6), "arguments.max_steps was 4, is 6 now"),
    "epochs": (dict(max_steps=-1, num_train_epochs=2), "arguments.max_steps was 4, is -1 now"),
    "precision": (dict(bf16=True), "arguments.bf16 was False, is True now"),
    "layers": (dict(trainable_layers=1), "arguments.trainable_layers was None, is 1 now"),
    "images per update": (dict(per_device_train_batch_size=4), "images_per_update was 8, is 4 now"),
    "images": (lambda: dict(data=other_images()), "data.digest"),
    "fewer images": (lambda: dict(data=tiny_data(15)), "data.images was 16, is 15 now"),
    "label": (lambda: dict(data=other_label()), "data.digest"),
    "classes": (lambda: dict(model=other_classes()), "model.classes"),
    "descriptions": (lambda: dict(model=with_descriptions("b")), "model.templates was"),
    "weights": (lambda: dict(model=other_weights()), "model.weights"),
    "heads": (lambda: dict(model=other_heads()), r"vision_config.num_attention_heads was 2, is 4 now"),
    "teacher": (lambda: dict(teacher=tiny_model(seed=5)), "teacher was None"),
    "adapter": (lambda: dict(lora=LoraConfig(r=2, target_modules=["q_proj"])), "adapter"),
    "own optimizer": (
        lambda: dict(optimizers=(torch.optim.SGD(tiny_model().parameters(), lr=0.3), None)), "optimizer.class"
    ),
}  # fmt: skip


def test_the_division_is_compared_where_the_objective_looks_at_it(tmp_path):
    for objective, others in ((APT("adv_half"), True), (APT("adv_full"), False)):
        found = [
            training_identity(arguments(tmp_path, **division), objective, None, (None, None))
            for division in (
                dict(per_device_train_batch_size=8),
                dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
            )
        ]
        assert any("images_per_forward" in text for text in differences(*found)) == others == bool(differences(*found))


def test_other_descriptions_are_another_training(tmp_path):
    found = [make(tmp_path, model=with_descriptions(last)).start_identity() for last in "bcb"]
    (told,) = differences(found[0], found[1])
    assert told.startswith("model.descriptions was") and not differences(found[0], found[2])


@pytest.mark.parametrize("what", OTHERS)
def test_another_training_does_not_go_on(what, folder):
    changes, named = OTHERS[what]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    trainer = make(folder, **(changes() if callable(changes) else changes))
    weights = state(trainer.model)
    for resume in (True, str(folder / "checkpoint-2")):
        with pytest.raises(ValueError, match=named) as refused:
            trainer.train(resume_from_checkpoint=resume)
        assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state(trainer.model).items())


SAME = {
    "nothing": {},
    "eps as a number": dict(eps=str(8 / 255)),
    "logging": dict(logging_steps=2, save_total_limit=5),
    "evaluation settings without evaluations": dict(eval_attack_steps=7, metric_for_best_model="loss"),
    "division": dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
    "memory": dict(gradient_checkpointing=True, per_device_eval_batch_size=3),
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_training_goes_on_to_the_same_end(what, folder, begun):
    trainer = make(folder, **SAME[what])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for name, tensor in state(trainer.model).items():
        torch.testing.assert_close(tensor, begun[1][name], rtol=0, atol=1e-10 if what == "division" else 0)


def test_resume_may_stand_in_the_arguments(folder, begun):
    trainer = make(folder, resume_from_checkpoint=str(folder / "checkpoint-2"))
    trainer.train()
    assert len([log for log in trainer.state.log_history if "loss" in log]) == 4
    assert trainer.state.log_history[0]["step"] == 1, "the first two were read from the checkpoint"
    assert trainer._initial_global_step == 2
    trainer = make(folder, resume_from_checkpoint=str(folder / "checkpoint-9"))
    with pytest.raises(OSError, match="checkpoint-9"):
        trainer.train()


def test_a_trainer_goes_on_from_its_own_checkpoint(folder, begun):
    """Though its model is trained by now; and starts another training if it begins with these weights."""
    trainer = make(folder)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in state(trainer.model).items())
    trainer.train()
    with pytest.raises(ValueError, match=r"model\.weights"):
        make(folder).train(resume_from_checkpoint=True)


def test_checkpoints_say_it_and_nothing_else_does(begun, tmp_path):
    run = json.loads((begun[0] / "checkpoint-2" / RUN_FILE).read_text())["run"]
    assert run["method"] == "PMG-AFT"
    assert run["objective"]["alpha"] == 1.0
    assert run["data"]["images"] == 16
    assert run["model"]["classes"][0] == "zero"
    assert [path.name for path in begun[0].rglob(RUN_FILE)] == [RUN_FILE]
    trainer = make(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / RUN_FILE).exists()


@pytest.mark.parametrize("text", [None, "{", "\udcff"])
def test_a_checkpoint_that_does_not_say_it_is_refused(text, folder):
    file = folder / "checkpoint-2" / RUN_FILE
    file.unlink()
    if text is not None:
        file.write_text(text, errors="surrogateescape")
    with pytest.raises(OSError, match=f"checkpoint-2.*{RUN_FILE}"):
        make(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(NothingToResume):
        make(folder).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["lora", "prompts"])
def test_settings_of_an_adapter_are_compared(kind, tmp_path):
    def adapter(size):
        if kind == "lora":
            return LoraConfig(r=2, lora_alpha=size, target_modules=["q_proj"])
        return tiny_prompts(num_vision_tokens=size)

    objective = TeCoA() if kind == "lora" else APT("adv_full")
    make(tmp_path, objective, lora=adapter(2), max_steps=2).train()
    trainer = make(tmp_path, objective, lora=adapter(2), max_steps=2)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)  # as another device may draw other numbers from the seed
    trainer.train(resume_from_checkpoint=True)
    other = make(tmp_path, objective, lora=adapter(3), max_steps=2)
    with pytest.raises(ValueError, match=r"adapter\.default\."):
        other.train(resume_from_checkpoint=True)


def test_evaluations_are_compared_where_they_decide(tmp_path):
    def trainer(data, **changes):
        chosen = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, max_steps=2)
        return make(tmp_path, TRADES(), eval_data=data, **{**chosen, **changes})

    trainer(tiny_data(5)).train()
    trainer(tiny_data(5)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"arguments\.eval_attack_steps was 2, is 3 now"):
        trainer(tiny_data(5), eval_attack_steps=3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"eval_data\.images was 5, is 6 now"):
        trainer(tiny_data(6)).train(resume_from_checkpoint=True)


def test_best_weights_are_those_beside_the_checkpoint(tmp_path):
    """Of a folder that was moved, though its old place holds another training by now."""

    def trainer(folder, values, **changes):
        chosen = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=3)
        made = make(folder, TeCoA(), eval_data=tiny_data(5), **{**chosen, **changes})
        values = iter(values)
        made.compute_metrics = lambda prediction: {"value": next(values)}
        made.args.metric_for_best_model, made.args.greater_is_better = "value", True
        return made

    old, new = tmp_path / "old", tmp_path / "new"
    whole = trainer(old, [0.9, 0.5, 0.7])
    whole.train()
    shutil.copytree(old, new)
    shutil.rmtree(new / "checkpoint-3")
    trainer(old, [0.1, 0.2, 0.3], seed=5).train()
    resumed = trainer(new, [0.7])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.settings()["weights_of_update"] == 1
    assert all(torch.equal(t, state(whole.model)[name]) for name, t in state(resumed.model).items())
    shutil.rmtree(new / "checkpoint-3")
    shutil.rmtree(new / "checkpoint-1")
    with pytest.raises(OSError, match="checkpoint-1"):
        trainer(new, [0.7]).train(resume_from_checkpoint=True)
    shutil.copytree(old / "checkpoint-1", new / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1.*arguments\.seed was 5, is 3 now"):
        trainer(new, [0.7]).train(resume_from_checkpoint=True)


def test_labels_are_not_needed_to_know_the_data(tmp_path):
    unlabelled = [{"pixel_values": example["pixel_values"]} for example in tiny_data(16)]
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    for resume in (None, True):
        FARETrainer(tiny_model(), args, train_dataset=unlabelled).train(resume)


# ---- its parts


class Transformed:
    """Images that are drawn anew each time, as torchvision's transforms do, from the global random numbers."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        noise = torch.rand(3, 8, 8) * random.random() * np.random.rand()
        return {"pixel_values": noise, "labels": i}


class Counting(Transformed):
    """Images of which no two are alike, whatever the random numbers are."""

    drawn = 0

    def __getitem__(self, i):
        self.drawn += 1
        return {"pixel_values": torch.full((3, 8, 8), float(self.drawn)), "labels": i}


def test_random_transforms_leave_the_digest_and_the_random_numbers_alone(tmp_path):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    args = arguments(tmp_path)
    first = data_identity(Transformed(), None, args)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert data_identity(Transformed(), None, args) == first
    assert first["data"]["digest"] is not None
    assert data_identity(Counting(), None, args)["data"] == {"digest": None, "images": 6}


def test_streams_have_no_digest(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError("a stream can be read once")

    assert data_identity(Stream(), None, arguments(tmp_path))["data"] == {"digest": None, "images": None}


def test_digest_of_weights_changes_with_every_kind_of_tensor():
    base = weights_digest(tiny_model())
    assert weights_digest(tiny_model()) == base
    for name in ("logit_scale", "vision_model.embeddings.class_embedding", "text_projection.weight"):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1e-9
        assert weights_digest(model) != base, name
    assert weights_digest(tiny_model(torch.float32)) != base
    assert weights_digest(tiny_model(torch.bfloat16))


def test_values_become_plain_and_differences_short():
    class Odd:
        pass

    assert plain({1: (torch.ones(2), np.float32(0.5), {"b", "a"})}) == {"1": [[1.0, 1.0], 0.5, ["a", "b"]]}
    assert plain(Odd()) == plain(Odd())
    (text,) = differences({"a": {"b": list(range(1000))}}, {"a": {"b": [1]}})
    assert text.startswith("a.b was [0, 1, 2") and "(1000 entries)" in text and len(text) < 120
    assert differences({"a": 1}, {"a": 1, "new": 2}) == ["new was None, is 2 now"]
