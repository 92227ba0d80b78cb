"""The value search of ROME and MEMIT: an offset at the lookup token that makes the target likely.

Axes: R requests, B rows of all requests, N scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyeditor.lm.replay import RowForward

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


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the rows of a forward belong to requests: each request has target rows, then one KL row.

    `labels` holds the target ids of every target row in order; KL rows have none and one scored position.
    """

    owner: Sequence[int]
    labels: Sequence[Sequence[int]]
    requests: int


@dataclass
class Found:
    """Result of the search for one request; `losses` rows are (total, nll, kl, weight decay), in nats."""

    initial_D: Tensor
    offset_D: Tensor
    losses: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def target_D(self) -> Tensor:
        """v*: the module's initial output plus the offset found."""
        return self.initial_D + self.offset_D


def search_values(forward: RowForward, rows: Rows, search: Search, watch: Watch | None = None) -> list[Found]:
    """Minimise mean NLL of the target over contexts + kl_factor KL + weight decay, by Adam, per request (ROME eq. 4).

    The offset is added at the lookup token of every row, the KL row included; it is clamped to `clamp_norm_factor`
    times
    the initial value's norm after each step; a request stops at loss < 0.05. The last pass only measures.
    """
    owner_B = torch.tensor(list(rows.owner), device=forward.initial_BD.device)
    first_row = [list(rows.owner).index(r) for r in range(rows.requests)]
    initial_RD = _wide(forward.initial_BD[first_row])
    offset_RD = torch.zeros_like(initial_RD, requires_grad=True)
    optimiser = torch.optim.Adam([offset_RD], lr=search.v_lr)
    loss_of = _Loss(rows, initial_RD, search)
    found = [Found(initial_D=initial_RD[r], offset_D=initial_RD[r]) for r in range(rows.requests)]
    active = set(range(rows.requests))
    with torch.enable_grad():
        for step in range(1, search.v_num_grad_steps + 1):
            parts_4R = loss_of(forward(offset_RD[owner_B]), offset_RD)
            measured_4R = parts_4R.detach().cpu()
            for r in active:
                found[r].losses.append(tuple(measured_4R[:, r].tolist()))
            if watch is not None:
                watch(step, search.v_num_grad_steps, float(measured_4R[0].mean()))
            done = {r for r in active if float(measured_4R[0, r]) < STOP_LOSS or step == search.v_num_grad_steps}
            for r in done:
                found[r].offset_D = offset_RD.detach()[r].clone()
            active -= done
            if not active:
                break
            optimiser.zero_grad()
            torch.autograd.backward(parts_4R[0].sum())
            optimiser.step()
            _clamp(offset_RD, search.clamp_norm_factor * initial_RD.norm(dim=1))
    return found


class _Loss:
    """The search's loss per request: rows total, nll, kl, weight decay (4, R)."""

    def __init__(self, rows: Rows, initial_RD: Tensor, search: Search) -> None:
        self._rows, self._search = rows, search
        self._norm_R = initial_RD.norm(dim=1)
        device = initial_RD.device
        labels: list[int] = []
        label_at: list[int] = []
        label_owner: list[int] = []
        share: list[float] = []
        kl_at: list[int] = []
        place = 0
        targets = iter(rows.labels)
        last_of = {r: max(i for i, owner in enumerate(rows.owner) if owner == r) for r in range(rows.requests)}
        contexts = {r: sum(1 for owner in rows.owner if owner == r) - 1 for r in range(rows.requests)}
        for i, owner in enumerate(rows.owner):
            if i == last_of[owner]:
                kl_at.append(place)
                place += 1
                continue
            target = next(targets)
            labels += list(target)
            label_at += range(place, place + len(target))
            label_owner += [owner] * len(target)
            share += [1.0 / (len(target) * contexts[owner])] * len(target)
            place += len(target)
        self._labels_L = torch.tensor(labels, device=device)
        self._label_at_L = torch.tensor(label_at, device=device)
        self._label_owner_L = torch.tensor(label_owner, device=device)
        self._share_L = torch.tensor(share, device=device)
        self._kl_at_R = torch.tensor(kl_at, device=device)
        self._kl_initial_RV: Tensor | None = None

    def __call__(self, logits_NV: Tensor, offset_RD: Tensor) -> Tensor:
        logs_NV = _wide(logits_NV.to(offset_RD.device)).log_softmax(dim=1)
        nll_L = -logs_NV[self._label_at_L, self._labels_L] * self._share_L
        nll_R = torch.zeros_like(self._norm_R).index_add(0, self._label_owner_L, nll_L)
        kl_logs_RV = logs_NV[self._kl_at_R]
        if self._kl_initial_RV is None:
            self._kl_initial_RV = kl_logs_RV.detach().clone()
        drift_RV = kl_logs_RV.exp() * (kl_logs_RV - self._kl_initial_RV)  # KL(now || before)
        kl_R = self._search.kl_factor * drift_RV.sum(dim=1)
        decay_R = self._search.v_weight_decay * offset_RD.norm(dim=1) / self._norm_R**2
        return torch.stack([nll_R + kl_R + decay_R, nll_R, kl_R, decay_R])


def _wide(values: Tensor) -> Tensor:
    """float32, or the tensor's own dtype where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@torch.no_grad()
def _clamp(offset_RD: Tensor, most_R: Tensor) -> None:
    norm_R = offset_RD.norm(dim=1)
    factor_R = torch.where(norm_R > most_R, most_R / norm_R, torch.ones_like(norm_R))
    offset_RD.mul_(factor_R.unsqueeze(1))
