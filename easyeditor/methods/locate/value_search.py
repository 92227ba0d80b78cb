"""The value search of ROME and MEMIT: an offset at the lookup token that makes the target likely.

The requests of a batch share each pass. One that is done leaves (`narrowed`), one that waits joins (`joined`).
Axes: R requests, B rows of all requests, N scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from easyeditor.base.errors import NumericalError
from easyeditor.lm.budget import Queue
from easyeditor.lm.replay import RowForward
from easyeditor.lm.scored import row_sums
from easyeditor.lm.tokens import sent
from easyeditor.methods.locate.lbfgs import Lbfgs

SEARCH_LOSSES = ("total", "nll", "kl", "weight_decay")
STOP_LOSS = 0.05  # a request whose loss is below this is done (ROME's published code)

Watch = Callable[[int, int, int, float], None]
"""Called after each pass with (requests in it, the pass of the one that is furthest, most passes, mean loss)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of the search, under the YAML's names."""

    v_num_grad_steps: int
    v_lr: float
    v_optimizer: Literal["adam", "lbfgs"] = "adam"
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    early_stop: Literal["loss", "mpes"] = "loss"
    prob_cutoff: int = 0
    early_stop_rows: Literal["all", "prefixed"] = "all"


@dataclass(frozen=True, kw_only=True)
class RowLabels:
    """What a forward's rows should predict, by request, in order: each request's target rows, then its one KL row.

    `ids[r][i]` are the target ids that the scored positions of request r's i-th target row predict.
    """

    ids: tuple[tuple[tuple[int, ...], ...], ...]

    @staticmethod
    def of(ids: Sequence[Sequence[Sequence[int]]]) -> RowLabels:
        """From nested lists: request, row, token."""
        return RowLabels(ids=tuple(tuple(tuple(target) for target in rows) for rows in ids))

    @property
    def counts(self) -> list[int]:
        """Rows of each request, its KL row included."""
        return [len(rows) + 1 for rows in self.ids]

    @property
    def first(self) -> list[int]:
        """Number of each request's first row."""
        return [sum(self.counts[:r]) for r in range(len(self.ids))]

    @property
    def targets(self) -> list[slice]:
        """Each request's target rows, its KL row left out."""
        return [slice(first, first + len(own)) for first, own in zip(self.first, self.ids, strict=True)]


@dataclass(frozen=True)
class Begun:
    """Requests whose rows are ready to be searched; clamp and decay go by `norms`, one for each, where given."""

    forward: RowForward
    labels: RowLabels
    norms: Sequence[float] | None = None


@dataclass
class Found:
    """Result of the search for one request; `losses` rows are `SEARCH_LOSSES`, in nats."""

    initial_D: Tensor
    offset_D: Tensor
    losses: list[tuple[float, float, float, float]] = field(default_factory=list)
    read: tuple[Tensor, Tensor] | None = None
    """Keys (B, K) of its contexts' rows and the projection's answers (B, D), where they were read on the way."""

    @property
    def target_D(self) -> Tensor:
        """v*: the module's initial output plus the offset found."""
        return self.initial_D + self.offset_D


def search_values(
    queue: Queue,
    begin: Callable[[list[int]], Begun],
    search: Search,
    keep: Callable[[int, Found], None],
    watch: Watch | None = None,
    *,
    mean_initial: bool = False,
) -> None:
    """Minimise mean NLL of the target over contexts + kl_factor KL + weight decay per request (ROME eq. 4), by Adam or
    L-BFGS (`v_optimizer`; lbfgs.py).

    The offset is added at the lookup token of every row, the KL row included, and clamped after each step to
    `clamp_norm_factor` times the initial value's norm. A request stops at loss < 0.05.
    With `early_stop: mpes` (ENCORE, Gupta et al. 2025, arXiv 2502.01636) it also stops, without a step, at the
    |prob_cutoff|-th pass in which every target token is the model's first choice. The last pass only measures.
    Where a request stops, `keep` is given its number and result, its rows leave the batch, and those that `begin`
    records of the next in the queue take their place. Requests do not see each other, and each has its own optimizer,
    passes and first distribution: the answers are those of one at a time.
    The initial value is the module's output in a request's first context, or with `mean_initial` the mean over its
    contexts. Clamp and decay refer to its norm, or to `norms`, one for each request.
    """
    batch: _Batch | None = None
    with torch.enable_grad():
        while True:
            if new := queue.fill():
                begun = _Batch.first(new, begin(new), search, mean_initial=mean_initial)
                batch = begun if batch is None else batch.joined(begun)
            if batch is None:
                return
            batch, ended = batch.passed(watch)
            for one in ended:
                queue.leave(one.number)
                keep(one.number, one.found)


