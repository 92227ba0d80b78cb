"""The two sets of requests every experiment compares: those whose edits collapse the model, and ordinary ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.paths import SHIPPED
from easyeditor.base.reading import read_bytes
from easyeditor.dataset.reader import read_dataset
from easyeditor.values.edit import EditRequest

DATA = SHIPPED / "data"
FACTS = DATA / "facts.json"
SMALL_COLLAPSE = DATA / "requests" / "collapse.json"


@dataclass(frozen=True, kw_only=True)
class RequestSet:
    """Requests and the file they came from; `name` is collapse or normal."""

    name: str
    path: Path
    requests: tuple[EditRequest, ...]

    def to_json(self) -> dict[str, Any]:
        """Identity for the manifest."""
        digest = hashlib.sha256(read_bytes(self.path)).hexdigest()
        ids = [request.case_id for request in self.requests]
        return {"path": str(self.path), "sha256": digest, "requests": len(ids), "case_ids": ids}


def load_collapse(model_name: str, file: str | None, limit: int, seed: int) -> RequestSet:
    """The first `limit` requests of `file`, or a sample (by `seed`) of the default collapse set.

    Default: `data/hard/<model>.json`, what was mined for this model, else `data/requests/collapse.json`, a few requests
    with a one-word subject in first place.

    Raises:
        ConfigError: a limit below 1. DataError: a missing, wrong or empty file.
    """
    if limit < 1:
        raise ConfigError(f"--limit is {limit}; allowed: 1 or more")
    mined = DATA / "hard" / f"{Path(model_name).name}.json"
    path = Path(file) if file is not None else mined if mined.exists() else SMALL_COLLAPSE
    requests = read_dataset(str(path)).requests
    chosen = requests[:limit] if file is not None else _sample(requests, limit, seed)
    return RequestSet(name="collapse", path=path, requests=tuple(chosen))


def load_normal(normal: str | None, limit: int, seed: int, collapse: RequestSet) -> RequestSet:
    """The first `limit` requests of the file `normal`, or of the default normal set.

    Default: a sample (by `seed`) of `data/facts.json` without the collapse set's and without one-word subjects in first
    place.

    Raises:
        DataError: a missing, wrong or empty file; sets that share a request.
    """
    places = {request.place for request in collapse.requests}
    path = FACTS if normal is None else Path(normal)
    requests = list(read_dataset(str(path)).requests)
    if normal is None:
        ordinary = [r for r in requests if r.place not in places and not starts_with_one_word(r)]
        requests = _sample(ordinary, limit, seed)
        if not requests:
            raise DataError(f"{path}: holds no request that is not in the collapse set; name another file (--normal)")
    requests = requests[:limit]
    shared = [request for request in requests if request.place in places]
    if shared:
        raise DataError(
            f"{collapse.path} and {path} share {len(shared)} requests, the first {shared[0].prompt!r}; "
            "a request can be in the collapse set or in the normal set"
        )
    return RequestSet(name="normal", path=path, requests=tuple(requests))


def demonstration_facts(file: str | None, limit: int, seed: int) -> list[EditRequest]:
    """At most `limit` requests of a file, drawn by `seed`; by default of the split `train` of `data/facts.json`.

    Raises:
        DataError: as `read_dataset`.
    """
    split = "train" if file is None else None
    return _sample(
        read_dataset(str(FACTS if file is None else file), split=split, needs_subject=False).requests, limit, seed
    )


def _sample(requests: Sequence[EditRequest], limit: int, seed: int) -> list[EditRequest]:
    """At most `limit` of them, drawn by the seed, in their order."""
    drawn = random.Random(seed).sample(range(len(requests)), min(limit, len(requests)))
    return [requests[i] for i in sorted(drawn)]


def starts_with_one_word(request: EditRequest) -> bool:
    """Is the subject one word that starts the prompt: the place where edits collapse (Fall of ROME, section 4)?"""
    return request.subject_start == 0 and len(request.subject.split()) == 1
