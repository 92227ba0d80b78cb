"""Activations of the unchanged model that replay needs, computed once for each token and only where they are used.

A row is a start that other rows share (a context before the prompt), what is left before its lookup token, and its
suffix from there on. Shared starts run once and stay while the weights do. What is left and the suffix run through the
blocks below `start`; from there on only what is left runs, for its keys and values.

Axes: B rows, b rows of one batch, T tokens, P longest prefix, S longest suffix, K input and D output width of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import Passage, StopForward, in_force, resumed, stopping, tapped, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import Prefixes
from easyeditor.lm.tokens import Row, model_inputs, sent, token_batches
from easyeditor.lm.weights import version

RECORD_TOKENS = {"cpu": 512, "cuda": 8192}  # positions in one recording forward: bounds its memory and its padding


@dataclass(frozen=True)
class Recording:
    """The unchanged model's part in a replay."""

    prefix: Prefixes
    """Keys and values before the lookup tokens, in the blocks from `start` on."""
    passage: Passage
    """What block `start` is given from the lookup tokens on (B, S, D)."""
    initial_BD: Tensor
    """The module's output at the lookup tokens."""
    read: tuple[Tensor, Tensor] | None
    """What the projection that is `read` was given (B, K) and gave (B, D) at the lookup tokens."""


@dataclass(frozen=True)
class Recorder:
    """Records rows for a replay from block `start`, to which `module` gives its output, directly or by the stream."""

    parts: Anatomy
    module: nn.Module
    _: KW_ONLY
    start: int
    above: bool
    """Does `module` lie below block `start`? Else in it."""
    read: nn.Module | None = None
    """A projection, no later than `module`, whose input and output at the lookup tokens are kept, too."""
    starts: SharedStarts | None = None

    @torch.no_grad()
    def record(self, rows: Sequence[Row]) -> Recording:
        """All of it, for rows in batches of equal length."""
        width = max(len(row.ids) - row.lookup for row in rows)
        device = input_device(self.parts.model)
        most = RECORD_TOKENS.get(device.type, RECORD_TOKENS["cuda"])
        known = [len(row.ids) if self.starts is None else len(row.ids) - self.starts.match(row)[1] for row in rows]
        batches = [sorted(batch) for batch in token_batches(known, most)]
        made = [self._batch([rows[i] for i in batch], width) for batch in batches]
        if len(made) == 1:
            return made[0]
        place = {i: n for n, i in enumerate(i for batch in batches for i in batch)}
        order = [place[i] for i in range(len(rows))]
        order_B = sent(order, device)

        def ordered(states: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(states))[order_B.to(states[0].device)]

        read = None
        if self.read is not None:
            keys, outputs = zip(*(m.read for m in made if m.read is not None), strict=True)
            read = ordered(keys), ordered(outputs)
        return Recording(
            prefix=Prefixes.joined([m.prefix for m in made], order),
            passage=Passage(ordered([m.passage.hidden_BTD for m in made]), made[0].passage.tuple_output),
            initial_BD=ordered([m.initial_BD for m in made]),
            read=read,
        )

    def _batch(self, rows: Sequence[Row], width: int) -> Recording:
        device, blocks = input_device(self.parts.model), self.parts.blocks
        begun = Prefixes.none(len(rows), len(blocks)) if self.starts is None else self.starts.of(rows)
        lookup_b = torch.tensor([row.lookup for row in rows])
        left_b = lookup_b - begun.lengths_B  # tokens between a shared start and the lookup token
        rest = [row.ids[n:] for row, n in zip(rows, begun.lengths_B.tolist(), strict=True)]
        given_bTD, tuple_output, initial_bD, read = self._below(continued(rest, begun, device), begun, left_b)
        cache, most = begun.keeping(), int(left_b.max())
        if most:
            inputs = continued([ids[:n] for ids, n in zip(rest, left_b.tolist(), strict=True)], begun, device)
            with stopping(), resumed(blocks, self.start, Passage(given_bTD[:, :most], tuple_output)):
                self.parts.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        prefix = Prefixes.of(cache, lookup_b, begun.width - begun.lengths_B, self.start)
        return Recording(prefix, Passage(_tail(given_bTD, left_b, width), tuple_output), initial_bD, read)

    def _below(
        self, inputs: dict[str, Tensor], begun: Prefixes, at_b: Tensor
    ) -> tuple[Tensor, bool, Tensor, tuple[Tensor, Tensor] | None]:
        """A forward that ends where block `start` and `module` are known.

        What the block is given, whether blocks answer with tuples, and at `at_b` the module's output, and input and
        output of what is read.
        """
        given: list[Tensor] = []
        gave: list[Tensor] = []
        read: list[Tensor] = []

        def enter(hidden_BTD: Tensor) -> None:
            given.append(hidden_BTD)
            if self.above:
                raise StopForward

        def leave(states_BTD: Tensor) -> None:
            gave.append(picked(states_BTD, at_b))
            if not self.above:
                raise StopForward

        def keep(states_BTD: Tensor) -> None:
            read.append(picked(states_BTD, at_b))

        blocks, past = self.parts.blocks, begun.fresh() if begun.width else None
        with stopping(), ExitStack() as stack:
            passages = stack.enter_context(watched(blocks[max(0, self.start - 1)]))
            stack.enter_context(tapped(blocks[self.start], on_input=enter))
            if self.read is not None:
                stack.enter_context(tapped(self.read, on_input=keep, on_output=keep))
            stack.enter_context(tapped(self.module, on_output=leave))
            self.parts.model.base_model(**inputs, past_key_values=past, use_cache=past is not None)
        tuple_output = passages[0].tuple_output if passages else False  # block 0: nothing is skipped below it
        return given[0], tuple_output, gave[0], (read[0], read[1]) if self.read is not None else None