@dataclass
class _One:
    """A request that is searched; the optimizer steps `found.offset_D`."""

    number: int
    found: Found
    targets: tuple[tuple[int, ...], ...]
    probable: int = 0
    """Passes in which its whole target was the first choice."""

    def ends(self, search: Search) -> bool:
        """Was its last pass the last one?"""
        enough = abs(search.prob_cutoff) if search.early_stop == "mpes" and search.prob_cutoff else math.inf
        passes = self.found.losses
        return passes[-1][0] < STOP_LOSS or self.probable >= enough or len(passes) == search.v_num_grad_steps


class _Batch:
    """Requests that are searched together."""

    def __init__(
        self,
        running: list[_One],
        forward: RowForward,
        search: Search,
        norm_R: Tensor,
        grown_R: Tensor,
        known: Any = None,
    ) -> None:
        """`grown_R` are the offsets' norms before the last clamp, read with the next pass's losses; `known` is what the
        optimizer knows of offsets, by offset."""
        self._running, self._forward, self._search, self._grown_R = running, forward, search, grown_R
        self._loss = _Loss(RowLabels(ids=tuple(one.targets for one in running)), norm_R, search)
        self._offsets = [one.found.offset_D for one in running]
        self._most_R = search.clamp_norm_factor * norm_R
        self._optimizer: Any = torch.optim.Adam(self._offsets, lr=search.v_lr)
        if search.v_optimizer == "lbfgs":
            self._optimizer = Lbfgs(self._offsets, self._most_R)
        self._optimizer.state.update({o: known[o] for o in self._offsets if known and o in known})

    @staticmethod
    def first(numbers: Sequence[int], begun: Begun, search: Search, *, mean_initial: bool) -> _Batch:
        """Requests before their first pass."""
        forward, labels = begun.forward, begun.labels
        initial_RD = _wide(forward.initial_BD[sent(labels.first, forward.initial_BD.device)])
        if mean_initial:
            means = [forward.initial_BD[at].double().mean(0) for at in labels.targets]
            initial_RD = torch.stack(means).to(initial_RD)
        running = []
        for number, initial_D, at, targets in zip(numbers, initial_RD, labels.targets, labels.ids, strict=True):
            found = Found(initial_D=initial_D, offset_D=torch.zeros_like(initial_D, requires_grad=True))
            found.read = None if forward.read is None else (forward.read[0][at], forward.read[1][at])
            running.append(_One(number, found, targets))
        if begun.norms is None:
            norm_R = initial_RD.norm(dim=1)
        else:
            norm_R = sent(list(begun.norms), initial_RD.device, initial_RD.dtype)
        return _Batch(running, forward, search, norm_R, torch.zeros_like(norm_R))

    def joined(self, other: _Batch) -> _Batch:
        """These requests and others, in this order. Both batches are used up."""
        norm_R, grown_R = torch.cat([self._loss.norm_R, other._loss.norm_R]), torch.cat([self._grown_R, other._grown_R])
        both = self._forward.joined(other._forward)
        made = _Batch([*self._running, *other._running], both, self._search, norm_R, grown_R, self._optimizer.state)
        made._loss.kl_initial_RV = self._loss.kl_initial_RV
        return made

    def _narrowed(self, kept: list[int]) -> _Batch:
        """Some of the requests."""
        if len(kept) == len(self._running):
            return self
        running, forward = [self._running[r] for r in kept], self._forward.narrowed(kept)
        kept_R = sent(kept, self._grown_R.device)
        norm_R, grown_R = self._loss.norm_R[kept_R], self._grown_R[kept_R]
        made = _Batch(running, forward, self._search, norm_R, grown_R, self._optimizer.state)
        assert self._loss.kl_initial_RV is not None
        made._loss.kl_initial_RV = self._loss.kl_initial_RV[kept_R]
        return made

    def passed(self, watch: Watch | None) -> tuple[_Batch | None, list[_One]]:
        """One pass and, for those that go on, one step: the batch without those that end, and these."""
        offset_RD = torch.stack(self._offsets)
        parts_4R = self._loss(self._forward(offset_RD), offset_RD)
        both_2R = torch.stack([self._loss.missed_R, self._grown_R])
        read_6R = torch.cat([parts_4R.detach(), both_2R]).cpu()  # the one wait
        measured_4R, missed_R, grown_R = read_6R[:4], read_6R[4], read_6R[5]
        if not bool(torch.isfinite(grown_R).all()):  # infinity would scale the offset to 0: an edit of nothing
            raise NumericalError(
                "the value search's offset has a norm beyond the dtype; lower v_lr; nothing was changed"
            )
        for one, losses, missed in zip(self._running, measured_4R.T.tolist(), missed_R.tolist(), strict=True):
            one.found.losses.append(tuple(losses))
            one.probable += missed == 0
        furthest = max(len(one.found.losses) for one in self._running)
        if not bool(torch.isfinite(measured_4R).all()):
            raise NumericalError(f"the value search's loss is not finite at pass {furthest}; nothing was changed")
        if watch is not None:
            watch(len(self._running), furthest, self._search.v_num_grad_steps, float(measured_4R[0].mean()))
        going = [r for r, one in enumerate(self._running) if not one.ends(self._search)]
        ended = [one for one in self._running if one.ends(self._search)]
        rest = None
        if going:
            self._optimizer.zero_grad()
            torch.autograd.backward(parts_4R[0].sum())
            rest = self._narrowed(going)
            rest._step()
        for one in ended:
            one.found.offset_D = one.found.offset_D.detach()
        return rest, ended

    def _step(self) -> None:
        if self._search.v_optimizer == "adam":
            self._optimizer.step()
        else:
            self._optimizer.step([one.found.losses[-1][0] for one in self._running])
        self._grown_R = _clamp(self._offsets, self._most_R)


