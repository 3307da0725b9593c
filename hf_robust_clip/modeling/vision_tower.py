"""The image encoder of a robust checkpoint as the vision tower of a language model (LLaVA and its like)."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..normalisation import has_adapter
from ..pictures import FOLLOWED, normalisation_of
from ..prompts.layer import ClipPromptLayer
from .checkpoints import adapter_config, base_of, with_adapter
from .clip import CLIPForZeroShotClassification
from .image_kernels import use_convolution

SAME = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size",
        "image_size", "hidden_act", "layer_norm_eps")  # fmt: skip


def robust_vision_tower(
    source: str | Path | CLIPForZeroShotClassification,
    *,
    like: PreTrainedModel | PretrainedConfig,
    processor: Any,
    revision: str | None = None,
) -> CLIPVisionModel:
    """The image encoder of a checkpoint as a plain `CLIPVisionModel`, without the projection, checked to be what a
    language model was made for. A LoRA in it is merged.

    Such a model reads the hidden states (B, 1 + P, W) of one layer, in LLaVA the last but one, through a projector
    that was trained on the encoder of before: it makes sense as far as the robust encoder's features stay near those,
    as FARE's do by what it minimises.

    Args:
        source: a folder, a Hub id, an adapter among them, or a classifier, which stays as it is.
        like: the language model, or its configuration (`vision_config` inside), or that of its vision tower alone.
        processor: of the language model: it must normalise pixels as the checkpoint was trained.
        revision: of a checkpoint on the Hub.

    Raises TypeError for a source that is no CLIP, and a model without a CLIP vision tower. Raises ValueError for
    another size (a tower of 224 px for a model of 336), activation, mean or std, and for prompts in the encoder.
    Raises OSError for a checkpoint that can't be loaded.

    Source: RobustVLM (arXiv 2402.12336), which puts such encoders into LLaVA and OpenFlamingo.
    """
    config = _tower_config(like)
    loaded = isinstance(source, str | Path)
    classifier = _load(str(source), revision) if loaded else source
    if not isinstance(classifier, CLIPForZeroShotClassification):
        raise TypeError(f"source={type(source).__name__} is no CLIP classifier; give one, a folder or a Hub id.")
    _check_same_tower(classifier.vision_model.config, config)
    _check_same_normalisation(classifier, processor)
    tower = classifier.vision_model if loaded else deepcopy(classifier.vision_model)
    return _merged(tower).eval()


def replace_vision_tower(
    language_model: PreTrainedModel,
    source: str | Path | CLIPForZeroShotClassification,
    *,
    processor: Any,
    revision: str | None = None,
) -> None:
    """Give a language model the image encoder of a robust checkpoint, in place: its tower keeps device, dtype and
    everything else but the weights, and `save_pretrained` writes a checkpoint that needs no other package.

        replace_vision_tower(llava, "out/fare-336", processor=llava_processor)

    Arguments and errors are those of `robust_vision_tower`. Raises TypeError, too, for a model without one
    `CLIPVisionModel`, and ValueError for a tower whose weights are quantised, offloaded or wrapped by an adapter. The
    model is left as it was then.
    """
    towers = [module for module in language_model.modules() if isinstance(module, CLIPVisionModel)]
    if len(towers) != 1:
        raise TypeError(
            f"language_model={type(language_model).__name__} has {len(towers)} CLIP vision towers, not one."
        )
    own = towers[0]
    if has_adapter(own):
        raise ValueError("the vision tower of language_model has an adapter inside; merge it first.")
    odd = [name for name, values in own.named_parameters() if values.is_meta or not values.is_floating_point()]
    if odd:
        raise ValueError(f"{odd[0]} of language_model's tower is quantised or offloaded; load the model in floats.")
    new = robust_vision_tower(source, like=language_model, processor=processor, revision=revision)
    own.load_state_dict(new.state_dict())


def _load(source: str, revision: str | None) -> Any:
    """A classifier; of an adapter its base with the adapter in it."""
    adapter = adapter_config(source, revision)
    if adapter is None:
        return CLIPForZeroShotClassification.from_pretrained(source, revision=revision or "main")
    base, base_revision = base_of(source, adapter)
    return with_adapter(
        CLIPForZeroShotClassification.from_pretrained(base, revision=base_revision), source, revision=revision
    )


def _tower_config(like: PreTrainedModel | PretrainedConfig) -> CLIPVisionConfig:
    config = like.config if isinstance(like, PreTrainedModel) else like
    tower = config if isinstance(config, CLIPVisionConfig) else getattr(config, "vision_config", None)
    if not isinstance(tower, CLIPVisionConfig):
        kind = type(config if tower is None else tower).__name__
        raise TypeError(f"like={type(like).__name__}: its vision tower is no CLIP ({kind}); give a LLaVA of CLIP.")
    return tower


def _check_same_tower(own: CLIPVisionConfig, like: CLIPVisionConfig) -> None:
    """Raise ValueError for the first size, or the activation, in which the towers differ."""
    for name in SAME:
        here, there = getattr(own, name), getattr(like, name)
        if here == there:
            continue
        mend = "take a checkpoint of the model's own kind of encoder"
        if name == "image_size":
            mend = f"train one at {there} px (for 336 the recipes of clip-vit-large-patch14-336)"
        raise ValueError(f"source has {name}={here!r}, the vision tower of the language model {there!r}; {mend}.")


def _check_same_normalisation(classifier: CLIPForZeroShotClassification, processor: Any) -> None:
    """Raise ValueError where a language model's processor normalises otherwise than a checkpoint was trained with, and
    TypeError for what is no processor of pictures.
    """
    preparation = copy(getattr(processor, "image_processor", processor))
    if not isinstance(preparation, BaseImageProcessor):
        raise TypeError(f"processor={type(processor).__name__} prepares no pictures; give the language model's own.")
    for name in vars(preparation):
        if name.startswith("do_") and name not in FOLLOWED:  # padding, tiles: the language model's own affair
            setattr(preparation, name, False)
    here = [list(values) for values in normalisation_of(classifier.require_processor().image_processor)]
    there = [list(values) for values in normalisation_of(preparation)]
    if not torch.allclose(torch.tensor(here), torch.tensor(there), rtol=0, atol=1e-6):
        raise ValueError(f"processor normalises by mean and std {there}, source was trained with {here}; set "
                         "image_mean and image_std of the language model's image processor to these.")  # fmt: skip


def _merged(tower: CLIPVisionModel) -> CLIPVisionModel:
    """The tower with its adapters merged into the weights. Raises ValueError for prompts, which can't be."""
    for name, module in list(tower.named_modules()):
        if isinstance(module, ClipPromptLayer):
            raise ValueError("source has prompts in its image encoder: more tokens than a language model reads, and "
                             "no part of the weights; give a checkpoint whose encoder was fine-tuned.")  # fmt: skip
        if isinstance(module, BaseTunerLayer):
            if not module.disable_adapters:
                module.merge(safe_merge=True)
            tower.set_submodule(name, module.get_base_layer())
    use_convolution(tower)
    with torch.device("meta"):
        plain = set(CLIPVisionModel(tower.config).state_dict())
    odd = sorted(plain ^ set(tower.state_dict()))
    if odd:
        raise ValueError(f"source has {odd[0]} in its image encoder beside the weights; merge its adapters first.")
    return tower
