"""Layouts in which robust CLIPs are published, a row each, and their names in those of transformers.

Sources: the code of OpenAI's CLIP and of open_clip (towers), of TeCoA and TGA-ZSR (what lies beside the image
encoder), of AGFT, and of trainers on Dassl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoints import UnfitWeights, check_loaded
from .weights_files import read_weights_file as read_weights_file

Place = tuple[str, ...]  # keys from the outside to the inside
Gives = Literal["whole", "visual", "adapter", "nothing"]
PLAIN: tuple[Place, ...] = ((), ("state_dict",), ("model_state_dict",), ("model",))
TECOA: tuple[Place, ...] = (("vision_encoder_state_dict",),)
AGFT: tuple[Place, ...] = (("modules", "clip.visual"),)
ANYWHERE = (*PLAIN, *TECOA, *AGFT)
WRAPPED = ("module.", "_orig_mod.")  # by DataParallel, by torch.compile
OF_TRAINING = ("optimizer", "optimizer_state", "optimizer_state_dict", "scheduler", "scheduler_state_dict",
               "lr_scheduler", "scaler", "scaler_state_dict", "grad_scaler")  # fmt: skip
SCALES = ("logit_scale", "logit_bias")
SIZES = {"input_resolution": ("vision_config", "image_size"), "vocab_size": ("text_config", "vocab_size"),
         "context_length": ("text_config", "max_position_embeddings")}  # fmt: skip
LARGEST_SCALE = 10.0  # of logit_scale, a logarithm: CLIP stops at log(100), 4.6


@dataclass(frozen=True)
class Layout:
    """A way in which weights are written.

    Args:
        name: by which it is asked for.
        about: whose it is.
        gives: a whole CLIP, its image tower alone, an adapter, or nothing.
        places: where in a file its tensors may lie.
        has: patterns; of each some tensor's name begins so.
        lacks: patterns of which no tensor's name begins so.
        vision: what the names of the image tower begin with.
        text: the same of the text tower; None where the base gives it.
        renamed: whether the towers have OpenAI's names; else those of transformers.
        empty: keys beside the tensors under which there may be no values: images would be prompted.
        refused: why nothing is made of it.
    """

    name: str
    about: str
    gives: Gives
    places: tuple[Place, ...]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    vision: str = ""
    text: str | None = None
    renamed: bool = True
    empty: tuple[str, ...] = ()
    refused: str = ""

    def fits(self, names: Mapping[str, Any]) -> bool:
        """Whether tensors of these names are written so."""
        begins = [any(re.match(pattern, name) for name in names) for pattern in (*self.has, *self.lacks)]
        return all(begins[: len(self.has)]) and not any(begins[len(self.has) :])


NO_VIT = (r"(visual\.)?layer1\.", r"(visual\.)?trunk\.")
PROMPTED = r"(visual\.)?prompt_pos_embedding$"
LEARNER = r"prompt_learner\.|(.*\.)?(ctx|VPT|VPT_shallow)$"
LAYOUTS = (
    Layout("open_clip", "a whole CLIP of OpenAI or open_clip", "whole", PLAIN,
           (r"visual\.conv1\.weight$", r"token_embedding\.weight$"), (*NO_VIT, LEARNER), "visual.", ""),
    Layout("open_clip_text", "a whole CLIP of open_clip with a text tower of its own", "whole", PLAIN,
           (r"visual\.conv1\.weight$", r"text\.token_embedding\.weight$"), (*NO_VIT, LEARNER), "visual.", "text."),
    Layout("visual", "an image tower alone (FARE, TeCoA2, TeCoA4, Sim-CLIP)", "visual", PLAIN,
           (r"conv1\.weight$", r"class_embedding$"), (*NO_VIT, PROMPTED)),
    Layout("visual_prefix", "an image tower alone, under visual.", "visual", PLAIN,
           (r"visual\.conv1\.weight$", r"visual\.class_embedding$"),
           (*NO_VIT, PROMPTED, LEARNER, r"(text\.)?token_embedding\.weight$"), "visual."),
    Layout("tecoa", "a training of TeCoA, PMG-AFT, TGA-ZSR and others on their code", "visual", TECOA,
           (r"conv1\.weight$", r"class_embedding$"), (*NO_VIT, PROMPTED), empty=("state_dict", "add_prompter")),
    Layout("agft", "a training of AGFT", "visual", AGFT,
           (r"conv1\.weight$", r"class_embedding$"), (*NO_VIT, PROMPTED), empty=("params",)),
    Layout("prompt_learner", "prompts of a trainer on Dassl (TAPT, APT, MaPLe, CoOp)", "adapter", PLAIN, (LEARNER,)),
    Layout("hugging_face", "a CLIPModel of transformers", "whole", PLAIN,
           (r"vision_model\.", r"text_model\."), vision="vision", text="text", renamed=False),
    Layout("hugging_face_visual", "the image tower of a CLIPModel of transformers", "visual", PLAIN,
           (r"vision_model\.",), (r"text_model\.",), vision="vision", renamed=False),
    Layout("resnet", "a CLIP with a ResNet (RN50)", "nothing", ANYWHERE, (r"(visual\.)?layer1\.",),
           refused="CLIPModel has no ResNet"),
    Layout("siglip", "a SigLIP in open_clip's names", "nothing", PLAIN, (r"visual\.trunk\.", r"logit_bias$"),
           refused="it is no CLIPModel; load the SiglipModel that its authors published"),
    Layout("timm", "a CLIP with an image tower of timm (ConvNeXt)", "nothing", PLAIN, (r"(visual\.)?trunk\.",),
           (r"logit_bias$",), refused="CLIPModel has no such tower"),
    Layout("clipa", "a CLIPA (Delta-CLIP), or a file that lacks ln_pre", "nothing", ANYWHERE,
           (r"(visual\.)?conv1\.weight$", r"(visual\.)?class_embedding$"), (*NO_VIT, r"(visual\.)?ln_pre\."),
           refused="without ln_pre, and with the mean over all tokens, it is no CLIPModel"),
    Layout("visual_prompts", "an image tower with prompt tokens (TeCoA's visual prompts)", "nothing", ANYWHERE,
           (PROMPTED,), refused="its prompts have positions of their own, which no adapter here has"),
)  # fmt: skip
KNOWN = {layout.name: layout for layout in LAYOUTS}
BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}  # fmt: skip
VISION = {
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
    "proj": "visual_projection.weight",
}
TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
TRANSPOSED = ("proj", "text_projection")
OF_VISION = ("vision_model.", "visual_projection.")


@dataclass(frozen=True)
class FoundWeights:
    """The tensors of a file, by their own names without what they are wrapped in.

    Args:
        layout: how they are written.
        place: where they lay.
        tensors: by name.
        left_out: what else the file holds.
    """

    layout: Layout
    place: Place
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def find_weights(content: Mapping[str, Any], source: str, layout: str | None = None) -> FoundWeights:
    """The weights in what `read_weights_file` gave.

    Args:
        source: what the file is called, for messages.
        layout: the name of a row of `LAYOUTS`; None takes that which the names of the tensors tell.

    Raises ValueError for an unknown layout, for weights that are written in none or in several of these ways, in one
    of which no CLIPModel can be made, or in another than was asked for, and where tensors would be dropped that
    change what the model computes.
    """
    if layout is not None and layout not in KNOWN:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(KNOWN)}.")
    fitting = [(row, place) for row in LAYOUTS for place in row.places if row.fits(_tensors_at(content, place))]
    for row, _ in fitting:
        if row.refused:
            raise ValueError(f"source={source!r} is {row.about}: {row.refused}.")
    chosen = [(row, place) for row, place in fitting if layout in (None, row.name)]
    if len(chosen) != 1:
        raise ValueError(_undecided(content, source, layout, fitting, chosen))
    row, place = chosen[0]
    others = {other[0] for _, other in fitting if other and layout is not None}
    left_out = tuple(_beside(content, place, row, others, source))
    return FoundWeights(row, place, _tensors_at(content, place), left_out)


def _undecided(content: Mapping[str, Any], source: str, layout: str | None, fitting: list, chosen: list) -> str:
    told = [f"{row.name} (under {'.'.join(place) or 'no key'})" for row, place in chosen or fitting]
    if chosen:
        mend = "give layout." if layout is None else "save one of them alone."
        return f"source={source!r} holds several models, {', '.join(told)}; {mend}"
    if fitting:
        return f"layout={layout!r} doesn't fit source={source!r}, which is written as {', '.join(told)}."
    names = [name for place in ANYWHERE for name in _tensors_at(content, place)] or list(content)
    return f"source={source!r} is in no known layout: it has {', '.join(names[:4])}; known: {', '.join(KNOWN)}."


def _tensors_at(content: Mapping[str, Any], place: Place) -> dict[str, Tensor]:
    """The tensors at a place, without what all of their names begin with; none if there is no such place."""
    inside: Any = content
    for key in place:
        inside = inside.get(key) if isinstance(inside, Mapping) else None
    if not isinstance(inside, Mapping):
        return {}
    tensors = {str(name): value.detach() for name, value in inside.items() if isinstance(value, Tensor)}
    while tensors and (prefix := next((own for own in WRAPPED if all(n.startswith(own) for n in tensors)), None)):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _beside(content: Mapping[str, Any], place: Place, row: Layout, others: set[str], source: str) -> Iterator[str]:
    """The keys that are left out. Raises ValueError for one that holds tensors, unless it is known what these are."""
    inside: Any = content
    for depth in range(len(place) + 1):
        for key, value in inside.items():
            if key == (place[depth] if depth < len(place) else None) or (depth == len(place) and _is_tensor(value)):
                continue
            prompts = _values_in(value) if key in row.empty and key not in others else 0
            if prompts:
                raise ValueError(
                    f"{key} in source={source!r} holds {prompts:,} values of prompts, without which the image "
                    "tower is another function; no adapter here has them."
                )
            lost = 0 if key in (*OF_TRAINING, *others) else _values_in(value, above=0 if key in SCALES else 1)
            if lost:
                raise ValueError(f"{key} in source={source!r} holds {lost:,} values that would be lost; take it out.")
            yield str(key)
        inside = inside[place[depth]] if depth < len(place) else inside


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _values_in(value: Any, above: int = 0) -> int:
    """How many values the tensors in nested containers have: those of more than so many, since one is a figure."""
    if isinstance(value, Tensor):
        return value.numel() if value.numel() > above else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(_values_in(own, above) for own in value) if isinstance(value, list | tuple | set) else 0


def clip_weights(found: FoundWeights, base: nn.Module, source: str) -> dict[str, Tensor]:
    """Weights by the names of a `CLIPModel`, in float32: `in_proj` in three, projections transposed.

    Args:
        base: a `CLIPModel`, whose names and shapes they must have: all of them, or those of its image tower.

    Raises UnfitWeights, with the names, for tensors that are missing, unknown, of another shape, no floats, or not
    finite; ValueError for OpenAI's own entries (`input_resolution`, say) that contradict the base.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in _without_sizes(found, base, source).items():
        pairs = _renamed(name, tensor, found.layout) if found.layout.renamed else [(name, tensor)]
        unknown += [] if pairs else [name]
        renamed |= dict(pairs)
    visual = found.layout.gives == "visual"
    there = base.state_dict()
    expected = {name: there[name].shape for name in there if not visual or name.startswith(OF_VISION)}
    if "logit_scale" in expected and renamed.get("logit_scale", torch.empty(0)).numel() == 1:
        renamed["logit_scale"] = renamed["logit_scale"].reshape(())
    info = {
        "missing_keys": expected.keys() - renamed.keys(),
        "unexpected_keys": [*unknown, *(renamed.keys() - expected.keys())],
        "mismatched_keys": [
            (name, tuple(own.shape), tuple(expected[name]))
            for name, own in renamed.items()
            if name in expected and own.shape != expected[name]
        ],
    }
    check_loaded(source, info, "the base", "name the base that they were trained from")
    renamed = {name: own for name, own in renamed.items() if name in expected}  # without position_ids
    _check_values(renamed, source)
    return {name: own.to(torch.float32).contiguous() for name, own in renamed.items()}


