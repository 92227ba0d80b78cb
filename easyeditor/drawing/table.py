"""A table: a list of columns, each with its title, how its cells are shown and how they are read of an item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Column:
    """`kind` is how a cell is shown: "" by its value (a text on one line, a number with four digits), text (whole, on
    several lines if need be), right (a text at the right, whole), count, number, perplexity, percent (stored as a share
    of 1) or seconds.

    `read` takes the cell of an item; None: the item is a row, and has the cell in the column's place.
    """

    title: str
    kind: str = ""
    read: Read | None = None


Spec = Column | str | tuple[Any, ...]
"""A column, or its title, kind and `read`; the last two may be left out."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as values. None is "not known"; infinity is "not finite". `name` is its file name without ending.

    A terminal shows the first `longest` rows (None: all, 0: no table) of the columns titled in `brief` (None: all).
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    longest: int | None = None
    brief: Sequence[str] | None = None

    @classmethod
    def of(cls, name: str, title: str, columns: Iterable[Spec], items: Iterable[Any], **rest: Any) -> Self:
        """A row for each item, read by the columns; `rest` are the other fields."""
        made = tuple(_column(spec) for spec in columns)
        rows = tuple(
            tuple(item[n] if column.read is None else column.read(item) for n, column in enumerate(made))
            for item in items
        )
        return cls(name=name, title=title, columns=made, rows=rows, **rest)

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [
            any(isinstance(row[n], (int, float)) for row in self.rows) if not column.kind else column.kind != "text"
            for n, column in enumerate(self.columns)
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """A mapping for each row."""
        return [dict(zip((column.title for column in self.columns), row, strict=True)) for row in self.rows]


def _column(spec: Spec) -> Column:
    return spec if isinstance(spec, Column) else Column(spec) if isinstance(spec, str) else Column(*spec)
