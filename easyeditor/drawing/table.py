"""A table as values: columns with their kinds, rows, a note."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: `kind` is text, count, number, perplexity, percent (stored as a share of 1) or seconds."""

    title: str
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as values. None is "not known"; infinity is "not finite". `name` is its file name without ending."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
