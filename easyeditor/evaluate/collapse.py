"""The verdict on an edit: did it collapse the model?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Perplexity of the original model and after the edit, the limits, and whether they were crossed.

    Non-finite counts as collapsed. `ppl_just_before` is that of the model the edit was made on (None: the original's).
    """

    collapsed: bool
    threshold: float
    ratio: float
    limit: float
    finite: bool
    ppl_before: float
    ppl_after: float
    ppl_just_before: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The `collapse` entry of a record; `times_…` is perplexity after the edit as a multiple of that before."""
        just_before = self.ppl_before if self.ppl_just_before is None else self.ppl_just_before
        return {
            "collapsed": self.collapsed,
            "threshold": self.threshold,
            "ratio": self.ratio,
            "limit": self.limit,
            "finite": self.finite,
            "ppl_before": self.ppl_before,
            "ppl_after": self.ppl_after,
            "ppl_just_before": just_before,
            "times_before": self.ppl_after / self.ppl_before,
            "times_just_before": self.ppl_after / just_before,
        }


def judge(ppl_before: float, ppl_after: float, *, threshold: float, ratio: float) -> Collapse:
    """Collapsed when perplexity after is above `threshold` (Butterfly paper: 1000) and above `ratio` times that before.

    The ratio matters only for models whose base is above threshold / ratio. NaN or infinity is a collapse.
    """
    limit = max(threshold, ratio * ppl_before) if math.isfinite(ppl_before) else threshold
    finite = math.isfinite(ppl_after)
    return Collapse(
        collapsed=not finite or ppl_after > limit,
        threshold=threshold,
        ratio=ratio,
        limit=limit,
        finite=finite,
        ppl_before=ppl_before,
        ppl_after=ppl_after,
    )
