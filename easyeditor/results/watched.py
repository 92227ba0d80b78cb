"""What is watched along a sequence beside perplexity: one value for each step, on the line of its last edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from easyeditor.results.values import known, number


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """The weights after a step, and what the step brought.

    `growth` is ||W||_F of each edited weight as a multiple of the original's; `drift` how far its leading singular
    directions turned from the original's (0 = none, 1 = at right angles). `key_cosine` is the largest |cosine| of a key
    of this step to a key of an earlier edit that stands (None: no earlier one, or a method without keys), at the last
    edited layer. `anchor` is the largest ||v*|| as a multiple of the norm anchor, where the method has one.
    """

    growth: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    key_cosine: float | None = None
    anchor: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The `watched` entry of a line."""
        weights = {"growth": dict(self.growth), "drift": dict(self.drift)}
        return {**weights, "key_cosine": self.key_cosine, "anchor": self.anchor}

    @staticmethod
    def from_json(raw: Mapping[str, Any] | None) -> Watched | None:
        """Inverse of `to_json`; None stays None."""
        if raw is None:
            return None
        growth, drift = ({name: known(value) for name, value in raw[key].items()} for key in ("growth", "drift"))
        return Watched(growth=growth, drift=drift, key_cosine=number(raw["key_cosine"]), anchor=number(raw["anchor"]))
