import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from plain_forward import block
from prompted_clip import make_base, make_images, make_prompted, randomise
from safetensors.torch import load_file, save_file
from tiny import make_processor
from torch.nn import functional as F

from hf_robust_clip.defences import fit
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.fit import collect_statistics, fingerprints
from hf_robust_clip.defences.moments import RunningMoments, VisionStatistics, layer_inputs
from hf_robust_clip.defences.prompt_align import PromptAlign
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.prompts.layer import ClipPromptLayer
from hf_robust_clip.zero_shot_data.loading import ImageDataset

CLOSE = dict(rtol=0, atol=1e-10)


def classifier(row="VLI", **changes):
    return make_prompted(row, **changes).get_base_model()


def examples(count=11, seed=0, dtype=torch.float64):
    return [{"pixel_values": image, "labels": i % 6} for i, image in enumerate(make_images(count, seed, dtype))]


def read_by_layers(model, images):
    """What the layers read, L tensors (N, T, D), by a forward written out in plain tensors."""
    model = model.double()
    weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    vision, name = model.config.vision_config, "vision_model.pre_layrnorm"
    prompted = {m.place: m.prompts() for m in model.modules() if isinstance(m, ClipPromptLayer)}
    prompts = {place.index: p for place, p in prompted.items() if place.tower == "vision"}
    size, rows = vision.patch_size, []
    for image in (images - model.image_mean) / model.image_std:
        patches = F.unfold(image[None], size, stride=size)[0].T
        x = patches @ weights["vision_model.embeddings.patch_embedding.weight"].flatten(1).T
        x = torch.cat([weights["vision_model.embeddings.class_embedding"][None], x])
        x = torch.cat([x + weights["vision_model.embeddings.position_embedding.weight"], *prompts.get(0, x[:0])[None]])
        x = F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
        own = []
        for i in range(vision.num_hidden_layers):
            if i in prompts and i > 0:
                x = torch.cat([x[: -len(prompts[i])], prompts[i]])
            own.append(x)
            x = block(weights, f"vision_model.encoder.layers.{i}.", x, vision.num_attention_heads, "quick_gelu", False)
        rows.append(torch.stack(own))
    return torch.stack(rows, dim=1)


def two_passes(model, data):
    inputs_LNTD = read_by_layers(model, torch.stack([example["pixel_values"] for example in data]))
    return inputs_LNTD.mean(dim=1), inputs_LNTD.var(dim=1, correction=0)


def is_close(found, mean, variance):
    torch.testing.assert_close(found.mean, mean.detach(), **CLOSE)
    torch.testing.assert_close(found.variance, variance.detach(), **CLOSE)
    return True


# ---- what layers read


@pytest.mark.parametrize("row", ["V", "VLI", "VLJ", "T"])
def test_layer_inputs_are_those_of_a_plain_forward(row):
    model, images = classifier(row), make_images(3)
    with layer_inputs(model) as inputs:
        assert inputs == []
        model.encode_images(images)
        torch.testing.assert_close(torch.stack(list(inputs)), read_by_layers(model, images), **CLOSE)
        first = list(inputs)
        model.encode_images(make_images(2, seed=1))
        assert [len(hidden) for hidden in inputs] == [2, 2, 2] and len(first[0]) == 3
    model.encode_images(images)
    assert len(inputs) == 3 and len(inputs[0]) == 2  # no longer filled
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layer_inputs_have_a_graph_and_hooks_go_after_an_error():
    model = classifier("V")
    prompts = [p for p in model.parameters() if p.requires_grad]
    with layer_inputs(model) as inputs:
        model.encode_images(make_images(2))
    grads = torch.autograd.grad(inputs[2].square().sum(), prompts)
    with pytest.raises(ValueError, match="image size"), layer_inputs(model):
        model.encode_images(torch.zeros(1, 3, 5, 5))
    assert all(grad.abs().max() > 0 for grad in grads) and len(grads) == 3
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- moments


@pytest.mark.parametrize("row", ["V", "VLJ"])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_one_pass_is_two_passes(row, batch_size):
    model, data = classifier(row), examples()
    found = collect_statistics(model, data, batch_size=batch_size)
    assert found.count == 11 and found.mean.dtype == found.variance.dtype == torch.float64
    assert is_close(found, *two_passes(model, data)) and found.variance.max() > 0.1


