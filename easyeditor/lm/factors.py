"""The factors of a gradient: what modules were given and the gradient at what they gave.

Axes: B rows, T tokens, K width of a module's input, D width of its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.scored import Batch, Line, nll, scored_logits
from easyeditor.lm.weights import applied
from easyeditor.values.edit import WeightDelta

FACTORS_COST = 4  # memory of a token whose factors are read, in tokens of a forward without gradients


def gradient_factors(
    model: PreTrainedModel, modules: Sequence[str], batch: Batch, *, whole: bool = False
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """By module path its input (B, T, K) and the gradient of `batch`'s NLL at its output (B, T, D); the NLL of each row
    (B).

    The model must be frozen; the gradient is taken with respect to what is added (nothing) to each module's output.
    """
    seen: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as taps:
        for module in modules:
            taps.enter_context(_recorded(model, module, seen, added))
        losses_B = nll(scored_logits(model, batch, whole=whole), batch)
        deltas = torch.autograd.grad(losses_B.sum(), [added[module] for module in modules])
    return {m: (seen[m], delta) for m, delta in zip(modules, deltas, strict=True)}, losses_B.detach()


@torch.no_grad()
def edited_losses(
    model: PreTrainedModel, lines: Sequence[Line], deltas: Sequence[WeightDelta], budget: Budget
) -> list[float]:
    """Every line's NLL on the model with `deltas`."""
    losses = [math.nan] * len(lines)

    def read(members: list[int]) -> None:
        batch = Batch.of([lines[i] for i in members], input_device(model))
        for i, loss in zip(members, nll(scored_logits(model, batch), batch).tolist(), strict=True):
            losses[i] = loss

    with applied(model, deltas):
        budget.each([len(x.ids) for x in lines], read)
    return losses


def _recorded(
    model: PreTrainedModel, module: str, seen: dict[str, Tensor], added: dict[str, Tensor]
) -> AbstractContextManager[None]:
    def on_input(x_BTK: Tensor) -> None:
        seen[module] = x_BTK.detach()

    def on_output(out_BTD: Tensor) -> Tensor:
        added[module] = torch.zeros_like(out_BTD, requires_grad=True)
        return out_BTD + added[module]

    return tapped(model.get_submodule(module), on_input=on_input, on_output=on_output)
