"""ROME and C-ROME: one fact, one layer, one rank-one update. Axes: B context rows, K key width, D model width."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.architectures import Anatomy, anatomy, max_positions, weight_is_transposed
from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT, check_length
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.base import EditMethod, Progress
from easyeditor.methods.locate.contexts import generated_contexts, given_contexts
from easyeditor.methods.locate.keys import keys_and_outputs
from easyeditor.methods.locate.rows import kl_row, prompt_row, target_rows
from easyeditor.methods.locate.solve import key_direction, value_direction
from easyeditor.methods.locate.targets import Found, Rows, Search, search_values
from easyeditor.methods.rome.hparams import ROMEHyperParams
from easyeditor.records import EditRequest, EditResult, LayerTrace, WeightDelta
from easyeditor.stats.store import load_moment


class ROME(EditMethod[ROMEHyperParams]):
    """Rank-One Model Editing (Meng et al. 2022, arXiv 2202.05262), with C-ROME (Yang et al. 2024, arXiv 2406.11263).

    Update: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar, kbar the mean key over contexts. Published ROME takes the
    *unprefixed* key as k; C-ROME takes kbar there too (`if_c_rome`).
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: ROMEHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self.parts.check_layers(hparams.layers)
        self.parts.check_layers([hparams.v_loss_layer], "v_loss_layer")
        given = hparams.context_templates
        self._contexts = None if given is None else tuple(t for group in given_contexts(given) for t in group)
        self._moments: dict[int, Tensor] = {}

    def find_parts(self) -> Anatomy:
        h = self.hparams
        return anatomy(self.model, block=h.layer_module_tmp, mlp=h.mlp_module_tmp, rewrite=h.rewrite_module_tmp)

    @property
    def title(self) -> str:
        return "C-ROME" if self.hparams.if_c_rome else "ROME"

    @property
    def remedy(self) -> str | None:
        return None if self.hparams.if_c_rome else "if_c_rome=true if_prefix=true"

    @property
    def weight_names(self) -> list[str]:
        return [self.parts.weight_name(layer) for layer in self.layers]

    @property
    def layers(self) -> list[int]:
        return list(self.hparams.layers)

    @property
    def contexts(self) -> tuple[str, ...]:
        if self._contexts is None:
            params = self.hparams.context_template_length_params
            with frozen(self.model):
                self._contexts = tuple(generated_contexts(self.model, self.tok, params, self.generator))
        return self._contexts

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
        found = self._search(request, layer, progress)
        rows = [prompt_row(self.tok, request, c, self.hparams.fact_token) for c in (SLOT, *self.contexts)]
        keys_BK, outputs_BD = keys_and_outputs(self.parts, layer, rows, self.hparams.batch_tokens)
        plain_K, mean_K = keys_BK[0], keys_BK[1:].double().mean(0)
        plain_D, mean_D = outputs_BD[0], outputs_BD[1:].double().mean(0)
        u_K = key_direction(mean_K, self._moment(layer))
        key_K, output_D = (mean_K, mean_D) if self.hparams.if_c_rome else (plain_K, plain_D)
        v_D, numerator, denominator = value_direction(found.target_D, output_D, key_K, u_K)
        delta = self._delta(layer, u_K, v_D)
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
        hparams = self.hparams
        rows, labels = target_rows(self.tok, request, self.contexts, hparams.fact_token)
        rows.append(kl_row(self.tok, request, hparams.fact_token))
        limit = max_positions(self.model)
        limit = hparams.max_length if limit is None else min(limit, hparams.max_length)
        check_length(
            [row.ids for row in rows], limit, f"request {request.case_id!r}: the prompt in its longest context"
        )
        forward = row_forward(self.parts, self.parts.mlp(layer), layer, rows, replay=hparams.replay)
        search = Search(
            v_num_grad_steps=hparams.v_num_grad_steps,
            v_lr=hparams.v_lr,
            v_weight_decay=hparams.v_weight_decay,
            clamp_norm_factor=hparams.clamp_norm_factor,
            kl_factor=hparams.kl_factor,
        )

        def watch(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress(step, steps, f"loss {loss:.3f}")

        return search_values(forward, Rows(owner=[0] * len(rows), labels=labels, requests=1), search, watch)[0]

    def _delta(self, layer: int, u_K: Tensor, v_D: Tensor) -> WeightDelta:
        module = self.parts.rewrite(layer)
        dtype = torch.promote_types(module.weight.dtype, torch.float32)  # type: ignore[arg-type]
        u_K, v_D = u_K.to(dtype), v_D.to(dtype)
        name = self.parts.weight_name(layer)
        if weight_is_transposed(module):
            return WeightDelta(name=name, left=u_K[:, None], right=v_D[None, :])
        return WeightDelta(name=name, left=v_D[:, None], right=u_K[None, :])

    def _moment(self, layer: int) -> Tensor | None:
        if not self.hparams.mom2_adjustment:
            return None
        if layer not in self._moments:
            module = self.parts.rewrite(layer)
            weight = self.model.get_parameter(self.parts.weight_name(layer))
            moment = load_moment(
                self.hparams.stats_dir,
                str(self.model.config.name_or_path),
                self.parts.rewrite_name(layer),
                dataset=self.hparams.mom2_dataset,
                dtype=self.hparams.mom2_dtype,
                samples=self.hparams.mom2_n_samples,
                width=weight.shape[0 if weight_is_transposed(module) else 1],
            )
            self._moments[layer] = moment.to(weight.device)
        return self._moments[layer]
