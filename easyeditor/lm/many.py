"""Many edited models in one forward: every row goes through the unedited model with the deltas of its own edit.

A low-rank delta changes what its projection gives by (x left) right, so nothing needs to be written into the weights.
Axes: E edits, B rows, T tokens, K width of a projection's input, D width of its output, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy, weight_is_transposed
from easyeditor.lm.hooks import tapped
from easyeditor.values.edit import WeightDelta

LARGEST_CHANGE = 1e30
"""No finite float32 weight overflows by adding less: half of the last place of the largest is more."""

Deltas = Sequence[WeightDelta]


def why_alone(parts: Anatomy, deltas: Deltas) -> str | None:
    """Why an edit must be written into the weights to be measured; None where its rows may share a forward.

    In a narrow dtype an edit is what rounding leaves of it, so it is measured as it is written.
    """
    if not parts.architecture.replay:
        return f"{type(parts.model).__name__} is not in the table of architectures"
    if not deltas:
        return "nothing is written into the weights"
    for delta in deltas:
        if delta.left is None or delta.right is None:
            return f"the delta of {delta.name} is dense"
        if parts.layer_of(delta.name) is None or not delta.name.endswith(".weight"):
            return f"{delta.name} is no projection of a block"
        weight = parts.model.get_parameter(delta.name)
        if weight.dtype not in (torch.float32, torch.float64):
            return f"{delta.name} is {weight.dtype}, and rounding to it is part of the edit"
        if (len(delta.left), delta.right.shape[1]) != tuple(weight.shape) or delta.left.shape[1] != len(delta.right):
            return f"the delta of {delta.name} has another shape than the weight"
        if not _largest(delta.left, delta.right) < LARGEST_CHANGE:  # so written that NaN is caught too
            return f"the delta of {delta.name} may overflow"
    return None


class SideBySide:
    """Edits of one model whose rows share forwards; for each of them `why_alone` is None."""

    def __init__(self, parts: Anatomy, edits: Sequence[Deltas]) -> None:
        self._parts, self._count = parts, len(edits)
        self._by_name: dict[str, list[tuple[int, WeightDelta]]] = {}
        for number, deltas in enumerate(edits):
            for delta in deltas:
                self._by_name.setdefault(delta.name, []).append((number, delta))
        self._factors = {name: self._stacked(name) for name in self._by_name}

    @property
    def lowest(self) -> int:
        """The first block that an edit changes."""
        layers = [self._parts.layer_of(name) for name in self._by_name]
        return min(layer for layer in layers if layer is not None)

    @contextmanager
    def rows(self, owners_B: Sequence[int]) -> Iterator[None]:
        """In forwards inside the block, row b is of the model with edit `owners_B[b]`."""
        owners = torch.tensor(owners_B)
        with ExitStack() as taps:
            for name, (left_EKR, right_ERD) in self._factors.items():
                own = owners.to(left_EKR.device, non_blocking=True)
                module = self._parts.model.get_submodule(name.removesuffix(".weight"))
                taps.enter_context(_changed(module, left_EKR[own], right_ERD[own]))
            yield

    def _stacked(self, name: str) -> tuple[Tensor, Tensor]:
        """All edits' factors of one weight, (E, K, R) and (E, R, D), zeros where an edit has fewer."""
        weight = self._parts.model.get_parameter(name)
        turned = not weight_is_transposed(self._parts.model.get_submodule(name.removesuffix(".weight")))
        ranks = [0] * self._count
        for number, delta in self._by_name[name]:
            assert delta.right is not None
            ranks[number] += len(delta.right)
        k, d = reversed(weight.shape) if turned else weight.shape
        left_EKR, right_ERD = (weight.new_zeros(self._count, *shape) for shape in ((k, max(ranks)), (max(ranks), d)))
        at = [0] * self._count
        for number, delta in self._by_name[name]:
            assert delta.left is not None
            assert delta.right is not None
            left, right = (delta.right.T, delta.left.T) if turned else (delta.left, delta.right)
            place = slice(at[number], at[number] + len(right))
            left_EKR[number, :, place], right_ERD[number, place] = left, right
            at[number] = place.stop
        return left_EKR, right_ERD


def _changed(module: nn.Module, left_BKR: Tensor, right_BRD: Tensor) -> AbstractContextManager[None]:
    given: list[Tensor] = []

    def on_output(out_BTD: Tensor) -> Tensor:
        return out_BTD + given.pop() @ left_BKR @ right_BRD

    return tapped(module, on_input=given.append, on_output=on_output)


def _largest(left: Tensor, right: Tensor) -> float:
    """A bound on the size of the product's entries."""
    return float(left.abs().max().double() * right.abs().max().double() * len(right))