class _Loss:
    """The search's loss per request: rows total, nll, kl, weight decay (4, R)."""

    def __init__(self, labels: RowLabels, norm_R: Tensor, search: Search) -> None:
        self._search, self._all, self.norm_R = search, labels, norm_R
        self.kl_initial_RV: Tensor | None = None
        """Each request's first distribution; those that are not known yet are the last ones."""
        self.missed_R = torch.ones_like(norm_R)
        """Of the last call: how many target tokens of a request (its bare prompt's left out if the rule says so) are
        not the model's first choice. Known only for `early_stop: mpes`."""

    @cached_property
    def _index(self) -> tuple[Tensor, ...]:
        """Of every label (L): scored position, id, request, must it be the first choice?, share in its request's mean;
        and the scored position of each request's KL row (R)."""
        index: list[tuple[int, int, int, int]] = []
        shares: list[float] = []
        kl_at: list[int] = []
        place = 0
        for r, targets in enumerate(self._all.ids):
            for n, target in enumerate(targets):
                asked = n > 0 or len(targets) == 1 or self._search.early_stop_rows == "all"
                index += [(place + i, label, r, int(asked)) for i, label in enumerate(target)]
                shares += [1.0 / (len(target) * len(targets))] * len(target)
                place += len(target)
            kl_at.append(place)
            place += 1
        device = self.norm_R.device
        at_L, labels_L, owner_L, asked_L = sent(list(zip(*index, strict=True)), device)
        share_L, kl_at_R = sent(shares, device, self.norm_R.dtype), sent(kl_at, device)
        return at_L, labels_L, owner_L, asked_L.bool(), share_L, kl_at_R

    def __call__(self, logits_NV: Tensor, offset_RD: Tensor) -> Tensor:
        at_L, labels_L, owner_L, asked_L, share_L, kl_at_R = self._index
        logs_NV = _wide(logits_NV.to(offset_RD.device)).log_softmax(dim=1)
        nll_L = -logs_NV[at_L, labels_L].to(offset_RD.dtype) * share_L
        if self._search.early_stop == "mpes":
            missed_L = (logs_NV[at_L].argmax(dim=1) != labels_L) & asked_L
            self.missed_R = row_sums(missed_L.to(self.norm_R), owner_L, len(self.norm_R))
        nll_R = row_sums(nll_L, owner_L, len(self.norm_R))
        kl_logs_RV = logs_NV[kl_at_R]
        known_RV = kl_logs_RV[:0].detach() if self.kl_initial_RV is None else self.kl_initial_RV
        if len(known_RV) < len(kl_logs_RV):
            known_RV = torch.cat([known_RV, kl_logs_RV[len(known_RV) :].detach()])
        self.kl_initial_RV = known_RV
        drift_RV = kl_logs_RV.exp() * (kl_logs_RV - known_RV)  # KL(now || before)
        kl_R = self._search.kl_factor * drift_RV.sum(dim=1)
        decay_R = self._search.v_weight_decay * offset_RD.norm(dim=1) / self.norm_R**2
        return torch.stack([nll_R + kl_R + decay_R, nll_R, kl_R, decay_R])


def _wide(values: Tensor) -> Tensor:
    """float32, or the tensor's own dtype where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@torch.no_grad()
def _clamp(offsets: Sequence[Tensor], most_R: Tensor) -> Tensor:
    """Shorten offsets in place to at most `most_R`; returns the norms they had."""
    norm_R = torch.stack(list(offsets)).norm(dim=1)
    factor_R = torch.where(norm_R > most_R, most_R / norm_R, torch.ones_like(norm_R))
    for offset_D, factor in zip(offsets, factor_R, strict=True):
        offset_D.mul_(factor)
    return norm_R
