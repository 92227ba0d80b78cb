"""The inverse of what is held in place along a sequence of edits, H + K_p K_p^T, K_p the keys of committed edits.

Each edit's keys change it by a term of rank N, so an edit's time does not depend on how many came before.

Axes: N requests of one edit, K key width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from easyeditor.base.errors import DataError
from easyeditor.methods.locate.updates import inverse_with


def check_columns(name: str, columns: Tensor, width: int) -> None:
    """Raise DataError unless what a saved edit remembers has columns of this width."""
    if columns.ndim != 2 or len(columns) != width:
        raise DataError(f"a saved edit's {name} is {tuple(columns.shape)}, not ({width}, …): another model's")


class Held:
    """What is held in place after the edits committed so far: one edit's keys (`layer` -> (K, N)) after the others'.

    Nothing is computed before `inverse` asks; keys are held until they are in it. Edits enter one by one in the order
    of their commits, so a run that goes on, or one whose edits were taken back, comes to the same bits.
    """

    def __init__(self, before: Held | None = None, keys: Mapping[int, Tensor] | None = None) -> None:
        self._before, self._keys = before, dict(keys or {})
        self._inverses: dict[int, Tensor] = {}

    def inverse(self, layer: int, unedited: Callable[[], Tensor]) -> Tensor | None:
        """(H + K_p K_p^T)^-1 (K, K) of a layer, float64; None where no keys are held. `unedited` gives H^-1."""
        node: Held | None = self
        later: list[Held] = []
        while node is not None and layer not in node._inverses:
            if layer in node._keys:
                later.append(node)
            node = node._before
        if node is None and not later:
            return None
        made_KK = unedited() if node is None else node._inverses[layer]
        for own in reversed(later):
            made_KK = inverse_with(made_KK, own._keys[layer].to(made_KK))
            own._inverses[layer] = made_KK
            del own._keys[layer]
            if node is not None:
                del node._inverses[layer]
            node = own
        return made_KK

    def has_inverse(self, layer: int) -> bool:
        """Was the inverse of a layer made, of these edits' keys or of some of them?"""
        node: Held | None = self
        while node is not None and layer not in node._inverses:
            node = node._before
        return node is not None
