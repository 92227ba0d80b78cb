"""How exactly a GPU multiplies float32 matrices. On a CPU, and of float64 as solves are, products are always exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def products(matmul: Literal["exact", "tf32"]) -> Iterator[None]:
    """Products of float32 matrices on CUDA, inside the block: `exact`, or `tf32` with 10 bits of each factor's mantissa
    in place of 23. What was set before is set again after it, also on error."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if matmul == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
