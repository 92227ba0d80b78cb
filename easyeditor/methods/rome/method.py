"""ROME and C-ROME: one fact, one layer, one rank-one update. Axes: B context rows, K key width, D model width."""

from __future__ import annotations

import time
from collections.abc import Sequence

from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.locate.keys import read_at_lookup
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

    def _edit_layer(
        self, request: EditRequest, layer: int, progress: Progress | None
    ) -> tuple[WeightDelta, LayerTrace]:
        moment_KK = self.moment(layer) if self.hparams.mom2_adjustment else None  # missing statistics show at once
        found = self._search(request, layer, progress)
        rows = [prompt_row(self.tok, request, c, self.hparams.fact_token) for c in (SLOT, *self.contexts)]
        keys_BK, outputs_BD = read_at_lookup(self.parts, self.parts.rewrite(layer), rows, self.hparams.batch_tokens)
        plain_K, mean_K = keys_BK[0], keys_BK[1:].double().mean(0)
        plain_D, mean_D = outputs_BD[0], outputs_BD[1:].double().mean(0)
        u_K = key_direction(mean_K, moment_KK)
        key_K, output_D = (mean_K, mean_D) if self.hparams.if_c_rome else (plain_K, plain_D)
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
