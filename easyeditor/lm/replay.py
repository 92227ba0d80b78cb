"""Run only what an edit can change: the plain full forward, and the replay that gives the same numbers for less.

Both answer one question: given an offset per row, added to a module's output at the row's lookup token, what are the
logits at the positions that are scored? Three facts make replay cheap:
  1. before the lookup token nothing changes: keys and values of that prefix are computed once;
  2. below the edited block nothing changes: its input is captured once, the blocks below are skipped;
  3. only the scored positions go through the output head.

Axes: B rows, T tokens of the longest row, P longest prefix, S longest suffix, N scored positions, D model width, V
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.attention import short_attention
from easyeditor.lm.hooks import Passage, captured, selected_head, skipped, tapped, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import Row, model_inputs, token_batches

RECORD_TOKENS = {"cpu": 512, "cuda": 8192}  # positions in one recording forward: bounds its memory and its padding


class RowForward(Protocol):
    """Logits of a fixed set of rows as a function of what is added at their lookup tokens."""

    initial_BD: Tensor
    """The module's own output at each row's lookup token."""
    tokens_per_call: int
    """Token positions computed in one call, pads included."""

    def __call__(self, offset_BD: Tensor) -> Tensor:
        """Logits (N, V) at the scored positions, rows in order, each row's positions in order."""
        ...

    def narrowed(self, kept: Sequence[int]) -> RowForward:
        """The same for some of the rows."""
        ...


class PlainForward:
    """The oracle: every call runs the whole model on whole, padded rows."""

    def __init__(self, parts: Anatomy, module: nn.Module, layer: int, rows: Sequence[Row]) -> None:
        self._model, self._module = parts.model, module
        self._again = (parts, module, layer, rows)
        device = input_device(parts.model)
        self._inputs = model_inputs([row.ids for row in rows], device)
        self._lookup_B = torch.tensor([row.lookup for row in rows])
        self._rows_N, self._positions_N = _scored(rows, start=0)
        self.tokens_per_call = self._inputs["input_ids"].numel()
        self.initial_BD = self._read_initial()

    def __call__(self, offset_BD: Tensor) -> Tensor:
        with tapped(self._module, on_output=_adder(self._lookup_B, offset_BD)):
            logits_BTV = self._model(**self._inputs, use_cache=False).logits
        return logits_BTV[self._rows_N.to(logits_BTV.device), self._positions_N.to(logits_BTV.device)]

    def narrowed(self, kept: Sequence[int]) -> PlainForward:
        """The same for some of the rows."""
        parts, module, layer, rows = self._again
        return PlainForward(parts, module, layer, [rows[i] for i in kept])

    def _read_initial(self) -> Tensor:
        with torch.no_grad(), captured(self._module, stop=True) as found:
            self._model(**self._inputs, use_cache=False)
        return picked(found.gave, self._lookup_B)


