"""A dataset file, folder or Hugging Face name as edit requests: format recognised and named, bad records reported."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.dataset.formats import parse_all, recognise
from easyeditor.errors import AbsentSubject, DataError
from easyeditor.fetch import hub
from easyeditor.files import parse_unchecked, read_json
from easyeditor.records import EditRequest

LOG = logging.getLogger(__name__)

Raw = tuple[Any, str | None]
"""One record as it stands in the source, or None and what is wrong with it."""
FILES = (".json", ".jsonl", ".ndjson")


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
    bad: tuple[BadRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Identity for a manifest, without the requests."""
        bad = [{"record": b.number, "reason": b.reason} for b in self.bad]
        return {
            "source": self.source,
            "format": self.format,
            "sha256": self.sha256,
            "requests": len(self.requests),
            "bad": bad,
        }


def read_dataset(source: str, *, skip_bad: bool = False, sample: str | None = None) -> Dataset:
    """Read JSON (a list, or one record), JSON lines, a `datasets` folder, or a Hugging Face dataset: `NAME[:SPLIT]`, or
    one of its files as `NAME:FILE.json`.

    All records must be of one format and have case ids of their own. With `skip_bad` those that break a rule are left
    out and listed in `bad`. `sample` is a file of record numbers, `FILE.json[:NAME]`: those are taken, in its order.

    Raises:
        DataError: nothing there, not readable, no usable record, or a bad record (with its number).
    """
    path, (name, _, part) = Path(source), source.rpartition(":")
    if path.is_file():
        raw, sha256 = _from_file(path)
    elif _is_folder(source) or not (_looks_like_file(source) or _looks_like_file(part)):
        raw, sha256 = _from_datasets(source)
    elif name and not _looks_like_file(name):
        raw, sha256 = _from_file(_hub_file(source, name, part))
    else:
        raise DataError(f"{source}: no such file")
    records: Iterable[tuple[int, Raw]] = enumerate(raw)
    if sample is not None:
        numbers = read_sample(sample)
        records = _sampled(source, list(raw), numbers, sample)
        sha256 = hashlib.sha256(f"{sha256} {numbers}".encode()).hexdigest()
    requests, bad, name = _requests(source, records, skip_bad)
    if not requests:
        if not bad:
            raise DataError(f"{source}: holds no records")
        first = f"the first: record {bad[0].number}, {bad[0].reason}"
        raise DataError(f"{source}: no usable record in it ({len(bad)} bad; {first})")
    return Dataset(source=source, format=name, sha256=sha256, requests=tuple(requests), bad=tuple(bad))


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


def _sampled(source: str, raw: list[Raw], numbers: list[int], sample: str) -> list[tuple[int, Raw]]:
    if max(numbers) >= len(raw):
        raise DataError(f"{sample}: asks for record {max(numbers)}, but {source} has {len(raw)} records")
    return [(n, raw[n]) for n in numbers]


def _requests(
    source: str, records: Iterable[tuple[int, Raw]], skip_bad: bool
) -> tuple[list[EditRequest], list[BadRecord], str]:
    requests: list[EditRequest] = []
    bad: list[BadRecord] = []
    absent: list[str] = []  # number and reason of records without their subject
    others: list[str] = []  # the same of other bad records
    name = ""
    seen: dict[str, int] = {}  # case id as text -> record
    for number, (record, problem) in records:
        try:
            if problem is not None:
                raise DataError(problem)
            made = parse_all(record, "unusable", number)
            found = recognise(record)
            if name and found != name:
                raise DataError(f"is a {found} record and those before are {name}; a dataset holds one format")
            for request in made:
                if (first := seen.setdefault(str(request.case_id), number)) != number:
                    raise DataError(f"has the case id {request.case_id!r} of record {first}; case ids must differ")
        except DataError as error:
            reason = str(error).removeprefix("unusable: ")
            if isinstance(error, AbsentSubject):
                absent.append(f"record {number}: {reason}")
            elif skip_bad:
                others.append(f"record {number}: {reason}")
            else:
                raise DataError(f"{source}: record {number}: {reason}; --skip-bad leaves such records out") from error
            bad.append(BadRecord(number=number, reason=reason))
            continue
        name = name or found
        requests += made
    _tell_absent(source, absent, skip_bad)
    if others:
        LOG.warning("%s: bad records left out: %d; the first: %s", source, len(others), others[0])
    return requests, bad, name


