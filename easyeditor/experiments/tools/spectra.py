"""What an update does to a weight's leading singular directions. Axes: D outputs, K inputs, r rank."""

from __future__ import annotations

import torch
from torch import Tensor


def leading(matrix_DK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading left (D, r) and right (K, r) singular vectors, float64.

    From the eigenvectors of the smaller of W W^T and W^T W: the leading directions need no more, and it is much cheaper
    than a whole decomposition of a wide matrix.
    """
    wide = matrix_DK.double()
    if wide.shape[0] > wide.shape[1]:
        right, left = leading(wide.T, rank)
        return left, right
    values_D, vectors_DD = torch.linalg.eigh(wide @ wide.T)
    rank = min(rank, len(values_D))
    left_Dr = vectors_DD.flip(1)[:, :rank]
    sizes_r = values_D.flip(0)[:rank].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return left_Dr, (wide.T @ left_Dr) / sizes_r


def overlap(first_Dr: Tensor, second_Dr: Tensor) -> float:
    """Share of one subspace that lies in another of the same rank, ||A^T B||_F^2 / r for orthonormal A, B: 1 = same."""
    return float((first_Dr.T @ second_Dr).square().sum() / first_Dr.shape[1])
