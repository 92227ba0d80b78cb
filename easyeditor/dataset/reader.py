"""A dataset file, folder or Hugging Face name as edit requests: format recognised and named, bad records reported."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from easyeditor.base.errors import AbsentSubject, DataError
from easyeditor.base.fetch import hub
from easyeditor.base.files import read_json
from easyeditor.base.reading import check_file
from easyeditor.dataset.formats import parse_all, recognise
from easyeditor.dataset.probes import Reading, left_out, listed_probes
from easyeditor.dataset.raw import FILES, Raw, from_file
from easyeditor.values.edit import EditRequest

LOG = logging.getLogger(__name__)

Record = tuple[int, tuple[EditRequest, ...]]
"""A record's number in its source, from 0, and the requests made of it."""


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that is no request: its number in the source, from 0, and the reason."""

    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Requests in the source's order, with where they came from; `format` is the name `FORMATS` knows it by."""

    source: str
    format: str
    sha256: str
    requests: tuple[EditRequest, ...]
    records: tuple[int, ...] = ()
    """The record that each request came from: its number in the source, from 0."""
    bad: tuple[BadRecord, ...] = ()
    unread: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Probes without an answer, by kind and name."""

    def said(self, requests: Sequence[EditRequest]) -> str:
        """One line on the data of those of its requests that are used: their probes, and the fields not read."""
        chosen = f"{len(requests):,} of {len(self.requests):,} requests ({self.format})"
        unread = f"; fields not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.source}: {chosen}; probes: {listed_probes(requests)}{unread}"

    def grouped(self) -> list[Record]:
        """The records in order (one of MQuAKE may hold several edits)."""
        pairs = zip(self.records, self.requests, strict=True)
        return [(number, tuple(r for _, r in own)) for number, own in groupby(pairs, key=itemgetter(0))]

    def first(self, count: int | None) -> list[EditRequest]:
        """The requests of the first so many records; None: of all."""
        return [request for _, own in self.grouped()[:count] for request in own]

    def to_json(self) -> dict[str, Any]:
        """Identity for a manifest, without the requests."""
        return {
            **{"source": self.source, "format": self.format, "sha256": self.sha256, "requests": len(self.requests)},
            "bad": [{"record": b.number, "reason": b.reason} for b in self.bad],
            **{"unread": list(self.unread), "left_out": dict(self.left_out)},
        }


def read_dataset(
    source: str,
    *,
    skip_bad: bool = False,
    skip_empty: bool = False,
    sample: str | None = None,
    split: str | None = None,
    needs_subject: bool = True,
) -> Dataset:
    """Read JSON (a list, or one record), JSON lines, CSV, Parquet, a `datasets` folder, or a Hugging Face dataset:
    `NAME[:SPLIT]`, or one of its files as `NAME:FILE.json`.

    All records must be of one format. A case id that an earlier record has gets the record's number added. With
    `skip_bad` records that break a rule are left out and listed in `bad`. `sample` is a file of record numbers,
    `FILE.json[:NAME]`: those are taken, in its order; with `split` those whose `split` field is this. With `skip_empty`
    records whose new answer `alt` is empty are left out too, as EasyEdit's dataset classes do. Without
    `needs_subject`, as for a method that uses none, a record whose subject is not in its prompt is read without it.

    Raises:
        DataError: nothing there, not readable, no usable record, or a bad record (with its number).
    """
    path, (name, _, part) = Path(source), source.rpartition(":")
    if os.path.exists(source) and not path.is_dir():
        raw, sha256 = from_file(path)
    elif path.is_dir() or Path(name or "nowhere").is_dir() or not (_looks_like_file(source) or _looks_like_file(part)):
        raw, sha256 = _from_datasets(source)
    elif name and not _looks_like_file(name):
        raw, sha256 = from_file(_hub_file(source, name, part))
    else:
        raise DataError(f"{source}: no such file")
    records: Iterable[tuple[int, Raw]] = enumerate(raw)
    if sample is not None:
        sampled, listed = read_sample(sample), list(raw)
        if max(sampled) >= len(listed):
            raise DataError(f"{sample}: asks for record {max(sampled)}, but {source} has {len(listed)} records")
        records = [(n, listed[n]) for n in sampled]
        sha256 = hashlib.sha256(f"{sha256} {sampled}".encode()).hexdigest()
    if split is not None:
        records = [(n, r) for n, r in records if not isinstance(r[0], Mapping) or r[0].get("split") == split]
    met = Reading(needs_subject=needs_subject)
    made, bad, name = _requests(source, records, skip_bad, skip_empty, met)
    numbers, requests = zip(*made, strict=True) if made else ((), ())
    if not requests:
        if not bad:
            raise DataError(f"{source}: holds no records{'' if split is None else f' of split {split!r}'}")
        first = f"the first: record {bad[0].number}, {bad[0].reason}"
        raise DataError(f"{source}: no usable record in it ({len(bad)} bad; {first})")
    if met.left_out:
        LOG.warning("%s: %s", source, left_out(met))
    return Dataset(
        source=source,
        format=name,
        sha256=sha256,
        requests=requests,
        records=numbers,
        bad=tuple(bad),
        unread=tuple(met.unread),
        left_out=met.left_out,
    )


def read_sample(sample: str) -> list[int]:
    """Record numbers from `FILE.json[:NAME]`: a list of them, or lists by name (the first where none is named), as
    the unique-subject samples of unified-model-editing are. Raises DataError."""
    path, name = Path(sample), ""
    if not path.is_file() and ":" in sample:
        path, name = Path(sample.rpartition(":")[0]), sample.rpartition(":")[2]
    value = read_json(path)
    if isinstance(value, dict) and value:
        name = name or next(iter(value))
        if name not in value:
            raise DataError(f"{path}: has no sample {name!r}; there are: {', '.join(list(value)[:20])}")
        value = value[name]
    elif name:
        raise DataError(f"{path}: holds no samples by name, so there is none called {name!r}")
    numbers = value if isinstance(value, list) else []
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise DataError(f"{path}: a sample must be a list of record numbers from 0, or lists by name")
    if len(set(numbers)) < len(numbers):
        twice = next(n for place, n in enumerate(numbers) if n in numbers[:place])
        raise DataError(f"{path}: a sample takes each record once; {twice} is in it again")
    return numbers


def _requests(
    source: str, records: Iterable[tuple[int, Raw]], skip_bad: bool, skip_empty: bool, met: Reading
) -> tuple[list[tuple[int, EditRequest]], list[BadRecord], str]:
    requests: list[tuple[int, EditRequest]] = []
    bad: list[BadRecord] = []
    absent: list[str] = []  # number and reason of records without their subject
    others: list[str] = []  # the same of other bad records
    name = ""
    seen: set[str] = set()  # case ids as text
    renamed: list[str] = []
    for number, (record, problem) in records:
        try:
            if problem is not None:
                raise DataError(problem)
            own = Reading(needs_subject=met.needs_subject)
            made = parse_all(record, "unusable", number, own)
            found = recognise(record)
            if name and found != name:
                raise DataError(f"is a {found} record and those before are {name}; a dataset holds one format")
        except DataError as error:
            reason = str(error).removeprefix("unusable: ")
            if isinstance(error, AbsentSubject):
                absent.append(f"record {number}: {reason}")
            elif skip_bad or (skip_empty and isinstance(record, Mapping) and record.get("alt") == ""):
                others.append(f"record {number}: {reason}")
            else:
                raise DataError(f"{source}: record {number}: {reason}; --skip-bad leaves such records out") from error
            bad.append(BadRecord(number=number, reason=reason))
            continue
        name = name or found
        met.add(own)
        for request in made:
            case_id = request.case_id
            while str(case_id) in seen:
                case_id = f"{case_id}-{number}"
            seen.add(str(case_id))
            if case_id != request.case_id:
                renamed.append(f"record {number}, {request.case_id!r} -> {case_id!r}")
            requests.append((number, replace(request, case_id=case_id)))
    if renamed:
        told = f"{len(renamed)} got their record's number added; the first: {renamed[0]}"
        LOG.warning("%s: case ids given twice: %s", source, told)
    if absent:
        count = "1 record has no place for its subject in its prompt:"
        if len(absent) > 1:
            count = f"{len(absent)} records have no place for their subject in their prompt; the first:"
        told = f"{source}: {count} {absent[0]}"
        if not skip_bad:
            raise DataError(f"{told}; --skip-bad leaves such records out")
        LOG.warning("%s; left out", told)
    if others:
        LOG.warning("%s: bad records left out: %d; the first: %s", source, len(others), others[0])
    return requests, bad, name


def _looks_like_file(source: str) -> bool:
    return Path(source).suffix.lower() in FILES or source.startswith((".", "/", "~"))


def _hub_file(source: str, name: str, file: str) -> Path:
    """One file of a dataset on the hub: for datasets whose files are of several formats, which `datasets` refuses."""
    from huggingface_hub import hf_hub_download

    try:
        with hub():
            return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:  # the hub client's many kinds, and a name that cannot be one
        what = "neither a file here nor one of a dataset on the Hugging Face hub that can be fetched"
        raise _unloadable(source, what, error) from error


def _unloadable(source: str, what: str, error: Exception) -> DataError:
    return DataError(f"{source}: {what} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")


def _from_datasets(source: str) -> tuple[Iterator[Raw], str]:
    """A folder that `save_to_disk` wrote, or a name on the hub (fetched by `datasets`); no code of theirs is run."""
    import datasets

    name, split = source, ""
    if ":" in source and not Path(source).is_dir():
        name, _, split = source.rpartition(":")
    try:
        if Path(name).is_dir():
            for file in (path for path in Path(name).rglob("*") if not path.is_dir()):
                check_file(file)
            loaded = datasets.load_from_disk(name)
        else:
            with hub():
                loaded = datasets.load_dataset(name)
    except Exception as error:  # datasets, the hub client and pyarrow raise many kinds
        raise _unloadable(source, "neither a file nor a dataset that `datasets` can load", error) from error
    if isinstance(loaded, Mapping):
        splits = list(loaded)
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(f"{source}: choose a split as {name}:SPLIT; there are: {', '.join(splits)}")
        loaded = loaded[split]
    rows = [{key: value for key, value in row.items() if value is not None} for row in loaded]
    digest = hashlib.sha256("".join(json.dumps(row, sort_keys=True, default=str) for row in rows).encode())
    return ((row, None) for row in rows), digest.hexdigest()
