"""Numbers as a reader sees them, in verdicts, tables, summaries and progress: one way for each kind."""

from __future__ import annotations

import math


def shown_ppl(value: float | None) -> str:
    """A perplexity; a dash when it was not measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"


def ppl_name(bos: bool) -> str:
    """What perplexity is called: where every sentence began with BOS (`ppl_bos`) it says so; the papers' had none."""
    return "perplexity (with BOS)" if bos else "perplexity"


def shown_share(value: float | None) -> str:
    """A metric's value or a probability: three decimals, or two digits where those would be zeros."""
    if value is None:
        return "–"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def shown_size(value: float | None) -> str:
    """A denominator or a norm: three digits."""
    return "–" if value is None else f"{value:.3g}"