def _without_sizes(found: FoundWeights, base: nn.Module, source: str) -> dict[str, Tensor]:
    """The tensors without OpenAI's three sizes. Raises ValueError where these aren't the base's."""
    for name, (part, size) in SIZES.items():
        told = found.tensors.get(name)
        here = getattr(getattr(base.config, part), size)
        if told is not None and (told.numel() != 1 or int(told) != here):
            raise ValueError(f"{name}={told.tolist()} in source={source!r} is {here} in the base; name another base.")
    return {name: own for name, own in found.tensors.items() if name not in SIZES or found.layout.gives != "whole"}


def _renamed(name: str, tensor: Tensor, layout: Layout) -> list[tuple[str, Tensor]]:
    """The name, or names, by which transformers knows a tensor, with its values; none for an unknown one."""
    if name == "logit_scale" and layout.text is not None:
        return [(name, tensor)]
    if name.startswith(layout.vision):
        own, table, tower = name.removeprefix(layout.vision), VISION, "vision_model"
    elif layout.text is not None and name.startswith(layout.text):
        own, table, tower = name.removeprefix(layout.text), TEXT, "text_model"
    else:
        return []
    if own in table:
        return [(table[own], tensor.T if own in TRANSPOSED and tensor.dim() == 2 else tensor)]
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", own)
    if block is None:
        return []
    layer, part, kind = f"{tower}.encoder.layers.{int(block[1])}", block[2], block[3]
    if part == "attn.in_proj" and tensor.dim() and len(tensor) % 3 == 0:
        chunks = zip("qkv", tensor.chunk(3), strict=False)
        return [(f"{layer}.self_attn.{which}_proj.{kind}", chunk) for which, chunk in chunks]
    return [(f"{layer}.{BLOCK[part]}.{kind}", tensor)] if part in BLOCK else []


