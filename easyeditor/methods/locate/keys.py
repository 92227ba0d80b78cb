"""Inputs (keys) and outputs of a module at the lookup token. Axes: B rows, K input width, D output width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import captured
from easyeditor.lm.loading import input_device
from easyeditor.lm.recording import picked
from easyeditor.lm.tokens import Row, model_inputs


@dataclass(frozen=True)
class Lookup:
    """Key and output of the edited projection at a request's lookup token: of the bare prompt (k^u, W k^u) and averaged
    over the contexts (kbar, W kbar; float64)."""

    plain_K: Tensor
    mean_K: Tensor
    plain_D: Tensor
    mean_D: Tensor


@torch.no_grad()
def read_at_lookup(parts: Anatomy, module: nn.Module, rows: Sequence[Row], budget: Budget) -> tuple[Tensor, Tensor]:
    """Input (B, K) and output (B, D) of `module` at each row's lookup token.

    Rows are cut after their lookup token, sorted by length and batched under the `budget`; the forward ends at the
    module.
    """
    inputs: list[Tensor] = [torch.empty(0)] * len(rows)
    outputs: list[Tensor] = [torch.empty(0)] * len(rows)

    def read(chunk: list[int]) -> None:
        inputs_BK, outputs_BD = _one_batch(parts, module, [rows[i] for i in chunk])
        for place, i in enumerate(chunk):
            inputs[i], outputs[i] = inputs_BK[place], outputs_BD[place]

    budget.each([row.lookup + 1 for row in rows], read)
    return torch.stack(inputs), torch.stack(outputs)


def lookup_of(keys_BK: Tensor, outputs_BD: Tensor, plain: int) -> Lookup:
    """From the keys of a request's contexts and the projection's answers to them; row `plain` is the bare prompt's."""
    return Lookup(keys_BK[plain], keys_BK.double().mean(0), outputs_BD[plain], outputs_BD.double().mean(0))


def lookups_of(parts: Anatomy, module: nn.Module, rows: Sequence[Sequence[Row]], budget: Budget) -> list[Lookup]:
    """Read all requests' rows in one go; a request's first row is its bare prompt, the others have contexts."""
    flat = [row for own in rows for row in own]
    keys_BK, outputs_BD = read_at_lookup(parts, module, flat, budget)
    found, place = [], 0
    for own in rows:
        keys_bK, outputs_bD = keys_BK[place : place + len(own)], outputs_BD[place : place + len(own)]
        found.append(Lookup(keys_bK[0], keys_bK[1:].double().mean(0), outputs_bD[0], outputs_bD[1:].double().mean(0)))
        place += len(own)
    return found


def _one_batch(parts: Anatomy, module: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    inputs = model_inputs([row.ids[: row.lookup + 1] for row in rows], input_device(parts.model))
    with captured(module, stop=True) as found:
        parts.model(**inputs, use_cache=False)
    lookup_B = torch.tensor([row.lookup for row in rows])
    return picked(found.given, lookup_B), picked(found.gave, lookup_B)
