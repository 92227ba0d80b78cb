"""Steps of a value search by limited-memory BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4).

A line search would take further passes, so a step is at most `cap` long in place of it, and one that raises the loss
is taken back in part. Each request has a memory of its own, in float64 on the CPU: its steps do not depend on the
requests it runs with.

Axes: R requests, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAIRS = 8  # steps and changes of the gradient that are remembered
FIRST = 0.25  # longest first step, as a share of the largest offset
RISE = 1.02  # a pass whose loss is more than this times the last accepted one's is a rise
BACK = 0.35  # after a rise: this share of the way from the accepted point
TWICE = 2  # rises in a row that are taken back
CURVED = 1e-10  # least s.y of a pair, as a share of s.s
CLAMPED = 0.9999  # from this share of the largest norm on an offset is as long as it may be


@dataclass
class Memory:
    """What one request's search knows: the accepted point, and the pairs (s, y) of changes of place and gradient."""

    cap: float
    """Longest step; halved after a rise."""
    at_D: Tensor | None = None
    gradient_D: Tensor | None = None
    loss: float = 0.0
    rises: int = 0
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def next(self, at_D: Tensor, gradient_D: Tensor, loss: float) -> Tensor:
        """Where the next pass measures, after one at `at_D`."""
        if self.at_D is not None and self.gradient_D is not None:
            s_D, y_D = at_D - self.at_D, gradient_D - self.gradient_D
            if s_D @ y_D > CURVED * (s_D @ s_D):
                self.pairs = [*self.pairs, (s_D, y_D)][-PAIRS:]
            if loss > RISE * self.loss and self.rises < TWICE:
                self.rises += 1
                self.cap /= 2
                return self.at_D + BACK * s_D
        self.at_D, self.gradient_D, self.loss, self.rises = at_D, gradient_D, loss, 0
        step_D = self.direction(gradient_D)
        length = float(step_D.norm())
        if length > self.cap or not self.pairs:
            step_D = step_D * (self.cap / length) if length else step_D
        return at_D + step_D

    def direction(self, gradient_D: Tensor) -> Tensor:
        """-H g, H the inverse Hessian of the pairs, from s.y / y.y of the last times the identity."""
        q_D, shares = gradient_D.clone(), []
        for s_D, y_D in reversed(self.pairs):
            shares.append((s_D @ q_D) / (s_D @ y_D))
            q_D -= shares[-1] * y_D
        if self.pairs:
            s_D, y_D = self.pairs[-1]
            q_D *= (s_D @ y_D) / (y_D @ y_D)
        for (s_D, y_D), share in zip(self.pairs, reversed(shares), strict=True):
            q_D += (share - (y_D @ q_D) / (s_D @ y_D)) * s_D
        return -q_D


class Lbfgs:
    """Steps `offsets` as `torch.optim.Adam` does: `state` is what is known of each, and can be handed on."""

    def __init__(self, offsets: Sequence[Tensor], most_R: Tensor) -> None:
        """`most_R` are the largest norms an offset may have."""
        self._offsets, self._most_R = offsets, most_R
        self.state: dict[Tensor, Memory] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for offset_D in self._offsets:
            offset_D.grad = None

    @torch.no_grad()
    def step(self, losses: Sequence[float]) -> None:
        """Move every offset in place; `losses` are of the pass that gave the gradients."""
        offsets_RD = torch.stack(list(self._offsets))
        gradients_RD = torch.stack([o.grad for o in self._offsets if o.grad is not None])
        both_2RD = torch.stack([offsets_RD, gradients_RD]).cpu().double()
        moved = []
        for offset_D, at_D, gradient_D, loss, most in zip(
            self._offsets, *both_2RD, losses, self._most_R.tolist(), strict=True
        ):
            memory = self.state.setdefault(offset_D, Memory(FIRST * most))
            moved.append(memory.next(at_D, _along(at_D, gradient_D, most), loss))
        for offset_D, next_D in zip(self._offsets, torch.stack(moved).to(offsets_RD), strict=True):
            offset_D.copy_(next_D)


def _along(at_D: Tensor, gradient_D: Tensor, most: float) -> Tensor:
    """The gradient; where the offset is as long as it may be and would grow, only its part along the sphere, for the
    clamp undoes the other."""
    square, outward = at_D @ at_D, at_D @ gradient_D
    if square < (CLAMPED * most) ** 2 or outward >= 0:
        return gradient_D
    return gradient_D - (outward / square) * at_D
