"""Numbers of a record read back: JSON has neither NaN nor infinity, so what was not finite is null there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self


def number(value: Any) -> float | None:
    """A number of a record, or None. Texts such as "inf" and "NaN" count; anything else raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)


def known(value: Any) -> float:
    """A number that was written; NaN where it was not finite."""
    found = number(value)
    return math.nan if found is None else found


def perplexity(value: Any, *, measured: bool) -> float | None:
    """A perplexity: None when it was not measured, infinity when it was not finite."""
    found = number(value)
    if found is None:
        return math.inf if measured else None
    return found if math.isfinite(found) else math.inf


def numbers(values: Any) -> tuple[float, ...]:
    """A list of numbers."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"expected a list of numbers, found {values!r}")
    return tuple(map(known, values))


def integer(value: Any) -> int:
    """A whole number from 0: a place, a step, a count; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number from 0, found {value!r}")
    return value


def text(value: Any) -> str:
    """A text; raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {value!r}")
    return value


def flag(value: Any) -> bool:
    """True or false; raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None when nothing is."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def mean_over_records(records: Iterable[Iterable[float | None]]) -> float | None:
    """The mean over records of the mean of each record's own values: a record counts once, however many prompts it
    has. Records without a known value are left out; None when there is no other."""
    return mean(mean(own) for own in records)


PARSERS: dict[str, Callable[[Any], Any]] = {
    "int": integer,
    "float": known,
    "float | None": number,
    "str": text,
    "bool": flag,
    "Any": lambda value: value,
    "tuple[str, ...]": lambda values: tuple(map(text, values)),
    "tuple[tuple[float, ...], ...]": lambda rows: tuple(map(numbers, rows)),
    "Mapping[str, float]": lambda raw: {name: known(value) for name, value in raw.items()},
    "Mapping[str, float | None]": lambda raw: {name: number(value) for name, value in raw.items()},
}
"""How a field of a `Flat` line is read, by its annotation."""


@dataclass(frozen=True, kw_only=True)
class Flat:
    """A value whose JSON has a key for each field, and no more; a field with a default may be missing there."""

    KIND: ClassVar[str | None] = None
    """The `kind` of a journal's line; None for a value inside one."""

    @classmethod
    def own(cls) -> tuple[Field[Any], ...]:
        """The fields that files hold."""
        return fields(cls)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        kind = {} if self.KIND is None else {"kind": self.KIND}
        return {**kind, **{f.name: getattr(self, f.name) for f in self.own()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises KeyError, TypeError, ValueError for what is no such value."""
        needed = [f for f in cls.own() if f.name in raw or (f.default is MISSING and f.default_factory is MISSING)]
        made: Any = cls
        return made(**{f.name: PARSERS[str(f.type)](raw[f.name]) for f in needed})


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One metric of one request; `value` is None where it cannot be had, and `reason` says why."""

    value: float | None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a reason and details only where there are some."""
        told = {"reason": self.reason} if self.reason is not None else {}
        return {"value": self.value, **told, **({"details": dict(self.details)} if self.details else {})}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Value:
        """Inverse of `to_json`."""
        return Value(value=number(raw["value"]), reason=raw.get("reason"), details=raw.get("details", {}))
