"""A table as values: columns with their kinds, rows, a note."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: `kind` is text, count, number, perplexity, percent (stored as a share of 1) or seconds."""

    title: str
    kind: str = "text"


class Estimate(float):
    """A number with the interval it is known to, shown with it; in a CSV file it takes three columns."""

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> Estimate:
        made = super().__new__(cls, value)
        made.low, made.high = low, high
        return made


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as values. None is "not known"; infinity is "not finite". `name` is its file name without ending."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
