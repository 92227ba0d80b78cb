"""UltraEdit's algebra: running statistics of all edits, normalised rows, the closed-form step.

Axes: N answer tokens, K width of a module's input, D width of its output, W = K + D. All float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = float(torch.finfo(torch.float32).eps)


def statistics(rows_NW: Tensor) -> Tensor:
    """Count, mean and spread of some rows, (3, W): every entry of the first row is N.

    The spread is the published code's: N times the *unbiased* variance, not the sum of squares. It adds nothing for a
    single row, whose unbiased variance does not exist (there the published code has NaN from then on).
    """
    count = len(rows_NW)
    mean_W = rows_NW.mean(0)
    spread_W = rows_NW.var(0) * count if count > 1 else torch.zeros_like(mean_W)
    return torch.stack([torch.full_like(mean_W, count), mean_W, spread_W])


def merged(ours_3W: Tensor, theirs_3W: Tensor) -> Tensor:
    """The statistics of two sets of rows together."""
    n_W, mean_W, spread_W = ours_3W
    m_W, other_W, scatter_W = theirs_3W
    total_W, apart_W = n_W + m_W, other_W - mean_W
    between_W = n_W * m_W * apart_W.square() / total_W
    return torch.stack([total_W, mean_W + m_W * apart_W / total_W, spread_W + scatter_W + between_W])


def deviation(known_3W: Tensor) -> Tensor:
    """Standard deviation (W) of the rows that statistics are of."""
    n_W, _, spread_W = known_3W
    return (spread_W / (n_W - 1 + EPSILON)).sqrt()


def normalised(rows_NW: Tensor, known_3W: Tensor) -> Tensor:
    """Rows with the mean taken off, in units of the standard deviation."""
    return (rows_NW - known_3W[1]) / (deviation(known_3W) + EPSILON)


def targets(keys_NK: Tensor, gradients_ND: Tensor, known_3W: Tensor, lr: float) -> Tensor:
    """What each answer token's output should move by: V = -lr |k^|^2 g^ (N, D)."""
    hats_NW = normalised(torch.cat([keys_NK, gradients_ND], dim=1), known_3W)
    width = keys_NK.shape[1]
    return -lr * hats_NW[:, :width].square().sum(1, keepdim=True) * hats_NW[:, width:]


def solved(keys_NK: Tensor, targets_ND: Tensor) -> tuple[Tensor, Tensor | None]:
    """dW^T = (H^T H + I)^-1 H^T V, H the keys as they are: factors (D, N) and (N, K), from an N x N system.

    With more tokens than the keys are wide, the K x K system is smaller: then dW (D, K) and None.
    """
    count, width = keys_NK.shape
    if count <= width:
        gram_NN = keys_NK @ keys_NK.T + torch.eye(count, dtype=keys_NK.dtype, device=keys_NK.device)
        return targets_ND.T, torch.linalg.solve(gram_NN, keys_NK)
    gram_KK = keys_NK.T @ keys_NK + torch.eye(width, dtype=keys_NK.dtype, device=keys_NK.device)
    return torch.linalg.solve(gram_KK, keys_NK.T @ targets_ND).T, None
