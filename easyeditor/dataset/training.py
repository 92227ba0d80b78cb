"""Datasets as EasyEdit names them, for training MEND: a file of records, read as checked requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from easyeditor.dataset.formats import parse
from easyeditor.errors import DataError
from easyeditor.files import read_json
from easyeditor.records import EditRequest


class RequestDataset(Sequence[EditRequest]):
    """Requests of one file, in its order. Any format of `dataset/formats.py` is read, whatever the class is called."""

    def __init__(
        self, data_dir: str | Path, size: int | None = None, config: Any = None, *, split: str | None = None
    ) -> None:
        """`data_dir` is a JSON file (EasyEdit's name for it), `size` takes the first so many, `split` those whose
        `split` field is this. `config` is EasyEdit's third argument; nothing is read from it.

        Raises:
            DataError: missing or unreadable file, a bad record (with its number), or no record left.
        """
        self.path, self.split = Path(data_dir), split
        raw = read_json(self.path)
        if not isinstance(raw, list):
            raise DataError(f"{self.path}: expected a JSON list of records, found {type(raw).__name__}")
        places = [
            (number, item)
            for number, item in enumerate(raw)
            if split is None or (isinstance(item, dict) and item.get("split") == split)
        ]
        self.requests = [parse(item, f"{self.path}: record {number}", number) for number, item in places[:size]]
        if not self.requests:
            which = "" if split is None else f" of split {split!r}"
            raise DataError(f"{self.path}: no records{which} in it")

    @overload
    def __getitem__(self, index: int) -> EditRequest: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[EditRequest]: ...

    def __getitem__(self, index: int | slice) -> EditRequest | Sequence[EditRequest]:
        return self.requests[index]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self.requests)


class CounterFactDataset(RequestDataset):
    """CounterFact: ROME's full format, or EasyEdit's flat one."""


class ZsreDataset(RequestDataset):
    """ZsRE as MEND uses it: `src`, `alt`, `rephrase`, `loc`, `loc_ans`."""
