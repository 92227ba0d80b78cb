"""MEMIT: many facts at once, spread over several layers.

Axes: N requests, G context groups, K key width, D model width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from easyeditor.lm.tokens import SLOT, Row
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.updates import spread_update
from easyeditor.methods.locate.value_search import Found
from easyeditor.methods.memit.hparams import MEMITHyperParams
from easyeditor.progress import Progress
from easyeditor.records import EditRequest, EditResult, LayerTrace, WeightDelta

CONTEXT_LENGTH, CONTEXT_COUNT = 10, 5  # MEMIT's contexts: five texts of ten tokens beside the bare prompt


class MEMIT(LocateMethod[MEMITHyperParams]):
    """Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229, algorithm 1).

    Each request's target z is searched at the last layer; then layer by layer the remaining difference is shared out
    and
    dW = R K^T (lambda C + K K^T)^-1 solved in float64.
    """

    @property
    def context_groups(self) -> list[list[str]]:
        """The bare prompt alone, and the texts together: the mean over groups gives the bare prompt weight 1/2."""
        groups = super().context_groups
        if len(groups) > 1 and groups[0] == [SLOT] and all(len(group) == 1 for group in groups):
            return [[SLOT], [text for group in groups[1:] for text in group]]
        return groups

    def context_lengths(self) -> list[tuple[int, int]]:
        return [(CONTEXT_LENGTH, CONTEXT_COUNT)]

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """One delta per layer that writes all `requests` at once."""
        started = time.perf_counter()
        layers = self.layers
        moments = [self.moment(layer) for layer in layers]  # missing statistics are found before hours of search
        with frozen(self.model):
            found = self.values(requests, self.parts.block(layers[-1]), layers[-1], progress)
            target_ND = torch.stack([f.target_D for f in found])
            rows = [self._key_rows(request) for request in requests]
            deltas: list[WeightDelta] = []
            traces: list[dict[int, LayerTrace]] = [{} for _ in requests]
            for i, layer in enumerate(layers):
                with applied(self.model, deltas):
                    keys_NK, bare_NK = self._keys(layer, rows)
                    missing_ND = target_ND.double() - self._values([r[0][0] for r in rows]).double()
                residual_ND = missing_ND / (len(layers) - i)
                adjusted_KN = spread_update(keys_NK, moments[i], self.hparams.mom2_update_weight)
                deltas.append(self.delta(layer, adjusted_KN, residual_ND.T))
                size = float((residual_ND.T @ adjusted_KN.T).norm())
                for n, trace in enumerate(traces):
                    trace[layer] = _trace(found[n], residual_ND[n], bare_NK[n], keys_NK[n], size)
        return EditResult(
            method=self.hparams.alg_name,
            requests=tuple(requests),
            deltas=tuple(deltas),
            traces=tuple(traces),
            contexts=self.contexts,
            seconds=time.perf_counter() - started,
        )

    def _key_rows(self, request: EditRequest) -> list[list[Row]]:
        """Rows in groups; the first row of the first group is the bare prompt's."""
        groups = [
            [prompt_row(self.tok, request, text, self.hparams.fact_token) for text in g] for g in self.context_groups
        ]
        if self.context_groups[0][0] != SLOT:
            groups.insert(0, [prompt_row(self.tok, request, SLOT, self.hparams.fact_token)])
        return groups

    def _keys(self, layer: int, rows: Sequence[list[list[Row]]]) -> tuple[Tensor, Tensor]:
        """Keys (N, K), averaged within groups and then over groups, in float64; and the bare prompts' keys (N, K)."""
        flat = [row for groups in rows for group in groups for row in group]
        keys_BK, _ = read_at_lookup(self.parts, self.parts.rewrite(layer), flat, self.hparams.batch_tokens)
        used = len(self.context_groups)
        place, means, bare = 0, [], []
        for groups in rows:
            bare.append(keys_BK[place])
            averages = []
            for group in groups:
                averages.append(keys_BK[place : place + len(group)].double().mean(0))
                place += len(group)
            means.append(torch.stack(averages[-used:]).mean(0))
        return torch.stack(means), torch.stack(bare)

    def _values(self, rows: Sequence[Row]) -> Tensor:
        """What the last layer's block gives at the lookup token of the bare prompts (N, D)."""
        block = self.parts.block(self.layers[-1])
        return read_at_lookup(self.parts, block, rows, self.hparams.batch_tokens)[1]


def _trace(found: Found, residual_D: Tensor, bare_K: Tensor, mean_K: Tensor, delta_norm: float) -> LayerTrace:
    return LayerTrace(
        numerator_norm=float(residual_D.norm()),
        denominator=None,
        key_norm=float(bare_K.norm()),
        prefixed_key_norm=float(mean_K.norm()),
        value_norm_before=float(found.initial_D.norm()),
        value_norm_after=float(found.target_D.norm()),
        loss_first=found.losses[0][0],
        loss_last=found.losses[-1][0],
        steps=len(found.losses),
        delta_norm=delta_norm,
        losses=tuple(found.losses),
        vectors={
            "target": found.target_D.float().cpu(),
            "target_init": found.initial_D.float().cpu(),
            "key": mean_K.float().cpu(),
            "residual": residual_D.float().cpu(),
        },
    )
