"""Second moments C = E[k k^T] on disk, in upstream's `.npz` form (kmeng01/rome): read, checked, never unpickled.

Keys: `mom2.constructor` (text), `mom2.count` (tokens), `mom2.mom2` (K, K; the *sum* of k k^T), `sample_size`
(documents).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from easyeditor.errors import StatsError


def moment_paths(stats_dir: str, model_name: str, module: str, *, dataset: str, dtype: str, samples: int) -> list[Path]:
    """Where a statistics file may lie: upstream spells the model's folder as its path with `/` -> `_`, or its last
    segment."""
    file = f"{module}_{dtype}_mom2_{samples}.npz"
    spelled = model_name.rstrip("/")
    folders = dict.fromkeys([spelled.replace("/", "_"), spelled.rsplit("/", 1)[-1]])
    return [Path(stats_dir) / folder / f"{dataset}_stats" / file for folder in folders]


def load_moment(
    stats_dir: str, model_name: str, module: str, *, dataset: str, dtype: str, samples: int, width: int
) -> Tensor:
    """The second moment (K, K) of the inputs of `module`, float64.

    Raises:
        StatsError: no such file (named, with what to do), corrupt, of another width, or not positive.
    """
    paths = moment_paths(stats_dir, model_name, module, dataset=dataset, dtype=dtype, samples=samples)
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        places = " or ".join(str(p) for p in paths)
        raise StatsError(
            f"no second-moment statistics: looked for {places}; put an upstream file there, or set "
            "mom2_adjustment: false (identity); `python -m easyeditor.stats` will collect them in a coming release"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            total = np.asarray(archive["mom2.mom2"], dtype=np.float64)
            count = float(archive["mom2.count"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StatsError(
            f"{path}: not a readable statistics file ({type(error).__name__}: {error}); delete it"
        ) from error
    if total.shape != (width, width):
        raise StatsError(
            f"{path}: moment of shape {total.shape}, but {module} has keys of width {width}: another model's file"
        )
    if not count > 0 or not np.isfinite(total).all():
        raise StatsError(
            f"{path}: count {count}, finite {bool(np.isfinite(total).all())}; the file is damaged, delete it"
        )
    return torch.from_numpy(total / count)
