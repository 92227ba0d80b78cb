"""MEND's networks: they map the factors (x, delta) of a gradient to those of an edit (MEND, arXiv 2110.11309, sec. 3).

Axes: N tokens, K width of x, D width of delta, W width of a network, R its rank, M modes (weights that share it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # clamp, not relu: at the identity every unit is exactly 0, where relu's gradient is 0 and nothing would be learned
    "relu": lambda z: z.clamp(min=0),
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
}
EPSILON = 1e-7  # added to the standard deviation


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """How the networks are built; the fields are those of MENDHyperParams."""

    combine: bool
    one_sided: bool
    x_only: bool
    delta_only: bool
    shared: bool
    norm: bool
    n_hidden: int
    hidden_dim: int | None
    init: str
    act: str
    rank: int | None
    mlp_class: str

    @staticmethod
    def of(source: Any) -> NetworkSpec:
        """Take the fields from hyper-parameters."""
        return NetworkSpec(**{f.name: getattr(source, f.name) for f in fields(NetworkSpec)})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class LowRankLayer(nn.Module):
    """z + act(scale_m * (U V z + b) + shift_m), MEND eq. 3; without the `z +` when not initialised as the identity."""

    def __init__(self, width: int, spec: NetworkSpec, modes: int, generator: torch.Generator, *, last: bool) -> None:
        super().__init__()
        rank = min(spec.rank or width, width)
        self._act, self._skip, self._linear = ACTIVATIONS[spec.act], spec.init == "id", last and spec.init != "id"
        if self._skip:
            u, v = torch.zeros(width, rank), torch.randn(rank, width, generator=generator)
        else:
            u = _xavier(width, rank, generator, gain=nn.init.calculate_gain("relu"))
            v = _xavier(rank, width, generator, gain=1.0)
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.bias = nn.Parameter(torch.zeros(width))
        _add_modes(self, modes, width)

    def forward(self, z_NW: Tensor, mode: int) -> Tensor:
        """Transform rows of weight number `mode`."""
        pre_NW = z_NW @ self.v.T @ self.u.T + self.bias
        acted_NW = _act_in_mode(self, pre_NW, mode, None if self._linear else self._act)
        return z_NW + acted_NW if self._skip else acted_NW


class DenseLayer(nn.Module):
    """act(scale_m * (A z + b) + shift_m) with a full weight A; the last layer has no activation."""

    def __init__(
        self, inputs: int, outputs: int, spec: NetworkSpec, modes: int, generator: torch.Generator, *, last: bool
    ) -> None:
        super().__init__()
        self._act = None if last else ACTIVATIONS[spec.act]
        weight = _xavier(outputs, inputs, generator, gain=1.0)
        self.weight = nn.Parameter(torch.zeros_like(weight) if last and spec.init == "id" else weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        _add_modes(self, modes, outputs)

    def forward(self, z_NI: Tensor, mode: int) -> Tensor:
        """Transform rows of weight number `mode`."""
        return _act_in_mode(self, z_NI @ self.weight.T + self.bias, mode, self._act)


class IDMLP(nn.Module):
    """Low-rank layers of constant width."""

    def __init__(self, width: int, spec: NetworkSpec, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        count = spec.n_hidden + 1
        self.layers = nn.ModuleList(
            LowRankLayer(width, spec, modes, generator, last=i == count - 1) for i in range(count)
        )

    def forward(self, z_NW: Tensor, mode: int) -> Tensor:
        """Transform rows (N, W) of weight number `mode`."""
        for layer in self.layers:
            z_NW = layer(z_NW, mode)
        return z_NW


class MLP(nn.Module):
    """Dense layers with a hidden width; with `init: id` the whole is z + MLP(z), which starts as the identity."""

    def __init__(self, width: int, spec: NetworkSpec, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [width] + [spec.hidden_dim or 2 * width] * spec.n_hidden + [width]
        self.layers = nn.ModuleList(
            DenseLayer(a, b, spec, modes, generator, last=i == spec.n_hidden)
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self._skip = spec.init == "id"

    def forward(self, z_NW: Tensor, mode: int) -> Tensor:
        """Transform rows (N, W) of weight number `mode`."""
        out_NW = z_NW
        for layer in self.layers:
            out_NW = layer(out_NW, mode)
        return z_NW + out_NW if self._skip else out_NW


NETWORKS: dict[str, Callable[..., nn.Module]] = {"IDMLP": IDMLP, "MLP": MLP}


class GradientTransform(nn.Module):
    """(x, delta) -> (x~, delta~) for the weights of one shape: normalisation, then the networks."""

    u_mean: Tensor
    u_s: Tensor
    v_mean: Tensor
    v_s: Tensor
    k: Tensor

    def __init__(self, x_dim: int, delta_dim: int, spec: NetworkSpec, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        self._spec = spec
        for side, width in (("u", x_dim), ("v", delta_dim)):
            self.register_buffer(f"{side}_mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer(f"{side}_s", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("k", torch.zeros(1, dtype=torch.float64))
        build = NETWORKS[spec.mlp_class]
        wide_x = x_dim > delta_dim
        if spec.combine:
            self.mlp = build(x_dim + delta_dim, spec, modes, generator)
        elif not (spec.delta_only or (spec.one_sided and wide_x)):
            self.mlp1 = build(x_dim, spec, modes, generator)
        if not spec.combine and not (spec.x_only or (spec.one_sided and not wide_x)):
            self.mlp2 = build(delta_dim, spec, modes, generator)

    def forward(self, x_NK: Tensor, delta_ND: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """Transformed factors. In training mode the running statistics take the rows in first; else they are fixed."""
        if self._spec.norm and self.training:
            self._observe(x_NK, delta_ND)
        if self._spec.norm:
            x_NK = self._normalised(x_NK, self.u_mean, self.u_s)
            delta_ND = self._normalised(delta_ND, self.v_mean, self.v_s)
        networks = self._modules
        if "mlp" in networks:
            out = self.mlp(torch.cat([x_NK, delta_ND], dim=1), mode)
            return out[:, : x_NK.shape[1]], out[:, x_NK.shape[1] :]
        x_NK = self.mlp1(x_NK, mode) if "mlp1" in networks else x_NK
        delta_ND = self.mlp2(delta_ND, mode) if "mlp2" in networks else delta_ND
        return x_NK, delta_ND

    def _normalised(self, z_NW: Tensor, mean_W: Tensor, s_W: Tensor) -> Tensor:
        std_W = torch.where(self.k > 1, (s_W / (self.k - 1)).sqrt(), torch.ones_like(s_W))
        return ((z_NW.double() - mean_W) / (std_W + EPSILON)).to(z_NW.dtype)

    @torch.no_grad()
    def _observe(self, x_NK: Tensor, delta_ND: Tensor) -> None:
        """Welford's mean and sum of squared deviations over all rows ever seen, merged batch by batch; under torchrun
        over the rows of all ranks, in rank order, so that every rank holds the same numbers."""
        rows = self.k.new_full((1,), len(x_NK))
        mine = torch.cat([rows, *_moments(x_NK), *_moments(delta_ND)])
        parts = [mine]
        if dist.is_initialized():
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, mine)
        wide, narrow = x_NK.shape[1], delta_ND.shape[1]
        for part in parts:
            count, x_mean, x_s, delta_mean, delta_s = torch.split(part, [1, wide, wide, narrow, narrow])
            total = self.k + count
            self.u_mean, self.u_s = _merged(self.u_mean, self.u_s, x_mean, x_s, self.k, count, total)
            self.v_mean, self.v_s = _merged(self.v_mean, self.v_s, delta_mean, delta_s, self.k, count, total)
            self.k = total


def _moments(z_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the rows, float64; zeros when there are none."""
    z_NW = z_NW.double()
    if not len(z_NW):
        return z_NW.new_zeros(z_NW.shape[1]), z_NW.new_zeros(z_NW.shape[1])
    mean_W = z_NW.mean(0)
    return mean_W, (z_NW - mean_W).square().sum(0)


