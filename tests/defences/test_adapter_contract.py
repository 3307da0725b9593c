"""What every test-time defence owes: a function of images, and a classifier left exactly as it was found."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from defence_rows import FEWER, ROWS, make, prompted, with_targets
from naive import targets_of
from prompted_clip import NAMES, make_base, make_images, make_prompted

from hf_robust_clip.defences import defence_classes
from hf_robust_clip.defences.bafta import BaFTA
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.defences.c_avp import CAVP
from hf_robust_clip.defences.clipure import CLIPure
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.prompt_align import PromptAlign
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.rfi import RFI
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.tpt import TPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.paper import Paper
from hf_robust_clip.prompts.access import prompt_layers, without_class_prompts


@pytest.fixture(params=list(ROWS))
def pair(request):
    return make(request.param)


def test_every_method_has_a_row():
    assert {adapter.paper.method for _, adapter in ROWS.values()} == set(defence_classes())


# ---- the classifier stays as it is


def plain_logits(classifier: CLIPForZeroShotClassification, images: torch.Tensor) -> torch.Tensor:
    with without_class_prompts(classifier):
        return classifier(images).logits.detach()


def found_in(classifier: CLIPForZeroShotClassification) -> dict:
    """All that a defence could leave behind, in the classifier and around it."""
    modules = dict(classifier.named_modules())
    tensors = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    embeds = classifier.class_embeds
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [
                list(getattr(module, kind))
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            ]
            for name, module in modules.items()
        },
        "own attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "tensors": {name: id(t) for name, t in tensors.items() if t is not embeds},
        "values": {name: t.detach().clone() for name, t in tensors.items() if t is not embeds},
        "gradients": {name: (t.requires_grad, t.grad is None) for name, t in tensors.items()},
        "classes": (classifier.class_names, classifier.templates, classifier.context_length, classifier.input_size),
        "attention": classifier.config._attn_implementation,
        "global": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "fixed embeddings": classifier._fixed,
        "switches": [(module.bare, module.unclipped_gradient) for module in prompt_layers(classifier)],
    }


def assert_as_found(classifier: CLIPForZeroShotClassification, before: dict) -> None:
    after = found_in(classifier)
    for name, value in before.items():
        if name == "values":
            assert all(torch.equal(after[name][key], tensor) for key, tensor in value.items())
        else:
            assert after[name] == value, name


def check_classifier_is_left_alone(adapter: Defence, classifier: CLIPForZeroShotClassification) -> None:
    """AssertionError if a defence leaves a trace, in a classifier as it's trained and in one as it's deployed."""
    images = make_images(3)
    for trained in (True, False):
        if not trained:
            classifier.requires_grad_(False)
        classifier.train(trained)
        classifier.text_model.eval()
        logits, embeds = plain_logits(classifier, images), classifier.class_embeds
        before = found_in(classifier)
        adapter.predict(classifier, images, path="through" if trained else "none")
        assert_as_found(classifier, before)
        assert torch.equal(classifier.class_embeds, embeds)
        assert torch.equal(plain_logits(classifier, images), logits)


def test_the_classifier_is_left_alone(pair):
    classifier, adapter = pair
    check_classifier_is_left_alone(adapter, classifier)


def test_the_classifier_is_left_alone_when_something_breaks(pair, monkeypatch):
    classifier, adapter = pair
    images = make_images(2)
    logits, before = plain_logits(classifier, images), found_in(classifier)
    encode, calls = CLIPForZeroShotClassification.encode_images, []

    def breaking(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == stop:
            raise RuntimeError("the lights went out")
        return encode(self, *args, **kwargs)

    stop = 0
    monkeypatch.setattr(CLIPForZeroShotClassification, "encode_images", breaking)
    adapter.predict(classifier, images, path="through")
    for stop in (1, len(calls)):  # the first and the last
        calls.clear()
        with pytest.raises(RuntimeError, match="lights"):
            adapter.predict(classifier, images, path="through")
        assert len(calls) == stop
        assert_as_found(classifier, before)
    monkeypatch.undo()
    assert torch.equal(plain_logits(classifier, images), logits)


@dataclass(frozen=True)
class Toy(Defence):
    """Answers with the plain classifier, and does something on the side."""

    deed: str = "nothing"
    paper = Paper(method="toy", title="", venue="", arxiv="", bibtex="")
    traits = Traits(randomised=False, optimising=False)

    def _predict(self, classifier, images_BCHW, state, seed, path):
        weight = classifier.visual_projection.weight
        if self.deed == "a weight":
            weight.data[0, 0] += 1e-12
        elif self.deed == "another parameter":
            classifier.visual_projection.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        elif self.deed == "requires_grad":
            classifier.logit_scale.requires_grad_(True)
        elif self.deed == "a gradient":
            weight.grad = torch.zeros_like(weight)
        elif self.deed == "a hook":
            classifier.vision_model.encoder.layers[0].register_forward_pre_hook(lambda module, args: None)
        elif self.deed == "a module":
            classifier.vision_model.extra = torch.nn.Identity()
        elif self.deed == "a random number":
            torch.rand(1)
        elif self.deed == "embeddings":
            classifier._known = classifier._known[0], classifier._known[1].flip(0)
        elif self.deed == "classes":
            classifier.set_classes(NAMES[:3])
        logits = classifier(images_BCHW).logits
        return Prediction(logits, torch.zeros(len(logits), dtype=torch.bool), {})


DEEDS = ["a weight", "another parameter", "requires_grad", "a gradient", "a hook", "a module", "a random number"]


@pytest.mark.parametrize("deed", [*DEEDS, "embeddings", "classes"])
def test_a_defence_that_changes_the_classifier_is_caught(deed):
    with pytest.raises(AssertionError):
        check_classifier_is_left_alone(Toy(deed=deed), make_base())


def test_a_defence_that_does_nothing_is_not_caught():
    check_classifier_is_left_alone(Toy(), make_base())


# ---- a function of images


def test_predict_is_a_function_in_every_mode(pair):
    classifier, adapter = pair
    images = make_images(3)
    torch.manual_seed(0)
    first = adapter.predict(classifier, images).logits
    assert first.shape == (3, len(NAMES)) and not first.requires_grad and first.isfinite().all()
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(adapter.predict(classifier, images).logits, first)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(adapter.predict(classifier, images.clone()).logits, first)
        assert torch.is_inference_mode_enabled()
    classifier.train()
    assert torch.equal(adapter.predict(classifier, images).logits, first)
    with adapter.prepared(classifier):
        assert torch.equal(adapter.predict(classifier, images).logits, first)
    found = adapter.predict(classifier, images.clone().requires_grad_())
    assert torch.equal(found.logits, first) and found.fell_back.tolist() == [False] * 3
    tensors = [found.logits, found.fell_back, *found.prompts.values(), found.images, found.loss, found.kept]
    assert all(tensor is None or (len(tensor) == 3 and not tensor.requires_grad) for tensor in tensors)


def test_gradients_reach_the_images_and_no_parameter(pair):
    classifier, adapter = pair
    for path in ("through", "identity"):
        images = make_images(2).requires_grad_()
        with torch.no_grad():
            logits = adapter.predict(classifier, images, path=path).logits
        logits.sum().backward()
        assert images.grad.isfinite().all() and images.grad.flatten(1).norm(dim=1).min() > 1e-6
        assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("name", ["tapt-VLI", "tpt", "r_tpt", "ttc", "ensemble", "rfi", "clipure", "bafta", "c_avp"])
def test_bfloat16_gives_float32_logits_near_those_of_float64(name):
    classifier, adapter = make(name)
    images = (make_images(2) * 255).round() / 255
    wanted = adapter.predict(classifier, images).logits
    for kind, near in ((torch.float32, 1e-3), (torch.bfloat16, 3.0)):
        found = adapter.predict(classifier.to(kind), images.to(kind)).logits
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert (found - wanted).abs().max() < near


# ---- what is refused


@pytest.mark.parametrize("name", ["tapt-V", "tpt", "ttc"])
def test_wrong_images_classifiers_and_paths_are_refused(name):
    classifier, adapter = make(name)
    images = make_images(2)
    wrong = {
        "outside": images * 1.5,
        "below": images - 0.5,
        "nan": images.clone().index_fill_(0, torch.tensor([1]), torch.nan),
        "large": torch.nn.functional.pad(images, (0, 1)),
        "single": images[0],
        "grey": images[:, :1],
        "none": images[:0],
    }
    for batch in wrong.values():
        with pytest.raises(ValueError, match=r"pixel_values|images"):
            adapter.predict(classifier, batch)
    with pytest.raises(ValueError, match="path"):
        adapter.predict(classifier, images, path="throuhg")
    with pytest.raises(TypeError, match="classifier"):
        adapter.predict(classifier.vision_model, images)
    classifier.set_classes(["one"], "a bc d {}.")
    with pytest.raises(ValueError, match="one class"):
        adapter.predict(classifier, images)
    classifier.class_names = ()
    with pytest.raises(ValueError, match="set_classes"):
        adapter.predict(classifier, images)


@pytest.mark.parametrize("adapter", [TAPT(**FEWER), PromptAlign(**FEWER)])
def test_methods_that_tune_prompts_refuse_classifiers_without(adapter):
    with pytest.raises(ValueError, match="prompts"):
        adapter.predict(make_base(), make_images(1))
    classifier = make_prompted("VLI")
    adapter = with_targets(adapter, classifier.get_base_model())
    with classifier.disable_adapter(), pytest.raises(ValueError, match="prompts"):
        adapter.predict(classifier.get_base_model(), make_images(1))


@pytest.mark.parametrize("cls", [TPT, RTPT])
def test_methods_that_tune_words_refuse_classifiers_without(cls):
    adapter, images = cls(**FEWER), make_images(1)
    with pytest.raises(ValueError, match="vision prompts alone"):
        adapter.predict(prompted("V"), images)
    classifier = make_base()
    classifier.set_classes(NAMES, ["a {}", "b {}"])
    with pytest.raises(ValueError, match="one template"):
        adapter.predict(classifier, images)
    classifier.set_classes(NAMES, "{} a")
    with pytest.raises(ValueError, match="before the class name"):
        adapter.predict(classifier, images)


def test_missing_and_foreign_statistics_are_refused():
    classifier, images = prompted("VLI"), make_images(1)
    targets = targets_of(classifier)
    for adapter in (TAPT(**FEWER), PromptAlign(**FEWER)):
        with pytest.raises(ValueError, match="targets is missing"):
            adapter.predict(classifier, images)
        with pytest.raises(ValueError, match="encoder"):
            replace(adapter, targets=targets_of(prompted("V-shallow"))).predict(prompted("V"), images)
        with pytest.raises(ValueError, match="another image encoder"):
            replace(adapter, targets=targets).predict(make_prompted("VLI", seed=1).get_base_model(), images)
    with pytest.raises(ValueError, match=r"targets\.clean is missing"):
        TAPT(targets=replace(targets, clean=None), **FEWER).predict(classifier, images)
    with torch.no_grad():
        classifier.vision_model.pre_layrnorm.clip_prompt_tokens["default"] += 1
    with pytest.raises(ValueError, match="other prompts"):
        TAPT(targets=targets, **FEWER).predict(classifier, images)


WRONG = [
    (TAPT, dict(num_views=1)),
    (TAPT, dict(num_views=2.5)),
    (TAPT, dict(num_views=9)),  # a tenth of which is no view
    (TAPT, dict(num_views=10)),  # keeps one, which has no unbiased variance
    (TPT, dict(selected=0.0)),
    (TPT, dict(selected=1.5)),
    (TPT, dict(selected=float("nan"))),
    (TPT, dict(learning_rate=-1.0)),
    (TPT, dict(learning_rate=float("nan"))),
    (TPT, dict(weight_decay=float("inf"))),
    (TPT, dict(num_steps=0)),
    (TPT, dict(chunk_size=0)),
    (TPT, dict(memory_budget=0)),
    (TAPT, dict(gamma=1.1)),
    (TAPT, dict(align_weight=-1.0)),
    (TAPT, dict(align_weight=float("inf"))),
    (TAPT, dict(align_layers=0)),
    (TAPT, dict(align_reduction="sum")),
    (TAPT, dict(reset_to="zero")),
    (TAPT, dict(reset_every=0)),
    (PromptAlign, dict(align_weight=float("inf"))),
    (PromptAlign, dict(align_layers=0)),
    (RTPT, dict(num_neighbours=0)),
    (RTPT, dict(temperature=0.0)),
    (TTC, dict(eps=0.0)),
    (TTC, dict(step_size=-0.1)),
    (TTC, dict(num_steps=0)),
    (TTC, dict(tau=float("nan"))),
    (TTC, dict(beta=float("nan"))),
    (BaFTA, dict(num_views=0)),
    (BaFTA, dict(beta=-1.0)),
    (BaFTA, dict(beta=float("nan"))),
    (BaFTA, dict(alpha=1.0)),
    (BaFTA, dict(alpha=0.0)),
    (BaFTA, dict(weights="printed")),
    (BaFTA, dict(assigned_by="image")),
    (BaFTA, dict(moved_by="text")),
    (BaFTA, dict(max_directions=1)),
    (Ensemble, dict(num_views=1)),
    (RFI, dict(top_k=0)),
    (RFI, dict(top_k=1.5)),
    (RFI, dict(score="last")),
    (CLIPure, dict(num_steps=0)),
    (CLIPure, dict(step_size=0.0)),
    (CLIPure, dict(step_size=float("nan"))),
    (CLIPure, dict(step_size=float("inf"))),
    (CLIPure, dict(normalised_over="pixel")),
    (CLIPure, dict(templates="a photo of a {}.")),
    (Ensemble, dict(chunk_size=-1)),
    (CAVP, dict(temperature=0.0)),
    (CAVP, dict(temperature=float("inf"))),
    (CAVP, dict(chunk_size=0)),
]


def test_settings_out_of_range_are_refused():
    for cls, wrong in WRONG:
        (name,) = wrong
        with pytest.raises(ValueError, match="selected" if wrong.get(name) in (9, 10) else name):
            cls(**wrong)


@dataclass(frozen=True, kw_only=True)
class Greedy(Ensemble):
    """As on a GPU that holds `fits` images with their views."""

    fits: int = 2

    def _predict(self, classifier, images_BCHW, state, seed, path):
        if len(images_BCHW) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return super()._predict(classifier, images_BCHW, state, seed, path)


def test_what_does_not_fit_is_divided_with_the_same_result():
    classifier, images = make_base(), make_images(7)
    whole = Ensemble(num_views=4).predict(classifier, images)
    parts = Greedy(num_views=4).predict(classifier, images)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-10)
    assert parts.fell_back.shape == (7,)
    with pytest.raises(RuntimeError, match=r"one image with its views doesn.t fit.*memory_budget"):
        Greedy(num_views=4, fits=0).predict(classifier, images)


def test_pictures_of_mixed_sizes_are_refused_with_the_mend():
    images = make_images(2)
    with pytest.raises(TypeError, match=r"images_BCHW is a list.*mixed sizes.*to_pixels"):
        TPT(**FEWER).predict(make_base(), [images[0], images[1, :, :4]])
