"""What a run's journal comes to: counts, the collapsed, mean metrics, time and its split, the screen's quality.

Reads the journal line by line; only numbers are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.base.files import read_json
from easyeditor.evaluate.registry import METRICS, harmonic_mean
from easyeditor.results.forecast import forecast, points_of
from easyeditor.results.lines import PARTS, EditLine, EvaluationLine, RunLine, ScreenLine
from easyeditor.results.run import CONFIG, MANIFEST, run_lines
from easyeditor.runs.manifest import read_manifest
from easyeditor.values.collapse import prediction_quality
from easyeditor.values.plain import mean


def summarise(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, as `summary.json` holds it."""
    config, manifest = read_json(folder / CONFIG), read_manifest(folder / MANIFEST)
    tally = Tally()
    for line in run_lines(folder):
        tally.add(line)
    return tally.to_json(config, manifest)


class Tally:
    """Sums over journal lines."""

    def __init__(self) -> None:
        self._counts = {"edits": 0, "failed": 0, "collapsed": 0, "screened": 0, "evaluations": 0}
        self._guard: dict[str, int] = {}
        self._collapsed: list[dict[str, Any]] = []
        self._metrics: dict[str, list[tuple[float | None, float | None]]] = {}
        self._seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "total")}
        self._ppl: list[float] = []
        self._pairs: list[tuple[float, bool]] = []  # |denominator|, collapsed
        self._screened: list[ScreenLine] = []
        self._before: float | None = None
        self._bos = False
        self._points: list[tuple[int, float]] = []  # of the forecast
        self._limit: float | None = None
        self._last: EvaluationLine | None = None

    def add(self, line: RunLine) -> None:
        """Count one line."""
        if isinstance(line, EditLine):
            self._add_edit(line)
        elif isinstance(line, ScreenLine):
            self._counts["screened"] += 1
            self._screened.append(line)
        elif isinstance(line, EvaluationLine):
            self._counts["evaluations"] += 1
            if self._last is None or line.after > self._last.after:
                self._last = line
        else:
            self._counts["failed"] += 1

    def _add_edit(self, line: EditLine) -> None:
        record = line.record
        self._counts["edits"] += 1
        self._points += points_of([line])
        if record.collapse is not None and self._limit is None:
            self._limit = record.collapse.limit
        for name, values in self._seconds.items():
            values.append(line.seconds[name])
        for name, pair in record.values().items():
            self._metrics.setdefault(name, []).append(pair)
        action = None if line.guard is None else line.guard.action
        if action is not None:
            self._guard[action] = self._guard.get(action, 0) + 1
        if record.post.ppl is None:
            return
        if self._before is None:
            self._before, self._bos = record.pre.ppl, record.bos
        self._ppl.append(record.post.ppl)
        if record.denominator is not None:
            self._pairs.append((abs(record.denominator), bool(record.collapsed)))
        if record.collapsed:
            self._counts["collapsed"] += 1
            self._collapsed.append(
                {
                    "index": line.index,
                    "step": line.step,
                    "case_id": line.request.case_id,
                    "prompt": line.request.prompt,
                    "target_new": line.request.target_new,
                    "ppl": record.post.ppl,
                    "denominator": record.denominator,
                    "guard": action,
                }
            )

    def to_json(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The summary."""
        run = config["run"]
        total = sum(self._seconds["total"])
        edits = self._counts["edits"]
        recorded_now = self._counts["screened"] if run["screen"] else edits + self._counts["failed"]
        single = run["mode"] == "single"
        order = sorted(self._collapsed, key=(lambda c: -c["ppl"]) if single else (lambda c: c["step"]))
        screened = sorted(self._screened, key=lambda line: abs(line.denominator))
        return {
            "method": manifest["method"],
            "model": config["hparams"]["model_name"],
            "data": run["data"],
            "format": manifest["data"]["format"],
            "mode": "screen" if run["screen"] else run["mode"],
            "counts": {"selected": manifest["selected"], **self._counts, "bad_records": len(manifest["data"]["bad"])},
            "complete": recorded_now >= manifest["selected"],
            "collapsed": order,
            "ppl": self._perplexity(),
            "metrics": self.means(),
            "seconds": {name: sum(values) for name, values in self._seconds.items()} if edits else None,
            "seconds_per_edit": {n: statistics.median(v) for n, v in self._seconds.items()} if edits else None,
            "edits_per_second": edits / total if total else None,
            "screen": self._screen(run["screen_threshold"], screened) if single else None,
            "guard": {"policy": run["on_collapse"], "actions": self._guard},
            "last_evaluation": self._evaluation(),
            "forecast": None if single else self._forecast(),
        }

    def _forecast(self) -> dict[str, Any] | None:
        told = None if self._limit is None else forecast(sorted(self._points), self._limit)
        return None if told is None else told.to_json()

    def means(self) -> dict[str, Any]:
        """Means over the edits that have a value; the one made of others (S) from their means."""
        found = {name: _means(pairs) for name, pairs in sorted(self._metrics.items())}
        for metric in METRICS.values():
            parts = [found[name] for name in metric.harmonic if name in found]
            if parts and len(parts) == len(metric.harmonic):
                means = {when: harmonic_mean([part[when] for part in parts]) for when in ("before", "after")}
                found[metric.name] = {**means, "edits": min(part["edits"] for part in parts)}
        return found

    def _perplexity(self) -> dict[str, Any] | None:
        if not self._ppl:
            return None
        found = {"before": self._before, "median": statistics.median(self._ppl), "max": max(self._ppl)}
        return {**found, "bos": self._bos}

    def _screen(self, threshold: float, screened: list[ScreenLine]) -> dict[str, Any] | None:
        """The ranking of a screen; or, for edits with a denominator, how well it predicted their collapse."""
        if screened:
            predicted = sum(line.prediction for line in screened)
            lowest = [_without_kind(line) for line in screened[: max(20, predicted)]]
            return {"threshold": threshold, "predicted": predicted, "lowest": lowest}
        return {"threshold": threshold, **quality(self._pairs, threshold)} if self._pairs else None

    def _evaluation(self) -> dict[str, Any] | None:
        if self._last is None:
            return None
        last = self._last
        made = {"after": last.after, "ppl": last.ppl, "collapsed": last.collapsed, "edits": len(last.retention)}
        return made | last.means()


def quality(pairs: Iterable[tuple[float, bool]], threshold: float) -> dict[str, Any]:
    """Precision and recall of "|denominator| below `threshold`" as a prediction of (|denominator|, collapsed) pairs.

    Null where there is nothing to divide by: no prediction, or no collapse.
    """
    found = prediction_quality((size < threshold, collapsed) for size, collapsed in pairs)
    return {
        "predicted": found.predicted,
        "true_positive": found.both,
        "false_positive": found.predicted - found.both,
        "false_negative": found.happened - found.both,
        "true_negative": found.pairs - found.predicted - found.happened + found.both,
        "precision": found.precision,
        "recall": found.recall,
    }


def _without_kind(line: ScreenLine) -> dict[str, Any]:
    return {key: value for key, value in line.to_json().items() if key != "kind"}


def _means(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    return {"before": mean(b for b, _ in pairs), "after": mean(a for _, a in pairs), "edits": len(pairs)}
