"""The factors of an edit's gradient. Axes: B rows, T tokens, K width of x, D width of delta."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import tapped
from easyeditor.lm.scored import Batch, nll, scored_logits
from easyeditor.methods.mend.hypernet import EditedWeight, Factors


def read_factors(
    parts: Anatomy, weights: Sequence[EditedWeight], batch: Batch, *, whole: bool = False
) -> tuple[dict[str, Factors], list[float]]:
    """x and delta of every edited weight (B, T, width) for the gradient of `batch`'s NLL, and the NLL of each row.

    The model must be frozen; the gradient is taken with respect to what is added (nothing) to each layer's output.
    """
    seen: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as taps:
        for weight in weights:
            taps.enter_context(_recorded(parts, weight, seen, added))
        losses_B = nll(scored_logits(parts.model, batch, whole=whole), batch)
        deltas = torch.autograd.grad(losses_B.sum(), [added[w.name] for w in weights])
    pairs = {w.name: Factors(seen[w.name], delta) for w, delta in zip(weights, deltas, strict=True)}
    return pairs, losses_B.detach().tolist()


def _recorded(
    parts: Anatomy, weight: EditedWeight, seen: dict[str, Tensor], added: dict[str, Tensor]
) -> AbstractContextManager[None]:
    def on_input(x_BTK: Tensor) -> None:
        seen[weight.name] = x_BTK.detach()

    def on_output(out_BTD: Tensor) -> Tensor:
        added[weight.name] = torch.zeros_like(out_BTD, requires_grad=True)
        return out_BTD + added[weight.name]

    return tapped(parts.model.get_submodule(weight.module), on_input=on_input, on_output=on_output)
