"""Run only what an edit can change: the plain full forward, and the replay that gives the same numbers for less.

Both answer one question: given an offset per request, added to a module's output at the lookup token of each of the
request's rows, what are the logits at the positions that are scored? Four facts make replay cheap:
  1. before the lookup token nothing changes: keys and values of that prefix are computed once (lm/recording.py);
  2. below the edited block nothing changes: its input is captured once, the blocks below are skipped;
  3. only the scored positions go through the output head;
  4. a row with which another of its request begins, up to the lookup token and beyond, is computed with that one.

Axes: R requests, B rows that run, T tokens of the longest row, S longest suffix, N scored positions, D model width, V
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.attention import short_attention
from easyeditor.lm.hooks import Passage, captured, resumed, selected_head, tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import Prefixes
from easyeditor.lm.recording import Recorder, SharedStarts, continued, picked
from easyeditor.lm.tokens import Row, model_inputs, sent


class RowForward(Protocol):
    """Logits of the rows of some requests as a function of what is added at the lookup tokens of each request's."""

    read: tuple[Tensor, Tensor] | None
    """Input and output of the projection that was to be read there, where this way reads it; not narrowed."""

    @property
    def initial_BD(self) -> Tensor:
        """The module's own output at the lookup token of every row that was given; not narrowed."""
        ...

    @property
    def tokens_per_call(self) -> int:
        """Token positions computed in one call, pads included."""
        ...

    def __call__(self, offset_RD: Tensor) -> Tensor:
        """Logits (N, V) at the scored positions: requests, their rows, and each row's positions in order."""
        ...

    def narrowed(self, kept: Sequence[int]) -> Self:
        """The same for some of the requests."""
        ...

    def joined(self, other: Self) -> Self:
        """The same for these requests and another's, in this order. Both are used up."""
        ...


class PlainForward:
    """The oracle: every call runs the whole model on whole, padded rows."""

    read: tuple[Tensor, Tensor] | None = None

    def __init__(self, parts: Anatomy, module: nn.Module, layer: int, rows: Sequence[Sequence[Row]]) -> None:
        self._model, self._module = parts.model, module
        self._parts, self._layer, self._requests = parts, layer, rows
        device = input_device(parts.model)
        flat = [row for own in rows for row in own]
        self._inputs = model_inputs([row.ids for row in flat], device)
        self._lookup_B = torch.tensor([row.lookup for row in flat])
        self._owner_B, self._rows_N, self._positions_N = _places([_Request.plain(own) for own in rows], start=0)
        self.tokens_per_call = self._inputs["input_ids"].numel()

    def __call__(self, offset_RD: Tensor) -> Tensor:
        offset_BD = offset_RD[self._owner_B.to(offset_RD.device, non_blocking=True)]
        with tapped(self._module, on_output=_adder(self._lookup_B, offset_BD)):
            logits_BTV = self._model(**self._inputs, use_cache=False).logits
        rows_N, positions_N = (x.to(logits_BTV.device, non_blocking=True) for x in (self._rows_N, self._positions_N))
        return logits_BTV[rows_N, positions_N]

    def narrowed(self, kept: Sequence[int]) -> PlainForward:
        """The same for some of the requests."""
        return PlainForward(self._parts, self._module, self._layer, [self._requests[r] for r in kept])

    def joined(self, other: PlainForward) -> PlainForward:
        """The same for these requests and another's, in this order."""
        return PlainForward(self._parts, self._module, self._layer, [*self._requests, *other._requests])

    @cached_property
    def initial_BD(self) -> Tensor:
        """The module's own output; one that was narrowed or joined is not asked, so no forward runs for it."""
        with torch.no_grad(), captured(self._module, stop=True) as found:
            self._model(**self._inputs, use_cache=False)
        return picked(found.gave, self._lookup_B)


