"""The base of MEMIT and its variants: many facts at once, spread over several layers; only the equation is open.

Axes: N requests, K key width, D model width, r rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.progress import Progress
from easyeditor.lm.tokens import SLOT, Row
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.base import EditMethod
from easyeditor.methods.locate.held import Held, check_columns
from easyeditor.methods.locate.hparams import LocateHyperParams
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.updates import answering
from easyeditor.methods.locate.value_search import SEARCH_LOSSES, Found
from easyeditor.methods.memory import Memory
from easyeditor.values.edit import EditRequest, EditResult, LayerTrace, WeightDelta

LOG = logging.getLogger(__name__)

CONTEXT_LENGTH, CONTEXT_COUNT = 10, 5  # MEMIT's contexts: five texts of ten tokens besides the bare prompt

L = TypeVar("L", bound=LocateHyperParams)


@dataclass(frozen=True)
class Spread:
    """An edit that was computed: its prompts' rows (request, group, row), the keys it was solved with as
    `keys.<layer>` -> (K, N), its deltas."""

    rows: list[list[list[Row]]]
    keys: Mapping[str, Tensor]
    deltas: Sequence[WeightDelta]


class Adjuster(Protocol):
    """Changes the targets of an edit after they were found and before they are written."""

    def __init__(self, method: SpreadMethod[Any]) -> None: ...

    def prepare(self) -> None:
        """Make what outlives an edit, on the model before any edit."""

    def take_over(self, other: Any) -> None:
        """Share what another adjuster of this class has made on the same model."""

    def __call__(
        self, requests: Sequence[EditRequest], found: list[Found]
    ) -> tuple[list[Found], list[dict[str, float]]]:
        """The targets that are written, and numbers for the trace of each request."""


class SpreadMethod(LocateMethod[L], Generic[L]):
    """Each request's target is searched at the last layer; then, layer by layer, what is missing is shared out and
    written.

    A method gives `unedited`, what it holds in place, or an equation of its own as `solve`. It may also change
    `divided_by`, `uses_statistics`, `adjusters`, `to_remember`, `notes`.
    """

    adjusters: ClassVar[tuple[type[Adjuster], ...]] = ()
    """What changes the targets, one after another."""

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: L) -> None:
        super().__init__(model, tok, hparams)
        self._earlier: Memory[Held] = Memory(Held(), self._with_keys)
        self._adjusters = [make(self) for make in self.adjusters]
        self._said = False

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's update as factors left (D, r) and right (r, K): dW = left @ right answers keys with residuals.

        `keys_KN` are the requests' mean keys, `residual_DN` what this layer has to add; all float64. By default

            dW = R K^T (H + K_p K_p^T + K K^T)^-1,    K_p the keys of committed edits (`to_remember`),

        by a system of the smaller of N and K.
        """
        inverse_KK = self.inverse(layer)
        whitened_KN = self.unedited(layer, keys_KN) if inverse_KK is None else inverse_KK @ keys_KN
        return residual_DN, answering(keys_KN, whitened_KN, 1.0).T

    def unedited(self, layer: int, keys_KN: Tensor) -> Tensor:
        """H^-1 K (K, N), float64: H weighs what must not change before any edit."""
        raise NotImplementedError(f"{type(self).__name__} gives neither `unedited` nor `solve`")

    def unedited_inverse(self, layer: int) -> Tensor:
        """H^-1 (K, K), float64."""
        weight = self.model.get_parameter(self.parts.weight_name(layer))
        width = self.parts.key_width(layer)
        return self.unedited(layer, torch.eye(width, dtype=torch.float64, device=weight.device))

    def divided_by(self, place: int) -> int:
        """By how many layers the missing difference is divided at the `place`-th layer (from 0): those still to
        come, this one included."""
        return len(self.layers) - place

    def notes(self, layer: int) -> Mapping[str, float]:
        """Further numbers for the traces at `layer`; by default none."""
        return {}

    def to_remember(self, spread: Spread) -> Mapping[str, Tensor]:
        """What later edits must know of this one once it is committed, as `keys.<layer>` -> (K, N); by default nothing.

        `spread.keys` are the keys that were solved with, `keys_after(spread)` those on the edited model.
        """
        return {}

    def inverse(self, layer: int) -> Tensor | None:
        """(H + K_p K_p^T)^-1 (K, K), float64, K_p the keys of committed edits; None before the first."""

        def first() -> Tensor:
            made_KK = self.unedited_inverse(layer)
            self.statistics.forget(layer)  # later edits change the inverse; only a revert asks for H again
            return made_KK

        return self._earlier.state.inverse(layer, first)

    def prepare(self) -> None:
        super().prepare()
        for adjuster in self._adjusters:
            adjuster.prepare()

    def ready(self, layer: int) -> None:
        if not self._earlier.state.has_inverse(layer):
            super().ready(layer)

    def committed(self, result: EditResult) -> None:
        self._earlier.committed(result)

    def reverted(self, result: EditResult | None) -> None:
        self._earlier.reverted(result)

    def take_over(self, other: EditMethod[Any]) -> None:
        super().take_over(other)
        if isinstance(other, SpreadMethod):
            self._earlier = other._earlier
            for ours, theirs in zip(self._adjusters, other._adjusters, strict=True):
                ours.take_over(theirs)

    @property
    def site(self) -> nn.Module:
        """Whose output the target is of: the last edited layer's block.

        Where a norm follows the MLP (Gemma 2 and 3), what is written is not what the block gains. A single layer's
        target is then of its MLP, so that it is written whole; over several layers nothing exact is known.
        """
        layer = self.layers[-1]
        exact = self.parts.architecture.mlp_adds
        if not exact and len(self.layers) > 1 and not self._said:
            self._said = True
            LOG.warning(
                "a norm follows this model's MLP, so differences shared out over layers %s are not written as they "
                "are meant; give one layer",
                list(self.layers),
            )
        return self.parts.block(layer) if exact or len(self.layers) > 1 else self.parts.mlp(layer)

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
        return self._written(requests, self._searched(requests, progress), started)

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[EditResult]:
        """Edits of their own, their value searches batched: a search is on the unedited model, whatever is written."""
        started = time.perf_counter()
        found = self._searched(requests, progress)
        share = (time.perf_counter() - started) / max(1, len(requests))
        return [
            self._written([request], [own], time.perf_counter() - share)
            for request, own in zip(requests, found, strict=True)
        ]

    def _searched(self, requests: Sequence[EditRequest], progress: Progress | None) -> list[Found]:
        self.prepare()  # missing statistics are found before hours of search
        with frozen(self.model):
            return self.values(requests, self.site, self.layers[-1], progress, read=self.layers[0])

    def _written(self, requests: Sequence[EditRequest], found: list[Found], started: float) -> EditResult:
        with frozen(self.model):
            noted: list[dict[str, float]] = [{} for _ in requests]
            for adjuster in self._adjusters:
                found, more = adjuster(requests, found)
                noted = [ours | theirs for ours, theirs in zip(noted, more, strict=True)]
            target_ND = torch.stack([f.target_D for f in found]).double()
            rows = [self._key_rows(request) for request in requests]
            deltas: list[WeightDelta] = []
            keys: dict[str, Tensor] = {}
            traces: list[dict[int, LayerTrace]] = [{} for _ in requests]
            for i, layer in enumerate(self.layers):
                with applied(self.model, deltas):
                    keys_NK, bare_NK = self._keys(layer, rows, None if deltas else self._read(found))
                    missing_ND = target_ND - self._values([r[0][0] for r in rows]).double()
                residual_ND = (missing_ND / self.divided_by(i)).to(keys_NK.device)  # layers may lie on several devices
                keys[f"keys.{layer}"] = keys_NK.T
                left_Dr, right_rK = self.solve(layer, keys_NK.T, residual_ND.T)
                delta, filtered = self.delta(layer, right_rK.T, left_Dr)
                deltas.append(delta)
                size = delta.norm() if self.hparams.filters else float((left_Dr @ right_rK).norm())
                for n, trace in enumerate(traces):
                    of = found[n], residual_ND[n], bare_NK[n], keys_NK[n]
                    vectors = _vectors(*of) if layer == self.layers[-1] else {}
                    trace[layer] = _trace(*of, size, {**filtered, **noted[n], **self.notes(layer)}, vectors)
            memory = self.to_remember(Spread(rows, keys, deltas))
        return self.result(requests, deltas, traces, time.perf_counter() - started, memory)

    def keys_after(self, spread: Spread) -> dict[str, Tensor]:
        """The requests' mean keys on the edited model, `keys.<layer>` -> (K, N), float64."""
        with applied(self.model, spread.deltas):
            return {f"keys.{layer}": self._keys(layer, spread.rows)[0].T for layer in self.layers}

    def _with_keys(self, held: Held, memory: Mapping[str, Tensor]) -> Held:
        keys: dict[int, Tensor] = {}
        for layer in self.layers:
            name, width = f"keys.{layer}", self.parts.key_width(layer)
            keys_KN = memory.get(name)
            if keys_KN is None:
                continue
            check_columns(name, keys_KN, width)
            keys[layer] = keys_KN
        return Held(held, keys) if keys else held

    def _key_rows(self, request: EditRequest) -> list[list[Row]]:
        """Rows in groups; the first row of the first group is the bare prompt's."""
        bare = [] if self.context_groups[0][0] == SLOT else [[SLOT]]
        return [
            [prompt_row(self.tok, request, text, self.hparams.fact_token, self.prompting) for text in group]
            for group in [*bare, *self.context_groups]
        ]

    def _read(self, found: Sequence[Found]) -> Tensor | None:
        """The rows' keys (B, K) at the first layer, where all searches brought them along."""
        read = [f.read[0] for f in found if f.read is not None]
        return torch.cat(read) if len(read) == len(found) and self.context_groups[0][0] == SLOT else None

    def _keys(
        self, layer: int, rows: Sequence[list[list[Row]]], keys_BK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys (N, K), averaged within groups and then over groups, in float64; and the bare prompts' keys (N, K).
        They are read at the rows' lookup tokens if they are not given."""
        flat = [row for groups in rows for group in groups for row in group]
        if keys_BK is None:
            keys_BK, _ = read_at_lookup(self.parts, self.parts.rewrite(layer), flat, self.budget)
        keys_of_group = iter(torch.split(keys_BK, [len(group) for groups in rows for group in groups]))
        means, bare = [], []
        for groups in rows:
            own = [next(keys_of_group) for _ in groups]
            bare.append(own[0][0])
            means.append(
                torch.stack([keys_bK.double().mean(0) for keys_bK in own[-len(self.context_groups) :]]).mean(0)
            )
        return torch.stack(means), torch.stack(bare)

    def _values(self, rows: Sequence[Row]) -> Tensor:
        """What `site` gives at the lookup token of the bare prompts (N, D)."""
        return read_at_lookup(self.parts, self.site, rows, self.budget)[1]


def _trace(
    found: Found,
    residual_D: Tensor,
    bare_K: Tensor,
    mean_K: Tensor,
    delta_norm: float,
    notes: Mapping[str, float],
    vectors: Mapping[str, Tensor],
) -> LayerTrace:
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
        loss_names=SEARCH_LOSSES,
        notes=notes,
        vectors=vectors,
    )


def _vectors(found: Found, residual_D: Tensor, bare_K: Tensor, mean_K: Tensor) -> dict[str, Tensor]:
    """What the trace carries at the last layer; of all layers it would outweigh the update."""
    return {
        "target": found.target_D.float().cpu(),
        "target_init": found.initial_D.float().cpu(),
        "key": bare_K.float().cpu(),
        "prefixed_key": mean_K.float().cpu(),
        "residual": residual_D.float().cpu(),
    }
