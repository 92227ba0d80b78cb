"""The edited model in training: decoder blocks whose weights are functions of the hypernetwork's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import higher
import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import replaced
from easyeditor.methods.mend.hypernet import EditedWeight


class PatchedBlocks:
    """The edited blocks made functional once with `higher`; every step runs them with other weights.

    Blocks, not the model: a whole transformers model slices its list of blocks, which `higher` cannot follow. A block
    that carries a forward of its own (accelerate's hooks, `device_map="auto"`) is called with torch's functional call:
    `higher` would copy that forward, which runs the block it was made for, so that no gradient would come back.
    """

    def __init__(self, parts: Anatomy, weights: Sequence[EditedWeight]) -> None:
        self._parts = parts
        self._names: dict[int, list[str]] = {}
        self._functional: dict[int, Any] = {}
        for layer in sorted({weight.layer for weight in weights}):
            block = parts.block(layer)
            prefix = parts.architecture.block.format(layer)
            self._names[layer] = [f"{prefix}.{name}" for name, _ in block.named_parameters()]
            if any("forward" in module.__dict__ for module in block.modules()):
                self._functional[layer] = partial(_called, _OwnForward(block))
                continue
            # The block's own tensors, not copies: they are frozen, and only what is edited gets another tensor. Without
            # tracking: with it, `higher` keeps the weights of every call ever made (gradients flow either way).
            functional = higher.patch.monkeypatch(block, copy_initial_weights=False, track_higher_grads=False)
            self._functional[layer] = functional

    @contextmanager
    def carrying(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside the block the model runs with weight + left @ right, differentiably; no parameter is written."""
        with ExitStack() as undo:
            for layer, functional in self._functional.items():
                params = [self._weight(name, updates) for name in self._names[layer]]
                undo.enter_context(replaced(self._parts.block(layer), partial(functional, params=params)))
            yield

    def _weight(self, name: str, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        weight = self._parts.model.get_parameter(name)
        if name not in updates:
            return weight
        left, right = updates[name]
        return torch.addmm(weight, left.to(weight), right.to(weight))


class _OwnForward(nn.Module):
    """A block's own forward without the block's hooks: the block itself has run those."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self._own = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's forward gives."""
        return self._own(*args, **kwargs)


def _called(block: _OwnForward, *args: Any, params: Sequence[Tensor], **kwargs: Any) -> Any:
    """The block with `params` in the place of its own, in their order."""
    names = [name for name, _ in block.named_parameters()]
    return torch.func.functional_call(block, dict(zip(names, params, strict=True)), args, kwargs)