class SharedStarts:
    """Keys and values, in all blocks, of texts that many rows start with; made once for as long as weights and hooks
    stay."""

    def __init__(self, parts: Anatomy, texts: Sequence[Sequence[int]]) -> None:
        self._parts = parts
        self._texts = sorted({tuple(ids) for ids in texts if ids})
        self._made: Prefixes | None = None
        self._state: object = None

    def match(self, row: Row) -> tuple[int, int]:
        """The text that shares most tokens before the lookup token with a row, and how many."""
        shared = [_shared(text, row.ids[: row.lookup]) for text in self._texts]
        most = max(shared, default=0)
        return (shared.index(most), most) if most else (0, 0)

    def of(self, rows: Sequence[Row]) -> Prefixes:
        """What rows and texts share."""
        found = [self.match(row) for row in rows]
        lengths = torch.tensor([length for _, length in found])
        if not int(lengths.max()):
            return Prefixes.none(len(rows), len(self._parts.blocks))
        return self._current().cut([number for number, _ in found], lengths)

    @torch.no_grad()
    def _current(self) -> Prefixes:
        model = self._parts.model
        state = version(model.parameters()), in_force(model)
        if self._made is None or self._state != state:
            self._made = None  # the old ones go first
            made, order, device = [], [], input_device(model)
            most = RECORD_TOKENS.get(device.type, RECORD_TOKENS["cuda"])
            for batch in token_batches([len(ids) for ids in self._texts], most):
                none = Prefixes.none(len(batch), len(self._parts.blocks))
                cache = none.keeping()
                with stopping():
                    inputs = model_inputs([self._texts[i] for i in batch], device)
                    model.base_model(**inputs, past_key_values=cache, use_cache=True)
                lengths = torch.tensor([len(self._texts[i]) for i in batch])
                made.append(Prefixes.of(cache, lengths, none.lengths_B, 0))
                order += batch
            place = {i: n for n, i in enumerate(order)}
            self._made = Prefixes.joined(made, [place[i] for i in range(len(order))])
            self._state = state
        return self._made


def continued(rows: Sequence[Sequence[int]], prefix: Prefixes, device: torch.device) -> dict[str, Tensor]:
    """What a decoder needs to go on with rows after their prefixes; pads repeat the last position, never too far.

    Made on the host, where the lengths are, and sent as it is: nobody waits.
    """
    inputs = model_inputs(rows, torch.device("cpu"))
    last_B1 = (inputs["attention_mask"].sum(1, keepdim=True) - 1).clamp(min=0)
    made = {
        "input_ids": inputs["input_ids"],
        "attention_mask": torch.cat([prefix.mask_BP, inputs["attention_mask"]], dim=1),
        "position_ids": prefix.lengths_B.unsqueeze(1) + torch.minimum(inputs["position_ids"], last_B1),
    }
    return {name: value.to(device, non_blocking=True) for name, value in made.items()}


def picked(states_BTD: Tensor, position_B: Tensor) -> Tensor:
    """The states (B, D) at one position of each row."""
    rows = torch.arange(len(position_B), device=states_BTD.device)
    return states_BTD[rows, position_B.to(states_BTD.device, non_blocking=True)]


def _tail(hidden_BTD: Tensor, first_B: Tensor, width: int) -> Tensor:
    """Hidden states from a position on (B, width, D); what a shorter row has there nothing reads."""
    index = (first_B.unsqueeze(1) + torch.arange(width)).clamp(max=hidden_BTD.shape[1] - 1)
    index = index.to(hidden_BTD.device, non_blocking=True)
    return hidden_BTD.gather(1, index.unsqueeze(2).expand(-1, -1, hidden_BTD.shape[2]))


def _shared(text: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    same = 0
    for a, b in zip(text, ids, strict=False):
        if a != b:
            break
        same += 1
    return same
