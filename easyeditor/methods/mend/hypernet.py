"""The hypernetwork: one gradient transform per weight shape and one learned step size per weight.

Axes: N tokens, K width of x (a layer's input), D width of delta (the gradient at its output).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from easyeditor.methods.gradient import EditedWeight as EditedWeight
from easyeditor.methods.gradient import edited_weights as edited_weights
from easyeditor.methods.mend.network import GradientTransform, NetworkSpec

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Factors:
    """The gradient of one weight as factors: sum over rows of delta x^T."""

    x_NK: Tensor
    delta_ND: Tensor


class Hypernetwork(nn.Module):
    """Maps the factors of an edit's gradient to the factors of an update.

    Tensors are named as in upstream's archives: `mend.(K, D).mlp.layers.0.u` …, and `edit_lrs`, which here goes by
    `weights`, in their order.
    """

    def __init__(
        self, spec: NetworkSpec, weights: Sequence[EditedWeight], *, edit_lr: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.spec, self.weights = spec, tuple(weights)
        groups: dict[str, list[EditedWeight]] = {}
        for weight in self.weights:
            groups.setdefault(self._key(weight), []).append(weight)
        self._place = {w.name: (key, mode) for key, group in groups.items() for mode, w in enumerate(group)}
        self.mend = nn.ModuleDict(
            {
                key: GradientTransform(
                    group[0].inputs, group[0].outputs, spec, len(group) if spec.shared else 0, generator
                )
                for key, group in groups.items()
            }
        )
        self.edit_lrs = nn.Parameter(torch.full((len(self.weights),), edit_lr))

    def _key(self, weight: EditedWeight) -> str:
        return str((weight.inputs, weight.outputs)) if self.spec.shared else weight.name.replace(".", "#")

    def transform(self, factors: Mapping[str, Factors]) -> dict[str, Factors]:
        """(x~, delta~) of every weight, rows that are all zero in x or in delta dropped first; on the hypernetwork's
        device, wherever the edited layers lie."""
        return self._transformed(nonzero_rows(factors))

    def _transformed(self, rows: Mapping[str, Factors]) -> dict[str, Factors]:
        out = {}
        for weight in self.weights:
            (key, mode), kept, own = self._place[weight.name], rows[weight.name], self.edit_lrs
            out[weight.name] = Factors(*self.mend[key](kept.x_NK.to(own), kept.delta_ND.to(own), mode))
        return out

    def factors_of(self, weight: EditedWeight, transformed: Factors) -> tuple[Tensor, Tensor]:
        """The update of `weight` as (left, right) in the weight's own layout: step size times sum of delta~ x~^T."""
        lr = self.edit_lrs[[w.name for w in self.weights].index(weight.name)]
        scaled_ND = lr * transformed.delta_ND
        if weight.transposed:
            return transformed.x_NK.T, scaled_ND
        return scaled_ND.T, transformed.x_NK

    def updates(self, rows: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        """The update of every weight as (left, right), differentiable in the hypernetwork's parameters. `rows` are
        what `nonzero_rows` leaves."""
        transformed = self._transformed(rows)
        return {w.name: self.factors_of(w, transformed[w.name]) for w in self.weights}

    @property
    def trained(self) -> bool:
        """Have all normalisers seen enough to normalise?"""
        return not self.spec.norm or all(float(net.k) > 1 for net in self._transforms())

    def _transforms(self) -> list[GradientTransform]:
        return [net for net in self.mend.values() if isinstance(net, GradientTransform)]


def nonzero_rows(factors: Mapping[Name, Factors]) -> dict[Name, Factors]:
    """Of each gradient only the rows where both x and delta have something. The host asks the device once for all."""
    flat = {name: Factors(f.x_NK.flatten(0, -2), f.delta_ND.flatten(0, -2)) for name, f in factors.items()}
    masks = [(f.x_NK != 0).any(1) & (f.delta_ND != 0).any(1) for f in flat.values()]
    kept = iter(torch.cat([mask.to(masks[0].device) for mask in masks]).tolist())
    found = {}
    for name, f in flat.items():
        own = [n for n, keep in enumerate(itertools.islice(kept, len(f.x_NK))) if keep]
        index = torch.tensor(own, dtype=torch.long).to(f.x_NK.device, non_blocking=True)
        found[name] = Factors(f.x_NK[index], f.delta_ND[index])
    return found
