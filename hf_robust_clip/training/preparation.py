"""From a model to what is trained: its adapter, its frozen parts, its teacher."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..modeling import ZeroShotClassifier
from ..normalisation import has_adapter
from ..objectives.base import NEEDS
from ..prompts import ClipPromptConfig, check_prompts
from ..prompts.access import prompts_of
from .config import RobustClipConfig, check_images_together, check_trained_part

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..defences.base import Defence
    from ..objectives.base import Objective

logger = logging.getLogger(__name__)
ARCHITECTURE = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")  # of the image encoder


@dataclass(frozen=True)
class Prepared:
    """What is trained, its teacher if the objective has one, and whether the adapter follows from its settings and the
    seed.
    """

    student: nn.Module
    teacher: ZeroShotClassifier | None
    adapter_is_new: bool


def prepare(
    model: nn.Module,
    args: RobustClipConfig,
    objective: Objective,
    peft_config: PeftConfig | None = None,
    teacher: ZeroShotClassifier | None = None,
) -> Prepared:
    """The model as it is trained: with classes, the objective's normalisation, frozen parts and adapter.

    Raises TypeError/ValueError for a model of another class or without classes that the objective needs, a teacher of
    another architecture, and adapters that don't fit.
    """
    if unknown := objective.needs - NEEDS:
        raise ValueError(f"{type(objective).__name__} needs {sorted(unknown)}; there are {sorted(NEEDS)}.")
    student, core, texts_too = model, classifier_in(model), "captions" in objective.needs
    if not core.class_names:
        if objective.needs & {"labels", "classes", "texts"}:
            raise ValueError("model has no classes; call model.set_classes(class_names) first.")
        if not texts_too:
            core.set_classes(["image"])  # such objectives never look at the logits
    if "texts" in objective.needs and core.texts_of_each() == 1:
        logger.warning("%s has one text for each class; give several by descriptions.", type(objective).__name__)
    if objective.normalisation is not None:
        core.set_normalisation(*objective.normalisation)
    check_adapters(student, core)
    if student is not core:
        for name, value in (("peft_config", peft_config), ("trainable_layers", args.trainable_layers)):
            if value is not None:
                raise ValueError(f"{name}={value!r} goes with a plain model; this one has its adapter already.")
    else:
        check_trained_part(args, adapter=peft_config is not None)
        if peft_config is None and args.trainable_layers is None:
            peft_config = objective.peft_config
        select_trainable(core, args.trainable_layers, texts_too)
    with torch.random.fork_rng([core.device] if core.device.type == "cuda" else []):
        torch.manual_seed(args.seed)  # what an adapter begins from follows the seed, not what ran before
        if isinstance(peft_config, ClipPromptConfig):
            check_prompts(core, peft_config)
            student = get_peft_model(core, copy.deepcopy(peft_config))
        reference = make_teacher(student, teacher) if "teacher" in objective.needs else None
        if peft_config is not None and student is core:  # after the teacher, which shares the text tower
            student = add_adapter(core, peft_config, texts_too)
    if (objective.templates or "texts" in objective.needs) and core.text_is_trainable():
        raise ValueError(f"{type(objective).__name__} asks for texts of a frozen text side; train no text prompts.")
    if reference is not None:
        reference.to(args.device)
    return Prepared(student, reference, adapter_is_new=peft_config is not None)


def check_met(args: RobustClipConfig, objective: Objective, core: ZeroShotClassifier, dataset: Any) -> None:
    """Raise ValueError where the images of a dataset or the texts of its classes, which are set, don't suffice for an
    objective: too few together in a batch, no captions, different numbers of texts.
    """
    if "captions" in objective.needs and "captions" not in dataset[0]:
        raise ValueError(f"{type(objective).__name__} needs captions; the dataset gives none.")
    check_images_together(args, objective, dataset)
    if "texts" in objective.needs:
        core.texts_of_each()


def classifier_in(model: nn.Module) -> ZeroShotClassifier:
    """The classifier itself, or that inside a `PeftModel`. Raises TypeError for any other model."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(core, ZeroShotClassifier):
        raise TypeError(f"model is a {type(core).__name__}; give one of AutoModelForZeroShotClassification.")
    return core


def select_trainable(model: ZeroShotClassifier, last_layers: int | None = None, texts_too: bool = False) -> None:
    """Freeze everything but the image encoder, or but its last layers and what follows them (`image_head`); with
    `texts_too` the text side and the logit scale are trained as well. A logit bias, which no objective depends on,
    stays as it is.

    Raises ValueError if `last_layers` is not in 1 .. the encoder's number of layers.
    """
    layers = model.image_layers
    if last_layers is not None and not 1 <= last_layers <= len(layers):
        raise ValueError(f"trainable_layers={last_layers!r} must be None or in 1 .. {len(layers)}.")
    model.requires_grad_(False)
    trained: tuple[nn.Module, ...] = model.image_modules
    if last_layers is not None:
        trained = (*layers[-last_layers:], *model.image_head)
    if texts_too:
        trained += model.text_modules
        model.logit_scale.requires_grad_(True)
    for module in trained:
        module.requires_grad_(True)


