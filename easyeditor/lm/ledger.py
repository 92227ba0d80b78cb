"""Edits committed to a model, and the way back; memory stays bounded however many there are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from easyeditor.base.errors import DataError
from easyeditor.base.files import write_tensors
from easyeditor.base.reading import read_tensors
from easyeditor.lm.weights import add, changing, committed, digest, restore, snapshot
from easyeditor.values.edit import EditResult, WeightDelta

HELD_BYTES = 64 * 2**20
"""Deltas held in memory, in bytes; beyond it the oldest go to files."""

Deltas = tuple[WeightDelta, ...]


class Ledger:
    """Edits committed to a model, and the way back.

    Keeps the original of every touched weight and the committed deltas in order. Taking one out rebuilds the touched
    weights from the originals and the rest, so the result is bit-equal to never having made that edit.
    """

    def __init__(self, model: nn.Module, held_bytes: int = HELD_BYTES) -> None:
        self._model = model
        self._originals: dict[str, Tensor] = {}
        self._shelf = Shelf(held_bytes)
        self._token = object()  # of these edits, in `weights`

    def __len__(self) -> int:
        return len(self._shelf)

    def commit(self, deltas: Sequence[WeightDelta], saved: Path | None = None) -> None:
        """Add `deltas` for good; a failure leaves the model as it was.

        `saved` is the folder of a saved edit with these deltas: they are read from there when they are needed again.

        Raises:
            DataError, NumericalError: see `weights.add`. ConfigError: see `weights.changing`. OutputError: no room for
                the deltas' file.
        """
        with changing(self._model, self._token, stays=True) as restored:
            restored |= snapshot(self._model, [delta.name for delta in deltas])
            add(self._model, deltas)
            self._shelf.append(tuple(deltas), saved)
            self._originals = {**restored, **self._originals}
            restored.clear()
            committed(self._model, self._token, len(self))

    def revert(self, deltas: Sequence[WeightDelta]) -> bool:
        """Take back the last commit of these deltas (or equal ones, loaded again); False if there is none."""
        place = self._shelf.last(deltas)
        if place is None:
            return False
        self._rebuild([n for n in range(len(self._shelf)) if n != place])
        return True

    def revert_all(self) -> None:
        """Back to the weights before the first commit, bit-exactly."""
        self._rebuild([])

    @contextmanager
    def original(self) -> Iterator[None]:
        """The weights before the first commit inside the block; the present ones bit-exactly after it, also on
        error."""
        with changing(self._model, self._token) as present:
            present |= snapshot(self._model, list(self._originals))
            restore(self._model, self._originals)
            yield

    def _rebuild(self, places: list[int]) -> None:
        with changing(self._model, self._token, stays=True) as restored:
            restored |= snapshot(self._model, list(self._originals))
            restore(self._model, self._originals)
            for place in places:
                add(self._model, self._shelf[place])
            self._shelf.keep(places)
            restored.clear()
            committed(self._model, self._token, len(self))
        touched = self._shelf.names()
        self._originals = {name: weight for name, weight in self._originals.items() if name in touched}


@dataclass(frozen=True)
class _Stored:
    """Deltas in a file: the weights they are of, their content's digest, how they are read."""

    names: tuple[str, ...]
    digest: str
    read: Callable[[], Deltas]

    @classmethod
    def of(cls, deltas: Deltas, read: Callable[[], Deltas]) -> _Stored:
        return cls(names=tuple(delta.name for delta in deltas), digest=digest(deltas), read=read)


class Shelf:
    """Deltas in order, the latest in memory and the others in files of a temporary folder, which goes with the
    process."""

    def __init__(self, held_bytes: int) -> None:
        self._bound = held_bytes
        self._entries: list[Deltas | _Stored] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, place: int) -> Deltas:
        entry = self._entries[place]
        return entry.read() if isinstance(entry, _Stored) else entry

    @property
    def held_bytes(self) -> int:
        """Size of the deltas in memory."""
        return sum(_size(entry) for entry in self._entries if not isinstance(entry, _Stored))

    def append(self, deltas: Deltas, saved: Path | None = None) -> None:
        """Put deltas at the end; they are read from `saved` if they lie there. OutputError: nothing was changed."""
        if saved is not None:
            self._entries.append(_Stored.of(deltas, lambda: EditResult.load(saved).deltas))
            return
        room = self._bound - _size(deltas)
        held = self.held_bytes
        for place, entry in enumerate(self._entries):
            if held <= room:
                break
            if not isinstance(entry, _Stored):
                self._entries[place] = self._in_file(entry)
                held -= _size(entry)
        self._entries.append(deltas if held <= room else self._in_file(deltas))

    def last(self, deltas: Sequence[WeightDelta]) -> int | None:
        """Place of the last entry with these deltas, bit by bit."""
        wanted = digest(deltas)
        for place in reversed(range(len(self._entries))):
            entry = self._entries[place]
            if entry.digest == wanted if isinstance(entry, _Stored) else _same_deltas(entry, deltas):
                return place
        return None

    def keep(self, places: Sequence[int]) -> None:
        """Leave only the entries at these places."""
        self._entries = [self._entries[place] for place in places]
        if not self._entries and self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def names(self) -> set[str]:
        """Weights that entries change."""
        return {
            name
            for entry in self._entries
            for name in (entry.names if isinstance(entry, _Stored) else [delta.name for delta in entry])
        }

    def _in_file(self, deltas: Deltas) -> _Stored:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="easyeditor-edits-")
        path = Path(self._folder.name) / f"{self._written:06d}.safetensors"
        self._written += 1
        write_tensors(
            path, {f"{n}.{k}": t.clone() for n, delta in enumerate(deltas) for k, t in delta.tensors().items()}
        )
        names = [delta.name for delta in deltas]

        def read() -> Deltas:
            from safetensors import SafetensorError

            try:
                tensors = read_tensors(path)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: a committed edit was kept here and cannot be read ({error})") from error
            parts: list[dict[str, Tensor]] = [{} for _ in names]
            for key, tensor in tensors.items():
                number, _, part = key.partition(".")
                parts[int(number)][part] = tensor
            return tuple(WeightDelta(name=name, **part) for name, part in zip(names, parts, strict=True))

        return _Stored.of(deltas, read)


def _same_deltas(ours: Sequence[WeightDelta], theirs: Sequence[WeightDelta]) -> bool:
    """Are these the same deltas, bit by bit?"""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a is b:
            continue
        if a.name != b.name or a.tensors().keys() != b.tensors().keys():
            return False
        if not all(torch.equal(a.tensors()[key].cpu(), b.tensors()[key].cpu()) for key in a.tensors()):
            return False
    return True


def _size(deltas: Sequence[WeightDelta]) -> int:
    return sum(tensor.numel() * tensor.element_size() for delta in deltas for tensor in delta.tensors().values())
