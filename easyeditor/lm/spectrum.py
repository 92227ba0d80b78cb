"""Cheap numbers of a weight matrix: its norm, its leading singular directions. Axes: D rows, K columns, r rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANK = 8
PASSES = 2
"""Power iterations: a subspace takes 2 (PASSES + 1) products with the matrix, each of D x K x RANK multiplications."""
ROWS = 1024  # rows whose norm is taken at once: the copy in float64 stays small


def frobenius(weight: Tensor) -> float:
    """||W||_F, summed in float64."""
    flat = weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()[None]
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in torch.split(flat, ROWS)))


def leading_rows(weight: Tensor, rank: int = RANK, seed: int = 0) -> Tensor | None:
    """An orthonormal basis (D, r) of the leading left singular directions, float32; None for what is not finite.

    The randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4): a start drawn from `seed`, then power
    iterations. Where singular values lie close together the directions are those of this start, which is the same for
    every matrix of a shape, so an unchanged matrix gives an unchanged basis.
    """
    matrix_DK = (weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()[None]).float()
    rank = min(rank, *matrix_DK.shape)
    start = torch.randn(matrix_DK.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    basis_Dr = matrix_DK @ start.to(matrix_DK.device)
    for step in range(PASSES + 1):
        if not bool(basis_Dr.isfinite().all()):
            return None
        basis_Dr = torch.linalg.qr(basis_Dr).Q
        if step < PASSES:
            basis_Dr = matrix_DK @ (matrix_DK.T @ basis_Dr)
    return basis_Dr


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
    return float((first_Dr.T.double() @ second_Dr.double()).square().sum() / first_Dr.shape[1])


def turned(before_Dr: Tensor | None, after_Dr: Tensor | None) -> float:
    """How far one subspace turned from another: the mean squared sine of the angles between them, 0 = the same,
    1 = at right angles; NaN where one is not known."""
    if before_Dr is None or after_Dr is None:
        return math.nan
    return max(0.0, 1.0 - overlap(before_Dr, after_Dr))
