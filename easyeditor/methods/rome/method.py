"""ROME and C-ROME: one fact, one layer, one rank-one update. Axes: B context rows, K key width, D model width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.locate.dumps import dump_keys
from easyeditor.methods.locate.keys import Lookup, lookup_of
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.solve import key_direction, value_direction, whitened
from easyeditor.methods.locate.targets import Found, Rows, search_values
from easyeditor.methods.rome.hparams import ROMEHyperParams
from easyeditor.progress import Progress
from easyeditor.records import EditRequest, EditResult, LayerTrace, WeightDelta


class ROME(LocateMethod[ROMEHyperParams]):
    """Rank-One Model Editing (Meng et al. 2022, arXiv 2202.05262), with C-ROME (Yang et al. 2024, arXiv 2406.11263).

    Update: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar, kbar the mean key over contexts. Published ROME takes the
    *unprefixed* key as k; C-ROME takes kbar there too (`if_c_rome`). The search starts from the bare prompt's output
    v0; `consistent_value` starts it from the mean output over contexts, so that v* - W kbar is the offset found.

    `edit` is the way in. An edit's three steps, `search`, `look_up` and `update`, stand alone for experiments: ROME
    and C-ROME, with and without C, share the first two.
    """

    @property
    def title(self) -> str:
        if self.hparams.consistent_value:
            return "C-ROME, consistent value"
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

    def search(self, request: EditRequest, layer: int, progress: Progress | None = None) -> Found:
        """The value search (ROME eq. 4) of one request at `layer`: the same for ROME and C-ROME, with or without C."""
        rows, labels = self.search_rows(request)

        def watch(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress(step, steps, f"loss {loss:.3f}")

        with frozen(self.model):
            forward = row_forward(self.parts, self.parts.mlp(layer), layer, rows, replay=self.hparams.replay)
            settings, mean = self.search_settings(), self.hparams.consistent_value
            return search_values(forward, Rows.of([labels]), settings, watch, mean_initial=mean)[0]

    def look_up(self, request: EditRequest, layer: int) -> Lookup:
        """The keys k^u and kbar of a request at `layer`, and what the projection answers to them."""
        plain, *rows = [prompt_row(self.tok, request, c, self.hparams.fact_token) for c in (SLOT, *self.contexts)]
        with frozen(self.model):
            return lookup_of(self.parts, self.parts.rewrite(layer), plain, rows, self.hparams.batch_tokens)

    def update(
        self,
        layer: int,
        found: Found,
        lookup: Lookup,
        *,
        if_c_rome: bool | None = None,
        mom2_adjustment: bool | None = None,
    ) -> tuple[WeightDelta, LayerTrace]:
        """The rank-one update that writes `found` (ROME eq. 2) and its trace; None: as the hyper-parameters say."""
        h = self.hparams
        c_rome = h.if_c_rome if if_c_rome is None else if_c_rome
        mom2 = h.mom2_adjustment if mom2_adjustment is None else mom2_adjustment
        u_K = key_direction(lookup.mean_K, self.moment(layer) if mom2 else None)
        key_K, output_D = (lookup.mean_K, lookup.mean_D) if c_rome else (lookup.plain_K, lookup.plain_D)
        v_D, numerator, denominator = value_direction(found.target_D, output_D, key_K, u_K)
        trace = LayerTrace(
            numerator_norm=numerator,
            denominator=denominator,
            key_norm=float(lookup.plain_K.norm()),
            prefixed_key_norm=float(lookup.mean_K.norm()),
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
                "key": lookup.plain_K.float().cpu(),
                "prefixed_key": lookup.mean_K.float().cpu(),
                "target": found.target_D.float().cpu(),
                "target_init": found.initial_D.float().cpu(),
            },
        )
        return self.delta(layer, u_K[:, None], v_D[:, None]), trace

    def _edit_layer(
        self, request: EditRequest, layer: int, progress: Progress | None
    ) -> tuple[WeightDelta, LayerTrace]:
        moment_KK = self.moment(layer) if self.hparams.mom2_adjustment else None  # missing statistics show at once
        found = self.search(request, layer, progress)
        lookup = self.look_up(request, layer)
        if self.hparams.save_keys:
            direction_K = whitened(lookup.mean_K, moment_KK)
            dump_keys(Path(self.hparams.save_keys_path), direction_K, lookup.plain_K, lookup.mean_K)
        return self.update(layer, found, lookup)
