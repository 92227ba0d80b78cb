"""The algebra of locate-then-edit: tensors in, tensors out. Axes: N requests, K key width, D model width.

Everything is accumulated and solved in float64 and handed back so; callers cast once, when the delta is made. No system
is larger than the smaller of N and K: what is held in place, H, comes factored (`Factored`) or as its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.stats.factored import Factored, plus_identity, solved


@dataclass(frozen=True)
class RankOne:
    """The update v u^T (D, K), float64; `numerator` is ||v* - W k||, `denominator` k.u with its sign."""

    u_K: Tensor
    v_D: Tensor
    numerator: float
    denominator: float


def rank_one(key_K: Tensor, whitened_K: Tensor, target_D: Tensor, output_D: Tensor) -> RankOne:
    """ROME eq. 2: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar scaled to unit length, so that (W + dW) k = v*.

    `key_K` is k, `whitened_K` C^-1 kbar, `target_D` v*, `output_D` W k. A tiny denominator is returned as it is: it is
    what collapses a model, and users are here to see it.
    """
    u_K = unit(whitened_K)
    residual_D = target_D.double() - output_D.double()
    denominator = torch.dot(key_K.double(), u_K)
    return RankOne(u_K, residual_D / denominator, float(residual_D.norm()), float(denominator))


def whitened(keys: Tensor, held: Factored | None) -> Tensor:
    """C^-1 k in float64, of a key (K) or keys as columns (K, N); C is the identity when no second moment is given."""
    return keys.double() if held is None else held.solve(keys)


def unit(direction_K: Tensor) -> Tensor:
    """A direction scaled to unit length."""
    return direction_K / direction_K.norm()


def joint_update(keys_Kr: Tensor, held: Factored | None, *, ridge: float = 0.0) -> Tensor:
    """A^-1 K (K^T A^-1 K + ridge I)^-1, shape (K, r), float64: times the residuals it answers each of the keys with its
    own (EMMET, Gupta et al. 2024, eq. 10); a ridge gives way where similar keys ask for different answers.

    Among all updates that do, R (K^T A^-1 K)^-1 (A^-1 K)^T is that of least tr dW A dW^T: it moves the keys whose
    second moment is A least. A is the identity when none is given.
    """
    return answering(keys_Kr.double(), whitened(keys_Kr, held), ridge)


def answering(keys_KN: Tensor, whitened_KN: Tensor, ridge: float) -> Tensor:
    """W (K^T W + ridge I)^-1, shape (K, N), W = H^-1 K: the right factor of an update, transposed.

    With ridge 1 it is (H + K K^T)^-1 K: MEMIT eq. 14 where H = lambda C, AlphaEdit eq. 11 where H^-1 is P / L2
    (Woodbury's identity; P need not be a projection for it). With more keys than they are wide the K x K system
    (W K^T + ridge I)^-1 W, which is the same, is the smaller.
    """
    width, count = keys_KN.shape
    if ridge and count > width:
        return solved(plus_identity(whitened_KN @ keys_KN.T, ridge), whitened_KN)
    return solved(plus_identity(keys_KN.T @ whitened_KN, ridge).T, whitened_KN.T).T


def inverse_with(inverse_KK: Tensor, keys_KN: Tensor) -> Tensor:
    """(H + K K^T)^-1 from H^-1: 4 N K^2 operations in place of K^3, whatever H holds already (recursive least squares;
    RLSEdit, arXiv 2601.15686). For AlphaEdit (P K K^T + L2 I)^-1 P from P / L2."""
    whitened_KN = inverse_KK @ keys_KN
    return torch.addmm(inverse_KK, answering(keys_KN, whitened_KN, 1.0), whitened_KN.T, alpha=-1)
