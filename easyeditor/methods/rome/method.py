"""ROME and C-ROME: one fact, one layer, one rank-one update. Axes: B context rows, K key width, D model width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.locate.keys import Lookup, lookups_of
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.solve import key_direction, value_direction
from easyeditor.methods.locate.targets import Found, Rows, search_values
from easyeditor.methods.rome.hparams import ROMEHyperParams
from easyeditor.progress import Progress
from easyeditor.records import EditRequest, EditResult, LayerTrace, WeightDelta


class ROME(LocateMethod[ROMEHyperParams]):
    """Rank-One Model Editing (Meng et al. 2022, arXiv 2202.05262), with C-ROME (Yang et al. 2024, arXiv 2406.11263).

    Update: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar, kbar the mean key over contexts. Published ROME takes the
    *unprefixed* key as k; C-ROME takes kbar there too (`if_c_rome`).
    """

    joint: ClassVar[bool] = False
    screens: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "C-ROME" if self.hparams.if_c_rome else "ROME"

    @property
    def remedy(self) -> str | None:
        return None if self.hparams.if_c_rome else "if_c_rome=true if_prefix=true"

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """Rank-one deltas for `requests`, each found with those before it applied; layers likewise, one after
        another."""
        started = time.perf_counter()
        deltas: list[WeightDelta] = []
        traces = []
        with frozen(self.model):
            for request in requests:
                trace = {}
                for layer in self.layers:
                    with applied(self.model, deltas):
                        delta, trace[layer] = self._edit_layer(request, layer, progress)
                    deltas.append(delta)
                traces.append(trace)
        return EditResult(
            method=self.hparams.alg_name,
            requests=tuple(requests),
            deltas=tuple(deltas),
            traces=tuple(traces),
            contexts=self.contexts,
            seconds=time.perf_counter() - started,
        )

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """Edits of their own, their value searches batched and their keys read together."""
        if len(self.layers) > 1:  # a later layer is searched with the request's own earlier edit applied
            return super().edit_each(requests, progress)
        started = time.perf_counter()
        (layer,) = self.layers
        self.prepare()  # missing statistics show at once
        found: dict[int, Found] = {}
        with frozen(self.model):
            for members, results in self.searched(requests, self.parts.mlp(layer), layer, progress):
                found |= zip(members, results, strict=True)
            lookups = self._look_up(requests, layer)
        made = [self._update(layer, found[n], lookup) for n, lookup in enumerate(lookups)]
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            EditResult(
                method=self.hparams.alg_name,
                requests=(request,),
                deltas=(delta,),
                traces=({layer: trace},),
                contexts=self.contexts,
                seconds=seconds,
            )
            for request, (delta, trace) in zip(requests, made, strict=True)
        ]

    def screen(self, requests: Sequence[EditRequest]) -> list[float]:
        """k.u of every request at every layer, on the model as it is: keys only, batched."""
        found: list[list[float]] = [[] for _ in requests]
        with frozen(self.model):
            for layer in self.layers:
                for own, lookup in zip(found, self._look_up(requests, layer), strict=True):
                    own.append(float(torch.dot(*self._key_and_direction(layer, lookup))))
        return [min(own, key=abs) for own in found]

    def _edit_layer(
        self, request: EditRequest, layer: int, progress: Progress | None
    ) -> tuple[WeightDelta, LayerTrace]:
        if self.hparams.mom2_adjustment:
            self.moment(layer)  # missing statistics show at once
        found = self._search(request, layer, progress)
        (lookup,) = self._look_up([request], layer)
        return self._update(layer, found, lookup)

    def _look_up(self, requests: Sequence[EditRequest], layer: int) -> list[Lookup]:
        templates = (SLOT, *self.contexts)
        rows = [[prompt_row(self.tok, r, text, self.hparams.fact_token) for text in templates] for r in requests]
        return lookups_of(self.parts, self.parts.rewrite(layer), rows, self.hparams.batch_tokens)

    def _key_and_direction(self, layer: int, lookup: Lookup) -> tuple[Tensor, Tensor]:
        """k and u, float64 (K)."""
        moment_KK = self.moment(layer) if self.hparams.mom2_adjustment else None
        key_K = lookup.mean_K if self.hparams.if_c_rome else lookup.plain_K
        return key_K.double(), key_direction(lookup.mean_K, moment_KK)

    def _update(self, layer: int, found: Found, lookup: Lookup) -> tuple[WeightDelta, LayerTrace]:
        key_K, u_K = self._key_and_direction(layer, lookup)
        output_D = lookup.mean_D if self.hparams.if_c_rome else lookup.plain_D
        plain_K, mean_K = lookup.plain_K, lookup.mean_K
        v_D, numerator, denominator = value_direction(found.target_D, output_D, key_K, u_K)
        delta = self.delta(layer, u_K[:, None], v_D[:, None])
        trace = LayerTrace(
            numerator_norm=numerator,
            denominator=denominator,
            key_norm=float(plain_K.norm()),
            prefixed_key_norm=float(mean_K.norm()),
            value_norm_before=float(found.initial_D.norm()),
            value_norm_after=float(found.target_D.norm()),
            loss_first=found.losses[0][0],
            loss_last=found.losses[-1][0],
            steps=len(found.losses),
            delta_norm=float(u_K.norm() * v_D.norm()),
            losses=tuple(found.losses),
            vectors={
                "u": u_K.float().cpu(),
                "v": v_D.float().cpu(),
                "key": plain_K.float().cpu(),
                "prefixed_key": mean_K.float().cpu(),
                "target": found.target_D.float().cpu(),
                "target_init": found.initial_D.float().cpu(),
            },
        )
        return delta, trace

    def _search(self, request: EditRequest, layer: int, progress: Progress | None) -> Found:
        rows, labels = self.search_rows(request)
        forward = row_forward(self.parts, self.parts.mlp(layer), layer, rows, replay=self.hparams.replay)

        def watch(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress(step, steps, f"loss {loss:.3f}")

        return search_values(forward, Rows.of([labels]), self.search_settings(), watch)[0]
