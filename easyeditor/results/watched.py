"""What is watched along a sequence besides perplexity: one value for each step, on the line of its last edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from easyeditor.values.plain import Flat


@dataclass(frozen=True, kw_only=True)
class Watched(Flat):
    """The weights after a step, and what the step brought.

    `growth` is ||W||_F of each edited weight as a multiple of the original's; `drift` how far its leading singular
    directions turned from the original's (0 = none, 1 = at right angles). `key_cosine` is the largest |cosine| of a key
    of this step to a key of an earlier edit that is kept (None: no earlier one, or a method without keys), at the last
    edited layer. `anchor` is the largest ||v*|| as a multiple of the norm anchor, where the method has one.
    """

    growth: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    key_cosine: float | None = None
    anchor: float | None = None
