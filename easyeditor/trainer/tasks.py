"""From requests to what a training step edits and measures: which requests, which of their prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import DataError
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import answered, check_length
from easyeditor.trainer.passes import Draw, Pool, Task
from easyeditor.values.edit import EditRequest


class Tasks:
    """Tasks of a set of requests. Every draw depends only on the seed and the step, so a run can start anywhere."""

    def __init__(
        self,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        seed: int,
        outer: int,
        locality: int,
        longest: int,
        name: str = "train",
        prompting: Prompting = PLAIN,
    ) -> None:
        """`outer` texts must give the new answer, the edited prompt among them; `locality` prompts must stay (0: all).

        Raises:
            DataError: no requests, or none with a locality prompt.
        """
        check_trainable(requests)
        self._prompting = prompting
        self._tok, self._requests, self._seed, self._longest = tok, list(requests), seed, longest
        self._outer, self._locality, self._name = outer, locality, name
        self._epochs: dict[int, list[int]] = {}
        self._pools: dict[int, tuple[Pool, int]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def training(self, step: int, size: int, rank: int, world: int) -> Task:
        """The task of one step on one rank: every request once an epoch, in an order drawn anew for each epoch."""
        first = (step * world + rank) * size
        members = [self._at(place) for place in range(first, first + size)]
        return self._task(members, random.Random(f"{self._seed}/step {step}/rank {rank}"))

    def validation(self, number: int) -> Task:
        """Validation task `number`, always the same; requests come in a drawn order, because files go by relation."""
        return self._task([self._at(number)], random.Random(f"{self._seed}/validation {number}"))

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._requests))
        if epoch not in self._epochs:
            order = list(range(len(self._requests)))
            random.Random(f"{self._seed}/epoch {epoch}").shuffle(order)
            self._epochs = {epoch: order} | {e: o for e, o in self._epochs.items() if e == epoch - 1}
        return self._epochs[epoch][index]

    def _task(self, members: Sequence[int], rng: random.Random) -> Task:
        draws = []
        for number in members:
            pool, outer = self._pool(number)
            others, near = list(range(1, outer)), list(range(outer, len(pool.lines)))
            more = _drawn(others, self._outer - 1 if self._outer else len(others), rng)
            draws.append(Draw(pool, (0, *more), tuple(_drawn(near, self._locality or len(near), rng))))
        return Task(tuple(draws))

    def _pool(self, number: int) -> tuple[Pool, int]:
        """A request's pool, and how many of its lines (the first ones) must give the new answer."""
        if number not in self._pools:
            request = self._requests[number]
            drawable = request.rephrase_prompts if self._outer != 1 else ()  # with 1, the prompt itself is the only one
            outer = [(text, request.target_new) for text in (request.prompt, *drawable)]
            probes = request.locality.values()
            near = [pair for probe in probes for pair in zip(probe.prompts, probe.answers, strict=True)]
            pairs = (*outer, *near)
            lines = tuple(line(self._tok, prompt, answer, self._prompting) for prompt, answer in pairs)
            check_length([made.ids for made in lines], self._longest, lambda i: answered([request], pairs[i][0]))
            self._pools[number] = (Pool((self._name, number), lines), len(outer))
        return self._pools[number]


def check_trainable(requests: Sequence[EditRequest]) -> None:
    """Raise DataError where there are no requests, or none with a locality prompt."""
    if not requests:
        raise DataError("training needs at least one request")
    if not any(probe.prompts for request in requests for probe in request.locality.values()):
        raise DataError(
            "no request has locality prompts (neighborhood_prompts, locality_prompt or loc), so nothing would hold "
            "the model in place; train on data that has them"
        )


def _drawn(items: list[int], count: int, rng: random.Random) -> list[int]:
    return items if count >= len(items) else rng.sample(items, count)
