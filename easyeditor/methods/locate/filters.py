"""Filters on a closed-form update: what of it is written. Pure algebra, dW and W as (D, K) outputs x inputs.

Axes: D outputs, K inputs, r rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from easyeditor.methods.locate.hparams import LocateHyperParams

LOG = logging.getLogger(__name__)


def rect_largest(update_DK: Tensor, weight_DK: Tensor, share: float = 0.4) -> Tensor:
    """RECT as AlphaEdit's lineage has it: entries whose |dW / (W + 1e-8)| is at least the int((1 - share) n)-th
    smallest stay, the others are 0 (Gu et al. 2024, arXiv 2401.04700)."""
    relative_DK = (update_DK / (weight_DK + 1e-8)).abs()
    cut = int((1 - share) * relative_DK.numel())
    return _above(update_DK, relative_DK, relative_DK.flatten().kthvalue(cut).values if cut else None)


def rect_official(update_DK: Tensor, weight_DK: Tensor, dropped: float = 0.8) -> Tensor:
    """RECT as its authors' code has it: the int(dropped n) entries of smallest |dW / W| are 0."""
    relative = (update_DK / weight_DK).abs().flatten()
    kept = update_DK.flatten().clone()
    kept[relative.argsort()[: int(dropped * relative.numel())]] = 0
    return kept.view_as(update_DK)


def prune(total_DK: Tensor, original_DK: Tensor, base: float = math.e) -> Tensor:
    """PRUNE (Ma et al. 2024, arXiv 2405.16821), on the total update since W0: a singular value s above s0, the largest
    of W0, becomes log_base(s) - log_base(s0) + s0.

    The map grows where s0 ln(base) < 1: then a warning says so.
    """
    limit = float(torch.linalg.matrix_norm(original_DK, 2))
    if limit * math.log(base) < 1:
        LOG.warning("prune: base %g makes singular values above %.3g larger, not smaller; take a larger", base, limit)
    return _above_limit(total_DK, limit, lambda values_R: (values_R / limit).log() / math.log(base) + limit)


def unpruned(change_DK: Tensor, original_DK: Tensor, base: float = math.e) -> Tensor:
    """The total update that `prune` made this change of: the map of singular values grows everywhere, so it has an
    inverse, s0 base^(s - s0) above s0. The sum of earlier updates is thus read from the weights and kept nowhere."""
    limit = float(torch.linalg.matrix_norm(original_DK, 2))
    return _above_limit(change_DK, limit, lambda values_R: limit * base ** (values_R - limit))


def prune_more(update_DK: Tensor, weight_DK: Tensor, original_DK: Tensor, base: float = math.e) -> Tensor:
    """What takes W0 + prune(T) to W0 + prune(T + dW), T the sum of the updates before they were pruned."""
    change_DK = weight_DK - original_DK
    total_DK = unpruned(change_DK, original_DK, base) + update_DK if change_DK.any() else update_DK
    return prune(total_DK, original_DK, base) - change_DK


def sphere(update_DK: Tensor, weight_DK: Tensor, ratio: float = 0.5, strength: float = 0.5) -> Tensor:
    """SPHERE (arXiv 2510.01172): dW (I - strength U U^T), U the leading eigenvectors of the second moment of W's rows,
    scaled to unit length, up to the cumulative share `ratio` of its eigenvalues and one more."""
    rows_DK = weight_DK / (weight_DK.norm(dim=1, keepdim=True) + 1e-8)
    values_K, vectors_KK = torch.linalg.eigh(rows_DK.T @ rows_DK / len(rows_DK))
    values_K, vectors_KK = values_K.flip(0), vectors_KK.flip(1)
    count = int((values_K.cumsum(0) / values_K.sum() <= ratio).sum()) + 1
    leading_KR = vectors_KK[:, :count]
    return update_DK - strength * (update_DK @ leading_KR) @ leading_KR.T


def revive(update_DK: Tensor, original_DK: Tensor, energy: float = 0.3) -> Tensor:
    """REVIVE (arXiv 2601.11042): only what lies in the tail of W0's singular directions on both sides stays; the head
    are the fewest directions that hold `energy` of the sum of singular values."""
    left_DR, values_R, right_RK = torch.linalg.svd(original_DK, full_matrices=False)
    head = int((values_R.cumsum(0) < energy * values_R.sum()).sum()) + 1
    head = min(max(head, 1), len(values_R) - 1)
    left_DR, right_RK = left_DR[:, head:], right_RK[head:]
    return left_DR @ (left_DR.T @ update_DK @ right_RK.T) @ right_RK


def _above_limit(total_DK: Tensor, limit: float, mapped: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix with `mapped` in place of its singular values from `limit` on."""
    left_DR, values_R, right_RK = torch.linalg.svd(total_DK, full_matrices=False)
    return (left_DR * torch.where(values_R >= limit, mapped(values_R), values_R)) @ right_RK


def _above(update_DK: Tensor, size_DK: Tensor, cut: Tensor | None) -> Tensor:
    return update_DK if cut is None else torch.where(size_DK >= cut, update_DK, torch.zeros_like(update_DK))


FILTERS: dict[str, Callable[[Tensor, Tensor, Tensor, LocateHyperParams], Tensor]] = {
    "rect": lambda dW, now, first, h: rect_largest(dW, now, h.rect_share),
    "rect-official": lambda dW, now, first, h: rect_official(dW, now, h.rect_dropped),
    "prune": lambda dW, now, first, h: prune_more(dW, now, first, h.prune_base),
    "sphere": lambda dW, now, first, h: sphere(dW, now, h.sphere_ratio, h.sphere_strength),
    "revive": lambda dW, now, first, h: revive(dW, first, h.revive_energy),
}
"""By name: (update, weight as it is, weight before the first edit, settings) -> what is written."""
NEED_ORIGINALS = {"prune", "revive"}
"""Filters that look at the weight before the first edit."""