def _tell_absent(source: str, absent: list[str], skip_bad: bool) -> None:
    """One line on records whose subject is not in their prompt. Raises DataError with it, unless they are skipped."""
    if not absent:
        return
    count = "1 record has no place for its subject in its prompt:"
    if len(absent) > 1:
        count = f"{len(absent)} records have no place for their subject in their prompt; the first:"
    told = f"{source}: {count} {absent[0]}"
    if not skip_bad:
        raise DataError(f"{told}; --skip-bad leaves such records out")
    LOG.warning("%s; left out", told)


def _from_file(path: Path) -> tuple[Iterator[Raw], str]:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable UTF-8 text file ({error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    raw = _lines(text) if _is_lines(text, path) else _whole(text, path)
    return raw, hashlib.sha256(content).hexdigest()


def _is_lines(text: str, path: Path) -> bool:
    """JSON lines: by the file's name, or because its first line is an object by itself and more follow."""
    if path.suffix.lower() in FILES[1:]:
        return True
    head, _, rest = text.lstrip().partition("\n")
    if not head.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(parse_unchecked(head), dict)
    except ValueError:
        return False


def _whole(text: str, path: Path) -> Iterator[Raw]:
    try:
        value = parse_unchecked(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} of {text.count(chr(10)) + 1} lines"
        raise DataError(f"{path}: not whole JSON ({error.msg} at {where}); is the file cut off?") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of records, found {type(value).__name__}")
    return ((item, None) for item in value)


def _lines(text: str) -> Iterator[Raw]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield parse_unchecked(line), None
        except ValueError as error:
            yield None, f"line {number} is not JSON ({error})"


def _is_folder(source: str) -> bool:
    """A folder, or a folder with a split behind a colon."""
    return Path(source).is_dir() or Path(source.rpartition(":")[0] or "nowhere").is_dir()


def _looks_like_file(source: str) -> bool:
    return Path(source).suffix.lower() in FILES or source.startswith((".", "/", "~"))


def _hub_file(source: str, name: str, file: str) -> Path:
    """One file of a dataset on the hub: for datasets whose files are of several formats, which `datasets` refuses."""
    from huggingface_hub import hf_hub_download

    try:
        with hub():
            return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:  # the hub client's many kinds, and a name that cannot be one
        reason = " ".join(str(error).split())[:300]
        what = "neither a file here nor one of a dataset on the Hugging Face hub that can be fetched"
        raise DataError(f"{source}: {what} ({type(error).__name__}: {reason})") from error


def _from_datasets(source: str) -> tuple[Iterator[Raw], str]:
    """A folder that `save_to_disk` wrote, or a name on the hub (fetched by `datasets`); no code of theirs is run."""
    import datasets

    name, split = source, ""
    if ":" in source and not Path(source).is_dir():
        name, _, split = source.rpartition(":")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
        else:
            with hub():
                loaded = datasets.load_dataset(name)
    except Exception as error:  # datasets, the hub client and pyarrow raise many kinds
        reason = " ".join(str(error).split())[:300]
        what = "neither a file nor a dataset that `datasets` can load"
        raise DataError(f"{source}: {what} ({type(error).__name__}: {reason})") from error
    if isinstance(loaded, Mapping):
        splits = list(loaded)
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(f"{source}: choose a split as {name}:SPLIT; there are: {', '.join(splits)}")
        loaded = loaded[split]
    rows = [{key: value for key, value in row.items() if value is not None} for row in loaded]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return ((row, None) for row in rows), digest.hexdigest()
