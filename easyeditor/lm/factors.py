"""The factors of a gradient: what modules were given and the gradient at what they gave.

Axes: B rows, T tokens, K width of a module's input, D width of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from easyeditor.lm.hooks import tapped
from easyeditor.lm.scored import Batch, nll, scored_logits


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


def _recorded(
    model: PreTrainedModel, module: str, seen: dict[str, Tensor], added: dict[str, Tensor]
) -> AbstractContextManager[None]:
    def on_input(x_BTK: Tensor) -> None:
        seen[module] = x_BTK.detach()

    def on_output(out_BTD: Tensor) -> Tensor:
        added[module] = torch.zeros_like(out_BTD, requires_grad=True)
        return out_BTD + added[module]

    return tapped(model.get_submodule(module), on_input=on_input, on_output=on_output)
