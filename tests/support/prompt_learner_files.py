"""Random state dicts as trainers on Dassl write them, with the prompts of each layer as their forward makes them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RENAMED = (
    (r"vision_model\.embeddings\.patch_embedding\.", "image_encoder.conv1."),
    (r"vision_model\.embeddings\.class_embedding", "image_encoder.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "image_encoder.positional_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "text_encoder.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "image_encoder.ln_pre."),
    (r"vision_model\.post_layernorm\.", "image_encoder.ln_post."),
    (r"text_model\.final_layer_norm\.", "text_encoder.ln_final."),
    (r"vision_model\.encoder\.layers\.", "image_encoder.transformer.resblocks."),
    (r"text_model\.encoder\.layers\.", "text_encoder.transformer.resblocks."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
)


@dataclass
class Learned:
    """A file, and the prompts (n, D) of each layer that its trainer would compute."""

    weights: dict[str, Tensor]
    vision: list[Tensor]
    text: list[Tensor]


class _Draw:
    """Random tensors of one size after another."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int) -> Tensor:
        return 0.5 * torch.randn(*size, generator=self.generator)


def coop(vision: int, text: int) -> Learned:
    """CoOp and APT, which save the learner alone."""
    ctx = _Draw(1)(4, text)
    return Learned({"ctx": ctx}, [], [ctx])


def vpt(vision: int, text: int) -> Learned:
    """VPT and TAPT-V."""
    draw = _Draw(2)
    own = [draw(3, vision) for _ in range(3)]
    weights = {f"image_encoder.transformer.resblocks.{i}.VPT_shallow": own[i] for i in (1, 2)}
    return Learned({"image_encoder.VPT": own[0], **weights}, own, [])


def ivlp(vision: int, text: int) -> Learned:
    """IVLP and TAPT-VLI, with another number and depth in either tower."""
    draw = _Draw(3)
    images, texts = [draw(3, vision) for _ in range(2)], [draw(2, text) for _ in range(3)]
    weights = {
        "prompt_learner.ctx": texts[0],
        "image_encoder.VPT": images[0],
        "image_encoder.transformer.resblocks.1.VPT_shallow": images[1],
        "text_encoder.transformer.resblocks.1.VPT_shallow": texts[1],
        "text_encoder.transformer.resblocks.2.VPT_shallow": texts[2],
    }
    return Learned(weights, images, texts)


def _coupled(seed: int, deep: str, source: int, target: int, vision: int, text: int) -> tuple:
    draw = _Draw(seed)
    ctx, proj_w, proj_b = draw(2, text), draw(vision, text), draw(vision)
    prompts = [draw(2, source) for _ in range(2)]
    maps = [(draw(target, source), draw(target)) for _ in range(2)]
    weights = {"prompt_learner.ctx": ctx, "prompt_learner.proj.weight": proj_w, "prompt_learner.proj.bias": proj_b}
    for i in range(2):
        weights[f"prompt_learner.{deep}.{i}"] = prompts[i]
        weights[f"prompt_learner.compound_prompt_projections.{i}.weight"] = maps[i][0]
        weights[f"prompt_learner.compound_prompt_projections.{i}.bias"] = maps[i][1]
    first = torch.nn.functional.linear(ctx.double(), proj_w.double(), proj_b.double())
    made = [
        torch.nn.functional.linear(p.double(), w.double(), b.double()) for p, (w, b) in zip(prompts, maps, strict=True)
    ]
    return weights, ctx, first, prompts, made


def maple(vision: int, text: int) -> Learned:
    """MaPLe and TAPT-VLJ."""
    weights, ctx, first, prompts, made = _coupled(4, "compound_prompts_text", text, vision, vision, text)
    return Learned(weights, [first, *made], [ctx, *prompts])


def fap(vision: int, text: int) -> Learned:
    """FAP."""
    weights, ctx, first, prompts, made = _coupled(5, "compound_prompts_image", vision, text, vision, text)
    return Learned(weights, [first, *prompts], [ctx, *made])


TRAINERS: dict[str, Callable[[int, int], Learned]] = {
    "coop": coop,
    "vpt": vpt,
    "ivlp": ivlp,
    "maple": maple,
    "fap": fap,
}


def towers(base: torch.nn.Module) -> dict[str, Tensor]:
    """A CLIP's towers by the names of the OpenAI code, as whole models hold them."""
    found: dict[str, Tensor] = {}
    for key, values in base.state_dict().items():
        if key == "logit_scale":
            found[key] = values
        elif key in ("visual_projection.weight", "text_projection.weight"):
            found["image_encoder.proj" if key.startswith("v") else "text_encoder.text_projection"] = values.T
        elif "token_embedding" not in key:
            for pattern, name in RENAMED:
                key = re.sub(pattern, name, key)
            found[key] = values
    for key in [key for key in found if ".q_proj." in key]:
        parts = [found.pop(key.replace(".q_proj.", f".{name}_proj.")) for name in "qkv"]
        found[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found


def texts(base: torch.nn.Module, context: str, names: list[str], count: int) -> dict[str, Tensor]:
    """The buffers of a learner that was trained on texts of these names, with `count` prompts."""
    tokenizer, length = base.processor.tokenizer, base.config.text_config.max_position_embeddings
    rows = [tokenizer(f"{context} {name}.").input_ids for name in names]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    embeddings = base.text_model.embeddings.token_embedding.weight.detach()[ids]
    return {
        "prompt_learner.token_prefix": embeddings[:, :1],
        "prompt_learner.token_suffix": embeddings[:, 1 + count :],
    }
