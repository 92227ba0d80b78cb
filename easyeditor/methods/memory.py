"""What a method remembers of the edits committed to its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from easyeditor.lm.weights import digest
from easyeditor.records import EditResult

S = TypeVar("S")


class Memory(Generic[S]):
    """A state built from the `EditResult.memory` of committed edits, in the order of their commits.

    A revert builds it again from the edits that stay, so the state is bit-equal to one that never saw the edit. Kept
    are the memories, on the CPU, and the digests of the deltas they belong to.
    """

    def __init__(self, first: S, add: Callable[[S, Mapping[str, Tensor]], S]) -> None:
        """`first` is the state before any commit; `add` gives the next one and changes neither argument."""
        self._first, self._add = first, add
        self._kept: list[tuple[str, dict[str, Tensor]]] = []
        self.state = first

    def committed(self, result: EditResult) -> None:
        """Add an edit that was just committed."""
        memory = {name: tensor.cpu() for name, tensor in result.memory.items()}
        self.state = self._add(self.state, memory)
        self._kept.append((digest(result.deltas), memory))

    def reverted(self, result: EditResult | None) -> None:
        """Take out the last commit of this edit (or of one with equal deltas); None: all of them."""
        if result is None:
            self._kept = []
        else:
            ours = digest(result.deltas)
            del self._kept[max(n for n, (theirs, _) in enumerate(self._kept) if theirs == ours)]
        self.state = self._first
        for _, memory in self._kept:
            self.state = self._add(self.state, memory)
