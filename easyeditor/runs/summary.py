"""What a run's journal comes to: counts, the collapsed, mean metrics, time and its split, the screen's quality.

Reads the journal line by line; only numbers are kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.evaluate.registry import METRICS, harmonic_mean
from easyeditor.files import read_json
from easyeditor.runs.shard import recorded

PARTS = ("edit", "metrics", "perplexity")


def summarise(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, as `summary.json` holds it."""
    config, manifest = read_json(folder / "config.json"), read_json(folder / "manifest.json")
    tally = Tally()
    for line in recorded(folder):
        tally.add(line)
    return tally.to_json(config, manifest)


class Tally:
    """Sums over journal lines."""

    def __init__(self) -> None:
        self._counts = {"edits": 0, "failed": 0, "collapsed": 0, "screened": 0, "evaluations": 0}
        self._guard: dict[str, int] = {}
        self._collapsed: list[dict[str, Any]] = []
        self._metrics: dict[str, list[tuple[float, float | None]]] = {}
        self._seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "total")}
        self._ppl: list[float] = []
        self._pairs: list[tuple[float, bool]] = []  # |denominator|, collapsed
        self._screened: list[dict[str, Any]] = []
        self._before: float | None = None
        self._last: Mapping[str, Any] | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line."""
        kind = line["kind"]
        if kind == "edit":
            self._add_edit(line)
        elif kind == "screen":
            self._counts["screened"] += 1
            keys = ("index", "case_id", "subject", "prompt", "denominator", "prediction")
            self._screened.append({key: line[key] for key in keys})
        elif kind == "evaluation":
            self._counts["evaluations"] += 1
            if self._last is None or line["after"] > self._last["after"]:
                self._last = line
        else:
            self._counts["failed"] += 1

    def _add_edit(self, line: Mapping[str, Any]) -> None:
        self._counts["edits"] += 1
        for name, values in self._seconds.items():
            values.append(line["seconds"][name])
        for name, pair in _metrics(line).items():
            self._metrics.setdefault(name, []).append(pair)
        if line["guard"] is not None:
            action = line["guard"]["action"]
            self._guard[action] = self._guard.get(action, 0) + 1
        denominator = smallest_denominator(line)
        collapse = line["collapse"]
        if collapse is None:
            return
        if line["step"] == 1:
            self._before = line["pre"]["ppl"]
        self._ppl.append(math.inf if line["post"]["ppl"] is None else line["post"]["ppl"])
        if denominator is not None:
            self._pairs.append((abs(denominator), collapse["collapsed"]))
        if collapse["collapsed"]:
            self._counts["collapsed"] += 1
            request = line["requested_rewrite"]
            self._collapsed.append(
                {
                    "index": line["index"],
                    "step": line["step"],
                    "case_id": line["case_id"],
                    "prompt": request["prompt"],
                    "target_new": request["target_new"],
                    "ppl": line["post"]["ppl"],
                    "denominator": denominator,
                    "guard": None if line["guard"] is None else line["guard"]["action"],
                }
            )

    def to_json(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The summary."""
        run = config["run"]
        total = sum(self._seconds["total"])
        edits = self._counts["edits"]
        recorded_now = self._counts["screened"] if run["screen"] else edits + self._counts["failed"]
        single = run["mode"] == "single"
        order = sorted(self._collapsed, key=(lambda c: -_size(c["ppl"])) if single else (lambda c: c["step"]))
        screened = sorted(self._screened, key=lambda s: abs(s["denominator"] or 0.0))
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
            "metrics": self._means(),
            "seconds": {name: sum(values) for name, values in self._seconds.items()} if edits else None,
            "seconds_per_edit": {n: statistics.median(v) for n, v in self._seconds.items()} if edits else None,
            "edits_per_second": edits / total if total else None,
            "screen": self._screen(run["screen_threshold"], screened) if single else None,
            "guard": {"policy": run["on_collapse"], "actions": self._guard},
            "last_evaluation": self._evaluation(),
        }

    def _means(self) -> dict[str, Any]:
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
        return {"before": self._before, "median": statistics.median(self._ppl), "max": max(self._ppl)}

    def _screen(self, threshold: float, screened: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The ranking of a screen; or, for edits with a denominator, how well it predicted their collapse."""
        if screened:
            predicted = [s for s in screened if s["prediction"]]
            return {"threshold": threshold, "predicted": len(predicted), "lowest": screened[: max(20, len(predicted))]}
        return {"threshold": threshold, **quality(self._pairs, threshold)} if self._pairs else None

    def _evaluation(self) -> dict[str, Any] | None:
        if self._last is None:
            return None
        kept = self._last["retention"]
        means = {key: _mean([r[key] for r in kept]) for key in ("rewrite_acc", "rephrase_acc", "locality_acc")}
        return {key: self._last[key] for key in ("after", "ppl", "collapsed")} | {"edits": len(kept)} | means


def quality(pairs: Iterable[tuple[float, bool]], threshold: float) -> dict[str, Any]:
    """Precision and recall of "|denominator| below `threshold`" as a prediction of (|denominator|, collapsed) pairs.

    Null where there is nothing to divide by: no prediction, or no collapse.
    """
    counts = {"true_positive": 0, "false_positive": 0, "false_negative": 0, "true_negative": 0}
    for size, collapsed in pairs:
        low = size < threshold
        counts[f"{'true' if low == collapsed else 'false'}_{'positive' if low else 'negative'}"] += 1
    right = counts["true_positive"]
    predicted, collapses = right + counts["false_positive"], right + counts["false_negative"]
    return {
        "predicted": predicted,
        **counts,
        "precision": right / predicted if predicted else None,
        "recall": right / collapses if collapses else None,
    }


def smallest_denominator(line: Mapping[str, Any]) -> float | None:
    """The denominator smallest in size over an edit's layers; None for a method that has none."""
    found = [t["denominator"] for t in line["trace"].values() if t.get("denominator") is not None]
    return min(found, key=abs) if found else None


def _metrics(line: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Name -> (after, before) of one edit; locality has no before: it is agreement with it."""
    pre, post = line["pre"], line["post"]
    found: dict[str, tuple[float, float | None]] = {}
    for key in ("rewrite_acc", "rephrase_acc"):
        if post.get(key):
            found[key] = (statistics.fmean(post[key]), statistics.fmean(pre[key]))
    for room in ("locality", "portability"):
        after = [v for key, values in post[room].items() if key.endswith("_acc") for v in values]
        before = [v for key, values in pre[room].items() if key.endswith("_acc") for v in values]
        if after:
            found[f"{room}_acc"] = (statistics.fmean(after), statistics.fmean(before) if before else None)
    chosen = line.get("metrics", {"before": {}, "after": {}})
    for name, value in chosen["after"].items():
        if value["value"] is not None:
            found[name] = (value["value"], chosen["before"][name]["value"])
    return found


def _means(pairs: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    before = [b for _, b in pairs if b is not None]
    return {"before": _mean(before), "after": _mean([a for a, _ in pairs]), "edits": len(pairs)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _size(value: float | None) -> float:
    return math.inf if value is None else value
