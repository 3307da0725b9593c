"""The architecture of OpenAI's CLIP in plain PyTorch, with its names of weights: written here from the paper and from
what the names say, on `nn.MultiheadAttention`, apart from transformers and from the package.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.c_fc, self.c_proj, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: str):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int, activation: str):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, hidden, activation) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int, side: int, patch: int, out: int, act: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, hidden, layers, act)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAIClip(nn.Module):
    """Of the sizes of `tiny.make_clip`, with random weights on every parameter."""

    def __init__(self, vocabulary: int, activation: str, context: int = 32, seed: int = 1):
        super().__init__()
        width, heads, hidden, layers, out = 16, 2, 32, 2, 12
        self.visual = Visual(width, heads, hidden, layers, 8, 2, out, activation)
        self.transformer = Transformer(width, heads, hidden, layers, activation)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, own in self.named_parameters():
                if name != "logit_scale":
                    own.add_(0.3 * torch.randn(own.shape, generator=generator))
        self.eval().requires_grad_(False)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, D) of normalised pixels."""
        return self.visual(pixels_BCHW)

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """(B, D): pooled where the highest token stands, which is that of the end."""
        length = ids_BL.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids_BL) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids_BL.argmax(dim=-1)] @ self.text_projection
