"""A run before a model is loaded: records chosen, requests of one edit. A record's edits stay together."""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.hparams import HyperParams
from easyeditor.dataset.reader import BadRecord, Dataset, Record, read_dataset
from easyeditor.evaluate.registry import judge_for
from easyeditor.methods.registry import method_class, row_of
from easyeditor.runs.ranks import Rank
from easyeditor.runs.settings import TYPED, RunSettings
from easyeditor.values.edit import EditRequest
from easyeditor.values.request import contradiction

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run before a model is loaded: hyper-parameters, settings, dataset, the records chosen, in order, and the place
    where each edit begins."""

    hparams: HyperParams
    settings: RunSettings
    dataset: Dataset
    records: Sequence[Record]
    starts: Sequence[int] = ()

    @cached_property
    def requests(self) -> tuple[EditRequest, ...]:
        """The requests of the records."""
        return tuple(request for _, own in self.records for request in own)

    def share(self, rank: Rank) -> list[int]:
        """The places that fall to a process: all edits of a record to one."""
        owners = [n for n, (_, own) in enumerate(self.records) for _ in own]
        own = set(rank.share(range(len(self.records))))
        return [place for place, record in enumerate(owners) if record in own]

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"hparams": self.hparams.to_dict(), "run": self.settings.to_dict()}


def plan(hparams: HyperParams, settings: RunSettings, read: Callable[..., Dataset] = read_dataset) -> Plan:
    """Read the data and check that method and mode go together.

    Raises:
        ConfigError: a pair of method and mode that makes no sense, an unknown metric, a judge's address that is none.
        DataError: no usable dataset, or requests of one batch that contradict each other.
    """
    if settings.data == TYPED:
        raise ConfigError(
            "the requests of this run were typed; go on with single_case_edit.py --interactive --resume RUN"
        )
    _check_pair(hparams, settings)
    judge_for(settings.metrics)
    needs = row_of(hparams.alg_name).needs_subject
    dataset = read(settings.data, skip_bad=settings.skip_bad, sample=settings.sample, needs_subject=needs)
    return Plan(hparams, settings, *chosen(dataset, settings))


def _check_pair(hparams: HyperParams, settings: RunSettings) -> None:
    method, name = method_class(hparams.alg_name), hparams.alg_name
    if settings.mode == "batch" and not method.joint:
        raise ConfigError(f"mode batch with {name}: it edits one fact at a time; use mode sequential or single")
    if settings.screen and not method.screens:
        raise ConfigError(f"--screen with {name}: it has no denominator to screen by")
    if settings.screen and settings.mode != "single":
        raise ConfigError(f"--screen with mode {settings.mode}: it makes no edit; drop the mode")
    if settings.on_collapse != "keep" and not hparams.ppl_sentence_num:
        raise ConfigError(f"on_collapse {settings.on_collapse} needs perplexity, and ppl_sentence_num is 0")
    if settings.stop_on_collapse and not hparams.ppl_sentence_num:
        raise ConfigError("stop_on_collapse needs perplexity, and ppl_sentence_num is 0")


def chosen(dataset: Dataset, settings: RunSettings) -> tuple[Dataset, list[Record], list[int]]:
    """The records a run edits, the place where each of its edits begins, and the dataset, with what is left out.

    In mode batch a record that contradicts an earlier one of its batch is left out with `skip_bad`: whole, because its
    questions need all its edits. In mode sequential a later fact overwrites an earlier one.

    Raises:
        ConfigError: no record is left. DataError: two requests of a batch contradict each other.
    """
    records = ordered(settings.select(dataset.grouped()), settings)
    if settings.mode != "batch":
        return dataset, records, list(range(sum(len(own) for _, own in records)))
    starts, opposed = batched(records, settings.batch_size)
    if opposed:
        counted = f"records that contradict an earlier one of their batch: {len(opposed)}"
        told = f"{settings.data}: {counted}; the first: record {opposed[0].number}: {opposed[0].reason}"
        if not settings.skip_bad:
            way = "--skip-bad leaves the later one out, and in mode sequential it overwrites the earlier one"
            raise DataError(f"{told}; {way}")
        LOG.warning("%s; left out", told)
    out = {record.number for record in opposed}
    kept = [record for record in records if record[0] not in out]
    return replace(dataset, bad=(*dataset.bad, *opposed)), kept, starts


def ordered(records: list[Record], settings: RunSettings) -> list[Record]:
    """The chosen records in the order the settings ask for; a record's edits stay together."""
    if settings.order == "as-is":
        return records
    drawn = list(records)
    random.Random(f"order {settings.order_seed}").shuffle(drawn)
    if settings.order == "random":
        return drawn
    clusters: dict[tuple[str, str], list[Record]] = {}
    for record in drawn:
        clusters.setdefault((record[1][0].before, record[1][0].after), []).append(record)
    return [record for own in clusters.values() for record in own]


def batched(records: Sequence[Record], size: int) -> tuple[list[int], list[BadRecord]]:
    """The places where batches of at most `size` requests begin, and the records that contradict an earlier one of
    their batch, which are in none. A record's edits are in one batch where they fit."""
    starts: list[int] = []
    opposed: list[BadRecord] = []
    batch: dict[Any, EditRequest] = {}
    filled, place = size, 0  # requests in the last batch, and in all
    for number, edits in records:
        fits = filled + len(edits) <= size
        own: dict[Any, EditRequest] = {}
        found = None
        for n, request in enumerate(edits):
            own = own if n % size else {}
            before = (own.setdefault(request.place, request), batch.get(request.place) if fits else None)
            found = next(filter(None, (found, *(contradiction(one, request) for one in before))), None)
        if found:
            opposed.append(BadRecord(number=number, reason=found))
            continue
        for n, request in enumerate(edits):
            if filled == size or not (fits or n):
                starts.append(place)
                batch, filled = {}, 0
            batch.setdefault(request.place, request)
            filled, place = filled + 1, place + 1
    return starts, opposed


def places(starts: Sequence[int], count: int) -> list[list[int]]:
    """The places of each edit of `count` requests."""
    return [list(range(first, end)) for first, end in pairwise([*starts, count])]


def batch_of(folder: Path, manifest: Mapping[str, Any]) -> Callable[[int], int]:
    """Place in a run -> the first place of its edit, by the run's manifest. Raises DataError: damaged."""
    starts = manifest.get("batches")
    if starts is None:  # not mode batch
        return lambda place: place
    if not starts or not isinstance(starts, list) or not all(isinstance(n, int) for n in starts) or starts[0] != 0:
        raise DataError(f"{folder}: batches in manifest.json is {starts!r:.80}; it is damaged")
    return lambda place: int(starts[bisect_right(starts, place) - 1])
