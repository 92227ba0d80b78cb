"""Collapse safety by layer: what an update that writes a mean key does to subjects in first place, from keys alone.

Axes: B rows, L layers, K key width, D model width.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from easyeditor.dataset.sets import starts_with_one_word
from easyeditor.lm.hooks import tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.recording import picked
from easyeditor.lm.tokens import SLOT, Row, encode, model_inputs
from easyeditor.lm.weights import frozen
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.values.edit import EditRequest

SAFETY = (
    *("reach", "most reach", "least reach", "|v0| bare", "|v0| mean"),
    *("smallest |denominator|", "median", "largest"),
)


@dataclass(frozen=True, kw_only=True)
class LayerSafety:
    """One layer, over subjects in first place: medians of reach |k^u.u|/|kbar.u| and of |v0|, and the extremes.

    u is kbar (C = identity). ROME divides by k^u.u: its update is larger by 1/reach than the key's own. C-ROME divides
    by kbar.u, and moves the first token's output by reach times what it writes.
    """

    layer: int
    reach: float
    most_reach: float
    least_reach: float
    bare_v0: float
    mean_v0: float
    denominators: tuple[float, float, float]
    """|k^u.u|: the smallest, the median, the largest."""

    def row(self) -> list[Any]:
        """The values of the columns `SAFETY`."""
        ends = [self.reach, self.most_reach, self.least_reach]
        return [*ends, self.bare_v0, self.mean_v0, *self.denominators]


def first_place(
    tok: Any, requests: Sequence[EditRequest], limit: int, seed: int, fact_token: str = "subject_last"
) -> list[EditRequest]:
    """At most `limit` requests with a one-word subject in first place, drawn by the seed, each subject once; those
    whose token that is edited is the text's first are taken before others."""
    drawn = list({request.subject: request for request in requests if starts_with_one_word(request)}.values())
    random.Random(seed).shuffle(drawn)
    start = len(encode(tok, "a")) - len(tok("a", add_special_tokens=False)["input_ids"])  # 1 with a BOS
    whole = [request for request in drawn if prompt_row(tok, request, SLOT, fact_token).lookup == start]
    return (whole or drawn)[:limit]


@torch.no_grad()
def safety_of(method: LocateMethod[Any], requests: Sequence[EditRequest]) -> list[LayerSafety]:
    """The numbers of every layer that can be edited, from one pass over the requests in all contexts."""
    templates = [SLOT, *method.contexts]
    rows = [prompt_row(method.tok, r, text, method.hparams.fact_token) for r in requests for text in templates]
    keys, values = _all_layers(method, rows)
    made = []
    for layer, keys_BK, values_BD in zip(method.parts.dense, keys, values, strict=True):
        shape = (len(requests), len(templates), -1)
        own_K, own_D = (x.double().reshape(shape) for x in (keys_BK, values_BD))
        mean_K = own_K[:, 1:].mean(1)
        direction_K = mean_K / mean_K.norm(dim=1, keepdim=True)
        bare, usual = ((key * direction_K).sum(1).abs() for key in (own_K[:, 0], mean_K))
        reach = (bare / usual).tolist()
        made.append(
            LayerSafety(
                layer=layer,
                reach=statistics.median(reach),
                most_reach=max(reach),
                least_reach=min(reach),
                bare_v0=statistics.median(own_D[:, 0].norm(dim=1).tolist()),
                mean_v0=statistics.median(own_D[:, 1:].mean(1).norm(dim=1).tolist()),
                denominators=(float(bare.min()), statistics.median(bare.tolist()), float(bare.max())),
            )
        )
    return made


def _all_layers(method: LocateMethod[Any], rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer that can be edited, the projection's input (B, K) and the MLP's output (B, D) at each row's lookup
    token."""
    parts = method.parts
    layers = parts.dense
    keys, values = ([[torch.empty(0)] * len(rows) for _ in layers] for _ in range(2))

    def read(numbers: list[int]) -> None:
        lookup_B = torch.tensor([rows[n].lookup for n in numbers])

        def take(kept: list[Tensor], states_BTD: Tensor) -> None:
            for n, state in zip(numbers, picked(states_BTD.detach(), lookup_B).cpu(), strict=True):
                kept[n] = state

        with ExitStack() as stack:
            for n, layer in enumerate(layers):
                stack.enter_context(tapped(parts.rewrite(layer), on_input=partial(take, keys[n])))
                stack.enter_context(tapped(parts.mlp(layer), on_output=partial(take, values[n])))
            inputs = model_inputs([rows[n].ids[: rows[n].lookup + 1] for n in numbers], input_device(parts.model))
            parts.model.base_model(**inputs, use_cache=False)

    with frozen(parts.model):
        method.budget.each([row.lookup + 1 for row in rows], read)
    return [torch.stack(own) for own in keys], [torch.stack(own) for own in values]
