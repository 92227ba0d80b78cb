"""The lines of a run's journal as typed, frozen values: one class for each `kind`, `line_of` for any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.results.watched import Watched
from easyeditor.values.plain import Flat, flag, integer, known, mean, perplexity, text
from easyeditor.values.record import EditRecord
from easyeditor.values.request import EditRequest

PARTS = ("edit", "metrics", "perplexity")
"""What a record's `seconds` are spent on; `total` is their sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What was done about a collapse: `action` as the run was told; `kept`: is an edit kept? `settings`, `seconds`
    and `record` belong to an edit done again with the method's remedy, `error` to one that could not be, `back_to` to a
    rollback: the step of the last edit in the model that is kept (0: the original model)."""

    action: str
    kept: bool
    settings: str | None = None
    seconds: Mapping[str, float] | None = None
    record: EditRecord | None = None
    error: str | None = None
    back_to: int | None = None

    @property
    def words(self) -> str:
        """What was done, for a table."""
        if not self.kept:
            return f"{self.action}: taken back" + (f" to step {self.back_to}" if self.back_to is not None else "")
        return self.action if self.record is None else f"{self.action}: done again, kept"

    def to_json(self) -> dict[str, Any]:
        """The `guard` entry of a line."""
        redone = None if self.record is None else self.record.to_json(whole=False)
        seconds = None if self.seconds is None else dict(self.seconds)
        every = {"settings": self.settings, "kept": self.kept, "seconds": seconds, "record": redone}
        told = {"action": self.action, **every, "error": self.error, "back_to": self.back_to}
        return {name: value for name, value in told.items() if value is not None}

    @staticmethod
    def from_json(raw: Mapping[str, Any], request: EditRequest) -> Guard:
        """Inverse of `to_json`."""
        redone = raw.get("record")
        return Guard(
            action=text(raw["action"]),
            kept=flag(raw["kept"]),
            settings=raw.get("settings"),
            seconds=raw.get("seconds"),
            record=None if redone is None else EditRecord.from_json(redone, request),
            error=raw.get("error"),
            back_to=None if raw.get("back_to") is None else integer(raw["back_to"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EditLine:
    """One edit of a run: its record, its place in the dataset (`index`) and in the run (`step`, from 1), its time (s)
    by part, the guard's action, the norm of its update by weight, the hash of the saved edit if it stays in the model,
    and what a sequence watches, on the last line of each step."""

    record: EditRecord
    index: int
    step: int
    mode: str
    seconds: Mapping[str, float]
    guard: Guard | None = None
    delta: Mapping[str, float] = field(default_factory=dict)
    saved_sha256: str | None = None
    watched: Watched | None = None

    @property
    def request(self) -> EditRequest:
        """What was asked."""
        return self.record.request

    @property
    def kept(self) -> bool:
        """Is the edit in the model (or would be, were edits kept)?"""
        return self.guard is None or self.guard.kept

    @property
    def kept_record(self) -> EditRecord:
        """The record of the edit that is kept: what the guard redid counts in place of the first."""
        redone = None if self.guard is None else self.guard.record
        return self.record if redone is None else redone

    @property
    def left_ppl(self) -> float | None:
        """Perplexity of the model that the next edit begins with; None: taken back, or not measured."""
        return self.kept_record.post.ppl if self.kept else None

    def without_details(self, *, outputs: bool = False) -> EditLine:
        """As `EditRecord.without_details`."""
        guard = self.guard
        if guard is not None and guard.record is not None:
            guard = replace(guard, record=guard.record.without_details(outputs=outputs))
        return replace(self, record=self.record.without_details(outputs=outputs), guard=guard)

    def to_json(self) -> dict[str, Any]:
        """The line."""
        return {
            **self.record.to_json(),
            "kind": "edit",
            "index": self.index,
            "step": self.step,
            "mode": self.mode,
            "seconds": dict(self.seconds),
            "guard": None if self.guard is None else self.guard.to_json(),
            "delta": dict(self.delta),
            "saved_sha256": self.saved_sha256,
            **({} if self.watched is None else {"watched": self.watched.to_json()}),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> EditLine:
        """Inverse of `to_json`."""
        record = EditRecord.from_json(raw)
        return EditLine(
            record=record,
            index=integer(raw["index"]),
            step=integer(raw["step"]),
            mode=text(raw["mode"]),
            seconds={part: known(raw["seconds"][part]) for part in (*PARTS, "total")},
            guard=None if raw["guard"] is None else Guard.from_json(raw["guard"], record.request),
            delta={name: known(norm) for name, norm in raw["delta"].items()},
            saved_sha256=raw["saved_sha256"],
            watched=None if raw.get("watched") is None else Watched.from_json(raw["watched"]),
        )


@dataclass(frozen=True, kw_only=True)
class Retention(Flat):
    """How one earlier edit fares now: mean accuracies, None where the request has no such prompts; locality against
    the original model, and against the model just before that edit."""

    index: int
    case_id: Any
    rewrite_acc: float | None
    rephrase_acc: float | None
    locality_acc: float | None
    locality_just_before_acc: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """An entry of `retention`; `metrics` only where some were asked for."""
        return {key: value for key, value in super().to_json().items() if key != "metrics" or value}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationLine:
    """The model after `after` edits: perplexity, verdict, and how each edit in it still holds."""

    after: int
    ppl: float | None
    collapsed: bool | None
    retention: tuple[Retention, ...]

    @property
    def index(self) -> int:
        """Place of the last edit made before it."""
        return self.after - 1

    def means(self) -> dict[str, float | None]:
        """Mean accuracies over the edits in the model, and means of the registry's metrics if some were asked for."""
        names = dict.fromkeys(name for row in self.retention for name in row.metrics)
        return {
            "rewrite_acc": mean(row.rewrite_acc for row in self.retention),
            "rephrase_acc": mean(row.rephrase_acc for row in self.retention),
            "locality_acc": mean(row.locality_acc for row in self.retention),
            **{name: mean(row.metrics.get(name) for row in self.retention) for name in names},
        }

    def to_json(self) -> dict[str, Any]:
        """The line."""
        told = {"after": self.after, "ppl": self.ppl, "collapsed": self.collapsed}
        return {"kind": "evaluation", "index": self.index, **told, "retention": [r.to_json() for r in self.retention]}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> EvaluationLine:
        """Inverse of `to_json`."""
        collapsed = None if raw["collapsed"] is None else flag(raw["collapsed"])
        return EvaluationLine(
            after=integer(raw["after"]),
            ppl=perplexity(raw["ppl"], measured=collapsed is not None),
            collapsed=collapsed,
            retention=tuple(map(Retention.from_json, raw["retention"])),
        )


