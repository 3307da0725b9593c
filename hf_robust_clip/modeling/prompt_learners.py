"""Prompts of the trainers that stand on Dassl, to `ClipPromptConfig` adapters, or a reason why they can't be one.

A file of such a trainer (CoOp, VPT, IVLP, MaPLe, and APT, TAPT, FAP after them) holds the learned prompts, buffers
that belong to the class names of its training, and often the frozen towers. What it holds beside the prompts says in
which CLIP they were learned, and on which texts: the first is compared with the base, the second told.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from ..normalisation import has_adapter
from ..prompts import ClipPromptConfig
from ..prompts.access import prompt_layers
from .clip import CLIPForZeroShotClassification
from .layouts import BLOCK, TEXT, TRANSPOSED, VISION

logger = logging.getLogger(__name__)

Role = Literal["text", "vision", "map"]
PROMPTS: tuple[tuple[str, Role, int], ...] = (  # key, what it is, its layer or that of the first in a list
    (r"prompt_learner\.ctx", "text", 0),
    (r"prompt_learner\.compound_prompts_text\.(?P<layer>\d+)", "text", 1),
    (r"prompt_learner\.compound_prompts_image\.(?P<layer>\d+)", "vision", 1),
    (r"prompt_learner\.proj\.(?P<leaf>weight|bias)", "map", 0),
    (r"prompt_learner\.compound_prompt_projections\.(?P<layer>\d+)\.(?P<leaf>weight|bias)", "map", 1),
    (r"text_encoder\.transformer\.resblocks\.(?P<layer>[1-9]\d*)\.VPT_shallow", "text", 0),
    (r"image_encoder\.VPT", "vision", 0),
    (r"image_encoder\.transformer\.resblocks\.(?P<layer>[1-9]\d*)\.VPT_shallow", "vision", 0),
)
REASONS = (
    (r"meta_net\.", "its prompts are made from each image (CoCoOp), which an adapter's are not"),
    (r"expert_prompts|base_prompt|\.gate\.", "it mixes prompts anew for each image, which an adapter doesn't"),
    (r"prompt_learner\.cls", "it learned class names too, and an adapter has none"),
)
PREFIX, SUFFIX = "prompt_learner.token_prefix", "prompt_learner.token_suffix"  # embeddings of its training's texts
MEAN, STD = "normalize.mean", "normalize.std"
TOWERS = ("image_encoder.", "text_encoder.")
CONTEXT = "a photo of a"  # of which the prompts take the first tokens, in every trainer that starts from words


@dataclass(frozen=True)
class _Learner:
    """The contents of a file: prompts (n, D) by layer, the maps between towers, and what is only compared."""

    text: dict[int, Tensor] = field(default_factory=dict)
    vision: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    names: dict[tuple[str, int], str] = field(default_factory=dict)


def prompt_learner_adapter(weights: Mapping[str, Tensor], base: CLIPForZeroShotClassification) -> PeftModel:
    """A CLIP with the prompts of a prompt learner in it, ready for `save_pretrained`.

    | keys of the file | adapter |
    |---|---|
    | `prompt_learner.ctx` (n, D), or `ctx`: CoOp, APT | `T`, one layer |
    | `image_encoder.VPT`, `...resblocks.i.VPT_shallow`: VPT, TAPT-V | `V` |
    | both, and `text_encoder...VPT_shallow`: IVLP, TAPT-VLI | `VLI` |
    | `ctx`, `compound_prompts_text`, `proj`, `compound_prompt_projections`: MaPLe, TAPT-VLJ | `VLJ` |
    | the same with `compound_prompts_image`: FAP | `VLJ`, `vision_to_text` |

    Deep prompts enter layer i in the place of what layer i - 1 made of the ones before, text prompts stand after the
    start token (positions are added), vision prompts after the patches (none is added): as `ClipPromptConfig` says.
    They become float32, in a base of float64 that.

    Args:
        weights: the `state_dict` of the file. Its buffers `token_prefix` and `token_suffix` must be embeddings of the
            base's tokens, its towers, where it has any, and its normalisation those of the base to half precision.
        base: the CLIP that the prompts were learned in. It is changed: the prompts are put into it.

    Raises TypeError for another base. Raises ValueError for a file that asks for more than an adapter can do (contexts
    of each class, prompts made from the image), a key that isn't known, layers that are missing or that the base
    lacks, sizes that aren't the base's, values that aren't finite, and another CLIP in the file than the base. The
    base is left as it was.

    Source: CoOp (arXiv 2109.01134), VPT (arXiv 2203.12119), MaPLe and IVLP (arXiv 2210.03117), APT (arXiv 2403.01849),
    TAPT (arXiv 2411.13136), FAP (arXiv 2403.14774); keys and order of tokens by their authors' code. Where a trainer
    rounds prompts to half precision in each forward, they are taken as they are stored.
    """
    if not isinstance(base, CLIPForZeroShotClassification):
        raise TypeError(f"base={type(base).__name__}: prompt learners are made for CLIP; give a CLIP classifier.")
    if has_adapter(base):
        raise ValueError("base has an adapter inside; give the CLIP that the prompts were learned in, without one.")
    learner = _read(weights)
    config = _config(learner, base)
    _check_same_clip(learner, base)
    _say_what_is_unknown(learner, base, _token_ids(learner, base))
    model = get_peft_model(base, config)
    with torch.no_grad():
        for layer in prompt_layers(model):
            tower, index = layer.place.tower, layer.place.index
            for tokens in layer.clip_prompt_tokens.values():
                tokens.copy_((learner.text if tower == "text" else learner.vision)[index])
            for projection in layer.clip_prompt_projection.values():
                for leaf, values in learner.maps[index].items():
                    getattr(projection, leaf).copy_(values)
    return model


def trained_template(weights: Mapping[str, Tensor], base: CLIPForZeroShotClassification) -> str | None:
    """The template of the texts that a prompt learner was trained on, for `set_classes`; None where the file doesn't
    tell, or no template says it.

    The words in the place of the prompts are arbitrary: `"a photo of a {}."` where these may have been the ones.
    Raises ValueError for a file that `prompt_learner_adapter` refuses.
    """
    learner = _read(weights)
    _config(learner, base)
    rows, count = _token_ids(learner, base), len(learner.text.get(0, ()))
    if len(rows) < 2:
        return None
    tokenizer = base.require_processor().tokenizer
    words = tokenizer(CONTEXT, add_special_tokens=False).input_ids
    known, stop = words[count:], tokenizer(".", add_special_tokens=False).input_ids
    shared = _shared(rows)
    if shared and rows[0][:shared] != known:
        return None
    names = [row[shared:] for row in rows]
    backwards = [name[::-1] for name in names]
    if backwards[0][: _shared(backwards)] != stop[::-1]:
        return None
    context = CONTEXT if shared or count == len(words) else " ".join(["X"] * count)
    template = f"{context} {{}}."
    for row, name in zip(rows, names, strict=True):
        text = template.replace("{}", tokenizer.decode(name[: -len(stop)]))
        if tokenizer(text, add_special_tokens=False).input_ids[count:] != row:
            return None
    return template


def _read(weights: Mapping[str, Tensor]) -> _Learner:
    """The contents of a state dict, sorted. Raises ValueError for what can't be read."""
    learner = _Learner()
    for key, values in _full_names(weights).items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise ValueError(f"{key!r} of the prompt learner is no tensor of floats; give its state_dict.")
        if not torch.isfinite(values).all():
            raise ValueError(f"{key!r} of the prompt learner has values that aren't finite; take another file.")
        for pattern, role, first in PROMPTS:
            found = re.fullmatch(pattern, key)
            if found is not None:
                parts = found.groupdict()
                layer = first + int(parts.get("layer") or 0)
                _sort(learner, key, values, role, layer, parts.get("leaf"))
                break
        else:
            if key in (PREFIX, SUFFIX):
                learner.texts[key] = values
            elif (key.startswith(TOWERS) and "VPT" not in key) or key in ("logit_scale", MEAN, STD):
                learner.rest[key] = values
            else:
                raise ValueError(_refusal(key))
    if not learner.text and not learner.vision:
        raise ValueError("weights hold no prompts (prompt_learner.ctx, VPT); give the state_dict of a prompt learner.")
    return learner


