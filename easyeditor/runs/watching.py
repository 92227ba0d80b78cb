"""Watching a sequence: growth and drift of the edited weights, nearness of new keys to earlier ones, values' norms.

The keys of every edit that is kept are saved next to its delta, so a resumed run has the same numbers bit for bit.
Memory: the keys of one layer in float32, 4 bytes x key width an edit.

Axes: N new keys, M earlier keys, K key width.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from easyeditor.base.errors import DataError
from easyeditor.base.files import write_tensors
from easyeditor.base.reading import read_tensors
from easyeditor.editing.editor import Editor
from easyeditor.lm.spectrum import frobenius, leading_rows, turned
from easyeditor.results.watched import Watched
from easyeditor.values.edit import EditResult

KEYS = "keys.safetensors"


class Watcher:
    """Made before the first edit is committed: what it measures is against the weights of that moment."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        weights = {name: editor.model.get_parameter(name) for name in editor.method.weight_names}
        self._norms = {name: frobenius(weight) for name, weight in weights.items()}
        self._leading = {name: leading_rows(weight) for name, weight in weights.items()}
        self._keys = Keys()

    def keep(self, keys_NK: Tensor | None, place: Path, *, save: bool) -> None:
        """An edit with these keys goes into the model; with `save` they are written next to its delta at `place`."""
        if save and keys_NK is not None:
            write_tensors(place / KEYS, {"keys": keys_NK})
        self._keys.add(keys_NK)

    def known(self, place: Path) -> None:
        """An edit saved at `place` by an earlier process goes into the model. Raises DataError: damaged keys."""
        self._keys.add(saved_keys(place))

    def nearest(self, keys_NK: Tensor | None) -> float | None:
        """`Keys.nearest` to the edits that are kept."""
        return None if keys_NK is None else self._keys.nearest(keys_NK)

    def seen(self, result: EditResult, key_cosine: float | None) -> Watched:
        """The step's numbers, with the weights as they are now."""
        weights = {name: self._editor.model.get_parameter(name) for name in self._norms}
        return Watched(
            growth={name: _ratio(frobenius(weight), self._norms[name]) for name, weight in weights.items()},
            drift={name: turned(self._leading[name], leading_rows(weight)) for name, weight in weights.items()},
            key_cosine=key_cosine,
            anchor=over_anchor(result),
        )


class Keys:
    """Unit keys of the edits that are kept, in one block that grows by doubling."""

    def __init__(self) -> None:
        self._block_MK: Tensor | None = None
        self._count = 0
        self._whole = True  # no edit without its keys

    def add(self, keys_NK: Tensor | None) -> None:
        """Take one edit's keys; None: it has none, and later ones are not measured."""
        if keys_NK is None:
            self._whole = False
            return
        self._check_width(keys_NK)
        needed = self._count + len(keys_NK)
        if self._block_MK is None or needed > len(self._block_MK):
            grown_MK = keys_NK.new_zeros(max(64, 2 * needed), keys_NK.shape[1])
            if self._block_MK is not None:
                grown_MK[: self._count] = self._block_MK[: self._count]
            self._block_MK = grown_MK
        self._block_MK[self._count : needed] = _unit(keys_NK)
        self._count = needed

    def nearest(self, keys_NK: Tensor) -> float | None:
        """The largest |cosine| of new keys to earlier ones; None where there is no earlier one, or one is unknown."""
        if self._block_MK is None or not self._whole:
            return None
        self._check_width(keys_NK)
        return float((_unit(keys_NK) @ self._block_MK[: self._count].T).abs().max())

    def _check_width(self, keys_NK: Tensor) -> None:
        if self._block_MK is not None and self._block_MK.shape[1] != keys_NK.shape[1]:
            found, other = self._block_MK.shape[1], keys_NK.shape[1]
            raise DataError(f"keys of width {found} and of width {other} in one run: a {KEYS} in it is another model's")


def keys_of(result: EditResult) -> Tensor | None:
    """The keys (N, K) an edit was solved with at its last layer, float32 on the CPU; None for a method without any."""
    found = [trace[max(trace)].vectors.get("prefixed_key") for trace in result.traces if trace]
    keys = [key for key in found if key is not None]
    return torch.stack(keys).float().cpu() if keys and len(keys) == len(result.traces) else None


def saved_keys(place: Path) -> Tensor | None:
    """The keys saved next to a delta; None where there are none. Raises DataError: not readable."""
    from safetensors import SafetensorError

    path = place / KEYS
    if not path.exists():
        return None
    try:
        keys = read_tensors(path)["keys"]
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: not readable keys of an edit ({error}); remove it to go on without them") from error
    if keys.ndim != 2 or keys.dtype != torch.float32:
        raise DataError(f"{path}: not the keys of an edit ({keys.dtype} {tuple(keys.shape)}); remove it to go on")
    return keys


def over_anchor(result: EditResult) -> float | None:
    """The largest ||v*|| over the norm anchor among the requests; None for a method without an anchor."""
    notes = [layer.notes for trace in result.traces for layer in trace.values()]
    ratios = [_ratio(n["value_norm"], n["norm_anchor"]) for n in notes if "value_norm" in n and "norm_anchor" in n]
    return max(ratios, default=None)


def _unit(keys_NK: Tensor) -> Tensor:
    return torch.nn.functional.normalize(keys_NK, dim=1)


def _ratio(now: float, first: float) -> float:
    return now / first if first else math.nan
