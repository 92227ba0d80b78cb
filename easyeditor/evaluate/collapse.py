"""The verdict on an edit: did it collapse the model?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Perplexity before and after, the limits, and whether they were crossed. Non-finite counts as collapsed."""

    collapsed: bool
    threshold: float
    ratio: float
    limit: float
    finite: bool
    ppl_before: float
    ppl_after: float

    def to_json(self) -> dict[str, Any]:
        """The `collapse` entry of a record."""
        return {
            "collapsed": self.collapsed,
            "threshold": self.threshold,
            "ratio": self.ratio,
            "limit": self.limit,
            "finite": self.finite,
            "ppl_before": self.ppl_before,
            "ppl_after": self.ppl_after,
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