def _sort(learner: _Learner, key: str, values: Tensor, role: Role, layer: int, leaf: str | None) -> None:
    """Put one tensor of prompts, or of a map, in its place. Raises ValueError for a place that is taken, for a context
    of each class, and for another shape.
    """
    if role == "map":
        assert leaf is not None
        learner.maps.setdefault(layer, {})[leaf] = values
        learner.names["map", layer] = key.rpartition(".")[0]
        return
    if key.endswith("ctx") and values.dim() == 3:
        raise ValueError(f"{key!r} has a context for each of {len(values)} classes; an adapter has one for all.")
    if values.dim() != 2 or not values.numel():
        raise ValueError(f"{key!r} has shape {tuple(values.shape)}; prompts of a layer are (n, width), n above 0.")
    if (role, layer) in learner.names:
        raise ValueError(f"{key!r} and {learner.names[role, layer]!r} are prompts of the same layer; keep one.")
    (learner.text if role == "text" else learner.vision)[layer] = values
    learner.names[role, layer] = key


def _full_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the whole model, where the learner alone, or a parallel model, was saved."""
    found = dict(weights)
    if found and all(str(key).startswith("module.") for key in found):
        found = {key.removeprefix("module."): values for key, values in found.items()}
    if "ctx" in found:
        found = {f"prompt_learner.{key}": values for key, values in found.items()}
    return found


def _refusal(key: str) -> str:
    for pattern, reason in REASONS:
        if re.search(pattern, key):
            return f"{key!r} can't become part of a prompt adapter: {reason}."
    return f"{key!r} isn't known to be part of a prompt learner, and would be lost; take it out by hand if it may be."


def _config(learner: _Learner, base: CLIPForZeroShotClassification) -> ClipPromptConfig:
    """The settings of the adapter. Raises ValueError for layers that are missing, and sizes that aren't the base's."""
    sizes = {"text": base.config.text_config, "vision": base.config.vision_config}
    own: dict[str, dict[int, Tensor]] = {"text": learner.text, "vision": learner.vision}
    depths = {}
    for tower, prompts in own.items():
        layers = {*prompts, *learner.maps}
        depths[tower] = depth = max(layers, default=-1) + 1
        for missing in sorted({*range(depth)} - layers):
            raise ValueError(f"the {tower} prompts of layer {missing} are missing, of {depth}; the file is not whole.")
        if depth > sizes[tower].num_hidden_layers:
            raise ValueError(
                f"{learner.names[tower if depth - 1 in prompts else 'map', depth - 1]!r} is of layer {depth - 1}, "
                f"but base has {sizes[tower].num_hidden_layers} {tower} layers; give the base that it was made for."
            )
        for layer, values in prompts.items():
            _check_shape(learner.names[tower, layer], values, (None, sizes[tower].hidden_size))
    counts = {tower: _count(learner, tower, prompts) for tower, prompts in own.items()}
    odd = next((key for key in learner.names.values() if ("VPT" if learner.maps else "compound") in key), None)
    if odd is not None:
        raise ValueError(f"{odd!r} {'stands beside' if learner.maps else 'lacks'} maps from tower to tower "
                         "(prompt_learner.proj); the file is not whole, or of another trainer.")  # fmt: skip
    if learner.maps:
        return _coupled(learner, counts, max(depths.values()), sizes["text"].hidden_size, sizes["vision"].hidden_size)
    design: Literal["VLI", "T", "V"] = "T" if not learner.vision else "VLI" if learner.text else "V"
    return ClipPromptConfig(
        design=design,
        num_vision_tokens=counts["vision"],
        num_text_tokens=counts["text"],
        vision_depth=depths["vision"],
        text_depth=depths["text"],
        context_init=None,
    )


def _coupled(
    learner: _Learner, counts: Mapping[str, int], depth: int, text_width: int, vision_width: int
) -> ClipPromptConfig:
    """The settings of an adapter whose prompts of one tower are made from those of the other."""
    if 0 not in learner.text:
        raise ValueError("'prompt_learner.ctx' is missing beside maps to vision prompts; the file is not whole.")
    to_text = bool(learner.vision)
    deep, other = (learner.vision, learner.text) if to_text else (learner.text, learner.vision)
    both = sorted(({*deep} & {*other}) | ({*other} - {0}))
    missing = sorted({*range(1, depth)} - {*deep})
    if both or missing:
        layer = (both or missing)[0]
        raise ValueError(f"layer {layer} must have prompts of one tower, the same in all layers but the first, and a "
                         "map to the other; the file is not whole, or of another trainer.")  # fmt: skip
    for layer in range(depth):
        name, parts = learner.names.get(("map", layer)), learner.maps.get(layer, {})
        if name is None or {*parts} != {"weight", "bias"}:
            raise ValueError(f"the map of layer {layer} is missing, or a part of it; the file is not whole.")
        source, target = (vision_width, text_width) if to_text and layer else (text_width, vision_width)
        _check_shape(f"{name}.weight", parts["weight"], (target, source))
        _check_shape(f"{name}.bias", parts["bias"], (target,))
    count = counts["text"]
    if to_text and counts["vision"] != count:
        raise ValueError(f"{learner.names['vision', 1]!r} has {counts['vision']} prompts, the context {count}; "
                         "coupled prompts are as many in both towers.")  # fmt: skip
    return ClipPromptConfig(
        design="VLJ",
        coupling="vision_to_text" if to_text else "text_to_vision",
        num_vision_tokens=count,
        num_text_tokens=count,
        vision_depth=depth,
        text_depth=depth,
        context_init=None,
    )


def _count(learner: _Learner, tower: str, prompts: Mapping[int, Tensor]) -> int:
    """How many prompts each layer of a tower has. Raises ValueError where the layers differ."""
    first = min(prompts, default=0)
    for layer, values in prompts.items():
        if len(values) != len(prompts[first]):
            other = learner.names[tower, first]
            raise ValueError(f"{learner.names[tower, layer]!r} has {len(values)} prompts, {other!r} "
                             f"{len(prompts[first])}; they must be as many.")  # fmt: skip
    return len(prompts[first]) if prompts else 0


def _check_shape(key: str, values: Tensor, expected: tuple[int | None, ...]) -> None:
    given = tuple(values.shape)
    if len(given) != len(expected) or any(b not in (None, a) for a, b in zip(given, expected, strict=True)):
        shape = ", ".join("n" if size is None else str(size) for size in expected)
        raise ValueError(f"{key!r} has shape {given}, for base it must be ({shape}); give the base it was made for.")


def _check_same_clip(learner: _Learner, base: CLIPForZeroShotClassification) -> None:
    """Raise ValueError where the file's towers, token embeddings or normalisation aren't the base's."""
    if learner.rest:
        there = {**openai_weights(base), MEAN: base.image_mean.flatten(), STD: base.image_std.flatten()}
        for key, values in learner.rest.items():
            if key not in there:
                raise ValueError(_refusal(key))
            values = values.flatten() if key in (MEAN, STD) else values
            _check_shape(key, values, tuple(there[key].shape))
            if not _equal(values, there[key]):
                raise ValueError(f"{key!r} differs from base: they were learned in another CLIP; give that.")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal to half precision, in which one of them may have been stored."""
    kind = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else torch.float16
    return torch.equal(a.detach().cpu().to(kind), b.detach().cpu().to(kind))


def openai_weights(base: CLIPForZeroShotClassification) -> dict[str, Tensor]:
    """A CLIP's weights by the names that they have in the OpenAI code, as prompt learners save them."""
    own = base.state_dict()
    found = {"logit_scale": own["logit_scale"]}
    towers = (("image_encoder", VISION, "vision_model", base.config.vision_config.num_hidden_layers),
              ("text_encoder", TEXT, "text_model", base.config.text_config.num_hidden_layers))  # fmt: skip
    for theirs, table, ours, depth in towers:
        found |= {f"{theirs}.{a}": own[b].T if a in TRANSPOSED else own[b] for a, b in table.items()}
        for i in range(depth):
            block, layer = f"{theirs}.transformer.resblocks.{i}", f"{ours}.encoder.layers.{i}"
            for leaf in ("weight", "bias"):
                found |= {f"{block}.{a}.{leaf}": own[f"{layer}.{b}.{leaf}"] for a, b in BLOCK.items()}
                qkv = [own[f"{layer}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
                found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(qkv)
    return found


def _token_ids(learner: _Learner, base: CLIPForZeroShotClassification) -> list[list[int]]:
    """The token ids after the prompts of each text of the training, without the end token; none where the file has no
    such buffer.

    Raises ValueError for embeddings that aren't the base's, and for texts of another length.
    """
    if not learner.texts:
        return []
    text = base.config.text_config
    count, width = len(learner.text.get(0, ())), text.hidden_size
    kind = torch.bfloat16 if any(v.dtype == torch.bfloat16 for v in learner.texts.values()) else torch.float16
    embeddings = base.text_model.embeddings.token_embedding.weight.detach()
    ids_by_row = {row: i for i, row in enumerate(_rows(embeddings, kind))}
    lengths = {PREFIX: 1, SUFFIX: text.max_position_embeddings - 1 - count}
    found: dict[str, list[list[int]]] = {}
    for key, values in learner.texts.items():
        _check_shape(key, values, (None, lengths[key], width))
        rows = [ids_by_row.get(row, -1) for row in _rows(values.reshape(-1, width), kind)]
        if -1 in rows:
            raise ValueError(f"{key!r} holds embeddings of no token of base: give the CLIP that it was made for.")
        found[key] = [rows[i : i + lengths[key]] for i in range(0, len(rows), lengths[key])]
    tokenizer = base.require_processor().tokenizer
    if any(row != [tokenizer.bos_token_id] for row in found.get(PREFIX, ())):
        raise ValueError(f"{PREFIX!r} holds other tokens than the start token of base; give the CLIP it was made for.")
    texts = found.get(SUFFIX, [])
    if any(tokenizer.eos_token_id not in row for row in texts):
        raise ValueError(f"{SUFFIX!r} holds a text without the end token of base; give the CLIP it was made for.")
    return [row[: row.index(tokenizer.eos_token_id)] for row in texts]


def _rows(values_ND: Tensor, kind: torch.dtype) -> Iterable[bytes]:
    """The bytes of each row, in a type of two bytes."""
    whole = values_ND.detach().cpu().to(kind).contiguous().view(torch.int16).numpy()
    return (row.tobytes() for row in whole)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with in common."""
    return next((i for i, ids in enumerate(zip(*rows, strict=False)) if len({*ids}) > 1), min(map(len, rows)))


def _say_what_is_unknown(learner: _Learner, base: CLIPForZeroShotClassification, texts: list[list[int]]) -> None:
    """Log the texts that the prompts were trained on, and what the file can't say."""
    if learner.text and not learner.vision and not learner.maps and len(learner.text) == 1:
        logger.warning("the file doesn't tell where class names stood among the prompts; they are put after them "
                       "(CLASS_TOKEN_POSITION 'end'), which is wrong where it was 'middle' or 'front'.")  # fmt: skip
    if not any(key.startswith(TOWERS[0]) for key in learner.rest):
        logger.warning("the file holds no image encoder: whether base is the CLIP it was trained in isn't checked.")
    if texts:
        words = f"<{len(learner.text[0])} prompts> {base.require_processor().tokenizer.decode(texts[0])}"
        logger.warning("these prompts were trained on texts such as %r; other templates give other figures.", words)
