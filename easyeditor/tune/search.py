"""Which settings are tried: layers from two curves, then one number after another, always from the best so far."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from easyeditor.analysis.tools.safety import LayerSafety
from easyeditor.hparams import field_types
from easyeditor.tune.start import Settings, Start

KNOBS: dict[str, tuple[float, float]] = {
    "clamp_norm_factor": (2.0, 0.5),
    "v_lr": (0.5, 2.0),
    "mom2_update_weight": (2.0, 0.5),
    "v_weight_decay": (10.0, 0.1),
    "lr": (2.0, 0.5),
}
"""Hyper-parameters that are searched where a method has them, and by what the best value so far is multiplied."""
MATTERS = 0.5  # share of the greatest effect from which on a layer's effect counts as large

Array = np.ndarray[Any, np.dtype[Any]]
Line = dict[str, Any]
Try = Callable[[Settings], "Line | None"]


def knobs_of(cls: type) -> list[str]:
    """The numbers of a method that are searched for."""
    known = field_types(cls)
    return [knob for knob in KNOBS if knob in known]


def candidates(effects: Array | None, safety: Sequence[LayerSafety], count: int, wanted: int) -> list[int]:
    """At most `wanted` layers to begin with, never the last one (nothing above it carries a value on).

    With effects: the layer of the greatest one, then those with at least half of it, safest first, then the others by
    effect. Without: evenly over the lower two thirds, safest first.
    """
    allowed = list(range(max(1, count - 1)))
    danger = {one.layer: abs(math.log10(max(one.reach, 1e-12))) for one in safety}
    if effects is None:
        spread = np.unique(np.linspace(0, max(0, 2 * count // 3 - 1), wanted).round().astype(int)).tolist()
        return sorted(spread, key=lambda layer: danger.get(layer, 0.0))
    by_effect = sorted(allowed, key=lambda layer: -effects[layer])
    peak = effects[by_effect[0]]
    large = [layer for layer in by_effect[1:] if effects[layer] >= MATTERS * peak]
    order = [by_effect[0], *sorted(large, key=lambda layer: danger.get(layer, 0.0))]
    return [*order, *(layer for layer in by_effect if layer not in order)][:wanted]


def name_of(settings: Mapping[str, Any]) -> str:
    """One text for equal settings."""
    return json.dumps(dict(sorted(settings.items())))


def rank(line: Line, most_ratio: float) -> tuple[bool, float, float]:
    """What a better trial has more of: perplexity within bounds, then score, then low perplexity."""
    ratio = math.inf if line["ppl_ratio"] is None else line["ppl_ratio"]
    return (ratio <= most_ratio, line["score"] or 0.0, -ratio)


def best_of(lines: Sequence[Line], most_ratio: float) -> Line:
    """The best trial; the earlier of two equal ones."""
    return max(lines, key=lambda line: rank(line, most_ratio))


def search(start: Start, first: Sequence[Settings], tried: Try, most_ratio: float) -> list[Line]:
    """All trials: the `first` settings, then changes of the best so far until none helps or `tried` says time is up."""
    lines: list[Line] = []
    seen: set[str] = set()

    def run(settings: Settings) -> bool:
        """Try settings that were not tried yet; False when time is up."""
        if name_of(settings) in seen:
            return True
        seen.add(name_of(settings))
        line = tried(settings)
        if line is not None:
            lines.append(line)
        return line is not None

    for settings in first:
        if not run(settings):
            return lines
    while True:
        before = best_of(lines, most_ratio)
        for change in changes(start):
            best = best_of(lines, most_ratio)
            for settings in change(best["settings"]):
                if not run(settings):
                    return lines
                if best_of(lines, most_ratio) is not best:
                    break
        if best_of(lines, most_ratio) is before:
            return lines


def changes(start: Start) -> Iterator[Callable[[Settings], list[Settings]]]:
    """One change after another: each number up and down, then the layers one up and one down."""
    for knob, factors in KNOBS.items():

        def scaled(best: Settings, knob: str = knob, factors: tuple[float, float] = factors) -> list[Settings]:
            value = best.get(knob)
            return [{**best, knob: float(f"{value * factor:.4g}")} for factor in factors] if value else []

        yield scaled

    def moved(best: Settings) -> list[Settings]:
        ends = [best["layers"][-1] + step for step in (1, -1)]
        return [{**best, "layers": start.layers(end)} for end in ends if 0 <= end < max(1, len(start.parts.blocks) - 1)]

    yield moved
