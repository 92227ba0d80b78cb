"""A token budget that gives way: rows that do not fit in a device's memory together are tried again in smaller batches.

Running out of memory is an event, not an end. No number depends on how rows are batched, beyond the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from easyeditor.errors import ConfigError
from easyeditor.lm.tokens import token_batches

LOG = logging.getLogger(__name__)

PADS = 8  # of the budget of a running batch at most this part may be pads


@dataclass
class Budget:
    """Most tokens in one padded batch; what was too much once stays halved."""

    tokens: int

    def each(
        self, lengths: Sequence[int], run: Callable[[list[int]], None], *, again: Callable[[], None] | None = None
    ) -> None:
        """`run(numbers)` for batches of the rows of these lengths, as `token_batches` cuts them.

        A batch for which the device's memory does not do is cut up and runs again, so `run` keeps nothing of a batch
        before its end. Where it must, `again` makes good what was kept, and all rows run again.

        Raises:
            ConfigError: a row alone does not fit.
        """
        left = list(range(len(lengths)))
        while left:
            done: set[int] = set()
            for batch in token_batches([lengths[i] for i in left], self.tokens):
                numbers = [left[i] for i in batch]
                try:
                    run(numbers)
                except torch.OutOfMemoryError as error:
                    self._give_way(len(numbers), max(lengths[i] for i in numbers), error)
                    break  # the error, which holds on to the batch's tensors, ends with this block
                done.update(numbers)
            left = [i for i in left if i not in done]
            if left and torch.cuda.is_available():
                torch.cuda.empty_cache()
            if left and again is not None:
                again()
                left = list(range(len(lengths)))

    def queue(self, lengths: Sequence[int], run: Callable[[Queue], None]) -> None:
        """`run(queue)` takes its batches from a queue of rows of these lengths, and says which of them left.

        Where the device's memory does not do for what runs together, that begins anew, in smaller batches.

        Raises:
            ConfigError: a row alone does not fit.
        """
        left = list(range(len(lengths)))
        while left:
            queue = Queue(lengths, left, self.tokens)
            try:
                run(queue)
            except torch.OutOfMemoryError as error:
                self._give_way(len(queue.running), max(lengths[i] for i in queue.running), error)
            left = [*queue.running, *queue.waiting]
            if left and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _give_way(self, rows: int, longest: int, error: torch.OutOfMemoryError) -> None:
        if rows == 1:
            raise ConfigError(
                f"{longest} tokens alone do not fit in the device's memory ({str(error).splitlines()[0]}); load a "
                "narrower dtype (dtype: bfloat16), spread the model over cards (model_parallel: true), or cut texts"
            ) from error
        self.tokens = rows * longest // 2
        LOG.warning("out of memory with %d rows of up to %d tokens: from now on %d a batch", rows, longest, self.tokens)


class Queue:
    """Rows that wait for a place in a running batch, by length: those that run together hardly pad each other."""

    def __init__(self, lengths: Sequence[int], numbers: Sequence[int], tokens: int) -> None:
        self._lengths, self._tokens = lengths, tokens
        self.waiting = sorted(numbers, key=lambda i: lengths[i])
        self.running: list[int] = []

    def fill(self) -> list[int]:
        """The next ones, as many as fit beside those that run: a row that is alone always does."""
        new = []
        while self.waiting and self._fits([*self.running, self.waiting[0]]):
            new.append(self.waiting.pop(0))
            self.running.append(new[-1])
        return new

    def leave(self, number: int) -> None:
        """One that ran is done."""
        self.running.remove(number)

    def _fits(self, numbers: Sequence[int]) -> bool:
        padded = len(numbers) * max(self._lengths[i] for i in numbers)
        pads = padded - sum(self._lengths[i] for i in numbers)
        return len(numbers) == 1 or (padded <= self._tokens and pads <= self._tokens // PADS)
