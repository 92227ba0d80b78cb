"""ROME and C-ROME: one fact, one layer, one rank-one update. Axes: B context rows, K key width, D model width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from easyeditor.base.progress import Progress
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.locate.key_files import dump_keys
from easyeditor.methods.locate.keys import Lookup, lookup_of, lookups_of
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.updates import joint_update, rank_one, unit, whitened
from easyeditor.methods.locate.value_search import SEARCH_LOSSES, Found
from easyeditor.methods.rome.hparams import ROMEHyperParams
from easyeditor.methods.table import METHODS
from easyeditor.stats.factored import Factored
from easyeditor.values.edit import EditRequest, EditResult, LayerTrace, WeightDelta


class ROME(LocateMethod[ROMEHyperParams]):
    """Rank-One Model Editing (Meng et al. 2022, arXiv 2202.05262), with C-ROME (Yang et al. 2024, arXiv 2406.11263).

    Update: dW = (v* - W k) u^T / (k.u) with u = C^-1 kbar, kbar the mean key over contexts. Published ROME takes the
    *unprefixed* key as k; C-ROME takes kbar there too (`if_c_rome`). The search starts from the bare prompt's output
    v0; `consistent_value` starts it from the mean output over contexts, so that v* - W kbar is the offset found.

    First-token protection (this project, docs/findings/first-token-protection.md): with `protect_first_tokens` the
    matrix A of `LocateMethod.preserved` takes C's place. With `both_keys`, where the subject is the text's first token,
    the offset delta_u found on the bare prompt alone joins the contexts' delta, and one update writes both:
    dW = R (K^T A^-1 K)^-1 (A^-1 K)^T, K = [kbar, k^u], R = [v* - W kbar, v*_u - W k^u].

    `edit` is the way in. Its three steps, `search`, `look_up` and `update`, can be called alone by experiments: ROME
    and C-ROME, with and without C, share the first two.
    """

    joint: ClassVar[bool] = False
    screens: ClassVar[bool] = True

    @property
    def title(self) -> str:
        h, preset = self.hparams, METHODS[self.hparams.alg_name].preset
        name = "C-ROME" if h.if_c_rome and h.alg_name == "ROME" else super().title
        said = {
            "consistent_value": "consistent value",
            "protect_first_tokens": "first tokens protected",
            "both_keys": "both keys",
        }
        return ", ".join([name, *(words for key, words in said.items() if getattr(h, key) and key not in preset)])

    @property
    def prefixes(self) -> bool | Literal["all"]:
        """As `if_prefix` says."""
        return self.hparams.if_prefix

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
            self.prepare()  # missing statistics show at once
            for request in requests:
                trace = {}
                for layer in self.layers:
                    with applied(self.model, deltas):
                        ((delta, trace[layer]),) = self._at_layer([request], layer, progress)
                    deltas.append(delta)
                traces.append(trace)
        return self.result(requests, deltas, traces, time.perf_counter() - started)

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """Edits of their own, their value searches batched and their keys read together."""
        if len(self.layers) > 1:  # a later layer is searched with the request's own earlier edit applied
            return super().edit_each(requests, progress)
        started = time.perf_counter()
        (layer,) = self.layers
        with frozen(self.model):
            self.prepare()  # missing statistics show at once
            made = self._at_layer(requests, layer, progress)
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            self.result([request], [delta], [{layer: trace}], seconds)
            for request, (delta, trace) in zip(requests, made, strict=True)
        ]

    def screen(self, requests: Sequence[EditRequest]) -> list[float]:
        """k.u of every request at every layer, on the model as it is: keys only, batched."""
        found: list[list[float]] = [[] for _ in requests]
        for layer in self.layers:
            lookups = self.look_up(requests, layer)
            for own, lookup, whitened_K in zip(found, lookups, self._whitened(layer, lookups), strict=True):
                key_K = lookup.mean_K if self.hparams.if_c_rome else lookup.plain_K
                own.append(float(torch.dot(key_K.double(), unit(whitened_K))))
        return [min(own, key=abs) for own in found]

    def search(self, request: EditRequest, layer: int, progress: Progress | None = None) -> Found:
        """The value search (ROME eq. 4) of one request at `layer`: the same for ROME and C-ROME, with or without C."""
        with frozen(self.model):
            return self.values([request], self.parts.mlp(layer), layer, progress)[0]

    def search_bare(
        self, requests: Sequence[EditRequest], found: Sequence[Found], layer: int, progress: Progress | None = None
    ) -> list[Found | None]:
        """With `both_keys`: the value searches on the bare prompts of requests whose subject is the text's first token;
        None for the others, whose bare prompt has an ordinary key.

        A first token's own output is tiny or huge, so clamp and decay go by that of `found`, the searches over
        contexts.
        """
        made: list[Found | None] = [None] * len(requests)
        first = [n for n, request in enumerate(requests) if self.hparams.both_keys and self.starts_text(request)]
        if first:
            norms = [float(found[n].initial_D.norm()) for n in first]
            own, mlp, steps = [requests[n] for n in first], self.parts.mlp(layer), self._bare_steps
            values = self.values(own, mlp, layer, progress, bare=True, norms=norms, steps=steps)
            for n, value in zip(first, values, strict=True):
                made[n] = value
        return made

    @property
    def _bare_steps(self) -> dict[str, Any]:
        own = {"v_lr": self.hparams.bare_v_lr, "v_num_grad_steps": self.hparams.bare_num_grad_steps}
        return {key: value for key, value in own.items() if value is not None}

    def starts_text(self, request: EditRequest) -> bool:
        """Is the token that is edited the very first of the bare prompt? Never with a BOS before it."""
        return prompt_row(self.tok, request, SLOT, self.hparams.fact_token, self.prompting).lookup == 0

    def look_up(self, requests: Sequence[EditRequest], layer: int) -> list[Lookup]:
        """The keys k^u and kbar of requests at `layer`, and what the projection answers to them; read in one go."""
        templates = (SLOT, *self.contexts)
        rows = [
            [prompt_row(self.tok, r, text, self.hparams.fact_token, self.prompting) for text in templates]
            for r in requests
        ]
        with frozen(self.model):
            return lookups_of(self.parts, self.parts.rewrite(layer), rows, self.budget)

    def update(
        self,
        layer: int,
        found: Found,
        lookup: Lookup,
        hparams: ROMEHyperParams | None = None,
        *,
        bare: Found | None = None,
        whitened_K: Tensor | None = None,
    ) -> tuple[WeightDelta, LayerTrace]:
        """The rank-one update that writes `found` (ROME eq. 2) and its trace; of rank two with `bare`, the value of the
        bare prompt.

        `hparams` may differ from the method's own in `if_c_rome` and `mom2_adjustment`, which the first two steps do
        not ask for. `whitened_K` is A^-1 kbar where it is known; else it is solved for.
        """
        h = self.hparams if hparams is None else hparams
        plain_K, mean_K = lookup.plain_K, lookup.mean_K
        key_K, output_D = (mean_K, lookup.mean_D) if h.if_c_rome else (plain_K, lookup.plain_D)
        held = self._held(layer, h)
        whitened_K = whitened(mean_K, held) if whitened_K is None else whitened_K
        made = rank_one(key_K, whitened_K, found.target_D, output_D)
        keys_Kr, values_Dr, numerator = made.u_K[:, None], made.v_D[:, None], made.numerator
        if bare is not None:
            keys_Kr = joint_update(torch.stack([mean_K.double(), plain_K.double()], 1), held)
            own_D = bare.target_D.double() - lookup.plain_D.double()
            values_Dr = torch.stack([found.target_D.double() - output_D.double(), own_D], 1)
            numerator = float(values_Dr.norm())
        delta, notes = self.delta(layer, keys_Kr, values_Dr)
        trace = LayerTrace(
            numerator_norm=numerator,
            denominator=made.denominator,
            key_norm=float(plain_K.norm()),
            prefixed_key_norm=float(mean_K.norm()),
            value_norm_before=float(found.initial_D.norm()),
            value_norm_after=float(found.target_D.norm()),
            loss_first=found.losses[0][0],
            loss_last=found.losses[-1][0],
            steps=len(found.losses),
            delta_norm=delta.norm() if bare or h.filters else float(made.u_K.norm() * made.v_D.norm()),
            losses=tuple(found.losses),
            loss_names=SEARCH_LOSSES,
            notes=notes,
            vectors={
                "u": made.u_K.float().cpu(),
                "v": made.v_D.float().cpu(),
                "key": plain_K.float().cpu(),
                "prefixed_key": mean_K.float().cpu(),
                "target": found.target_D.float().cpu(),
                "target_init": found.initial_D.float().cpu(),
            },
        )
        return delta, trace

    @property
    def starts_from_mean(self) -> bool:
        return self.hparams.consistent_value

    def _at_layer(
        self, requests: Sequence[EditRequest], layer: int, progress: Progress | None
    ) -> list[tuple[WeightDelta, LayerTrace]]:
        """One layer's edits of requests, each on the model as it is: search, look up, update."""
        found = self.values(requests, self.parts.mlp(layer), layer, progress, read=layer)
        bare = self.search_bare(requests, found, layer, progress)
        lookups = self._lookups(requests, found, layer)
        directions_NK = self._whitened(layer, lookups)
        for lookup, direction_K in zip(lookups, directions_NK, strict=True):
            if self.hparams.save_keys:  # upstream's key dumps
                dump_keys(Path(self.hparams.save_keys_path), direction_K, lookup.plain_K, lookup.mean_K)
        each = zip(found, lookups, bare, directions_NK, strict=True)
        return [self.update(layer, value, lookup, bare=own, whitened_K=k) for value, lookup, own, k in each]

    def _whitened(self, layer: int, lookups: Sequence[Lookup]) -> Tensor:
        """A^-1 kbar of requests (N, K): one solve with all of them as right-hand sides."""
        return whitened(torch.stack([lookup.mean_K for lookup in lookups], 1), self.held(layer)).T

    def _lookups(self, requests: Sequence[EditRequest], found: Sequence[Found], layer: int) -> list[Lookup]:
        """Keys that the searches brought along; the others are looked up."""
        plain = self.contexts.index(SLOT) if SLOT in self.contexts else None
        lookups = [None if f.read is None or plain is None else lookup_of(*f.read, plain) for f in found]
        missing = [n for n, lookup in enumerate(lookups) if lookup is None]
        looked_up = iter(self.look_up([requests[n] for n in missing], layer) if missing else [])
        return [next(looked_up) if lookup is None else lookup for lookup in lookups]

    def _held(self, layer: int, hparams: ROMEHyperParams) -> Factored | None:
        """What an update holds in place; `hparams` may ask for C or the identity where the method has the other."""
        if hparams.protect_first_tokens:
            return self.held(layer)
        return self.statistics.moment(layer) if hparams.mom2_adjustment else None
