"""How matrices are multiplied: how exactly on a GPU, and by which kernels on a CPU.

On a CPU, and of float64 as solves are, products are always exact. But MKL, which PyTorch's float32 products go to,
runs at less than half speed on AMD's processors with AVX-512; oneDNN, which is in every build of PyTorch for x86, does
not, and needs no second copy of the weights. The sums are added in another order: results differ in the last bits.
docs/performance.md has both rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from easyeditor.base.errors import ConfigError

FEWEST_ROWS = 16
"""Products of fewer rows read the matrix once and are left to MKL."""
SMALLEST_MATRIX = 2**14
"""Smaller matrices are left to MKL: calling takes longer than multiplying."""

Kernels = Literal["auto", "torch", "onednn"]


@contextmanager
def products(matmul: Literal["exact", "tf32"], cpu: Kernels = "auto") -> Iterator[None]:
    """Products of float32 matrices inside the block. On CUDA: `exact`, or `tf32` with 10 bits of each factor's mantissa
    in place of 23. On a CPU: PyTorch's own kernels, or oneDNN's, or those that are known to be faster on this
    processor. What was set before is set again after it, also on error."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if matmul == "tf32" else "ieee"
    try:
        with _OneDNN() if _by_onednn(cpu) else nullcontext():
            yield
    finally:
        setting.fp32_precision = before


def _by_onednn(cpu: Kernels) -> bool:
    if cpu == "onednn" and not _has_onednn():
        raise ConfigError("cpu_products: onednn: this build of PyTorch has no oneDNN")
    return cpu == "onednn" or (cpu == "auto" and _mkl_is_slow())


def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _mkl_is_slow() -> bool:
    """An AMD processor with AVX-512, which MKL does not use there."""
    cpu = Path("/proc/cpuinfo")
    return (
        _has_onednn()
        and torch._C.has_mkl
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu.exists()
        and "AuthenticAMD" in cpu.read_text(encoding="utf-8", errors="replace")
    )


class _OneDNN(TorchFunctionMode):
    """Inside it `linear` and `addmm` of float32 matrices on the CPU are computed by oneDNN."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if func is functional.linear and _suits(args[0], args[1]):
                return _linear(args[0], args[1], args[2] if len(args) > 2 else None)
            if func is torch.addmm and len(args) == 3 and args[0].dim() == 1 and _suits(args[1], args[2]):
                return _linear(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, matrix: Tensor) -> bool:
    return (
        type(x) is Tensor
        and type(matrix) in (Tensor, torch.nn.Parameter)
        and x.dtype == matrix.dtype == torch.float32
        and x.device.type == matrix.device.type == "cpu"
        and matrix.numel() >= SMALLEST_MATRIX
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
    )


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_OI, bias_O)):
        product: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
        return product
    return _multiplied(x, weight_OI, bias_O)


def _multiplied(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, by oneDNN; it lays W out anew in every call, so W may have been edited since the last."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """`linear` with its first derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _multiplied(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat_NO = grad.reshape(-1, grad.shape[-1])
        return (
            _multiplied(grad, weight_OI.t()) if needs_x else None,
            _multiplied(flat_NO.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
            flat_NO.sum(0) if needs_bias else None,
        )
