"""Lines of a run's journal as typed values: edits, evaluations, screened requests, training steps.

A perplexity is None when it was not measured and infinity when it was not finite: JSON has neither NaN nor infinity,
so records hold null with `finite: false` beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easyeditor.errors import DataError
from easyeditor.files import parse_json

Floats = NDArray[np.float64]

PARTS = ("edit", "metrics", "perplexity", "total")
"""The entries of a record's `seconds`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """What the report needs of one edit. Accuracies are means over the request's prompts, None where it has none.

    `denominator` is the one of smallest size over the edited layers; `layer` and `numerator` belong to it. `guard` says
    what was done about a collapse; `left_ppl` is the perplexity of the model that went on from here, None when the edit
    was taken back or nothing was measured.
    """

    index: int
    step: int
    mode: str
    case_id: str
    prompt: str
    subject: str
    target_new: str
    method: str
    ppl_before: float | None
    ppl: float | None
    collapsed: bool | None
    limit: float | None
    layer: str | None
    numerator: float | None
    denominator: float | None
    value_growth: float | None
    rewrite: float | None
    rephrase: float | None
    locality: float | None
    seconds: Mapping[str, float]
    guard: str
    left_ppl: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The model after `after` edits: perplexity, and how each edit so far still holds (arrays of one length, NaN
    where a request has no such prompt)."""

    after: int
    ppl: float | None
    collapsed: bool | None
    indexes: NDArray[np.int64]
    rewrite: Floats
    rephrase: Floats
    locality: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Screened:
    """One request's denominator, computed without an edit, and whether it foretells a collapse."""

    index: int
    case_id: str
    subject: str
    denominator: float | None
    prediction: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """One line of a training log: `validation` or training, and its numbers by name (non-finite as NaN)."""

    validation: bool
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A request that has no edit, and why."""

    index: int
    case_id: str
    error: str


Line = Edit | Evaluation | Screened | TrainingStep | Failed


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSONL file. A torn last line is dropped and noted.

    Raises:
        DataError: the file cannot be read, or a line before the last is not a JSON object.
    """
    try:
        with open(path, "rb") as source:
            held: tuple[int, bytes] | None = None
            for number, line in enumerate(source, 1):
                if not line.strip():
                    continue
                if held is not None:
                    yield _object(path, *held)
                held = (number, line)
            if held is None:
                return
            try:
                last = _object(path, *held)
            except DataError as error:
                notes.append(f"{error}; it is the last line, torn when the run was killed, and is left out")
                return
            yield last
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _object(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    where = f"{path}, line {number}"
    try:
        value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at character {error.pos + 1})") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return where, value


def parse_line(raw: Mapping[str, Any], where: str) -> Line | None:
    """The typed value of one line; None for a kind the report does not know. Raises DataError naming the place."""
    kind = raw.get("kind")
    if not isinstance(kind, str):
        raise DataError(f"{where}: no 'kind' in this line, so it is not a line of a run's journal")
    if kind not in PARSERS:
        return None
    try:
        return PARSERS[kind](raw)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{where}: not a whole {kind} record ({type(error).__name__}: {error})") from error


def edit_of(raw: Mapping[str, Any]) -> Edit:
    """One edit's record, of a journal or of a `result.json` (which has no index and no step)."""
    request, post, collapse = raw["requested_rewrite"], raw["post"], raw["collapse"]
    layer, trace = _telling_layer(raw.get("trace") or {})
    before, after = number(trace.get("value_norm_before")), number(trace.get("value_norm_after"))
    locality = [value for key, values in post["locality"].items() if key.endswith("_acc") for value in values]
    seconds = raw.get("seconds") or {"edit": raw["time"]}
    ppl = _perplexity(post["ppl"], measured=collapse is not None)
    guard, left_ppl = _guard(raw.get("guard"), ppl)
    return Edit(
        index=int(raw.get("index", 0)),
        step=int(raw.get("step", 1)),
        mode=str(raw.get("mode", "single")),
        case_id=str(raw["case_id"]),
        prompt=str(request["prompt"]),
        subject=str(request["subject"]),
        target_new=str(request["target_new"]),
        method=str(raw["method"]),
        ppl_before=_perplexity(raw["pre"].get("ppl"), measured=collapse is not None),
        ppl=ppl,
        collapsed=None if collapse is None else bool(collapse["collapsed"]),
        limit=None if collapse is None else number(collapse["limit"]),
        layer=layer,
        numerator=number(trace.get("numerator_norm")),
        denominator=number(trace.get("denominator")),
        value_growth=after / before if before and after is not None else None,
        rewrite=_mean(post["rewrite_acc"]),
        rephrase=_mean(post.get("rephrase_acc")),
        locality=_mean(locality),
        seconds={part: float(seconds[part]) for part in PARTS if seconds.get(part) is not None},
        guard=guard,
        left_ppl=left_ppl,
    )