def _check_values(weights: Mapping[str, Tensor], source: str) -> None:
    for name, own in weights.items():
        if not own.is_floating_point() or own.layout != torch.strided or own.is_meta:
            raise UnfitWeights(f"{name} in source={source!r} is of {own.dtype}, {own.layout}; save it as floats.")
        if not own.to(torch.float32).isfinite().all():
            raise UnfitWeights(f"{name} in source={source!r} holds values that are not finite; its training failed.")
    scale = weights.get("logit_scale")
    if scale is not None and not abs(float(scale)) <= LARGEST_SCALE:
        raise UnfitWeights(
            f"logit_scale={float(scale):g} in source={source!r} is no logarithm of a scale; correct it."
        )


def likeness(weights: Mapping[str, Tensor], base: nn.Module) -> float:
    """How alike weights (by the names of a `CLIPModel`) and the base's are: the cosine over all matrices, in [-1, 1];
    about 0 for models that were trained apart, far above for one that was fine-tuned from the other.
    """
    there = base.state_dict()
    inner = own = other = 0.0
    for name, weight in weights.items():
        if weight.dim() >= 2:
            here, base_weight = weight.double(), there[name].double()
            inner += float((here * base_weight).sum())
            own, other = own + float(here.square().sum()), other + float(base_weight.square().sum())
    return inner / (own * other) ** 0.5 if own and other else 0.0
