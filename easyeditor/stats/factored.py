"""A symmetric positive definite matrix, factored once and solved with often. Axes: K width, N right-hand sides."""

from __future__ import annotations

import torch
from torch import Tensor

from easyeditor.base.errors import NumericalError


class Factored:
    """A matrix (K, K) in float64 and its Cholesky factor, in the memory of one: above the diagonal is the matrix
    (its upper triangle is the one that counts), on and below it the factor.

    A matrix that is not positive definite to rounding keeps no factor, and every solve eliminates anew.
    """

    def __init__(self, matrix_KK: Tensor) -> None:
        matrix_KK = matrix_KK.double()
        lower_KK, info = torch.linalg.cholesky_ex(matrix_KK.T)  # reads what is the upper triangle of the matrix
        self.positive = int(info) == 0
        """Is there a factor?"""
        self._diagonal_K = matrix_KK.diagonal().clone()
        self._packed_KK = lower_KK + matrix_KK.triu(1) if self.positive else matrix_KK

    def __len__(self) -> int:
        return len(self._diagonal_K)

    @property
    def matrix_KK(self) -> Tensor:
        """The matrix itself, made anew."""
        above_KK = self._packed_KK.triu(1)
        return above_KK + above_KK.T + self._diagonal_K.diag()

    def solve(self, right_KN: Tensor) -> Tensor:
        """The inverse times `right_KN` (a vector or columns), float64.

        Raises:
            NumericalError: the matrix is singular.
        """
        right_KN = right_KN.double()
        columns_KN = right_KN if right_KN.ndim == 2 else right_KN[:, None]
        if self.positive:
            return torch.cholesky_solve(columns_KN, self._packed_KK).view_as(right_KN)
        return solved(self.matrix_KK, columns_KN).view_as(right_KN)

    def inverse(self) -> Tensor:
        """The inverse (K, K): for those who change it afterwards; to solve, `solve` is nearer and quicker."""
        if self.positive:
            return torch.cholesky_inverse(self._packed_KK)
        return solved(self.matrix_KK, torch.eye(len(self), dtype=torch.float64, device=self._packed_KK.device))


def plus_identity(matrix_KK: Tensor, weight: float) -> Tensor:
    """A matrix plus a multiple of the identity."""
    return torch.diagonal_scatter(matrix_KK, matrix_KK.diagonal() + weight) if weight else matrix_KK


def solved(matrix_KK: Tensor, right_KN: Tensor) -> Tensor:
    """The inverse of any matrix times columns, by elimination. Raises NumericalError if it is singular."""
    found_KN, info = torch.linalg.solve_ex(matrix_KK, right_KN)
    if int(info) != 0:
        raise NumericalError("the second moment of the keys is singular; collect it on more text")
    return found_KN
