"""The null space of a second moment: P = U0 U0^T, U0 the singular vectors of C whose singular values lie below a
threshold (AlphaEdit, section 3.1). Kept next to the statistics, under the identity of the moment and the threshold.

Axes: K key width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from easyeditor.base.errors import StatsError
from easyeditor.base.files import write_tensors
from easyeditor.base.reading import open_tensors
from easyeditor.stats.store import StatsKey


@dataclass(frozen=True)
class NullSpace:
    """P (K, K) in float64, rounded to float32 so that a kept one is the same; how many directions it keeps; the
    smallest and largest singular value of C."""

    projection_KK: Tensor
    rank: int
    lowest: float
    highest: float


def null_space(moment_KK: Tensor, threshold: float, scale: str, key: StatsKey) -> NullSpace:
    """P of a moment, read from next to its statistics or computed and kept there; one that keeps no direction, or all,
    is of no use to anyone and is not kept.

    Raises:
        StatsError: a kept file is damaged. OutputError: it cannot be written.
    """
    path = _place(moment_KK, threshold, scale, key)
    if path.exists():
        return _read(path, len(moment_KK))
    made = computed(moment_KK, threshold, scale)
    if 0 < made.rank < len(moment_KK):
        numbers = {"rank": str(made.rank), "lowest": repr(made.lowest), "highest": repr(made.highest)}
        write_tensors(path, {"projection": made.projection_KK.float().cpu()}, numbers)
    return made


def computed(moment_KK: Tensor, threshold: float, scale: str) -> NullSpace:
    """P of a moment. C is symmetric, so its singular vectors are its eigenvectors, by eigenvalues' size."""
    values_K, vectors_KK = torch.linalg.eigh(moment_KK.double())
    sizes_K = values_K.abs()
    limit = threshold * (float(sizes_K.max()) if scale == "relative" else 1.0)
    kept_KR = vectors_KK[:, sizes_K < limit]
    projection_KK = (kept_KR @ kept_KR.T).float().double()
    return NullSpace(projection_KK, kept_KR.shape[1], float(sizes_K.min()), float(sizes_K.max()))


def _place(moment_KK: Tensor, threshold: float, scale: str, key: StatsKey) -> Path:
    digest = hashlib.sha256(moment_KK.double().cpu().numpy().tobytes())
    digest.update(f"{threshold!r} {scale}".encode())
    statistics = key.find() or key.paths[0]
    return statistics.with_name(f"{statistics.stem}-null-space-{digest.hexdigest()[:16]}.safetensors")


def _read(path: Path, width: int) -> NullSpace:
    try:
        with open_tensors(path) as opened:
            kept, projection_KK = opened.metadata() or {}, opened.get_tensor("projection")
            made = NullSpace(projection_KK.double(), int(kept["rank"]), float(kept["lowest"]), float(kept["highest"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StatsError(f"{path}: not a readable null space ({error}); delete it") from error
    if projection_KK.shape != (width, width) or not bool(torch.isfinite(projection_KK).all()):
        raise StatsError(f"{path}: null space of shape {tuple(projection_KK.shape)}, damaged; delete it")
    return made