class ReplayForward:
    """Calls run only each row's suffix (lookup token to end), what lies above the edit, the scored logits."""

    def __init__(
        self,
        parts: Anatomy,
        module: nn.Module,
        layer: int,
        rows: Sequence[Sequence[Row]],
        *,
        read: nn.Module | None = None,
        starts: SharedStarts | None = None,
    ) -> None:
        self._model, self._module, self._blocks = parts.model, module, parts.blocks
        self._device = input_device(parts.model)
        self._requests = [_Request.merged(own) for own in rows]
        # Where the module's output is simply added to the block's, the block above starts from that sum; else the block
        # itself runs again, as the plain forward would.
        adds = module is parts.block(layer) or (module is parts.mlp(layer) and parts.architecture.mlp_adds)
        self._starts_above = adds and layer + 1 < len(self._blocks)
        self._start = layer + 1 if self._starts_above else layer
        recorder = Recorder(parts, module, start=self._start, above=self._starts_above, read=read, starts=starts)
        found = recorder.record([row for own in self._requests for row in own.run])
        self._prefix, self._passage = found.prefix, found.passage
        every_B = sent(_leads(self._requests), found.initial_BD.device)
        self.initial_BD = found.initial_BD[every_B]
        self.read = None
        if found.read is not None:
            every_B = every_B.to(found.read[0].device)
            self.read = found.read[0][every_B], found.read[1][every_B]
        self._inputs: dict[str, Tensor] | None = None

    @property
    def tokens_per_call(self) -> int:
        """Positions of the rows that run, from the lookup token to the longest one's end."""
        suffixes = [len(row.ids) - row.lookup for own in self._requests for row in own.run]
        return len(suffixes) * max(suffixes)

    def narrowed(self, kept: Sequence[int]) -> ReplayForward:
        """The same for some of the requests; what was recorded is kept."""
        first = [sum(len(own.run) for own in self._requests[:r]) for r in range(len(self._requests))]
        index = [first[r] + i for r in kept for i in range(len(self._requests[r].run))]
        fewer = copy.copy(self)
        fewer._requests = [self._requests[r] for r in kept]
        fewer._prefix = self._prefix.narrowed(index)
        width = max(len(row.ids) - row.lookup for own in fewer._requests for row in own.run)
        hidden_BTD = self._passage.hidden_BTD[:, :width]
        fewer._passage = Passage(hidden_BTD[sent(index, hidden_BTD.device)], self._passage.tuple_output)
        fewer._inputs = None
        return fewer

    def joined(self, other: ReplayForward) -> ReplayForward:
        """The same for these requests and another's, in this order; what was recorded is moved, so both are used up."""
        both = copy.copy(self)
        both._requests = [*self._requests, *other._requests]
        both._prefix = Prefixes.joined([self._prefix, other._prefix])
        hidden = [self._passage.hidden_BTD, other._passage.hidden_BTD]
        width = max(own.shape[1] for own in hidden)
        wide = [torch.cat([own, own[:, -1:].expand(-1, width - own.shape[1], -1)], dim=1) for own in hidden]
        both._passage = Passage(torch.cat(wide), self._passage.tuple_output)
        both._inputs = None
        return both

    def _prepared(self) -> dict[str, Tensor]:
        """What the model is given. That, and all that a call indexes by, is sent once, at the first call after a
        request joined or left."""
        if self._inputs is not None:
            return self._inputs
        owner_B, rows_N, positions_N = _places(self._requests, start=1)
        head = self._model.get_output_embeddings().weight.device
        self._rows_N, self._positions_N = torch.stack([rows_N, positions_N]).to(head, non_blocking=True)
        self._owner_B = owner_B.to(self.initial_BD.device, non_blocking=True)
        self._first_B = torch.zeros(len(owner_B), dtype=torch.long, device=self._passage.hidden_BTD.device)
        suffixes = [row.ids[row.lookup :] for own in self._requests for row in own.run]
        self._inputs = continued(suffixes, self._prefix, self._device)
        return self._inputs

    def __call__(self, offset_RD: Tensor) -> Tensor:
        inputs = self._prepared()
        add = _adder(self._first_B, offset_RD[self._owner_B])
        with ExitStack() as stack:
            if self._starts_above:
                hidden_BSD = add(self._passage.hidden_BTD)
                passage = Passage(hidden_BSD, self._passage.tuple_output)
            else:
                passage = self._passage
                stack.enter_context(tapped(self._module, on_output=add))
            stack.enter_context(resumed(self._blocks, self._start, passage))
            stack.enter_context(selected_head(self._model, self._rows_N, self._positions_N))
            stack.enter_context(short_attention(self._model))
            output = self._model(**inputs, past_key_values=self._prefix.fresh(), use_cache=True)
        return output.logits[0]


def row_forward(
    parts: Anatomy,
    module: nn.Module,
    layer: int,
    rows: Sequence[Sequence[Row]],
    *,
    replay: bool,
    read: nn.Module | None = None,
    starts: SharedStarts | None = None,
) -> RowForward:
    """Replay where it is asked for and applies, else the plain forward: the numbers are the same. `rows` are those of
    each request."""
    if replay and parts.architecture.replay:
        return ReplayForward(parts, module, layer, rows, read=read, starts=starts)
    return PlainForward(parts, module, layer, rows)


@dataclass(frozen=True)
class _Request:
    """A request's rows, those that run, and for each row the place of the one that runs for it."""

    rows: tuple[Row, ...]
    run: tuple[Row, ...]
    lead: tuple[int, ...]

    @staticmethod
    def plain(rows: Sequence[Row]) -> _Request:
        """All rows run."""
        return _Request(tuple(rows), tuple(rows), tuple(range(len(rows))))

    @staticmethod
    def merged(rows: Sequence[Row]) -> _Request:
        """A row runs if no longer one (or equal one before it) with its lookup token begins with it."""

        def leader(row: Row) -> int:
            same = [i for i, o in enumerate(rows) if o.lookup == row.lookup and o.ids[: len(row.ids)] == row.ids]
            return max(same, key=lambda i: (len(rows[i].ids), -i))

        leaders = [leader(row) for row in rows]
        run = sorted(set(leaders))
        return _Request(tuple(rows), tuple(rows[i] for i in run), tuple(run.index(i) for i in leaders))


def _leads(requests: Sequence[_Request]) -> list[int]:
    """For every row of all requests the number of the one that runs for it."""
    found, first = [], 0
    for own in requests:
        found += [first + i for i in own.lead]
        first += len(own.run)
    return found


def _places(requests: Sequence[_Request], *, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The request of every row that runs (B); row and position of every scored token (N). `start=1` counts positions
    from the lookup token."""
    owners = [r for r, own in enumerate(requests) for _ in own.run]
    rows = [row for own in requests for row in own.rows]
    pairs = [(i, p - start * row.lookup) for i, row in zip(_leads(requests), rows, strict=True) for p in row.scored]
    return torch.tensor(owners), torch.tensor([i for i, _ in pairs]), torch.tensor([p for _, p in pairs])


def _adder(position_B: Tensor, offset_BD: Tensor) -> Any:
    """A tap that adds `offset_BD` at `position_B` of each row, differentiably."""

    def add(output_BTD: Tensor) -> Tensor:
        device = output_BTD.device
        rows = torch.arange(len(position_B), device=device)
        offset = offset_BD.to(device, output_BTD.dtype)
        return output_BTD.index_put((rows, position_B.to(device, non_blocking=True)), offset, accumulate=True)

    return add