def test_merged_parts_are_the_whole_even_far_from_zero():
    """A mean of 1e6 and a variance of 1: the difference of mean squares would keep four digits."""
    generator = torch.Generator().manual_seed(0)
    inputs = 1e6 + torch.randn(2, 23, 3, 4, generator=generator, dtype=torch.float64)
    parts = [RunningMoments() for _ in range(3)]
    for moments, rows in zip(parts, (slice(0, 9), slice(9, 9), slice(9, 23)), strict=True):
        for start in range(rows.start, rows.stop, 5):
            moments.update(list(inputs[:, start : min(start + 5, rows.stop)]))
    whole = RunningMoments()
    for moments in parts:
        whole.merge(moments)
    assert whole.count == 23
    torch.testing.assert_close(whole.statistics({}).mean, inputs.mean(dim=1), rtol=1e-15, atol=0)
    torch.testing.assert_close(whole.statistics({}).variance, inputs.var(dim=1, correction=0), rtol=0, atol=1e-8)
    shifted = RunningMoments()
    shifted.update(list(inputs - 1e6))
    torch.testing.assert_close(shifted.statistics({}).variance, inputs.var(dim=1, correction=0), rtol=0, atol=1e-9)


def test_float32_and_bfloat16_models_give_float32():
    exact = collect_statistics(classifier(), examples(), batch_size=4)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        found = collect_statistics(classifier(dtype=dtype), examples(dtype=torch.float32), batch_size=4)
        assert found.mean.dtype == found.variance.dtype == torch.float32
        assert 0 < (found.mean - exact.mean).abs().max() < tolerance


def processes(rank, world=3):
    return SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=lambda: None)


@pytest.mark.parametrize("count", [2, 11])
def test_processes_find_together_what_one_finds(count, monkeypatch):
    """Three ranks one after another; what each gives away is gathered for a second round."""
    model, data, given = classifier("VLJ"), examples(count), []
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda own: own if isinstance(own[0], dict) else given.extend(own) or own
    )
    for rank in range(3):
        if rank < count:
            collect_statistics(model, data, batch_size=2, processes=processes(rank))
    given = given if count > 2 else [*given, (0, torch.zeros(0), torch.zeros(0))]
    assert [moments[0] for moments in given] == [len(range(rank, count, 3)) for rank in range(3)]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own if isinstance(own[0], dict) else given)
    found = [collect_statistics(model, data, batch_size=2, processes=processes(rank)) for rank in range(3)]
    assert all(torch.equal(found[0].mean, other.mean) for other in found)
    assert found[2].count == count and is_close(found[2], *two_passes(model, data))


# ---- a run that is killed


class Killed(list):
    """Images that break off at one of them, once all have been looked at."""

    at, looks = 7, 0

    def __getitem__(self, index):
        self.looks += index == self.at
        if self.looks > 1:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_resumed_run_is_bitwise_that_without_a_break(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "BATCHES_PER_STATE", 2)
    model, settings = classifier(), dict(batch_size=2, state_dir=tmp_path / "state")
    expected = collect_statistics(model, examples(), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, Killed(examples()), **settings)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state-0.safetensors"]
    seen = []
    encode = type(model).encode_images
    monkeypatch.setattr(type(model), "encode_images", lambda self, x: seen.append(len(x)) or encode(self, x))
    found = collect_statistics(model, examples(), **settings)
    assert seen == [2, 2, 2, 1]  # the first four images were in the state
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)
    assert found.count == expected.count == 11 and found.record == expected.record
    again = collect_statistics(model, examples(), **settings)
    assert len(seen) == 4 and torch.equal(again.variance, expected.variance)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model", lambda model, data: (make_prompted("VLI", seed=1).get_base_model(), data, None)),
        ("prompts", lambda model, data: (randomise(model, 9) or model, data, None)),
        ("dataset", lambda model, data: (model, examples(seed=1), None)),
        ("dataset", lambda model, data: (model, data[:-1], None)),
        ("precision", lambda model, data: (model.float(), data, None)),
        ("number of processes", lambda model, data: (model, data, processes(1, 2))),
    ],
)
def test_the_state_of_another_collection_is_refused(what, change, tmp_path):
    model, data = classifier(), examples()
    collect_statistics(model, data, batch_size=4, state_dir=tmp_path)
    model, data, ranks = change(model, data)
    with pytest.raises(ValueError, match=f"state of another collection: its {what} is .* Delete the folder"):
        collect_statistics(model, data, batch_size=4, state_dir=tmp_path, processes=ranks)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 1  # of the tensors: nothing else sees it
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def of_another_kind(file):
    save_file({"mean": torch.zeros(1)}, file)


