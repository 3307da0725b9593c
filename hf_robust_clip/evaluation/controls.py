"""What a defence is compared with, on the very images that it was shown."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from ..defences.base import Defence
from ..defences.ensemble import Ensemble
from ..modeling import ZeroShotClassifier
from ..prediction import Predict, by_logits

Control = Callable[[ZeroShotClassifier, Defence, int], Predict | None]  # None: the defence's own verdict


def static_prompts(classifier: ZeroShotClassifier, defence: Defence, seed: int) -> Predict:
    """The classifier as it is."""
    return by_logits(lambda pixels: classifier(pixel_values=pixels).logits)


def random_prompts(classifier: ZeroShotClassifier, defence: Defence, seed: int) -> Predict:
    """The classifier without adapters and with random vision prompts."""
    plain = with_random_prompts(classifier)
    return by_logits(lambda pixels: plain(pixel_values=pixels).logits)


def ensemble(classifier: ZeroShotClassifier, defence: Defence, seed: int) -> Predict | None:
    """The mean prediction over 64 random views."""
    mean = Ensemble(memory_budget=defence.memory_budget)
    return None if defence == mean else lambda pixels: mean.predict(classifier, pixels, seed=seed)


CONTROLS: dict[str, Control] = {
    "static prompts": static_prompts,
    "random prompts": random_prompts,
    "ensemble-64": ensemble,
}


def controls_of(defence: Defence, classifier: ZeroShotClassifier, seed: int) -> dict[str, Predict | None]:
    """The controls of a defence by name, ready to judge; none where nothing is defended. Make them before the
    classifier is `prepared` for the defence, which may put prompts in.
    """
    return {name: make(classifier, defence, seed) for name, make in CONTROLS.items()} if defence.defends else {}


def with_random_prompts(model: ZeroShotClassifier) -> ZeroShotClassifier:
    """A copy without adapters and with vision prompts, always the same: 2 in up to 9 layers each, N(0, 0.02^2)."""
    from peft import get_peft_model

    from ..prompts import ClipPromptConfig

    plain = copy.deepcopy(model)
    for name, module in reversed(list(plain.named_modules())):  # the innermost first
        base = getattr(module, "base_layer", getattr(module, "original_module", None))
        if base is not None:
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, base)
    plain.__dict__.pop("peft_config", None)
    depth = min(9, plain.config.vision_config.num_hidden_layers)
    devices = [plain.device] if plain.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        prompted = get_peft_model(plain, ClipPromptConfig(design="V", num_vision_tokens=2, vision_depth=depth))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prompted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return plain.requires_grad_(False).eval()