class ReplayForward:
    """Calls run only each row's suffix (lookup token to end), what lies above the edit, the scored logits."""

    def __init__(self, parts: Anatomy, module: nn.Module, layer: int, rows: Sequence[Row]) -> None:
        self._model, self._module, self._blocks = parts.model, module, parts.blocks
        self._device = input_device(parts.model)
        self._rows = list(rows)
        # Where the module's output is simply added to the block's, the block above starts from that sum; else the block
        # itself runs again, as the plain forward would.
        adds = module is parts.block(layer) or (module is parts.mlp(layer) and parts.architecture.mlp_adds)
        self._starts_above = adds and layer + 1 < len(self._blocks)
        self._start = layer + 1 if self._starts_above else layer
        self._prefix, self._passage, self.initial_BD = self._record(rows)
        self._prepare()

    def narrowed(self, kept: Sequence[int]) -> ReplayForward:
        """The same for some of the rows; what was recorded is kept."""
        index = list(kept)
        fewer = copy.copy(self)
        fewer._rows = [self._rows[i] for i in index]
        fewer._prefix = self._prefix.narrowed(index)
        width = max(len(row.ids) - row.lookup for row in fewer._rows)
        fewer._passage = Passage(self._passage.hidden_BTD[index, :width], self._passage.tuple_output)
        fewer.initial_BD = self.initial_BD[index]
        fewer._prepare()
        return fewer

    def _prepare(self) -> None:
        # All that a call indexes by lies where it is used: a copy from the host would wait in every pass.
        head = self._model.get_output_embeddings().weight.device
        self._rows_N, self._positions_N = (x.to(head) for x in _scored(self._rows, start=1))
        self._first_B = torch.zeros(len(self._rows), dtype=torch.long, device=self._passage.hidden_BTD.device)
        self._inputs = self._suffix_inputs(self._rows)
        self.tokens_per_call = self._inputs["input_ids"].numel()

    def __call__(self, offset_BD: Tensor) -> Tensor:
        add = _adder(self._first_B, offset_BD)
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
            output = self._model(**self._inputs, past_key_values=self._prefix.fresh(), use_cache=True)
        return output.logits[0]

    @torch.no_grad()
    def _record(self, rows: Sequence[Row]) -> tuple[_Prefix, Passage, Tensor]:
        """Full forwards, once: prefixes' keys and values, suffixes' hidden states, the module's initial output."""
        lookup_B = torch.tensor([row.lookup for row in rows])
        width = max(len(row.ids) - row.lookup for row in rows)
        prefix = _Prefix(lookup_B)
        hidden_BSD, initial_BD, tuple_output = torch.empty(0), torch.empty(0), False
        most = RECORD_TOKENS.get(self._device.type, RECORD_TOKENS["cuda"])
        for batch in token_batches([len(row.ids) for row in rows], most):
            cache = DynamicCache()  # no config: full-length layers also where the model slides its window
            outputs: list[Tensor] = []
            at_b = lookup_B[batch]
            with (
                watched(self._blocks[self._start]) as passages,
                tapped(self._module, on_output=lambda states, at=at_b, out=outputs: out.append(picked(states, at))),  # type: ignore[misc]
            ):
                inputs = model_inputs([rows[i].ids for i in batch], self._device)
                self._model.base_model(**inputs, past_key_values=cache, use_cache=True)
            prefix.keep(cache, batch)
            seen_bTD, found_bD = passages[0].hidden_BTD, outputs[0]
            if not hidden_BSD.numel():
                hidden_BSD = seen_bTD.new_zeros(len(rows), width, seen_bTD.shape[2])
                initial_BD = found_bD.new_zeros(len(rows), found_bD.shape[1])
            tail_bSD = _tail(seen_bTD, at_b, width)
            hidden_BSD[batch], initial_BD[batch] = tail_bSD, found_bD
            tuple_output = passages[0].tuple_output
        return prefix, Passage(hidden_BSD, tuple_output), initial_BD

    def _suffix_inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        inputs = model_inputs([row.ids[row.lookup :] for row in rows], self._device)
        lookup_B1 = torch.tensor([[row.lookup] for row in rows], device=self._device)
        last_B1 = inputs["attention_mask"].sum(1, keepdim=True) - 1
        steps_BS = torch.minimum(inputs["position_ids"], last_B1)  # pads repeat the last position: never out of range
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": torch.cat([self._prefix.mask_BP.to(self._device), inputs["attention_mask"]], dim=1),
            "position_ids": lookup_B1 + steps_BS,
        }


def row_forward(parts: Anatomy, module: nn.Module, layer: int, rows: Sequence[Row], *, replay: bool) -> RowForward:
    """Replay where it is asked for and applies, else the plain forward: the numbers are the same."""
    if replay and parts.architecture.replay:
        return ReplayForward(parts, module, layer, rows)
    return PlainForward(parts, module, layer, rows)


@contextmanager
def resumed(blocks: Sequence[nn.Module], layer: int, passage: Passage) -> Iterator[None]:
    """Start forwards at block `layer` from the hidden states it was given before; the blocks below are not computed."""
    with (
        skipped(blocks[:layer], tuple_output=passage.tuple_output),
        tapped(blocks[layer], on_input=lambda _hidden: passage.hidden_BTD),
    ):
        yield