def other_position(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(b'position\\": 11', b'position\\": 10'))


@pytest.mark.parametrize("damage", [flip_a_bit, cut, of_another_kind, other_position])
def test_a_damaged_state_is_named_and_can_be_deleted(damage, tmp_path):
    model, data = classifier(), examples()
    expected = collect_statistics(model, data, batch_size=4, state_dir=tmp_path)
    file = tmp_path / "state-0.safetensors"
    before = file.read_bytes()
    damage(file)
    assert file.read_bytes() != before
    with pytest.raises(ValueError, match=r"state-0\.safetensors is damaged .*delete it"):
        collect_statistics(model, data, batch_size=4, state_dir=tmp_path)
    file.unlink()
    found = collect_statistics(model, data, batch_size=4, state_dir=tmp_path)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)


# ---- collecting


def rows(count=5, side=12):
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    table = {"image": [Image.fromarray(picture) for picture in pictures], "label": [0] * count}
    return Dataset.from_dict(table, features=features)


def dataset(**settings):
    return ImageDataset(rows(), make_processor(), ("a", "b"), "user/pictures", "abc", "train", **settings)


def test_the_classifier_and_the_random_state_come_back_as_they_were():
    model = classifier()
    model.train().set_input_size(6)
    params = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    before = torch.get_rng_state()
    found = collect_statistics(model, dataset(), batch_size=2)
    assert model.training and model.input_size == 6 and torch.equal(torch.get_rng_state(), before)
    for name, p in model.named_parameters():
        assert torch.equal(p, params[name][0]) and p.requires_grad == params[name][1] and p.grad is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not found.mean.requires_grad
    with pytest.raises(ValueError, match="pixel_values have shape"):
        collect_statistics(model, [{"pixel_values": torch.zeros(3, 5, 5), "labels": 0}], batch_size=2)
    assert model.training and model.input_size == 6
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_are_enlarged_inside_as_for_an_evaluation():
    model, data = classifier(), dataset(attack_resolution=4)
    small = torch.stack([data[i]["pixel_values"] for i in range(5)]).double()
    found = collect_statistics(model, data, batch_size=2)
    enlarged = F.interpolate(small, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found.mean, read_by_layers(model, enlarged).mean(dim=1), rtol=0, atol=1e-5)
    assert small.shape[-1] == found.record["image_size"] == 4


def test_the_record_says_where_statistics_come_from():
    model = classifier()
    model.name_or_path = str(Path(__file__).parent)
    record = collect_statistics(model, dataset(), batch_size=2).record
    model_hash, prompts_hash = fingerprints(model)
    assert record == json.loads(json.dumps(record))
    assert record.pop("library_versions")["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record == {
        "model": "defences",
        "model_revision": "local",
        "model_fingerprint": model_hash,
        "prompts": 'design VLI, 3 vision tokens in 2 layers, 2 text tokens in 3 layers from "a bc d"',
        "prompts_fingerprint": prompts_hash,
        "dataset": "user/pictures",
        "dataset_revision": "abc",
        "split": "train",
        "num_images": 5,
        "image_size": 8,
        "precision": "float64",
    }
    assert collect_statistics(model, examples(2), batch_size=2, data_id="mine").record["dataset"] == "mine"


