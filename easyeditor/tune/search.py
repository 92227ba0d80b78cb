"""Which settings are tried: layers from two curves, then one number after another, always from the best so far."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from easyeditor.analysis.safety import LayerSafety
from easyeditor.base.hparams import field_types
from easyeditor.tune.start import SWITCH, Settings, Start
from easyeditor.tune.trials import METRICS, summed

KNOBS: dict[str, tuple[float, float]] = {
    "clamp_norm_factor": (2.0, 0.5),
    "v_weight_decay": (0.1, 10.0),
    "v_lr": (2.0, 0.5),
    "mom2_update_weight": (0.5, 2.0),
    "lr": (2.0, 0.5),
    "kl_factor": (0.25, 4.0),
}
"""Hyper-parameters that are searched where a method has them, and by what the best value so far is multiplied: for a
bolder edit, and for a gentler one."""
TAKES = 0.95  # rewrite accuracy below which settings rank lower, however much they leave in place
MATTERS = 0.5  # share of the greatest effect from which on a layer's effect counts as large

Array = np.ndarray[Any, np.dtype[Any]]
Line = dict[str, Any]
Try = Callable[[Settings, "Line | None"], "Line | None"]
"""Runs a trial against the best so far; None when there is no more time."""


def knobs_of(cls: type) -> list[str]:
    """The numbers of a method that are searched for."""
    known = field_types(cls)
    return [knob for knob in (*KNOBS, SWITCH) if knob in known]


def candidates(effects: Array | None, safety: Sequence[LayerSafety], allowed: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of the `allowed` layers to begin with.

    With effects: the layer of the greatest one, then those with at least half of it, safest first, then the others by
    effect. Without: evenly over the lower two thirds, safest first.
    """
    danger = {one.layer: abs(math.log10(max(one.reach, 1e-12))) for one in safety}
    if effects is None:
        last = max(0, 2 * (len(allowed) + 1) // 3 - 1)
        spread = np.unique(np.linspace(0, last, wanted).round().astype(int)).tolist()
        return sorted((allowed[n] for n in spread), key=lambda layer: danger.get(layer, 0.0))
    by_effect = sorted(allowed, key=lambda layer: -effects[layer])
    peak = effects[by_effect[0]]
    large = [layer for layer in by_effect[1:] if effects[layer] >= MATTERS * peak]
    order = [by_effect[0], *sorted(large, key=lambda layer: danger.get(layer, 0.0))]
    return [*order, *(layer for layer in by_effect if layer not in order)][:wanted]


def name_of(settings: Mapping[str, Any]) -> str:
    """One text for equal settings."""
    return json.dumps(dict(sorted(settings.items())))


def rank(line: Line, most_ratio: float) -> tuple[bool, bool, bool, float, float]:
    """What a better trial has more of: all its facts edited, perplexity within the bound, edits that take, score for
    each time the worst perplexity grew, low perplexity."""
    ratio = math.inf if line["ppl_ratio"] is None else line["ppl_ratio"]
    score = (line["score"] or 0.0) / max(1.0, ratio)
    return ("left_after" not in line, ratio <= most_ratio, (line["rewrite_acc"] or 0.0) >= TAKES, score, -ratio)


def best_of(lines: Sequence[Line], most_ratio: float) -> Line:
    """The best trial; the earlier of two equal ones."""
    return max(lines, key=lambda line: rank(line, most_ratio))


def lost(line: Line, best: Line, most_ratio: float) -> bool:
    """Has a trial that edited some of its facts fallen behind the best one? Beyond the bound it only gets further; else
    both are compared on the same facts."""
    same = summed(best["rows"][: line["requests"]])
    return rank(line, most_ratio)[1:4] < (rank(best, most_ratio)[1], *rank(same, most_ratio)[2:4])


def search(start: Start, first: Settings, layers: Sequence[int], tried: Try, most_ratio: float) -> list[Line]:
    """All trials: `first`, it with statistics of keys, the best of these at each of `layers`, then changes of the best
    so far until none helps or `tried` says time is up."""
    lines: list[Line] = []
    seen: set[str] = set()

    def best() -> Line:
        return best_of(lines, most_ratio)

    def run(settings: Settings) -> bool:
        """Try settings that were not tried yet; False when time is up."""
        if name_of(settings) in seen:
            return True
        seen.add(name_of(settings))
        line = tried(settings, best() if lines else None)
        if line is not None:
            lines.append(line)
        return line is not None

    run(first)
    if first.get(SWITCH) is False and not run({**first, SWITCH: True}):
        return lines
    for layer in layers:
        if not run({**best()["settings"], "layers": start.layers(layer)}):
            return lines
    while True:
        before = best()
        for change in changes(start):
            now = best()
            for settings in change(now["settings"], gentler(now, most_ratio)):
                if not run(settings):
                    return lines
                if best() is not now:
                    break
        if best() is before:
            return lines


def gentler(line: Line, most_ratio: float) -> bool:
    """Is a gentler edit worth trying first? Where perplexity is beyond the bound, or locality is what lacks most."""
    accuracies = {name: line[name] for name in METRICS if line.get(name) is not None}
    return not rank(line, most_ratio)[1] or min(accuracies, key=accuracies.__getitem__, default="") == "locality_acc"


def changes(start: Start) -> Iterator[Callable[[Settings, bool], list[Settings]]]:
    """One change after another: each number up and down, the gentler first or last, then the layers one up and down."""
    for knob, factors in KNOBS.items():

        def scaled(
            best: Settings, gentle: bool, knob: str = knob, factors: tuple[float, float] = factors
        ) -> list[Settings]:
            value = best.get(knob)
            made = [{**best, knob: float(f"{value * factor:.4g}")} for factor in factors] if value else []
            return made[::-1] if gentle else made

        yield scaled

    def moved(best: Settings, gentle: bool) -> list[Settings]:
        last = best["layers"][-1]
        above, below = [n for n in start.allowed if n > last], [n for n in start.allowed if n < last]
        return [{**best, "layers": start.layers(end)} for end in (*above[:1], *below[-1:])]

    yield moved


def chosen(lines: Sequence[Line], checked: Callable[[Line], Line], most_ratio: float, most: int) -> tuple[Line, Line]:
    """The trial that is taken with what other facts said of it: going down from the best, the first one that keeps
    perplexity within the bound on those too; of `most` that do not, the best over both."""
    order = sorted(lines, key=lambda line: rank(line, most_ratio), reverse=True)
    found: list[tuple[Line, Line]] = []
    for line in [line for line in order if "left_after" not in line][:most]:
        found.append((line, checked(line)))
        if rank(_both(*found[-1]), most_ratio)[1]:
            return found[-1]
    return max(found, key=lambda pair: rank(_both(*pair), most_ratio))


def _both(line: Line, check: Line) -> Line:
    return summed([*line["rows"], *check["rows"]]) if check["score"] is not None else check
