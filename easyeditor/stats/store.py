"""Second moments C = E[k k^T] on disk, in upstream's `.npz` form (kmeng01/rome): read, checked, written; no pickle.

Keys: `mom2.constructor` (text), `mom2.count` (tokens), `mom2.mom2` (K, K; the *sum* of k k^T), `sample_size`
(documents). Next to a file of ours is a manifest, `<file>.json`; upstream's files have none and are checked by
shape.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError, StatsError
from easyeditor.base.files import read_json, whole_file, write_json
from easyeditor.base.hparams import typed
from easyeditor.base.reading import check_file, memory
from easyeditor.lm.weights import alike
from easyeditor.stats.factored import Factored, plus_identity

FORMAT = 1
CONSTRUCTOR = "util.runningstats.SecondMoment()"  # what upstream's reader expects to find


@dataclass(frozen=True, kw_only=True)
class StatsKey:
    """What a statistics file is of; its place on disk follows from it."""

    stats_dir: str
    model_name: str
    module: str
    dataset: str
    dtype: str
    samples: int

    @property
    def paths(self) -> list[Path]:
        """Where it may lie: upstream spells the model's folder as its path with `/` -> `_`, or its last segment."""
        file = f"{self.module}_{self.dtype}_mom2_{self.samples}.npz"
        spelled = self.model_name.rstrip("/")
        folders = dict.fromkeys([spelled.rsplit("/", 1)[-1], spelled.replace("/", "_")])
        return [Path(self.stats_dir) / folder / f"{self.dataset}_stats" / file for folder in folders]

    def find(self) -> Path | None:
        """The file that is there, if any."""
        return next((path for path in self.paths if path.exists()), None)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How a moment was collected; `weights` is `lm.weights.sample` of the model."""

    module: str
    model_name: str
    weights: str
    corpus: str
    corpus_identity: str
    samples: int
    documents: int
    tokens: int
    max_length: int
    sums: str
    format: int = FORMAT


def write_moment(path: Path, sum_KK: Tensor, manifest: Manifest) -> None:
    """Write the moment and its manifest, each whole or not at all. Raises OutputError."""
    dtype = np.float64 if "_float64_" in path.name else np.float32
    packed = io.BytesIO()
    arrays: dict[str, Any] = {
        "mom2.constructor": np.array(CONSTRUCTOR),
        "mom2.count": np.array(manifest.tokens),
        "mom2.mom2": sum_KK.cpu().numpy().astype(dtype),
        "sample_size": np.array(manifest.samples),
    }
    np.savez(packed, **arrays)
    with whole_file(path) as part:
        part.write_bytes(packed.getvalue())
        write_json(_manifest_path(path), asdict(manifest))


def read_moment(path: Path, width: int, weights: str | None = None) -> Tensor:
    """The moment (K, K) in a file, float64. Raises StatsError as `read_factored` does."""
    return read_factored(path, width, weights).matrix_KK


def read_factored(path: Path, width: int, weights: str | None = None, device: torch.device | str = "cpu") -> Factored:
    """The moment in a file, on a device, with the factor that checking it has made.

    Raises:
        StatsError: corrupt or truncated, of another width, not finite, or collected on another model's weights.
    """
    total, count, _ = read_sum(path, width)
    manifest = read_manifest(path)
    if manifest is not None and weights is not None and not alike(manifest.weights, weights):
        raise StatsError(
            f"{path}: collected on other weights ({manifest.model_name}) than this model's; collect for this model, or "
            f"remove {_manifest_path(path).name} to use it all the same"
        )
    return checked_moment(path, np.asarray(total, dtype=np.float64), count, device)


def read_sum(path: Path, width: int | None = None) -> tuple[NDArray[Any], float, int | None]:
    """The sum of k k^T (K, K) in its own dtype, the number of tokens, and of documents where the file says it.

    Raises:
        StatsError: not readable, or of another width.
    """
    try:
        check_file(path, memory())
        with np.load(path, allow_pickle=False) as archive:
            _check_header(path, archive, "mom2.mom2", width)
            _check_header(path, archive, "mom2.count")
            total, count = np.asarray(archive["mom2.mom2"]), float(archive["mom2.count"])
            samples = int(archive["sample_size"]) if "sample_size" in archive else None
    except StatsError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds
        why = f"{type(error).__name__}: {error}"
        raise StatsError(f"{path}: not a readable statistics file ({why}); delete it and collect again") from error
    return total, count, samples


def _check_header(path: Path, archive: Any, name: str, *width: int | None) -> None:
    """Raise StatsError, before anything of the array is read, for another shape (it may claim terabytes) or type;
    with a `width` it is a square, with None one that fits into memory."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, kind = read(member)
    fits = len(found) == 2 and 8 * found[0] ** 2 <= memory()
    shape = width * 2 if width != (None,) else (found[0],) * 2 if fits else ("K", "K")
    if found != shape or kind.kind not in "fiu":
        raise StatsError(f"{path}: {name} is {kind} of shape {found}, and real numbers of shape {shape} are needed")


def checked_moment(path: Path, total: NDArray[np.float64], count: float, device: torch.device | str) -> Factored:
    """C of a sum over `count` tokens.

    Raises:
        StatsError: not finite, a count or a sum of squares that is not above 0, not symmetric, or an eigenvalue below 0
            by more than float32's rounding.
    """
    if not count > 0 or not np.isfinite(total).all():
        raise StatsError(
            f"{path}: count {count}, finite {bool(np.isfinite(total).all())}; the file is damaged, delete it"
        )
    if not (np.diagonal(total) > 0).all():
        raise StatsError(f"{path}: a sum of squares on the diagonal is not above 0; the file is damaged, delete it")
    scale = float(np.trace(total))  # at least the largest eigenvalue, and 1e-6 of it is 16 times what rounding does
    if float(np.abs(total - total.T).max()) > 1e-6 * scale:
        raise StatsError(f"{path}: the moment is not symmetric; the file is damaged, delete it")
    moment = Factored(torch.from_numpy(total / count).to(device))
    if not moment.positive:  # fewer tokens than dimensions: still a sum of k k^T if only rounding makes it negative
        raised_KK = plus_identity(moment.matrix_KK, 1e-6 * scale / count)
        if int(torch.linalg.cholesky_ex(raised_KK).info) != 0:
            raise StatsError(f"{path}: the moment is not positive definite, so it is no sum of k k^T; collect again")
    return moment


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a statistics file; None for upstream's, which have none. Raises StatsError if it is damaged."""
    where = _manifest_path(path)
    if not where.exists():
        return None
    try:
        manifest = typed(Manifest, read_json(where), "its keys")
    except (DataError, ConfigError) as error:
        raise StatsError(f"{where}: not a readable manifest ({error}); delete it with its .npz") from error
    if manifest.format != FORMAT:
        raise StatsError(f"{where}: manifest of format {manifest.format}; this version reads {FORMAT}")
    return manifest


def not_collected(key: StatsKey, command: str) -> StatsError:
    """The error for statistics that are not there: which file, and what to do."""
    places = " or ".join(str(path) for path in key.paths)
    return StatsError(
        f"no second-moment statistics: looked for {places}; collect them: {command} (or set collect_stats: auto; "
        "for ROME also mom2_adjustment: false, the identity)"
    )


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
