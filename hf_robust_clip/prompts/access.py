"""The prompts in a model, as everything else reaches them: which are active, by what names, and how other tensors take
their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from .layer import ClipPromptLayer, Place

T = TypeVar("T")


def prompt_layers(model: nn.Module) -> list[ClipPromptLayer]:
    """The modules that carry prompts, whether these are active or not."""
    return [module for module in model.modules() if isinstance(module, ClipPromptLayer)]


def active_prompts(model: nn.Module) -> list[Tensor]:
    """The active prompts in a model or tower, (n, D) or (B, n, D), one for each prompted layer."""
    found = (layer.prompts() for layer in prompt_layers(model))
    return [prompts for prompts in found if prompts is not None]


def prompts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The active adapter's prompts, and the maps that make prompts of others, by parameter name."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ClipPromptLayer) or module.prompts() is None:
            continue
        active = module.active_names[0]
        for own_name, parameter in module.named_parameters(prefix=name):
            if ".clip_prompt_" in own_name and active in own_name.removeprefix(name).split("."):
                found[own_name] = parameter
    return found


def coupled_parameters(tower: nn.Module) -> list[nn.Parameter]:
    """Parameters outside a tower that its active prompts are made from."""
    return [parameter for layer in prompt_layers(tower) for parameter in layer.coupled_parameters()]


def pixel_layer(tower: nn.Module) -> ClipPromptLayer | None:
    """The layer of an image tower with active pixel prompts in units of [0, 1]; None without any."""
    layer = getattr(getattr(tower, "embeddings", None), "patch_embedding", None)
    return layer if isinstance(layer, ClipPromptLayer) and layer.in_units() is not None else None


def classes_with_prompts(model: nn.Module) -> tuple[str, ...] | None:
    """The classes that each have a pixel prompt of the active adapter; None where prompts are for all classes."""
    units = (layer.in_units() for layer in prompt_layers(model) if layer.place.tower == "pixel")
    return next((own.class_names for own in units if own is not None), None)


def check_bound_classes(model: nn.Module, class_names: Sequence[str]) -> None:
    """Raise ValueError for other classes, or another order, than those that an adapter in a model has prompts for."""
    for layer in prompt_layers(model):
        for adapter, units in layer.unit_pixels.items():
            if units.class_names is not None and units.class_names != tuple(class_names):
                check_same_names(units.class_names, class_names, f"class_names: the prompts of adapter {adapter!r}")


def check_same_names(bound: Sequence[str], given: Sequence[str], whose: str) -> None:
    """Raise ValueError, telling the first difference, unless two lists of classes are the same."""
    if len(bound) != len(given):
        raise ValueError(f"{whose} are those of {len(bound)} classes, not of these {len(given)}; set those classes.")
    for place, (own, other) in enumerate(zip(bound, given, strict=True)):
        if own != other:
            raise ValueError(
                f"{whose} have {own!r} for class {place}, not {other!r}; set those classes in that order."
            )


@contextmanager
def without_class_prompts(model: nn.Module) -> Iterator[None]:
    """Forwards inside that choose no class' prompt are those of the network without prompts: what an attack sees that
    doesn't know of them. Other prompts stay.
    """
    with _switched_on(model, "bare"):
        yield


@contextmanager
def unclipped_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients inside take the clipping of pixel prompts for the identity, where they would be 0: for attacks."""
    with _switched_on(model, "unclipped_gradient"):
        yield


@contextmanager
def _switched_on(model: nn.Module, switch: str) -> Iterator[None]:
    """A switch of all layers with pixel prompts; as found afterwards."""
    layers = [layer for layer in prompt_layers(model) if layer.place.tower == "pixel"]
    before = [getattr(layer, switch) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, switch, True)
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, switch, was)


def num_vision_prompts(model: nn.Module) -> int:
    """How many tokens of active prompts stand at the end of the image encoder's."""
    layers = [layer for layer in prompt_layers(model) if layer.place.tower == "vision"]
    return max((p.shape[-2] for layer in layers if (p := layer.prompts()) is not None), default=0)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter whose prompts are used; None without any."""
    return next((layer.active_names[0] for layer in prompt_layers(model) if layer.active_names), None)


def summary(model: Any) -> str:
    """The active prompts in a few words; `"none"` without any."""
    layers = [layer for layer in prompt_layers(model) if layer.prompts() is not None]
    return model.peft_config[layers[0].active_names[0]].summary() if layers else "none"


class _Inside(nn.Module):
    """Runs any function of a model as a module's forward, which is what `functional_call` takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_prompts(model: nn.Module, prompts: Mapping[str, Tensor], function: Callable[[], T]) -> T:
    """`function()` while these tensors stand in the place of the model's parameters of the same names."""
    if not prompts:
        return function()
    inside = {f"model.{name}": value for name, value in prompts.items()}
    return functional_call(_Inside(model), inside, (function,))


@contextmanager
def words_as_prompts(text_model: Any, ids_N: Tensor, first: int = 1) -> Iterator[None]:
    """Text prompts at the input that begin as these words, for the time being; the tower is left as it was found.

    Args:
        first: the position of the first of these words in every text.
    """
    embeddings = text_model.embeddings
    plain = embeddings.token_embedding
    layer = ClipPromptLayer(plain, Place("text", 0), first)
    layer.update_layer("default", plain.weight.detach()[ids_N].clone())
    try:
        embeddings.token_embedding = layer
        yield
    finally:
        embeddings.token_embedding = plain


def plain_layer(layer: nn.Module) -> nn.Module:
    """A layer without the prompts around it."""
    return layer.base_layer if isinstance(layer, ClipPromptLayer) else layer
