"""How many tokens run together: a budget from the device's memory, halved after an out-of-memory error.

Rows that do not fit together are tried again in smaller batches. Running out of memory is an event, not an end. No
number depends on how rows are batched, beyond the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from easyeditor.base.errors import ConfigError
from easyeditor.base.process import look
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.tokens import token_batches

LOG = logging.getLogger(__name__)

USUAL_TOKENS = 8192  # in a forward on a CPU
GRADIENT_COST = 16  # a token with gradients through all blocks takes this many times the memory of one without: a rule
PLANNED = 0.5  # of a GPU's free memory: the rest is for what `tokens_for` does not count
PADS = 8  # of the budget of a running batch at most this part may be pads


@dataclass
class Budget:
    """Most tokens in one padded batch; what was too much once stays halved, for as long as this object is used."""

    tokens: int

    def each(
        self, lengths: Sequence[int], run: Callable[[list[int]], None], *, again: Callable[[], None] | None = None
    ) -> None:
        """`run(numbers)` for batches of the rows of these lengths, as `token_batches` cuts them.

        A batch that does not fit the device's memory is cut up and runs again, so `run` keeps nothing of a batch before
        its end. If it has to, `again` resets what was kept, and all rows run again.

        Raises:
            ConfigError: a row alone does not fit.
        """
        left = list(range(len(lengths)))
        while left:
            done: set[int] = set()
            for batch in token_batches([lengths[i] for i in left], self.tokens):
                numbers = [left[i] for i in batch]
                look()
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


def tokens_for(parts: Anatomy, given: int | None, *, gradients: bool = False, free: int | None = None) -> int:
    """Most tokens in one forward of a model, or in one with `gradients` through all blocks.

    That is `given`, or of that the sixteenth part; on a CPU without it 8,192 and 512. On a GPU without it, half of the
    `free` bytes over those of a token, of s bytes a value:

        s (8 D + 4 K) + (s + 4) V        what one block makes; logits, and their copy in float32
        s (8 D + 4 K) L + (s + 8) V      what all blocks keep; logits, their logarithms and the gradient in float32

    D is the model's width, K that of a key, L the blocks, V the vocabulary. The other half is for the keys and values
    of prefixes, attention, and what the allocator rounds up.
    """
    free = free_bytes(parts) if free is None else free
    if given is not None or free is None:
        tokens = USUAL_TOKENS if given is None else given
        return max(1, tokens // GRADIENT_COST if gradients else tokens)
    head = parts.model.get_output_embeddings().weight
    size, (vocabulary, width) = head.element_size(), head.shape
    of_token = token_bytes(size, width, parts.key_width(0), vocabulary, len(parts.blocks), gradients=gradients)
    return max(1, int(PLANNED * free) // of_token)


def token_bytes(size: int, width: int, key_width: int, vocabulary: int, blocks: int, *, gradients: bool) -> int:
    """What a token takes in a forward, or in one with `gradients` through all blocks (`tokens_for`); a block makes
    8 D + 4 K values of it, and keeps them for the way back."""
    kept = size * (8 * width + 4 * key_width) * (blocks if gradients else 1)
    return kept + (size + (8 if gradients else 4)) * vocabulary


def free_bytes(parts: Anatomy) -> int | None:
    """What is free for a model's values on its GPUs, each of which has its share of the blocks; None on a CPU."""
    cards = {weight.device for weight in parts.model.parameters() if weight.device.type == "cuda"}
    free = [
        torch.cuda.mem_get_info(card)[0] + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
        for card in cards
    ]
    return len(free) * min(free) if free else None


class Queue:
    """Rows that wait for a place in a running batch, by length: those that run together hardly pad each other."""

    def __init__(self, lengths: Sequence[int], numbers: Sequence[int], tokens: int) -> None:
        self._lengths, self._tokens = lengths, tokens
        self.waiting = sorted(numbers, key=lambda i: lengths[i])
        self.running: list[int] = []

    def fill(self) -> list[int]:
        """The next ones, as many as fit together with those that run: a row that is alone always does."""
        look()
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