def number(value: Any) -> float | None:
    """A number of a record, or None. Texts such as "inf" and "NaN" count; anything else raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)


def _guard(guard: Mapping[str, Any] | None, ppl: float | None) -> tuple[str, float | None]:
    """What the guard did, in words, and the perplexity of the model that went on; `ppl` is the edit's own."""
    if not guard:
        return "", ppl
    action = str(guard["action"])
    if not guard.get("kept", action == "keep"):
        return f"{action}: taken back", None
    again = guard.get("record")
    if again is None:
        return action, ppl
    left = _perplexity(again["post"]["ppl"], measured=again["collapse"] is not None)
    return f"{action}: done again, stands", left


def _perplexity(value: Any, *, measured: bool) -> float | None:
    found = number(value)
    if found is None:
        return math.inf if measured else None
    return found if math.isfinite(found) else math.inf


def _telling_layer(trace: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, Mapping[str, Any]]:
    """The layer with the smallest |denominator|; where there is none, the one with the largest numerator."""
    if not trace:
        return None, {}

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[float, float]:
        denominator, numerator = number(item[1].get("denominator")), number(item[1].get("numerator_norm"))
        return math.inf if denominator is None else abs(denominator), -(numerator or 0.0)

    return min(trace.items(), key=order)


def _mean(values: Any) -> float | None:
    """Mean of a list of accuracies, or the number itself; None for nothing."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        known = [found for found in map(number, values) if found is not None]
        return math.fsum(known) / len(known) if known else None
    return number(values)


def _evaluation(raw: Mapping[str, Any]) -> Evaluation:
    retention, collapsed = raw["retention"], raw["collapsed"]

    def column(key: str) -> Floats:
        values = [_mean(row.get(key)) for row in retention]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    return Evaluation(
        after=int(raw["after"]),
        ppl=_perplexity(raw["ppl"], measured=bool(collapsed)),
        collapsed=None if collapsed is None else bool(collapsed),
        indexes=np.array([int(row["index"]) for row in retention], dtype=np.int64),
        rewrite=column("rewrite_acc"),
        rephrase=column("rephrase_acc"),
        locality=column("locality_acc"),
    )


def _screened(raw: Mapping[str, Any]) -> Screened:
    return Screened(
        index=int(raw["index"]),
        case_id=str(raw["case_id"]),
        subject=str(raw["subject"]),
        denominator=number(raw["denominator"]),
        prediction=bool(raw["prediction"]),
    )


def _training(raw: Mapping[str, Any]) -> TrainingStep:
    values = {}
    for key, value in raw.items():
        if key in ("kind", "step") or isinstance(value, (bool, dict, list)):
            continue
        if value is None:
            values[key] = math.nan
        elif isinstance(value, (int, float)) or value.lower().lstrip("-") in ("nan", "inf", "infinity"):
            values[key] = float(value)
    return TrainingStep(validation=raw["kind"] == "validation", step=int(raw["step"]), values=values)


def _failed(raw: Mapping[str, Any]) -> Failed:
    return Failed(index=int(raw["index"]), case_id=str(raw["case_id"]), error=" ".join(str(raw["error"]).split()))


PARSERS: dict[str, Callable[[Mapping[str, Any]], Line]] = {
    "edit": edit_of,
    "evaluation": _evaluation,
    "screen": _screened,
    "failed": _failed,
    "train": _training,
    "validation": _training,
}
"""What the report reads of each kind of line."""
