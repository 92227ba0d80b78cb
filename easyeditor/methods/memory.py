"""What a method remembers of the edits committed to its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from easyeditor.lm.weights import same_deltas
from easyeditor.records import EditResult

S = TypeVar("S")


class Memory(Generic[S]):
    """A state built from committed edits (as a rule their `memory`, or their deltas), in the order of their commits.

    A revert builds it again from the edits that stay, so the state is bit-equal to one that never saw the edit.
    """

    def __init__(self, first: S, add: Callable[[S, EditResult], S]) -> None:
        """`first` is the state before any commit; `add` gives the next one and changes neither argument."""
        self._first, self._add = first, add
        self._results: list[EditResult] = []
        self.state = first

    def committed(self, result: EditResult) -> None:
        """Add an edit that was just committed."""
        self.state = self._add(self.state, result)
        self._results.append(result)

    def reverted(self, result: EditResult | None) -> None:
        """Take out the last commit of this edit (or of one with equal deltas); None: all of them."""
        if result is None:
            self._results = []
        else:
            found = [n for n, kept in enumerate(self._results) if same_deltas(kept.deltas, result.deltas)]
            del self._results[found[-1]]
        self.state = self._first
        for kept in self._results:
            self.state = self._add(self.state, kept)
