"""The edited model in training: decoder blocks whose weights are functions of the hypernetwork's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import replaced
from easyeditor.methods.mend.hypernet import EditedWeight


class PatchedBlocks:
    """The edited blocks as functions of their weights (`torch.func.functional_call`); every step runs them with others.

    What is called is a block's own forward: hooks of the block, accelerate's for one, have run by then.
    """

    def __init__(self, parts: Anatomy, weights: Sequence[EditedWeight]) -> None:
        self._parts = parts
        self._blocks = {layer: _OwnForward(parts.block(layer)) for layer in sorted({w.layer for w in weights})}

    @contextmanager
    def carrying(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside the block the model runs with weight + left @ right, differentiably; no parameter is written."""
        with ExitStack() as undo:
            for layer, own in self._blocks.items():
                prefix = self._parts.architecture.block.format(layer)
                names = [name for name in updates if name.startswith(f"{prefix}.")]
                changed = {}
                for name in names:
                    weight = self._parts.model.get_parameter(name)
                    left, right = (factor.to(weight) for factor in updates[name])
                    changed[f"block{name.removeprefix(prefix)}"] = torch.addmm(weight, left, right)
                undo.enter_context(replaced(own.block, partial(_called, own, changed)))
            yield


class _OwnForward(nn.Module):
    """A block's forward as a module that has the block's parameters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self._own = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's forward gives."""
        return self._own(*args, **kwargs)


def _called(own: _OwnForward, changed: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The block with `changed` in the place of the parameters of these names."""
    return torch.func.functional_call(own, dict(changed), args, kwargs)
