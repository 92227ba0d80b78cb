"""The algebra of locate-then-edit: tensors in, tensors out. Axes: K key width, D model width.

Everything is accumulated and solved in float64 and handed back so; callers cast once, when the delta is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.errors import NumericalError


@dataclass(frozen=True)
class RankOne:
    """The update v u^T (D, K), float64; `numerator` is ||v* - W k||, `denominator` k.u with its sign."""

    u_K: Tensor
    v_D: Tensor
    numerator: float
    denominator: float


def rank_one(
    key_K: Tensor, direction_K: Tensor, target_D: Tensor, output_D: Tensor, moment_KK: Tensor | None
) -> RankOne:
    """ROME eq. 2: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar scaled to unit length, so that (W + dW) k = v*.

    `key_K` is k, `direction_K` kbar, `target_D` v*, `output_D` W k. A tiny denominator is returned as it is: it is what
    collapses a model, and users are here to see it.
    """
    u_K = key_direction(direction_K, moment_KK)
    residual_D = target_D.double() - output_D.double()
    denominator = torch.dot(key_K.double(), u_K)
    return RankOne(u_K, residual_D / denominator, float(residual_D.norm()), float(denominator))


def joint_update(keys_Kr: Tensor, held_KK: Tensor | None, *, ridge: float = 0.0) -> Tensor:
    """A^-1 K (K^T A^-1 K + ridge I)^-1, shape (K, r), float64: times the residuals it answers each of the keys with its
    own (EMMET, Gupta et al. 2024, eq. 10); a ridge gives way where similar keys ask for different answers.

    Among all updates that do, R (K^T A^-1 K)^-1 (A^-1 K)^T is that of least tr dW A dW^T: it moves the keys whose
    second moment is A least. A is the identity when none is given.
    """
    keys_Kr = keys_Kr.double()
    whitened_Kr = keys_Kr if held_KK is None else _solve(held_KK.double(), keys_Kr)
    return _solve(plus_identity(keys_Kr.T @ whitened_Kr, ridge).T, whitened_Kr.T).T


def key_direction(key_K: Tensor, moment_KK: Tensor | None) -> Tensor:
    """ROME eq. 2: u = C^-1 k scaled to unit length; C is the identity when no second moment is given."""
    direction_K = whitened(key_K, moment_KK)
    return direction_K / direction_K.norm()


def whitened(key_K: Tensor, moment_KK: Tensor | None) -> Tensor:
    """C^-1 k in float64; C is the identity when no second moment is given."""
    key_K = key_K.double()
    return key_K if moment_KK is None else _solve(moment_KK.double(), key_K)


def spread_update(keys_KN: Tensor, held_KK: Tensor) -> Tensor:
    """MEMIT eq. 14: (H + K K^T)^-1 K, shape (K, N); the update is the residuals (D, N) times its transpose.

    `held_KK` weighs what must not change: lambda C, and whatever a method adds to it.
    """
    return _solve(held_KK + keys_KN @ keys_KN.T, keys_KN)


def projected_update(keys_KN: Tensor, projection_KK: Tensor, earlier_KK: Tensor | None, ridge: float) -> Tensor:
    """AlphaEdit eq. 11: (P (K K^T + K_p K_p^T) + ridge I)^-1 P K, shape (K, N); `earlier_KK` is K_p K_p^T.

    Without earlier keys the same by a system of N: P K (K^T P K + ridge I)^-1.
    """
    projected_KN = projection_KK @ keys_KN
    if earlier_KK is None:
        return _solve(plus_identity(keys_KN.T @ projected_KN, ridge).T, projected_KN.T).T
    return _solve(plus_identity(projection_KK @ (keys_KN @ keys_KN.T + earlier_KK), ridge), projected_KN)


def plus_identity(matrix_KK: Tensor, weight: float) -> Tensor:
    """A matrix plus a multiple of the identity."""
    if not weight:
        return matrix_KK
    return matrix_KK + weight * torch.eye(len(matrix_KK), dtype=matrix_KK.dtype, device=matrix_KK.device)


def _solve(matrix_KK: Tensor, right: Tensor) -> Tensor:
    solved, info = torch.linalg.solve_ex(matrix_KK, right)
    if int(info) != 0:
        raise NumericalError("the second moment of the keys is singular; collect it on more text")
    return solved
