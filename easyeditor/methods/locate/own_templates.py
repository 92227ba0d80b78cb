"""The edited requests' own prompts with other names in the subject's place: rows, keys, and sums along a sequence.

Axes: T tokens, K key width, r rank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import read_json
from easyeditor.base.paths import SHIPPED
from easyeditor.lm.architectures import longest
from easyeditor.lm.hooks import StopForward, stopping, tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import SLOT, encode, model_inputs, whole
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.spread_hparams import SpreadHyperParams
from easyeditor.values.edit import EditRequest

NAMES = SHIPPED / "data" / "names.json"
"""Names of people, places, organisations and works; none is a subject or an answer of a request of data/."""


@dataclass(frozen=True)
class Sums:
    """Of the edits committed so far, by layer: K_p K_p^T and the sum of M_own (K, K), float64; and how many."""

    edits: int = 0
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    own: Mapping[int, Tensor] = field(default_factory=dict)

    def after(self, memory: Mapping[str, Tensor]) -> Sums:
        """With an edit's `keys.<layer>` and `own.<layer>`, (K, any number) each; one without the latter counts for K_p
        alone."""
        made: dict[str, dict[int, Tensor]] = {"keys": dict(self.keys), "own": dict(self.own)}
        for name, columns in memory.items():
            kind, _, layer = name.partition(".")
            gram_KK, sums = columns.double() @ columns.double().T, made[kind]
            sums[int(layer)] = sums[int(layer)] + gram_KK if int(layer) in sums else gram_KK
        return Sums(self.edits + any(name.startswith("own.") for name in memory), **made)


class OwnTemplates:
    """`held_own_templates` names in each request's own prompt, and the keys of what comes of it."""

    def __init__(self, method: LocateMethod[Any], hparams: SpreadHyperParams) -> None:
        self._method, self._hparams = method, hparams
        self._names, self._kinds = names_of(NAMES if hparams.held_names is None else Path(hparams.held_names))

    def rows(self, requests: Sequence[EditRequest]) -> list[tuple[int, ...]]:
        """The token rows of an edit. A name with a subject of the edit in it, or in one, is left out.

        Raises:
            DataError: no name is left for a request.
        """
        method, found = self._method, list[tuple[int, ...]]()
        subjects = {f" {request.subject} ".casefold() for request in requests}
        limit = longest(method.model, self._hparams.max_length)
        for request in requests:
            names = self._kinds.get(request.before + SLOT + request.after, self._names)
            free = [n for n in names if not any(f" {n} ".casefold() in s or s in f" {n} ".casefold() for s in subjects)]
            if not free:
                raise DataError(
                    f"{whole(request)}: held_names has no name for its prompt that no subject here has in it"
                )
            draw = random.Random(f"{self._hparams.seed} {request.prompt}")
            for name in draw.sample(free, min(self._hparams.held_own_templates, len(free))):
                ids = encode(method.tok, request.before + name + request.after, method.prompting)
                found.append(tuple(ids[:limit]))
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def read(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """`own.<layer>` -> F (K, r) with F F^T = M_own, the second moment of the keys of all tokens but the first, on
        the model as it is; r is the smaller of T and K. One forward for all layers, which ends at the last of them."""
        method, rows = self._method, self.rows(requests)
        layers, device = method.layers, input_device(method.model)
        found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}

        def read(batch: list[int]) -> None:
            def keep(layer: int, keys_BTK: Tensor) -> None:
                for keys_TK, n in zip(keys_BTK, batch, strict=True):
                    found[layer][n] = keys_TK[1 : len(rows[n])]
                if layer == max(layers):
                    raise StopForward

            with ExitStack() as taps:
                taps.enter_context(stopping())
                for layer in layers:
                    taps.enter_context(tapped(method.parts.rewrite(layer), on_input=partial(keep, layer)))
                method.model(**model_inputs([rows[n] for n in batch], device), use_cache=False)

        method.budget.each([len(row) for row in rows], read)
        return {f"own.{layer}": factor(torch.cat(keys)) for layer, keys in found.items()}


def factor(keys_TK: Tensor) -> Tensor:
    """F (K, r) with F F^T = K^T K / T: the keys, or the triangle of their QR where they are many."""
    kept_TK = keys_TK.to(torch.promote_types(keys_TK.dtype, torch.float32)) / max(1, len(keys_TK)) ** 0.5
    return (torch.linalg.qr(kept_TK, mode="r")[1] if len(kept_TK) > kept_TK.shape[1] else kept_TK).T.contiguous()


def names_of(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """All names of a file, each once; and by prompt, where the file gives them so.

    Raises:
        ConfigError: not such a file. DataError: unreadable.
    """
    value = read_json(path)
    kinds = value if isinstance(value, dict) else {}
    lists = list(kinds.values()) or [value]
    if not all(isinstance(names, list) and names for names in lists) or not all(
        isinstance(name, str) and name.strip() for names in lists for name in names
    ):
        raise ConfigError(f"{path}: held_names must be a JSON list of names, or an object from prompts to such lists")
    if wrong := [kind for kind in kinds if kind.count(SLOT) != 1]:
        raise ConfigError(f"{path}: held_names: {wrong[0]!r} must be a prompt with exactly one {SLOT} for the subject")
    return list(dict.fromkeys(name for names in lists for name in names)), kinds
