"""A random CLIP of `openai_clip`, in the files that people publish."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from openai_clip import OpenAIClip
from torch import Tensor

TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own.half() for name, own in weights.items()}


def wrapped(weights: Mapping[str, Any], prefix: str = "module.") -> dict[str, Any]:
    return {f"{prefix}{name}": own for name, own in weights.items()}


def training(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a training saves beside: momenta that are as large as the weights."""
    momenta = {i: {"momentum_buffer": own.clone()} for i, own in enumerate(weights.values())}
    return {"epoch": 3, "optimizer": {"state": momenta, "param_groups": [{"lr": 1e-5}]}}


def openai(clip: OpenAIClip) -> dict[str, Any]:
    """As OpenAI's archives have it: half precision, and three sizes among the weights."""
    sizes = {"input_resolution": 8, "context_length": 32, "vocab_size": clip.token_embedding.num_embeddings}
    return {**halved(clip.state_dict()), **{name: torch.tensor(size) for name, size in sizes.items()}}


def open_clip_training(clip: OpenAIClip) -> dict[str, Any]:
    return {"name": "ViT-B-32", "state_dict": wrapped(clip.state_dict()), **training(clip.state_dict())}


def open_clip_text(clip: OpenAIClip) -> dict[str, Any]:
    return {f"text.{name}" if name.startswith(TEXT) else name: own for name, own in clip.state_dict().items()}


def visual(clip: OpenAIClip) -> dict[str, Any]:
    return halved(clip.visual.state_dict())


def visual_prefix(clip: OpenAIClip) -> dict[str, Any]:
    return wrapped(clip.visual.state_dict(), "visual.")


def tecoa(clip: OpenAIClip) -> dict[str, Any]:
    """The top-level `state_dict` is that of the prompter, which does nothing; the accuracy is NumPy's."""
    prompt = {"module.prompt": torch.zeros(1, 0, 16)}
    own, best = clip.visual.state_dict(), np.float64(38.18)
    beside = {"state_dict": {}, "add_prompter": prompt, "best_acc1": best, "best_robust": torch.tensor(38.18)}
    return {**training(own), **beside, "vision_encoder_state_dict": own}


def agft(clip: OpenAIClip) -> dict[str, Any]:
    return {"modules": {"clip.visual": halved(clip.visual.state_dict())}, "params": {}}


def compiled(clip: OpenAIClip) -> dict[str, Any]:
    return {"model_state_dict": wrapped(wrapped(clip.visual.state_dict()), "_orig_mod.")}


FILES: dict[str, Callable[[OpenAIClip], dict[str, Any]]] = {
    "openai": openai,
    "open_clip_training": open_clip_training,
    "open_clip_text": open_clip_text,
    "visual": visual,
    "visual_prefix": visual_prefix,
    "tecoa": tecoa,
    "agft": agft,
    "compiled": compiled,
}
