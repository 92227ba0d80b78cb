"""Keys and values of what comes before: the caches that replay and its recording go on from, left-padded, never grown.

Axes: B rows, P longest prefix, T tokens in a cache, H key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from easyeditor.lm.architectures import type_of
from easyeditor.lm.hooks import StopForward
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import model_inputs, sent

States = tuple[Tensor, Tensor]
"""Keys and values of one block (B, H, P, d); both of no axis where no row has a prefix."""

_NOTHING: States = (torch.empty(0), torch.empty(0))


class Prefixes:
    """The first tokens of rows in the blocks from `first` on; pads are zeros, so that they stay finite."""

    def __init__(self, lengths_B: Tensor, first: int, states: Sequence[States]) -> None:
        self.lengths_B, self.first, self._states = lengths_B, first, list(states)
        self.width = int(lengths_B.max())
        self.mask_BP = (_places(lengths_B, self.width) >= 0).long()

    @staticmethod
    def none(rows: int, blocks: int) -> Prefixes:
        """Rows that start from nothing."""
        return Prefixes(torch.zeros(rows, dtype=torch.long), 0, [_NOTHING] * blocks)

    @staticmethod
    def of(cache: Cache, lengths_B: Tensor, before_B: Tensor, first: int) -> Prefixes:
        """The tokens of each row in a cache from `before_B` on, in the blocks from `first` on."""
        states = [(layer.keys, layer.values) for layer in cache.layers[first:]]
        width = int(lengths_B.max())
        if not width:
            return Prefixes(lengths_B, first, [_NOTHING] * len(states))
        places_BP = _places(lengths_B, width)
        source_BP = torch.where(places_BP >= 0, places_BP + before_B.unsqueeze(1), -1)
        at = {device: source_BP.to(device, non_blocking=True) for device in {keys.device for keys, _ in states}}
        moved = [(_move(k, at[k.device]), _move(v, at[v.device])) for k, v in states]
        return Prefixes(lengths_B, first, moved)

    @staticmethod
    def joined(parts: Sequence[Prefixes], order: Sequence[int] | None = None) -> Prefixes:
        """The rows of several, in `order`, padded to the longest. The parts are used up, block by block: nothing is
        held twice."""
        lengths_B = torch.cat([part.lengths_B for part in parts])
        index = list(range(len(lengths_B))) if order is None else list(order)
        as_they_are = index == sorted(index)
        if len(parts) == 1 and as_they_are:
            return parts[0]
        width, first = int(lengths_B.max()), parts[0].first
        filled = [part for part in parts if part.width]
        if not filled:
            return Prefixes(lengths_B[index], first, parts[0]._states)
        at, states = _sent(index, filled[0]._states), []
        for number, like in enumerate(filled[0]._states):
            own = [_widened(part._states[number], len(part.lengths_B), width, like) for part in parts]
            for part in parts:
                part._states[number] = _NOTHING
            keys, values = (torch.cat(both) for both in zip(*own, strict=True))
            states.append((keys, values) if as_they_are else (keys[at[keys.device]], values[at[values.device]]))
        return Prefixes(lengths_B[index], first, states)

    def cut(self, rows: Sequence[int], lengths_B: Tensor) -> Prefixes:
        """Some rows (one may be asked for often), each to its first `lengths_B` tokens."""
        index = list(rows)
        at = _sent(index, self._states)
        chosen = Cache(layers=[_Frozen(k[at[k.device]], v[at[v.device]]) for k, v in self._states])
        return Prefixes.of(chosen, lengths_B, self.width - self.lengths_B[index], self.first)

    def narrowed(self, kept: Sequence[int]) -> Prefixes:
        """Some rows, cut to the longest of them."""
        lengths_B = self.lengths_B[list(kept)]
        cut = self.width - int(lengths_B.max())
        if cut == self.width:
            return Prefixes(lengths_B, self.first, [_NOTHING] * len(self._states))
        at = _sent(kept, self._states)
        fewer = [(k[at[k.device], :, cut:], v[at[v.device], :, cut:]) for k, v in self._states]
        return Prefixes(lengths_B, self.first, fewer)

    def fresh(self) -> Cache:
        """A cache whose layers answer with prefix + new, and keep nothing. The blocks below `first` do not ask it."""
        return Cache(layers=[_Frozen(*states) for states in self._all()])

    def keeping(self) -> Cache:
        """A cache whose layers keep prefix + new; the forward ends where the last block has given its own."""
        layers = [_Kept(*states) for states in self._all()]
        layers[-1].last = True
        return Cache(layers=layers)

    def _all(self) -> list[States]:
        """States for every block; those below `first` are there for their length."""
        return [self._states[0]] * self.first + self._states


class _Frozen(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True  # no empty tensors in every pass

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> States:
        assert self.keys is not None
        assert self.values is not None
        if self.keys.ndim == 1:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _Kept(_Frozen):
    last = False

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> States:
        self.keys, self.values = super().update(key_states, value_states)
        if self.last:
            raise StopForward
        return self.keys, self.values


@torch.no_grad()
def caches(model: PreTrainedModel) -> bool:
    """Can a text go on from keys and values alone? Not where a model gives none back, or a block also has a state of
    its own (a convolution, a recurrence)."""
    if type_of(model)[1]:
        return True
    try:
        cache = model(**model_inputs([[1, 2, 3]], input_device(model)), use_cache=True).past_key_values
    except Exception:  # some give back a state of another name, some cannot start one without their own cache
        return False
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    return type(cache) is DynamicCache and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def unmasked(inputs: Mapping[str, Tensor], blocks: int) -> dict[str, Any]:
    """Inputs of whole, right-padded rows without their mask: attention is causal, so no token that counts sees a pad.

    transformers looks into a mask on the host, which waits for the device; without one it looks into the positions,
    unless there is a cache. This one is empty and keeps nothing.
    """
    own = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return {**own, "past_key_values": Prefixes.none(1, blocks).fresh()}


def _places(lengths_B: Tensor, width: int) -> Tensor:
    """Number of the token at each of `width` left-padded places (B, P); negative for pads."""
    return torch.arange(width) - (width - lengths_B).unsqueeze(1)


def _move(states_BHTd: Tensor, source_BP: Tensor) -> Tensor:
    index = source_BP.clamp(min=0)[:, None, :, None].expand(-1, states_BHTd.shape[1], -1, states_BHTd.shape[3])
    return states_BHTd.gather(2, index).masked_fill((source_BP < 0)[:, None, :, None], 0)


def _sent(rows: Sequence[int], states: Sequence[States]) -> dict[torch.device, Tensor]:
    """Row numbers on every device that holds states: each is sent to once, not for every block."""
    return {device: sent(list(rows), device) for device in {keys.device for keys, _ in states}}


def _widened(states: States, rows: int, width: int, like: States) -> States:
    if states[0].ndim == 1:
        return tuple(x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in like)  # type: ignore[return-value]
    return tuple(torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in states)  # type: ignore[return-value]
