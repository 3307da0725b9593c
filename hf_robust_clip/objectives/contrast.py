"""What contrastive objectives share: several views of each image against those of all others, and pairs of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch


def gathered_views(batch: Batch, features_VBD: Tensor) -> Tensor:
    """Features of V views of this process' images as those of all processes, (V, N, D), with gradients to each."""
    return batch.gathered(features_VBD.transpose(0, 1)).transpose(0, 1)


def contrast_of_views(features_VND: Tensor, temperature: float) -> Tensor:
    """A loss for each of V * N anchors, (V, N), at least float32, with unit features u_i:

        L_i = -1 / (V - 1) * sum_{p in P_i} log( e^{u_i . u_p / t} / sum_{a != i} e^{u_i . u_a / t} )

    P_i are the other views of the same image, a are all others of the V * N features. Of two views it is NT-Xent.

    Args:
        features_VND: V views of N images, at least two of each; they need not be of unit length.
        temperature: t, above 0.

    Raises ValueError for a single image.
    """
    views, count = features_VND.shape[:2]
    check_negatives(count)
    with torch.autocast(features_VND.device.type, enabled=False):
        features_MD = features_VND.flatten(0, 1)
        units_MD = F.normalize(features_MD.float() if features_MD.dtype.itemsize < 4 else features_MD, dim=1)
        similar_MM = (units_MD @ units_MD.T / temperature).fill_diagonal_(-torch.inf)
        log_shares_VNVN = similar_MM.log_softmax(dim=1).view(views, count, views, count)
        pairs_VVN = log_shares_VNVN.diagonal(dim1=1, dim2=3)
        itself_VV1 = torch.eye(views, dtype=torch.bool, device=pairs_VVN.device)[:, :, None]
        return -pairs_VVN.masked_fill(itself_VV1, 0).sum(dim=1) / (views - 1)


def pair_loss(rows_ND: Tensor, others_MD: Tensor, scale: Tensor, same_NM: Tensor) -> Tensor:
    """-mean_i log( e^{z_ii} / (e^{z_ii} + sum_{j: not same_ij} e^{z_ij}) ), in at least float32, one direction.

    Args:
        rows_ND, others_MD: features u_i and v_j, of any length, z_ij = s cos(u_i, v_j); row i belongs to the first N
            others, in their order.
        scale: s.
        same_NM: which others are no negatives of a row, since they mean the same; of the pair itself it doesn't count.
    """
    with torch.autocast(rows_ND.device.type, enabled=False):  # bfloat16 would leave two digits of 100 * cos
        kind = torch.promote_types(torch.promote_types(rows_ND.dtype, others_MD.dtype), torch.float32)
        logits_NM = scale * F.normalize(rows_ND.to(kind), dim=1) @ F.normalize(others_MD.to(kind), dim=1).T
        targets_N = torch.arange(len(rows_ND), device=rows_ND.device)
        itself_NM = targets_N[:, None] == torch.arange(len(others_MD), device=rows_ND.device)
        return F.cross_entropy(logits_NM.masked_fill(same_NM & ~itself_NM, -torch.inf), targets_N)


def same_texts(ids_NL: Tensor, others_ML: Tensor) -> Tensor:
    """Which texts, as token ids of one length, are equal: (N, M)."""
    return (ids_NL[:, None] == others_ML[None]).all(dim=2)


def check_negatives(count: int) -> None:
    """Raise ValueError for a batch, over all processes, of one image: there is none that it could be told from."""
    if count < 2:
        raise ValueError("a batch of 1 image has nothing to contrast it with; raise per_device_train_batch_size.")
