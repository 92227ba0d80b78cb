"""The factors of an edit's gradient. Axes: B rows, T tokens, K width of x, D width of delta."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.factors import gradient_factors
from easyeditor.lm.scored import Batch
from easyeditor.methods.mend.hypernet import EditedWeight, Factors


def read_factors(
    parts: Anatomy, weights: Sequence[EditedWeight], batch: Batch, *, whole: bool = False
) -> tuple[dict[str, Factors], Tensor]:
    """x and delta of every edited weight (B, T, width) for the gradient of `batch`'s NLL, and the NLL of each row (B);
    the model must be frozen."""
    found, losses_B = gradient_factors(parts.model, [w.module for w in weights], batch, whole=whole)
    return {w.name: Factors(*found[w.module]) for w in weights}, losses_B