@pytest.mark.parametrize(
    ("make", "batch_size", "message"),
    [
        (list, 2, "dataset is empty"),
        (lambda: dataset(augment=True), 2, "dataset.augment=True"),
        (lambda: examples(2), 0, "batch_size=0 must be a whole number of at least 1"),
        (lambda: [{"pixel_values": 2 * torch.ones(3, 8, 8), "labels": 0}], 2, "outside"),
    ],
)
def test_bad_data(make, batch_size, message):
    with pytest.raises(ValueError, match=message):
        collect_statistics(classifier(), make(), batch_size=batch_size)


def test_weights_that_are_not_finite_are_told():
    model = classifier("V")
    with torch.no_grad():
        model.vision_model.encoder.layers[1].base_layer.mlp.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match="values that aren't finite; check the weights"):
        collect_statistics(model, examples(2), batch_size=2)


@pytest.mark.parametrize(
    ("mean", "variance", "count", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), 1, r"\(2, 3\).*must both have the shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), 1, "must both have the shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 0, "count=0"),
        (torch.zeros(1, 1, 1), torch.full((1, 1, 1), torch.inf), 3, "aren't finite"),
    ],
)
def test_bad_statistics(mean, variance, count, message):
    with pytest.raises(ValueError, match=message):
        VisionStatistics(mean, variance, count)


# ---- fingerprints


def test_fingerprints_survive_a_cast_and_a_copy_and_see_every_change():
    model = make_prompted("VLI", dtype=torch.float32).get_base_model()
    known = fingerprints(model)
    assert known == fingerprints(make_prompted("VLI", dtype=torch.float32).get_base_model())
    assert known == fingerprints(make_prompted("VLI", dtype=torch.bfloat16).get_base_model())
    assert known[0] == fingerprints(make_base(dtype=torch.float32))[0] and fingerprints(make_base())[1] == "none"

    def changed_by(tensor):
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[0] += 1
            found = fingerprints(model)
            tensor.copy_(kept)
        assert fingerprints(model) == known
        return found[0] != known[0], found[1] != known[1]

    assert changed_by(model.vision_model.encoder.layers[2].mlp.fc2.bias) == (True, False)
    assert changed_by(model.visual_projection.weight) == (True, False)
    assert changed_by(model.image_mean) == (True, False)
    assert changed_by(model.text_projection.weight) == (False, False)
    for name, parameter in model.named_parameters():
        if "clip_prompt_" in name:
            assert changed_by(parameter) == (False, name.startswith("vision_model"))


def test_coupled_prompts_count_with_what_they_are_made_from():
    model = classifier("VLJ")
    known = fingerprints(model)
    for name, parameter in model.named_parameters():
        if "clip_prompt_" in name:
            with torch.no_grad():
                parameter.view(-1)[-1] += 1
            found = fingerprints(model)
            assert found[0] == known[0] and found[1] != known[1], name
            known = found


def test_a_value_written_past_every_count_of_changes_is_seen():
    model = classifier()
    known = fingerprints(model)
    next(p for name, p in model.named_parameters() if name.startswith("vision") and "clip_prompt_" in name).data += 1
    assert fingerprints(model)[1] != known[1]


# ---- targets


@pytest.fixture(scope="module")
def targets():
    """Of the VLI model, and clean ones under other prompts of the same kind."""
    other = classifier()
    randomise(other, 7)
    return AlignmentTargets(*(collect_statistics(model, examples(), batch_size=4) for model in (classifier(), other)))


@pytest.mark.parametrize("parts", [2, 1])
@pytest.mark.parametrize("as_file", [True, False])
def test_what_is_saved_is_restored(parts, as_file, targets, tmp_path):
    targets = targets if parts == 2 else AlignmentTargets(targets.adversarial)
    place = tmp_path / "new" / "own.safetensors" if as_file else tmp_path / "new"
    targets.save(place)
    targets.save(place)  # over itself
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["own.safetensors" if as_file else AlignmentTargets.file]
    found = AlignmentTargets.load(place)
    assert (found.clean is None) == (parts == 1)
    for name, own in targets._parts().items():
        other = getattr(found, name)
        assert torch.equal(other.mean, own.mean) and torch.equal(other.variance, own.variance)
        assert other.mean.dtype == torch.float64
        assert (other.count, other.record) == (own.count, own.record)
    found.check(classifier())
    tensors = load_file(place if as_file else place / AlignmentTargets.file)
    assert set(tensors) == {f"{k}.{v}" for k in ("adversarial", "clean")[:parts] for v in ("mean", "variance")}


