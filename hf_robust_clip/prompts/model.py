"""The tuner: injects prompts into a CLIP, and what PEFT asks of a method beyond that."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionModel, SiglipTextModel, SiglipVisionModel

from ..normalisation import agree_on_normalisation
from ..pictures import normalisation_of
from .access import check_same_names, prompt_layers
from .config import ClipPromptConfig
from .layer import MERGE, ClipPromptLayer, Place, UnitPixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tower:
    """A tower that prompts may go into.

    Args:
        family: its `model_type` in a whole model's configuration.
        kind: `"vision"` or `"text"`.
        entry: the module whose input (of a text tower: whose output) the first prompts are put into.
        why_not: the reason, where it takes no prompt tokens.
    """

    family: str
    kind: Literal["vision", "text"]
    entry: str
    why_not: str | None = None


TOWERS = {
    CLIPVisionModel: Tower("clip", "vision", "pre_layrnorm"),
    CLIPTextModel: Tower("clip", "text", "embeddings.token_embedding"),
    SiglipVisionModel: Tower("siglip", "vision", "encoder.layers.0"),
    SiglipTextModel: Tower(
        "siglip",
        "text",
        "embeddings.token_embedding",
        "SigLIP's text tower has no start token that prompts could follow, and reads its padding",
    ),
}


class ClipPromptModel(BaseTuner):
    """Learned vision and text prompts in a frozen CLIP; see `ClipPromptConfig` for the designs.

    Works on `CLIPModel` and what derives from it, on `CLIPVisionModel` and `CLIPVisionModelWithProjection` (designs V
    and pixel), and on `CLIPTextModel` and `CLIPTextModelWithProjection` (design T); designs V and pixel also on
    `SiglipModel` and `SiglipVisionModel`. Prompted layers see n tokens more than the base model's:
    `last_hidden_state` and `hidden_states` of the vision tower hold them at the end.

    Raises TypeError for another model; ValueError for prompts that don't fit it: more layers or tokens than it has, a
    context that its tokenizer doesn't make or that is shorter than the prompts, an adapter of another width or family,
    a design for a tower it lacks, text prompts in a SigLIP.
    """

    prefix: str = "clip_prompt_"
    tuner_layer_cls = ClipPromptLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if adapter_name in ("", "training") or "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
            raise ValueError(f"adapter_name={adapter_name!r} can't name parameters; choose another.")
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        layers = {module.place: module for module in prompt_layers(model)}
        other = {"text": "vision", "vision": "text"}
        for place, layer in layers.items():
            partner = layers.get(Place(other[place.tower], place.index)) if place.tower in other else None  # type: ignore[arg-type]
            layer.partner = [] if partner is None else [partner]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Everything that can be refused is refused here, before the model is touched."""
        assert isinstance(peft_config, ClipPromptConfig)
        check_unwrapped(self.model)
        settled = copy(peft_config)
        settled.places = _find_places(self.model, settled)  # type: ignore[misc]
        others = [config for config in self.peft_config.values() if config is not peft_config]
        settle_normalisation(self.model, settled, alone=not others)
        peft_config.__dict__.update(settled.__dict__)  # a config that is refused stays as it was given
        return peft_config

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError for a file that lacks a prompt of the adapter, or holds one that it has no place for."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefix = "base_model.model."
        own = {name.removeprefix(prefix) for name, _ in model.named_parameters() if f".{cls.prefix}" in name}
        expected = {name for name in own if adapter_name in name.split(".")}
        given = {name.removeprefix(prefix) for name in found if f".{cls.prefix}" in name}
        for verb, names in (("lacks", expected - given), ("holds, without a place for it,", given - expected)):
            if names:
                raise ValueError(
                    f"the file of adapter {adapter_name!r} {verb} {min(names)}{_more(names)}; save it again."
                )
        return found

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Raises ValueError where another method's adapter came into the model after the prompts."""
        check_unwrapped(self.model)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in peft_config.places

    def _create_and_replace(  # PEFT's signature
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        assert isinstance(peft_config, ClipPromptConfig)
        place = peft_config.places[current_key]
        layer = target if isinstance(target, ClipPromptLayer) else ClipPromptLayer(target, place)
        like = next(layer.base_layer.parameters())
        layer.update_layer(adapter_name, *_initial(peft_config, place, like))
        if place.tower == "pixel":
            layer.pixel_index[adapter_name] = _region(peft_config, like.device)
            if peft_config.clipped:
                names = tuple(peft_config.class_names or ()) if peft_config.per_class else None
                layer.unit_pixels[adapter_name] = UnitPixels(_side(peft_config), names)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapter whose prompts are used. Raises ValueError for more than one."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(f"adapter_name={names!r}: prompts of several adapters don't add up; choose one.")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others (by name) takes its place, in all layers."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:  # PEFT lets each layer choose among its own
            self.set_adapter(min(self.peft_config))

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Make an adapter whose prompts are sum_i weights_i * prompts_i of others (weights of sum 1: their mean).

        Args:
            adapters: names of adapters of one design, with prompts at the same places.
            weights: one for each.
            adapter_name: of the new one; it isn't made active.
            combination_type: `"linear"`, the only one.

        Raises ValueError for unknown names, unequal counts, adapters that differ, and coupled prompts: the product of
        two mixed factors is no mixture of the products. So too for adapters with modules_to_save, which stay unmixed.
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type={combination_type!r} is unknown for prompts; choose 'linear'.")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"adapters={list(adapters)!r}: choose among {', '.join(self.peft_config)}.")
        if len(weights) != len(adapters):
            raise ValueError(f"weights={list(weights)!r} must have one value for each of {len(adapters)} adapters.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken; choose another.")
        first = self.peft_config[adapters[0]]
        assert isinstance(first, ClipPromptConfig)
        if first.coupling is not None:
            raise ValueError(f"adapter {adapters[0]!r} has coupled prompts (design='VLJ'), which can't be mixed.")
        saved = [name for name in adapters if self.peft_config[name].modules_to_save]
        if saved:
            raise ValueError(f"adapter {saved[0]!r} has modules_to_save beside its prompts, which can't be mixed.")
        for name in adapters[1:]:
            if _shape(self.peft_config[name]) != _shape(first):
                raise ValueError(
                    f"adapters {adapters[0]!r} and {name!r} differ in design, number of prompts or depth."
                )
        self.peft_config[adapter_name] = type(first).from_peft_type(**first.to_dict())
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in prompt_layers(self.model):
                own = layer.clip_prompt_tokens
                if adapter_name in own:
                    mixed = sum(weight * own[name] for name, weight in zip(adapters, weights, strict=True))
                    own[adapter_name].copy_(mixed)


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for a model with another PEFT method in it: only one of the two would be saved."""
    others = [type(m).__module__ for m in model.modules() if isinstance(m, BaseTunerLayer | PeftModel)
              and not isinstance(m, ClipPromptLayer)]  # fmt: skip
    if others:
        raise ValueError(f"the model has another PEFT adapter ({others[0]}), which would be lost; merge it first.")


def settle_normalisation(model: nn.Module, config: ClipPromptConfig, alone: bool) -> None:
    """Note the classifier's mean and std in the config, or give it those that the prompts were trained with.

    Raises ValueError where other adapters in the model were trained with another normalisation.
    """
    processor = getattr(model, "processor", None)
    if processor is None or not hasattr(model, "set_normalisation"):
        if config.image_mean is not None:
            logger.info("these prompts were trained on pixels normalised by %s and %s", config.image_mean,
                        config.image_std)  # fmt: skip
        return
    here = [list(values) for values in normalisation_of(processor.image_processor)]
    if config.image_mean is None or config.image_std is None:
        config.image_mean, config.image_std = here
        return
    agree_on_normalisation(model, config.image_mean, config.image_std, alone)


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shape(config: PeftConfig) -> tuple:
    """What must be equal in two adapters whose prompts can be mixed."""
    assert isinstance(config, ClipPromptConfig)
    vision = (config.num_vision_tokens, config.vision_depth) if config.has_vision else ()
    text = (config.num_text_tokens, config.text_depth) if config.has_text else ()
    pixel: tuple = ()
    if config.design == "pixel":
        units = (config.clipped, config.prompt_size, tuple(config.class_names or ()))
        pixel = (config.pixel_region, config.border_width, *units)
    return config.design, vision, text, pixel, config.coupling


def check_prompts(model: nn.Module, config: ClipPromptConfig) -> None:
    """Raise what injecting these prompts would raise, and ValueError if they would overwrite class names.

    The model and the config stay as they are.
    """
    config = deepcopy(config)
    _find_places(model, config)
    if getattr(model, "class_names", ()) and config.has_text:
        model.check_context(_count(config, "text"), model.context_length, model.templates)  # type: ignore[operator]


def _find_places(model: nn.Module, config: ClipPromptConfig) -> dict[str, Place]:
    """The modules that get prompts, by name. Checks that the prompts fit the model, and completes the config."""
    towers: dict[str, tuple[str, Any, Tower]] = {}
    for name, module in model.named_modules():
        if type(module) in TOWERS:
            tower = TOWERS[type(module)]
            towers[tower.kind] = (f"{name}." if name else "", module, tower)
    if not towers:
        raise TypeError(
            f"prompts go into CLIPModel or SiglipModel, their towers or our classifiers, not into a "
            f"{type(model).__name__}."
        )
    for _, _, tower in towers.values():
        _same(config, "family", tower.family)
    needed = {"vision": config.has_vision or config.design == "pixel", "text": config.has_text}
    for kind, need in needed.items():
        if need and kind not in towers:
            raise ValueError(f"design={config.design!r} needs a {kind} tower; {type(model).__name__} has none.")
        if need and (why_not := towers[kind][2].why_not):
            raise ValueError(f"design={config.design!r} puts prompts among texts: {why_not}; choose 'V' or 'pixel'.")
    places: dict[str, Place] = {}
    if needed["vision"]:
        prefix, module, tower = towers["vision"]
        vision = module.config
        _same(config, "vision_width", vision.hidden_size)
        if config.design == "pixel":
            _same(config, "image_size", vision.image_size)
            _check_pixels(model, config)
            return {f"{prefix}embeddings.patch_embedding": Place("pixel", 0)}
        depth = _depth("vision_depth", config.vision_depth, vision.num_hidden_layers)
        places[f"{prefix}{tower.entry}"] = Place("vision", 0)
        places |= {f"{prefix}encoder.layers.{i}": Place("vision", i) for i in range(1, depth)}
    if needed["text"]:
        prefix, module, tower = towers["text"]
        text = module.config
        _same(config, "text_width", text.hidden_size)
        depth = _depth("text_depth", config.text_depth, text.num_hidden_layers)
        if config.context_token_ids is None and config.context_init is not None and _count(config, "text"):
            config.context_token_ids = _context_ids(model, config, text)
        _check_context(config, text.max_position_embeddings, text.vocab_size)
        places[f"{prefix}{tower.entry}"] = Place("text", 0)
        places |= {f"{prefix}encoder.layers.{i}": Place("text", i) for i in range(1, depth)}
    return places


def _check_pixels(model: nn.Module, config: ClipPromptConfig) -> None:
    """Raise ValueError for pixel prompts that don't fit the pictures, or the classes; note the classes."""
    if config.prompt_size is not None and config.prompt_size > config.image_size:  # type: ignore[operator]
        raise ValueError(f"prompt_size={config.prompt_size} is beyond the {config.image_size} px of the encoder.")
    if config.pixel_region == "border" and 2 * config.border_width >= _side(config):
        raise ValueError(f"border_width={config.border_width} must be below half of {_side(config)} px.")
    if not config.clipped:
        return
    class_names = getattr(model, "class_names", None)
    if class_names is None:
        name = "per_class" if config.per_class else "clipped"
        raise ValueError(
            f"{name}=True puts prompts on pixels that aren't normalised yet, which a {type(model).__name__} never "
            "sees; give a classifier of AutoModelForZeroShotClassification."
        )
    if not config.per_class:
        return
    if config.class_names is not None:
        if class_names:
            check_same_names(config.class_names, class_names, "class_names: the prompts")
        return
    if config.inference_mode:
        raise ValueError("class_names is missing in the settings of class-wise prompts; save the adapter again.")
    if len(class_names) < 2:
        raise ValueError(f"per_class=True needs the classes, and the model has {len(class_names)}; set_classes first.")
    config.class_names = list(class_names)


def _side(config: ClipPromptConfig) -> int:
    """Of the pictures that pixel prompts are put on."""
    return config.prompt_size or config.image_size  # type: ignore[return-value]


def _same(config: ClipPromptConfig, name: str, here: int | str) -> None:
    """Note the family or a size of the model in the config, or compare it with what is noted there."""
    there = getattr(config, name)
    if there is not None and there != here:
        raise ValueError(
            f"the adapter was made for a model with {name}={there}, this one has {here}; load it on the model that "
            f"it was trained on{f', {config.base_model_name_or_path}' if config.base_model_name_or_path else ''} (and "
            "give each new adapter a ClipPromptConfig of its own)."
        )
    setattr(config, name, here)


def _depth(name: str, depth: int, layers: int) -> int:
    if depth > layers:
        raise ValueError(f"{name}={depth} is more than the tower's {layers} layers; choose 0 .. {layers}.")
    return depth


def _count(config: ClipPromptConfig, tower: str) -> int:
    """Prompts per layer; none at depth 0."""
    if tower == "vision":
        return config.num_vision_tokens if config.vision_depth else 0
    return config.num_text_tokens if config.text_depth else 0


def _context_ids(model: nn.Module, config: ClipPromptConfig, text_config) -> list[int]:
    """Token ids of the context words, by the tokenizer of the model or of its checkpoint."""
    processor, name = getattr(model, "processor", None), getattr(model, "name_or_path", "")
    if processor is not None:
        tokenizer = processor.tokenizer
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # whatever is missing: folder, Hub, files
            raise ValueError(
                f"context_init={config.context_init!r} needs a tokenizer; give context_token_ids."
            ) from error
    words = str(config.context_init).replace("_", " ")
    ids = tokenizer(words, add_special_tokens=False).input_ids
    special = {tokenizer.eos_token_id, tokenizer.unk_token_id, text_config.eos_token_id}
    if special & set(ids) or max(ids, default=0) >= text_config.vocab_size:
        raise ValueError(f"context_init={config.context_init!r} has words that the model's tokenizer doesn't know.")
    limit = text_config.max_position_embeddings
    if len(ids) + 3 > limit:
        raise ValueError(f"context_init={config.context_init!r} has {len(ids)} tokens, too long for {limit} in all.")
    return ids


def _check_context(config: ClipPromptConfig, limit: int, vocab_size: int) -> None:
    count, ids = _count(config, "text"), config.context_token_ids
    if count + 3 > limit:
        raise ValueError(f"num_text_tokens={count} leaves no place among {limit}; choose at most {limit - 3}.")
    if count and ids is not None:
        if len(ids) < count:
            raise ValueError(
                f"context_init={config.context_init!r} has {len(ids)} tokens for num_text_tokens={count}; give more."
            )
        if not all(0 <= i < vocab_size for i in ids):
            raise ValueError(f"context_token_ids={ids} must lie in 0 .. {vocab_size - 1}, the model's vocabulary.")


def _initial(config: ClipPromptConfig, place: Place, like: Tensor) -> tuple[Tensor | None, nn.Linear | None]:
    """The first values at a place: prompts of its own, or the map that makes them from the other tower's.

    Args:
        like: a weight of the wrapped module, for device and type; the embeddings where tokens enter, the patch
            embedding where pixels do.
    """
    if place.tower == "pixel":
        start = torch.nan if config.inference_mode else 0.0
        each = (len(config.class_names or ()),) if config.per_class else ()
        return like.new_full((*each, like.shape[1], len(_region(config, like.device))), start), None
    width, other = config.vision_width, config.text_width
    if place.tower == "text":
        width, other = other, width
    if config.coupling is not None and config.owner(place.index) != place.tower:
        linear = nn.Linear(other, width, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
        if config.inference_mode:
            for parameter in linear.parameters():
                nn.init.constant_(parameter, torch.nan)
        return None, linear
    count = _count(config, place.tower)
    if config.inference_mode:  # to be loaded: what a file lacks must not go unnoticed
        return like.new_full((count, width), torch.nan), None  # type: ignore[arg-type]
    ids = config.context_token_ids
    if place == Place("text", 0) and ids is not None:
        return like.detach()[ids[:count]].clone(), None
    return torch.randn(count, width, device=like.device, dtype=like.dtype) * config.init_std, None  # type: ignore[arg-type]


def _region(config: ClipPromptConfig, device: torch.device) -> Tensor:
    """Indices of the prompted pixels in a flattened picture."""
    side, edge = _side(config), config.border_width
    inside = torch.zeros(side, side, dtype=torch.bool)
    if config.pixel_region == "border":
        inside[edge:-edge, edge:-edge] = True
    return (~inside).flatten().nonzero().squeeze(1).to(device)
