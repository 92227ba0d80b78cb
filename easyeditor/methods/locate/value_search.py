"""The value search of ROME and MEMIT: an offset at the lookup token that makes the target likely.

Axes: R requests, B rows of all requests, N scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from easyeditor.errors import NumericalError
from easyeditor.lm.replay import RowForward
from easyeditor.lm.scored import row_sums

SEARCH_LOSSES = ("total", "nll", "kl", "weight_decay")
STOP_LOSS = 0.05  # a request whose loss is below this is done (ROME's published code)

Watch = Callable[[int, int, float], None]
"""Called after each pass with (pass number, most passes, mean loss)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of the search, under the YAML's names."""

    v_num_grad_steps: int
    v_lr: float
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
    def targets(self) -> list[list[int]]:
        """Numbers of each request's target rows, its KL row left out."""
        return [list(range(first, first + len(own))) for first, own in zip(self.first, self.ids, strict=True)]


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
    forward: RowForward,
    labels: RowLabels,
    search: Search,
    watch: Watch | None = None,
    *,
    mean_initial: bool = False,
    norms: Sequence[float] | None = None,
) -> list[Found]:
    """Minimise mean NLL of the target over contexts + kl_factor KL + weight decay, by Adam, per request (ROME eq. 4).

    The offset is added at the lookup token of every row, the KL row included, and clamped after each step to
    `clamp_norm_factor` times the initial value's norm. A request stops at loss < 0.05, and its rows leave the batch.
    With `early_stop: mpes` (ENCORE, Gupta et al. 2025, arXiv 2502.01636) it also stops, without a step, at the
    |prob_cutoff|-th pass in which every target token is the model's first choice. The last pass only measures.
    Requests do not see each other: the answers are those of one at a time.
    The initial value is the module's output in a request's first context, or with `mean_initial` the mean over its
    contexts. Clamp and decay refer to its norm, or to `norms`, one for each request.
    """
    initial_RD = _wide(forward.initial_BD[labels.first])
    if mean_initial:
        initial_RD = torch.stack([_mean_initial(forward.initial_BD[at]) for at in labels.targets])
    found = [Found(initial_D=value, offset_D=torch.zeros_like(value)) for value in initial_RD]
    for result, at in zip(found, labels.targets, strict=True):
        result.read = None if forward.read is None else (forward.read[0][at], forward.read[1][at])
    active = list(range(len(labels.ids)))
    offset_RD = torch.zeros_like(initial_RD, requires_grad=True)
    optimiser = torch.optim.Adam([offset_RD], lr=search.v_lr)
    norm_R = initial_RD.norm(dim=1) if norms is None else initial_RD.new_tensor(list(norms))
    loss_of = _Loss(labels, norm_R, search, None)
    grown_R = torch.zeros_like(norm_R)  # the offsets' norms before the last clamp, read with the next pass's losses
    probable = [0] * len(found)  # passes in which a request's whole target was the first choice
    with torch.enable_grad():
        for step in range(1, search.v_num_grad_steps + 1):
            parts_4R = loss_of(forward(offset_RD), offset_RD)
            read_6R = torch.cat([parts_4R.detach(), torch.stack([loss_of.missed_R, grown_R])]).cpu()  # the one wait
            measured_4R, missed_R = read_6R[:4], read_6R[4]
            if not bool(torch.isfinite(read_6R[5]).all()):  # infinity would scale the offset to 0: an edit of nothing
                raise NumericalError(
                    "the value search's offset has a norm beyond the dtype; lower v_lr; nothing was changed"
                )
            for r, request in enumerate(active):
                found[request].losses.append(tuple(measured_4R[:, r].tolist()))
                found[request].offset_D = offset_RD.detach()[r].clone()
                probable[request] += float(missed_R[r]) == 0
            if not bool(torch.isfinite(measured_4R).all()):
                raise NumericalError(f"the value search's loss is not finite at pass {step}; nothing was changed")
            if watch is not None:
                watch(step, search.v_num_grad_steps, float(measured_4R[0].mean()))
            enough = abs(search.prob_cutoff) if search.early_stop == "mpes" and search.prob_cutoff else math.inf
            going = [
                r
                for r, request in enumerate(active)
                if float(measured_4R[0, r]) >= STOP_LOSS and probable[request] < enough
            ]
            if not going or step == search.v_num_grad_steps:
                break
            optimiser.zero_grad()
            torch.autograd.backward(parts_4R[0].sum())
            optimiser.step()
            grown_R = _clamp(offset_RD, search.clamp_norm_factor * loss_of.norm_R)
            if len(going) < len(active):
                forward, loss_of = forward.narrowed(going), loss_of.narrowed(going)
                offset_RD, optimiser = _narrowed_adam(offset_RD, optimiser, going, search.v_lr)
                grown_R = grown_R[going]
                labels = RowLabels(ids=tuple(labels.ids[r] for r in going))
                active = [active[r] for r in going]
    return found