def test_a_save_that_fails_leaves_what_was_there(targets, tmp_path, monkeypatch):
    targets.save(tmp_path)

    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(fit, "save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        AlignmentTargets(targets.adversarial).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [AlignmentTargets.file]
    assert AlignmentTargets.load(tmp_path).clean is not None


def test_files_that_are_no_statistics(targets, tmp_path):
    with pytest.raises(FileNotFoundError, match="make it with collect_statistics"):
        AlignmentTargets.load(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no statistics"):
        AlignmentTargets.load(tmp_path / "other.safetensors")
    targets.save(tmp_path)
    file = tmp_path / AlignmentTargets.file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="cut short or damaged"):
        AlignmentTargets.load(tmp_path)


def test_targets_fit_their_classifier_in_any_precision(targets):
    targets.check(classifier())
    targets.check(make_prompted("VLI", dtype=torch.bfloat16).get_base_model())
    model = make_prompted("VLI")
    model.get_base_model().text_model.embeddings.token_embedding.clip_prompt_tokens["default"].data += 1
    targets.check(model.get_base_model())  # words don't reach the image encoder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_base(), r"adversarial statistics are of .* \(3, 8, 20\), but .* has \(3, 5, 20\)"),
        (lambda: classifier("V"), r"\(3, 8, 20\), but .* has \(3, 7, 20\)"),
        (lambda: classifier(seed=1), "made with another image encoder"),
        (lambda: randomise(m := classifier(), 7) or m, "other prompts in the image encoder .*VLI.* than the active"),
        (lambda: make_prompted("V", num_vision_tokens=3).get_base_model(), r"\(design VLI.*\) than .* \(design V,"),
    ],
)
def test_targets_of_another_classifier_are_refused(make, message, targets):
    with pytest.raises(ValueError, match=message):
        targets.check(make())


def test_clean_statistics_must_be_of_the_same_encoder_but_of_any_prompts(targets):
    foreign = collect_statistics(classifier(seed=1), examples(2), batch_size=2)
    with pytest.raises(ValueError, match="the clean statistics were made with another image encoder"):
        AlignmentTargets(targets.adversarial, foreign).check(classifier())
    other_shape = collect_statistics(classifier("V"), examples(2), batch_size=2)
    with pytest.raises(ValueError, match="the clean statistics are of"):
        AlignmentTargets(targets.adversarial, other_shape).check_shapes(classifier())


# ---- what a defence is fitted with


@pytest.mark.parametrize(
    ("defence", "needs"),
    [(TAPT(), True), (TAPT(gamma=1.0), False), (TAPT(align_weight=0.0), False), (PromptAlign(), False)],
)
def test_a_defence_is_fitted_with_the_statistics_of_its_classifiers(defence, needs, tmp_path):
    model, other = classifier(), classifier()
    randomise(other, seed=5)
    assert defence.needs == ({"clean_classifier"} if needs else set())
    if needs:
        with pytest.raises(ValueError, match="clean_classifier"):
            defence.fit(model, examples())
    else:
        assert defence.fit(model, examples(), batch_size=4).targets.clean is None
    fitted = defence.fit(model, examples(), clean_classifier=other, batch_size=4, state_dir=tmp_path)
    assert defence.targets is None and replace(fitted, targets=None) == defence
    assert {folder.name for folder in tmp_path.iterdir()} == {"adversarial", "clean"}
    for found, source in ((fitted.targets.adversarial, model), (fitted.targets.clean, other)):
        wanted = collect_statistics(source, examples(), batch_size=4)
        assert torch.equal(found.mean, wanted.mean) and found.record == wanted.record
    assert fitted.parameters()["statistics"] == fitted.targets.record == fitted.targets.adversarial.record


def test_a_defence_that_learns_nothing_is_given_back():
    defence = Ensemble(num_views=2)
    assert defence.fit(classifier(), examples()) is defence and defence.fitted == defence.learns() == {}