def add_adapter(model: ZeroShotClassifier, peft_config: PeftConfig, texts_too: bool = False) -> PeftModel:
    """The model with a new adapter in it, which stays out of the text tower unless that is trained too."""
    peft_config = copy.deepcopy(peft_config)
    if not texts_too and getattr(peft_config, "exclude_modules", "") is None:
        peft_config.exclude_modules = r".*text_(model|projection).*"
    student = get_peft_model(model, peft_config)
    if model.text_is_trainable() and not texts_too:
        raise ValueError("peft_config reaches the text tower; restrict target_modules to the vision encoder.")
    check_adapter_is_used(student)
    return student


def check_adapter_is_used(student: nn.Module) -> None:
    """Raise ValueError for an adapter inside of `torch.nn.MultiheadAttention`, which reads the weights of its layers
    and never calls them: nothing would be trained.
    """
    for name, module in student.named_modules():
        inside = [child for child, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
        wrapped = name.endswith(".base_layer")  # by an adapter that knows what is inside
        if isinstance(module, nn.MultiheadAttention) and inside and not wrapped:
            raise ValueError(
                f"peft_config reaches {name}.{inside[0]}, which its attention never calls: keep the adapter out by "
                "exclude_modules."
            )


def make_teacher(model: nn.Module, teacher: ZeroShotClassifier | None) -> ZeroShotClassifier:
    """A frozen copy of the model without adapters (its frozen text tower shared), or the given one, comparable.

    Raises TypeError for one of another class, ValueError for one of another architecture.
    """
    if isinstance(model, PeftModel) and teacher is None:
        return copy.deepcopy(model).unload().eval().requires_grad_(False)
    model = classifier_in(model)
    if teacher is None:
        frozen = () if model.text_is_trainable() else model.text_modules
        teacher = copy.deepcopy(model, {id(part): part for part in (*frozen, model.processor)})
        return teacher.eval().requires_grad_(False)
    if not isinstance(teacher, ZeroShotClassifier):
        raise TypeError(f"teacher is a {type(teacher).__name__}; give a classifier, as for model.")
    own, other = (
        {f"vision {name}": getattr(m.config.vision_config, name) for name in ARCHITECTURE}
        | {"model_type": m.config.model_type, "embedding_width": m.embedding_width}
        for m in (model, teacher)
    )
    for name, value in own.items():
        if other[name] != value:
            raise ValueError(f"teacher has another architecture: its {name} is {other[name]}, the model's is {value}.")
    teacher = copy.deepcopy(teacher)
    teacher.set_normalisation(model.image_mean.flatten().tolist(), model.image_std.flatten().tolist())
    teacher.set_classes(model.class_names, model.templates, model.descriptions or None)
    return teacher.eval().requires_grad_(False)


def check_adapters(student: nn.Module, core: ZeroShotClassifier) -> None:
    """Raise ValueError for adapters that a training would not train, or not save as they are."""
    if student is core:
        if has_adapter(core):
            raise ValueError("the model has an adapter inside; give its PeftModel, or merge_and_unload() it first.")
        return
    if list(student.peft_config) != ["default"]:  # type: ignore[arg-type]
        raise ValueError(
            f"the model has the adapters {list(student.peft_config)}; one is trained and saved, named 'default'."  # type: ignore[arg-type]
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("the adapter is not trainable; load it with is_trainable=True.")
    check_adapter_is_used(student)


def check_defence(defence: Defence | None, student: nn.Module, objective: Objective) -> None:
    """Raise ValueError for a defence that can't be saved beside what is trained, or can't predict by it."""
    if defence is None:
        return
    if isinstance(student, PeftModel) and not prompts_of(student):
        raise ValueError(f"defence={defence.name} can't be saved beside this adapter; train without it.")
    if objective.judged_by is not None:
        defence.check(classifier_in(student))


def check_teacher(teacher: ZeroShotClassifier, core: ZeroShotClassifier) -> None:
    """Raise ValueError where the teacher has other classes or another normalisation: its logits would be of other
    things than the student's.
    """
    told_apart = [
        (getattr(teacher, name), getattr(core, name)) for name in ("class_names", "templates", "descriptions")
    ]
    same_pixels = all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in ((teacher.image_mean, core.image_mean), (teacher.image_std, core.image_std))
    )
    if any(a != b for a, b in told_apart) or not same_pixels:
        raise ValueError("model got other classes, texts or normalisation than the teacher's; make a new trainer.")


def twin_of(model: nn.Module, core: ZeroShotClassifier) -> tuple[nn.Module, PeftConfig]:
    """The frozen model that an adapter stands in, without it (its frozen weights shared), and the adapter's settings,
    for another one like it. Raises ValueError for a model without an adapter.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("clean_model is missing: the model has no adapter of which a clean one could be trained.")
    shared = [p for p in model.parameters() if not p.requires_grad]
    base = copy.deepcopy(model.base_model, {id(part): part for part in (*shared, core.processor)}).unload()
    peft_config = copy.deepcopy(model.active_peft_config)
    peft_config.inference_mode, peft_config.base_model_name_or_path = False, None
    return base, peft_config