def _merged(
    mean: Tensor, s: Tensor, mean_b: Tensor, s_b: Tensor, k: Tensor, count: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Chan et al.'s rule for joining two sets of rows; no rows change nothing."""
    gap, total = mean_b - mean, total.clamp(min=1)
    return mean + gap * count / total, s + s_b + gap.square() * k * count / total


def _xavier(rows: int, columns: int, generator: torch.Generator, *, gain: float) -> Tensor:
    bound = gain * math.sqrt(6.0 / (rows + columns))
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * bound


class _PerMode(nn.Module):
    """One vector for each weight that shares a layer (M, W); a module, so that names are upstream's."""

    def __init__(self, values_MW: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values_MW)


def _add_modes(layer: nn.Module, modes: int, width: int) -> None:
    """A scale and a shift for each weight that shares the layer; none when there is no sharing (modes = 0)."""
    if modes:
        layer.mode_shift = _PerMode(torch.zeros(modes, width))
        layer.mode_scale = _PerMode(torch.ones(modes, width))


def _act_in_mode(layer: Any, pre_NW: Tensor, mode: int, act: Callable[[Tensor], Tensor] | None) -> Tensor:
    if "mode_scale" in layer._modules:
        pre_NW = pre_NW * layer.mode_scale.weight[mode] + layer.mode_shift.weight[mode]
    return pre_NW if act is None else act(pre_NW)