class _Loss:
    """The search's loss per request: rows total, nll, kl, weight decay (4, R)."""

    def __init__(self, labels: RowLabels, norm_R: Tensor, search: Search, kl_initial_RV: Tensor | None) -> None:
        self._labels, self._search, self.norm_R = labels, search, norm_R
        self._kl_initial_RV = kl_initial_RV
        self.missed_R = torch.ones_like(norm_R)
        """Of the last call: how many target tokens of a request (its bare prompt's left out if the rule says so) are
        not the model's first choice. Known only for `early_stop: mpes`."""
        device = norm_R.device
        index: list[tuple[int, int, int, float]] = []  # scored position, label, request, share in the request's mean
        asked: list[bool] = []  # must this label be the first choice?
        kl_at: list[int] = []
        place = 0
        for r, targets in enumerate(labels.ids):
            for n, target in enumerate(targets):
                asked += [n > 0 or len(targets) == 1 or search.early_stop_rows == "all"] * len(target)
                share = 1.0 / (len(target) * len(targets))
                index += [(place + i, label, r, share) for i, label in enumerate(target)]
                place += len(target)
            kl_at.append(place)
            place += 1
        at, wanted, owner, shares = zip(*index, strict=True)
        self._at_L, self._labels_L = torch.tensor(at, device=device), torch.tensor(wanted, device=device)
        self._owner_L = torch.tensor(owner, device=device)
        self._share_L = torch.tensor(shares, device=device, dtype=norm_R.dtype)
        self._kl_at_R = torch.tensor(kl_at, device=device)
        self._asked_L = torch.tensor(asked, device=device)

    def __call__(self, logits_NV: Tensor, offset_RD: Tensor) -> Tensor:
        logs_NV = _wide(logits_NV.to(offset_RD.device)).log_softmax(dim=1)
        nll_L = -logs_NV[self._at_L, self._labels_L].to(offset_RD.dtype) * self._share_L
        if self._search.early_stop == "mpes":
            missed_L = (logs_NV[self._at_L].argmax(dim=1) != self._labels_L) & self._asked_L
            self.missed_R = row_sums(missed_L.to(self.norm_R), self._owner_L, len(self.norm_R))
        nll_R = row_sums(nll_L, self._owner_L, len(self.norm_R))
        kl_logs_RV = logs_NV[self._kl_at_R]
        if self._kl_initial_RV is None:
            self._kl_initial_RV = kl_logs_RV.detach().clone()
        drift_RV = kl_logs_RV.exp() * (kl_logs_RV - self._kl_initial_RV)  # KL(now || before)
        kl_R = self._search.kl_factor * drift_RV.sum(dim=1)
        decay_R = self._search.v_weight_decay * offset_RD.norm(dim=1) / self.norm_R**2
        return torch.stack([nll_R + kl_R + decay_R, nll_R, kl_R, decay_R])

    def narrowed(self, kept: Sequence[int]) -> _Loss:
        """The loss of some of the requests."""
        assert self._kl_initial_RV is not None
        labels = RowLabels(ids=tuple(self._labels.ids[r] for r in kept))
        return _Loss(labels, self.norm_R[list(kept)], self._search, self._kl_initial_RV[list(kept)])


def _narrowed_adam(
    offset_RD: Tensor, optimiser: torch.optim.Adam, kept: Sequence[int], lr: float
) -> tuple[Tensor, torch.optim.Adam]:
    """The offsets of some requests with an Adam that remembers their moments."""
    index = list(kept)
    narrowed = offset_RD.detach()[index].clone().requires_grad_()
    fresh = torch.optim.Adam([narrowed], lr=lr)
    state = optimiser.state[offset_RD]
    fresh.state[narrowed] = {key: value[index] if value.ndim == 2 else value for key, value in state.items()}
    return narrowed, fresh


def _mean_initial(outputs_BD: Tensor) -> Tensor:
    return outputs_BD.double().mean(0).to(_wide(outputs_BD).dtype)


def _wide(values: Tensor) -> Tensor:
    """float32, or the tensor's own dtype where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@torch.no_grad()
def _clamp(offset_RD: Tensor, most_R: Tensor) -> Tensor:
    """Shorten offsets in place to at most `most_R`; returns the norms they had."""
    norm_R = offset_RD.norm(dim=1)
    factor_R = torch.where(norm_R > most_R, most_R / norm_R, torch.ones_like(norm_R))
    offset_RD.mul_(factor_R.unsqueeze(1))
    return norm_R
