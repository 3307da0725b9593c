"""Many texts that begin alike through CLIP's text tower, with what they share computed once.

The tower is causal: the hidden states of `[BOS] a photo of a` are the same in every class prompt, and what follows the
end token changes nothing. So the prefix runs once, every text adds only its own tokens, and no padding is computed.

Shapes: G groups (1, or one for each sample that carries text prompts of its own), R texts, T packed tokens, P of them
the prefix, S the tokens of the longest text after the prefix, D width, H heads, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from ..prompts.access import plain_layer


@dataclass(frozen=True)
class PackedTexts:
    """R token sequences in one row of T tokens: the shared prefix, then each text's own tokens up to its end token.

    Args:
        ids_T, positions_T: token ids and their positions in their text.
        slots: (T - P,), where each own token stands in an (R * S) table padded to the longest.
        ends_R: which of the T tokens ends each text.
        prefix, longest: P and S.
    """

    ids_T: Tensor
    positions_T: Tensor
    slots: Tensor
    ends_R: Tensor
    prefix: int
    longest: int


def end_positions(ids_RL: Tensor, eos_token_id: int | None) -> Tensor:
    """Where each text is pooled, (R,): its first end token, as `CLIPTextModel` finds it."""
    if eos_token_id is None or eos_token_id == 2:  # old checkpoints: the largest id ends the text
        return ids_RL.argmax(dim=1)
    return (ids_RL == eos_token_id).int().argmax(dim=1)


def pack_texts(ids_RL: Tensor, eos_token_id: int | None, replaced: int = 0) -> PackedTexts:
    """Lay out texts (R, L) that are all pooled after position `replaced`.

    Args:
        replaced: tokens after the first that prompts will overwrite: they count as alike in all texts.
    """
    ends = end_positions(ids_RL, eos_token_id)
    alike_L = (ids_RL == ids_RL[0]).all(dim=0)
    alike_L[: 1 + replaced] = True
    prefix = min(int(alike_L.int().cumprod(dim=0).sum()), int(ends.min()))
    place_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)
    own_RL = (place_L >= prefix) & (place_L <= ends[:, None])
    longest = int(ends.max()) + 1 - prefix
    slot_RL = torch.arange(len(ids_RL), device=ids_RL.device)[:, None] * longest + place_L - prefix
    return PackedTexts(
        ids_T=torch.cat([ids_RL[0, :prefix], ids_RL[own_RL]]),
        positions_T=torch.cat([place_L[:prefix], place_L.expand_as(ids_RL)[own_RL]]),
        slots=slot_RL[own_RL],
        ends_R=prefix - 1 + own_RL.sum(dim=1).cumsum(dim=0),
        prefix=prefix,
        longest=longest,
    )


def can_run_packed(text_model: CLIPTextModel) -> bool:
    """Whether every layer is a plain one: a wrapped, sharded or watched layer must be called as a whole."""
    layers = [plain_layer(layer) for layer in text_model.encoder.layers]
    return all(
        type(layer) is CLIPEncoderLayer and not layer._forward_hooks and not layer._forward_pre_hooks
        for layer in layers
    )


def encode_packed(text_model: CLIPTextModel, texts: PackedTexts) -> Tensor:
    """The pooled states (G, R, D) of the texts, before the projection: equal to the tower's own forward.

    Layers that carry prompts overwrite positions 1 .. n of the prefix.
    """
    embeddings = text_model.embeddings
    hidden_GTD = embeddings.token_embedding(texts.ids_T[None]) + embeddings.position_embedding(texts.positions_T)
    for layer in text_model.encoder.layers:
        plain = plain_layer(layer)
        if plain is not layer:
            hidden_GTD = layer.put_prompts(hidden_GTD)
        run = partial(_run_layer, plain, texts)
        if plain.gradient_checkpointing and plain.training:
            hidden_GTD = plain._gradient_checkpointing_func(run, hidden_GTD)  # type: ignore[operator]
        else:
            hidden_GTD = run(hidden_GTD)
    return text_model.final_layer_norm(hidden_GTD[:, texts.ends_R])


def _run_layer(layer: CLIPEncoderLayer, texts: PackedTexts, hidden_GTD: Tensor) -> Tensor:
    """What `CLIPEncoderLayer.forward` does, on packed tokens."""
    hidden_GTD = hidden_GTD + _attend(layer.self_attn, texts, layer.layer_norm1(hidden_GTD))
    return hidden_GTD + layer.mlp(layer.layer_norm2(hidden_GTD))


def _attend(attention: CLIPAttention, texts: PackedTexts, hidden_GTD: Tensor) -> Tensor:
    """Causal attention in which a text's own tokens see the prefix and their predecessors in the same text."""
    split = (*hidden_GTD.shape[:-1], -1, attention.head_dim)
    q_GTHK, k_GTHK, v_GTHK = (
        project(hidden_GTD).view(split) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    P, S, rows = texts.prefix, texts.longest, len(texts.ends_R)
    q_P, k_P, v_P = (x[:, :P].transpose(1, 2) for x in (q_GTHK, k_GTHK, v_GTHK))  # (G, H, P, K)
    q_R, k_R, v_R = (_pad(x[:, P:], texts.slots, rows, S) for x in (q_GTHK, k_GTHK, v_GTHK))  # (G, H, R, S, K)
    out_P = _weights(attention, [(q_P @ k_P.mT, _future(P, q_P))])[0] @ v_P
    to_prefix = (q_R.flatten(2, 3) @ k_P.mT).unflatten(2, (rows, S))
    w_prefix, w_own = _weights(attention, [(to_prefix, None), (q_R @ k_R.mT, _future(S, q_R))])
    out_R = (w_prefix.flatten(2, 3) @ v_P).unflatten(2, (rows, S)) + w_own @ v_R
    out_own = out_R.flatten(2, 3)[:, :, texts.slots]
    return attention.out_proj(torch.cat([out_P, out_own], dim=2).transpose(1, 2).flatten(2))


def _pad(own_GTHK: Tensor, slots: Tensor, rows: int, longest: int) -> Tensor:
    """Own tokens of all texts, as a table with zeros after the end of each: (G, H, R, S, K)."""
    own_GHTK = own_GTHK.transpose(1, 2)
    table = own_GHTK.new_zeros(*own_GHTK.shape[:2], rows * longest, own_GHTK.shape[-1])
    return table.index_copy(2, slots, own_GHTK).unflatten(2, (rows, longest))


def _future(length: int, like: Tensor) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)


def _weights(attention: CLIPAttention, scores: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """One softmax over several groups of keys (each with what it may not see), split into these groups again."""
    masked = [s if hidden is None else s.masked_fill(hidden, -torch.inf) for s, hidden in scores]
    joined = torch.cat(masked, dim=-1) * attention.scale
    weights = joined.softmax(dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(joined.dtype)
    weights = F.dropout(weights, attention.dropout, attention.training)
    return weights.split([s.shape[-1] for s, _ in scores], dim=-1)
