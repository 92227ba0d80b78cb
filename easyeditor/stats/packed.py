"""Statistics of one model as a folder to share, on a hub or a web server as it is: `statistics.json`, and a safetensors
file for each moment and each kept projection (docs/data.md).

A matrix is symmetric, so the triangle on and above its diagonal is stored, row by row. `statistics.json` has the model,
a fingerprint of its weights, and the checksum of every file and of itself. Axes: K key width.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError, StatsError
from easyeditor.base.fetch import file_sha256, hub
from easyeditor.base.files import read_json, whole_folder, write_json, write_tensors
from easyeditor.base.hparams import typed
from easyeditor.base.reading import check_file, open_tensors
from easyeditor.lm import embedded
from easyeditor.lm.weights import alike
from easyeditor.stats.store import Manifest, checked_moment, read_manifest, read_sum, write_moment

FORMAT = 1
MANIFEST = "statistics.json"
MOST_MANIFEST = 1 << 24  # bytes
SECONDS = 60  # without a byte, until a server counts as gone
_NAME = re.compile(r"(?P<module>.+)_(float32|float64)_mom2_(?P<samples>[0-9]+)(\.npz|-null-space-.*\.safetensors)")
_PLACE = re.compile(r"[^/\\\0.][^/\\\0]*/[^/\\\0.][^/\\\0]*")
_HUB = re.compile(r"(datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Whose statistics they must be: its name, `lm.weights.sample` of it, and the key width of each of its modules."""

    name: str
    weights: str
    widths: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """One matrix: `name` is its place below a model's folder of statistics, `lost` ‖what packing changed‖/‖matrix‖,
    `made` how a moment was collected; None for a projection, whose `numbers` are in the safetensors file."""

    name: str
    width: int
    dtype: str
    lost: float
    made: Manifest | None
    sha256: str = ""
    bytes: int = 0

    @property
    def path(self) -> str:
        """Its place in the packed folder."""
        return self.name.removesuffix(".npz").removesuffix(".safetensors") + ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The manifest of a packed folder; `checksum` is of all the rest."""

    model_name: str
    weights: str
    licence: str | None
    files: tuple[PackedFile, ...]
    code: str
    format: int = FORMAT
    checksum: str = ""

    def digest(self) -> str:
        """What `checksum` must be."""
        rest = asdict(replace(self, checksum=""))
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def pack(
    paths: Sequence[Path], output: Path, *, code: str, model: Model | None = None, dtype: str | None = None
) -> Packed:
    """Write a new folder with the moments in `paths`, all of one model, and the projections kept with them; `code` is
    the version that does so.

    `model` is needed for files without a manifest (upstream's). `dtype` float32 rounds sums that are float64; a
    projection is packed only with a moment that is stored exactly, for it is found by the moment's bits.

    Raises:
        StatsError: nothing to pack, a damaged file, or files of several models. OutputError: nowhere to write.
    """
    if not paths:
        raise StatsError("there are no statistics to pack; <corpus>_stats/<module>_<dtype>_mom2_<samples>.npz are")
    files: list[PackedFile] = []
    whose: Model | Manifest | None = model
    with whole_folder(output) as folder:
        for path in sorted(paths):
            made, total_KK = _read(path, model)
            whose = whose or made
            if not alike(made.weights, whose.weights):
                raise StatsError(f"{path}: collected on other weights than the others; pack each model by itself")
            checked_moment(path, total_KK.double().numpy(), made.tokens, "cpu")
            name, stored_KK = f"{path.parent.name}/{path.name}", total_KK.float() if dtype == "float32" else total_KK
            public = replace(made, model_name=_public(made.model_name))
            files.append(_written(folder, name, stored_KK, total_KK, public))
            for kept in sorted(path.parent.glob(f"{path.stem}-null-space-*.safetensors")) if not files[-1].lost else ():
                with _readable(kept), open_tensors(kept) as tensors:
                    matrix_KK, numbers = tensors.get_tensor("projection"), tensors.metadata()
                files.append(_written(folder, f"{path.parent.name}/{kept.name}", matrix_KK, matrix_KK, None, numbers))
        assert whose is not None
        name = _public(made.model_name)
        licence = next((base.licence for base in embedded.MODELS if base.hub_name == name), None)
        packed = Packed(model_name=name, weights=whose.weights, licence=licence, files=tuple(files), code=code)
        packed = replace(packed, checksum=packed.digest())
        write_json(folder / MANIFEST, asdict(packed))
    return packed


def _read(path: Path, model: Model | None) -> tuple[Manifest, Tensor]:
    named, made = _NAME.fullmatch(path.name), read_manifest(path)
    if named is None or not _PLACE.fullmatch(f"{path.parent.name}/{path.name}"):
        raise StatsError(f"{path}: no name of statistics; <corpus>_stats/<module>_<dtype>_mom2_<samples>.npz is")
    found, count, documents = read_sum(path, None if model is None else model.widths.get(named["module"], 0))
    if made is None and model is None:
        raise StatsError(f"{path}: has no manifest, so nothing says whose statistics these are; name it with --model")
    if made is None and model is not None:
        samples = documents or int(named["samples"])
        made = Manifest(
            module=named["module"],
            model_name=model.name,
            weights=model.weights,
            corpus=path.parent.name.removesuffix("_stats"),
            corpus_identity="",
            samples=samples,
            documents=samples,
            tokens=0,
            max_length=0,
            sums="",
        )
    assert made is not None
    total_KK = torch.from_numpy(found)
    exact = total_KK.dtype in (torch.float32, torch.float64)
    return replace(made, tokens=int(count)), total_KK if exact else total_KK.double()


def _public(name: str) -> str:
    """A model's name for others: an embedded one's on the hub, of a folder its last part."""
    base = embedded.find(name)
    return base.hub_name if base else Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _written(
    folder: Path,
    name: str,
    stored_KK: Tensor,
    given_KK: Tensor,
    made: Manifest | None,
    numbers: dict[str, str] | None = None,
) -> PackedFile:
    triangle = stored_KK[_upper(len(stored_KK))]
    lost = (_square(triangle, len(stored_KK)).double() - given_KK.double()).norm() / given_KK.double().norm()
    dtype = str(stored_KK.dtype).removeprefix("torch.")
    file = PackedFile(name=name, width=len(stored_KK), dtype=dtype, lost=float(lost), made=made)
    write_tensors(where := folder / file.path, {"triangle": triangle}, numbers)
    return replace(file, sha256=file_sha256(where), bytes=where.stat().st_size)


def _upper(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu()


def _square(triangle: Tensor, width: int) -> Tensor:
    upper_KK = triangle.new_zeros(width, width)
    upper_KK[_upper(width)] = triangle
    return upper_KK + upper_KK.triu(1).T


def read_packed(source: str, model: Model | None = None) -> Packed:
    """The manifest of a packed folder: a folder here, `http(s)://…`, or a name on the hub (`owner/name`, or
    `datasets/owner/name`).

    Raises:
        StatsError: there is none, it is damaged, or it is of other weights than `model`'s.
    """
    with _obtained(source, MANIFEST, MOST_MANIFEST) as path:
        try:
            packed = typed(Packed, read_json(path), "its keys")
        except (DataError, ConfigError) as error:
            raise StatsError(f"{source}: not a readable {MANIFEST} ({error}); get it again") from error
    if packed.format != FORMAT or packed.checksum != packed.digest():
        found = (
            f"format {packed.format}; this version reads {FORMAT}" if packed.format != FORMAT else "a wrong checksum"
        )
        raise StatsError(f"{source}: {MANIFEST} has {found}; get it again")
    if model is not None and not alike(packed.weights, model.weights):
        raise StatsError(f"{source}: collected on other weights ({packed.model_name}) than {model.name}'s; not used")
    for file in packed.files:
        named = _NAME.fullmatch(file.name.rpartition("/")[2])
        if not named or not _PLACE.fullmatch(file.name) or file.bytes > 4 * file.width * (file.width + 1) + (1 << 20):
            raise StatsError(f"{source}: {file.name}: no name or size of statistics; the folder is not used")
        if model is not None and model.widths.get(named["module"]) != file.width:
            raise StatsError(f"{source}: {file.name}: {model.name} has no such module with {file.width} keys; not used")
    return packed


def unpacked(source: str, packed: Packed, folder: Path | None, name: str) -> Iterator[tuple[PackedFile, bool]]:
    """Check every file of a packed folder and write it below `folder`, the place of the statistics of the model `name`;
    what is there already stays. Yields each file, and whether it was read. Without `folder` nothing is written.

    Raises:
        StatsError: a file is absent, damaged, or no second moment. OutputError: it cannot be written.
    """
    for file in packed.files:
        if folder is not None and (folder / file.name).exists():
            yield file, False
            continue
        where = f"{source}: {file.path}"
        with _obtained(source, file.path, file.bytes) as path, _readable(path):
            if file_sha256(path) != file.sha256:
                raise StatsError(f"{where} is not what was packed (checksum); it is damaged, get it again")
            with open_tensors(path) as tensors:
                triangle, numbers = tensors.get_tensor("triangle"), tensors.metadata() or {}
        if triangle.shape != (file.width * (file.width + 1) // 2,):
            raise StatsError(f"{where}: shape {tuple(triangle.shape)} is no triangle of width {file.width}")
        matrix_KK = _square(triangle, file.width)
        if file.made is not None:
            checked_moment(Path(where), matrix_KK.double().numpy(), file.made.tokens, "cpu")
        elif not abs(float(matrix_KK.diagonal().double().sum()) - float(numbers.get("rank", "nan"))) < 0.5:
            raise StatsError(f"{where}: no projection of the rank that it says; it is damaged")
        if folder is not None and file.made is not None:
            write_moment(folder / file.name, matrix_KK, replace(file.made, model_name=name))
        elif folder is not None:
            write_tensors(folder / file.name, {"projection": matrix_KK}, numbers)
        yield file, True


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StatsError(f"{path}: not a readable file of statistics ({error}); get it again") from error


@contextmanager
def _obtained(source: str, name: str, most: int) -> Iterator[Path]:
    """A file of a packed folder, at most `most` bytes; where it is not here, fetched for the length of the block."""
    on_hub = _HUB.fullmatch(source)
    with tempfile.TemporaryDirectory(prefix="statistics-") as scratch:
        try:
            if source.startswith(("http://", "https://")):
                path = _downloaded(f"{source.rstrip('/')}/{quote(name)}", Path(scratch) / "file", most)
            elif on_hub is None or Path(source).exists():
                path = Path(source) / name
            else:
                from huggingface_hub import hf_hub_download

                with hub():
                    kind = "dataset" if on_hub[1] else "model"
                    path = Path(hf_hub_download(on_hub[2], name, repo_type=kind, local_dir=scratch))
            check_file(path, most)
        except (OSError, HTTPException, ValueError) as error:  # the system's, urllib's and the hub client's
            raise StatsError(f"{source}: {name} cannot be had ({str(error) or type(error).__name__})") from error
        yield path


def _downloaded(url: str, path: Path, most: int) -> Path:
    with urllib.request.urlopen(url, timeout=SECONDS) as answer, open(path, "wb") as sink:
        while (chunk := answer.read(1 << 20)) and sink.tell() <= most:
            sink.write(chunk)
    return path