class _Prefix:
    """Keys and values of what comes before each row's lookup token, left-padded, never grown."""

    def __init__(self, lookup_B: Tensor) -> None:
        self._lookup_B = lookup_B
        self._width = int(lookup_B.max())
        self._source_BP = torch.arange(self._width) - (self._width - lookup_B).unsqueeze(1)
        self.mask_BP = (self._source_BP >= 0).long()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def keep(self, cache: DynamicCache, batch: Sequence[int]) -> None:
        """Take the prefixes of the rows in `batch` out of their cache; pads become zeros, so that they stay finite."""
        for number, layer in enumerate(cache.layers):
            assert layer.keys is not None
            assert layer.values is not None
            if number == len(self._keys):
                self._keys.append(self._room(layer.keys))
                self._values.append(self._room(layer.values))
            self._keys[number][batch] = _move(layer.keys, self._source_BP[batch])
            self._values[number][batch] = _move(layer.values, self._source_BP[batch])

    def narrowed(self, kept: list[int]) -> _Prefix:
        """The prefixes of some rows, cut to the longest of them."""
        fewer = _Prefix(self._lookup_B[kept])
        cut = self._width - fewer._width
        fewer._keys = [keys[kept, :, cut:] for keys in self._keys]
        fewer._values = [values[kept, :, cut:] for values in self._values]
        return fewer

    def fresh(self) -> Cache:
        """A cache whose layers answer with prefix + new, and keep nothing."""
        return Cache(layers=[_FrozenLayer(k, v) for k, v in zip(self._keys, self._values, strict=True)])

    def _room(self, like_bHTd: Tensor) -> Tensor:
        return like_bHTd.new_zeros(len(self._source_BP), like_bHTd.shape[1], self._width, like_bHTd.shape[3])


class _FrozenLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True  # no empty tensors in every pass

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _move(states_BHTd: Tensor, source_BP: Tensor) -> Tensor:
    source = source_BP.to(states_BHTd.device)
    index = source.clamp(min=0)[:, None, :, None].expand(-1, states_BHTd.shape[1], -1, states_BHTd.shape[3])
    return states_BHTd.gather(2, index).masked_fill((source < 0)[:, None, :, None], 0)


def _tail(hidden_BTD: Tensor, lookup_B: Tensor, width: int) -> Tensor:
    """Hidden states from the lookup token on (B, width, D); what a shorter row has there nothing reads."""
    index = (lookup_B.unsqueeze(1) + torch.arange(width)).clamp(max=hidden_BTD.shape[1] - 1).to(hidden_BTD.device)
    return hidden_BTD.gather(1, index.unsqueeze(2).expand(-1, -1, hidden_BTD.shape[2]))


def _scored(rows: Sequence[Row], *, start: int) -> tuple[Tensor, Tensor]:
    """(row, position) of every scored position; `start=1` counts positions from the lookup token."""
    pairs = [(i, p - start * row.lookup) for i, row in enumerate(rows) for p in row.scored]
    return torch.tensor([i for i, _ in pairs]), torch.tensor([p for _, p in pairs])


def _adder(position_B: Tensor, offset_BD: Tensor) -> Any:
    """A tap that adds `offset_BD` at `position_B` of each row, differentiably."""

    def add(output_BTD: Tensor) -> Tensor:
        device = output_BTD.device
        rows = torch.arange(len(position_B), device=device)
        offset = offset_BD.to(device, output_BTD.dtype)
        return output_BTD.index_put((rows, position_B.to(device)), offset, accumulate=True)

    return add


def picked(states_BTD: Tensor, position_B: Tensor) -> Tensor:
    """The states (B, D) at one position of each row."""
    rows = torch.arange(len(position_B), device=states_BTD.device)
    return states_BTD[rows, position_B.to(states_BTD.device)]
