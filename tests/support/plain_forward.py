"""CLIP with prompts once more, in plain tensor operations on a state dict: one image and one text at a time, nothing
cut, nothing shared."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def block(weights: dict[str, Tensor], prefix: str, x_TD: Tensor, heads: int, act: str, causal: bool) -> Tensor:
    """One pre-norm transformer block on a single sequence."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"], 1e-5)

    y = norm("layer_norm1", x_TD)
    length, width = y.shape
    size = width // heads
    out = []
    q, k, v = (linear(f"self_attn.{name}_proj", y) for name in "qkv")
    for h in range(heads):
        columns = slice(h * size, (h + 1) * size)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(size)
        if causal:
            scores = scores + torch.full((length, length), -math.inf, dtype=scores.dtype).triu(1)
        out.append(torch.exp(scores - scores.logsumexp(dim=1, keepdim=True)) @ v[:, columns])
    x_TD = x_TD + linear("self_attn.out_proj", torch.cat(out, dim=1))
    hidden = linear("mlp.fc1", norm("layer_norm2", x_TD))
    hidden = hidden * torch.sigmoid(1.702 * hidden) if act == "quick_gelu" else F.gelu(hidden)
    return x_TD + linear("mlp.fc2", hidden)


def image_feature(weights: dict[str, Tensor], config, image_CHW: Tensor, prompts: list[Tensor]) -> Tensor:
    """The projected feature (D,) of one normalised image; `prompts[i]` (n, width) enter layer i, after the patches."""
    vision, size = config.vision_config, config.vision_config.patch_size
    kernel = weights["vision_model.embeddings.patch_embedding.weight"].flatten(1)
    patches = [
        kernel @ image_CHW[:, r : r + size, c : c + size].flatten()
        for r in range(0, vision.image_size, size)
        for c in range(0, vision.image_size, size)
    ]
    x = torch.stack([weights["vision_model.embeddings.class_embedding"], *patches])
    x = x + weights["vision_model.embeddings.position_embedding.weight"]
    base = len(x)
    if prompts:
        x = torch.cat([x, prompts[0]])
    name = "vision_model.pre_layrnorm"
    x = F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
    for i in range(vision.num_hidden_layers):
        if 0 < i < len(prompts):
            x = torch.cat([x[:base], prompts[i]])
        x = block(
            weights, f"vision_model.encoder.layers.{i}.", x, vision.num_attention_heads, vision.hidden_act, False
        )
    name = "vision_model.post_layernorm"
    x = F.layer_norm(x[0], x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
    return weights["visual_projection.weight"] @ x


def text_feature(weights: dict[str, Tensor], config, ids_L: list[int], prompts: list[Tensor]) -> Tensor:
    """The projected feature (D,) of one text, padded to the whole context; `prompts[i]` overwrite tokens 1 .. n."""
    text = config.text_config
    end = ids_L.index(text.eos_token_id)
    ids_L = ids_L + [text.eos_token_id] * (text.max_position_embeddings - len(ids_L))
    x = weights["text_model.embeddings.token_embedding.weight"][ids_L]
    count = len(prompts[0]) if prompts else 0
    if prompts:
        x = torch.cat([x[:1], prompts[0], x[1 + count :]])
    x = x + weights["text_model.embeddings.position_embedding.weight"]
    for i in range(text.num_hidden_layers):
        if 0 < i < len(prompts):
            x = torch.cat([x[:1], prompts[i], x[1 + count :]])
        x = block(weights, f"text_model.encoder.layers.{i}.", x, text.num_attention_heads, text.hidden_act, True)
    name = "text_model.final_layer_norm"
    x = F.layer_norm(x[end], x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
    return weights["text_projection.weight"] @ x
