"""What a method remembers of the edits committed to its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from easyeditor.lm.weights import digest
from easyeditor.values.edit import EditResult

S = TypeVar("S")


class Memory(Generic[S]):
    """A state built from the `EditResult.memory` of committed edits, in the order of their commits.

    A revert builds it again from the edits that stay, so the state is bit-equal to one that never saw the edit. Kept
    are the digests of the deltas, and the memories: on the CPU, or in the folder where the edit is saved.
    """

    def __init__(self, first: S, add: Callable[[S, Mapping[str, Tensor]], S]) -> None:
        """`first` is the state before any commit; `add` gives the next one and changes neither argument."""
        self._first, self._add = first, add
        self._kept: list[tuple[str, Callable[[], Mapping[str, Tensor]]]] = []
        self.state = first

    def committed(self, result: EditResult) -> None:
        """Add an edit that was just committed."""
        # laid out as in a file: of a matrix the other way round a product may differ in its last bit
        memory = {name: tensor.cpu().contiguous() for name, tensor in result.memory.items()}
        folder = result.folder
        self.state = self._add(self.state, memory)
        read = (lambda: memory) if folder is None else (lambda: EditResult.load(folder).memory)
        self._kept.append((digest(result.deltas), read))

    def reverted(self, result: EditResult | None) -> None:
        """Take out the last commit of this edit (or of one with equal deltas); None: all of them."""
        kept, state = [] if result is None else list(self._kept), self._first
        if result is not None:
            ours = digest(result.deltas)
            del kept[max(n for n, (theirs, _) in enumerate(kept) if theirs == ours)]
        for _, read in kept:
            state = self._add(state, read())
        self._kept, self.state = kept, state