@dataclass(frozen=True, kw_only=True)
class ScreenLine(Flat):
    """One request's denominator, computed without an edit, and whether it foretells a collapse."""

    KIND = "screen"
    index: int
    case_id: Any
    subject: str
    prompt: str
    denominator: float
    prediction: bool


@dataclass(frozen=True, kw_only=True)
class FailureLine(Flat):
    """A request that has no edit, and why."""

    KIND = "failed"
    index: int
    step: int
    case_id: Any
    prompt: str
    mode: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLine:
    """One line of a training log: a `validation` or the updates since the line before, and its numbers by name."""

    validation: bool
    step: int
    values: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The line."""
        return {"kind": "validation" if self.validation else "train", "step": self.step, **self.values}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> TrainingLine:
        """Inverse of `to_json`; numbers that were not finite are NaN, what is no number is left out."""
        named = {key: value for key, value in raw.items() if key not in ("kind", "step")}
        values = {key: known(value) for key, value in named.items() if not isinstance(value, (bool, dict, list))}
        return TrainingLine(validation=raw["kind"] == "validation", step=integer(raw["step"]), values=values)


RunLine = EditLine | EvaluationLine | ScreenLine | FailureLine
"""What a mass edit writes."""
Line = RunLine | TrainingLine

KINDS: dict[str, Callable[[Mapping[str, Any]], Line]] = {
    "edit": EditLine.from_json,
    "evaluation": EvaluationLine.from_json,
    "screen": ScreenLine.from_json,
    "failed": FailureLine.from_json,
    "train": TrainingLine.from_json,
    "validation": TrainingLine.from_json,
}


def line_of(raw: Mapping[str, Any], where: str) -> Line | None:
    """The typed value of one line; None for a kind that is not known. Raises DataError naming the place."""
    kind = raw.get("kind")
    if not isinstance(kind, str):
        raise DataError(f"{where}: no 'kind' in this line, so it is not a line of a run's journal")
    if kind not in KINDS:
        return None
    return checked(KINDS[kind], raw, where, f"a whole {kind} record")


def checked(parse: Callable[[Mapping[str, Any]], Any], raw: Mapping[str, Any], where: str, what: str) -> Any:
    """`parse(raw)`. Raises DataError naming the place where it is not `what`."""
    try:
        return parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, DataError) as error:
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: not {what} ({reason})") from error
