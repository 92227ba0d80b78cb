"""Key dumps in upstream's layout: three folders with `keyN.npy` in each, safe with several processes. K key width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from easyeditor.base.errors import OutputError
from easyeditor.base.files import discard, whole_file

FOLDERS = ("C_keys_with_prefix", "keys_without_prefix", "keys_with_prefix")
"""C^-1 kbar (not scaled to unit length), k^u and kbar."""


def dump_keys(folder: Path, direction_K: Tensor, plain_K: Tensor, mean_K: Tensor) -> int:
    """Write one edit's C^-1 kbar, k^u and kbar as float32 `keyN.npy`, (K,) each; returns N, one for all three folders.

    N is one more than the highest there. Nothing is ever overwritten: a number is claimed by creating its file
    exclusively, so that processes writing to one folder at a time get numbers of their own.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    vectors = {name: _float32(v) for name, v in zip(FOLDERS, (direction_K, plain_K, mean_K), strict=True)}
    try:
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        number = 1 + max((n for name in FOLDERS for n in numbers(folder / name)), default=0)
        while not _write(folder, number, vectors):
            number += 1
    except OSError as error:
        raise OutputError(f"{folder}: keys cannot be written ({error.strerror or error})") from error
    return number


def numbers(folder: Path) -> list[int]:
    """The numbers N of the `keyN.npy` in a folder, ascending."""
    found = (re.fullmatch(r"key(\d+)\.npy", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _write(folder: Path, number: int, vectors: Mapping[str, np.ndarray[tuple[int], np.dtype[np.float32]]]) -> bool:
    """Write `keyN.npy` in all folders; False if the number is taken. The claim is N's part file in the first folder."""
    claim = folder / FOLDERS[0] / f"key{number}.npy.part"
    try:
        claim.open("xb").close()
    except FileExistsError:
        return False
    try:
        if any((folder / name / f"key{number}.npy").exists() for name in FOLDERS):
            return False
        for name in reversed(FOLDERS):  # the claimed folder last: its part file guards the number till all is there
            with whole_file(folder / name / f"key{number}.npy") as part, part.open("wb") as sink:
                np.save(sink, vectors[name], allow_pickle=False)
    finally:
        discard(claim)
    return True


def _float32(vector_K: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return vector_K.detach().float().cpu().numpy()
