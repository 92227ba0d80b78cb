"""What a mass edit is asked to do, besides the hyper-parameters: mode, data, selection, guard, screen."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import check_seed_size, require, typed
from easyeditor.values.collapse import SMALL_DENOMINATOR

T = TypeVar("T")

TYPED = "(typed)"
"""The name in place of the dataset of a run whose requests were typed (`single_case_edit.py --interactive`)."""

Mode = Literal["single", "sequential", "batch"]
Guard = Literal["keep", "revert", "remedy", "rollback"]
Order = Literal["as-is", "random", "clustered"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of one run; written to its `config.json` under `run`."""

    data: str
    """Dataset: a file, a folder, or a Hugging Face name."""
    mode: Mode = "single"
    """`single`: each edit on the original model; `sequential`: edits stay; `batch`: `batch_size` at once, they stay."""
    batch_size: int = 1
    """Requests in one edit (mode `batch`)."""
    eval_every: int = 0
    """Edits between two evaluations of all edits so far; 0: at the end only (not in mode `single`)."""
    stop_on_collapse: bool = False
    """End after the first edit that collapses the model and stays in it, or was rolled back (not in mode `single`)."""
    sample: str | None = None
    """File of record numbers, `FILE.json[:NAME]`: those are used, in its order; null for all."""
    start: int = 0
    """First record used."""
    limit: int | None = None
    """Most records used; null for all."""
    shuffle: bool = False
    """Shuffle the records by `seed` before `start` and `limit` choose."""
    seed: int = 0
    """Seed of the shuffle; contexts and test prefixes have the hyper-parameters' `seed`."""
    order: Order = "as-is"
    """Order of the records that were chosen: as they are, drawn, or drawn and then those together whose prompts have
    the same words around the subject (of CounterFact: one sentence of a relation)."""
    order_seed: int = 0
    """Seed of the order `random` or `clustered`; it changes no choice of records."""
    skip_bad: bool = False
    """Leave bad records out instead of refusing the dataset."""
    screen: bool = False
    """Compute denominators only."""
    screen_threshold: float = SMALL_DENOMINATOR
    """|denominator| below which a collapse is predicted."""
    on_collapse: Guard = "keep"
    """Leave a collapsing edit, take it back, or take it back and do it again with the method's remedy; `rollback` goes
    back to the last step whose perplexity stood and records which (not in mode `single`)."""
    metrics: list[str] = dataclasses.field(default_factory=list)
    """Metrics or groups of the registry, measured around every edit besides EasyEdit's."""
    together: int | Literal["auto"] = "auto"
    """Edits computed together in mode `single` (the numbers are those of one at a time); `auto`: 8 on a CPU, on a GPU
    twice what a batch of value searches holds. The manifest has the number."""
    measure: Literal["auto", "together", "alone"] = "auto"
    """Whether the edited models of such a group share forwards where their deltas are of low rank (equal up to float32
    rounding); `auto`: not on a CPU."""

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> RunSettings:
        """Checked settings from plain values. Raises ConfigError."""
        settings = typed(RunSettings, values, where)
        settings.validate(where)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        return dataclasses.asdict(self)

    def validate(self, where: str) -> None:
        """Cross-checks between settings. Raises ConfigError."""
        check_seed_size(self.seed, where)
        check_seed_size(self.order_seed, where)
        require(self.batch_size > 0, where, "batch_size", self.batch_size, "1 or more")
        require(self.eval_every >= 0, where, "eval_every", self.eval_every, "0 or more")
        require(self.start >= 0, where, "start", self.start, "0 or more")
        require(self.limit is None or self.limit > 0, where, "limit", self.limit, "1 or more")
        together = self.together
        require(together == "auto" or together > 0, where, "together", together, "1 or more, or auto")
        require(
            0 < self.screen_threshold < math.inf, where, "screen_threshold", self.screen_threshold, "a number above 0"
        )
        if self.mode != "batch" and self.batch_size != 1:
            raise ConfigError(
                f"{where}: batch_size is {self.batch_size} with mode {self.mode}; it belongs to mode batch"
            )
        if self.order == "as-is" and self.order_seed:
            raise ConfigError(
                f"{where}: order_seed is {self.order_seed} with order as-is; it belongs to random, clustered"
            )
        if self.mode == "single" and self.on_collapse == "rollback":
            raise ConfigError(
                f"{where}: on_collapse rollback with mode single, where every edit is on the original model; use revert"
            )
        if self.mode == "single" and (self.eval_every or self.stop_on_collapse):
            given = "eval_every" if self.eval_every else "stop_on_collapse"
            raise ConfigError(f"{where}: {given} is set with mode single, where no edit stays in the model; drop it")

    def select(self, items: Sequence[T]) -> list[T]:
        """The items chosen, in the order they are edited. Raises ConfigError when none is left."""
        order = list(range(len(items)))
        if self.shuffle:
            random.Random(self.seed).shuffle(order)
        chosen = order[self.start :] if self.limit is None else order[self.start : self.start + self.limit]
        if not chosen:
            raise ConfigError(f"start is {self.start}, but {self.data} has {len(items)} usable records")
        return [items[i] for i in chosen]
