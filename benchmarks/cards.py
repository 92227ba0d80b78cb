"""What cards can do at best, and how a stage is timed: seconds, counted operations, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

GIB = 2**30
PEAKS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"float32": 51, "tf32": 378, "bfloat16": 756, "float16": 756},
    "H100 NVL": {"float32": 60, "tf32": 418, "bfloat16": 835, "float16": 835},
    "H100": {"float32": 67, "tf32": 495, "bfloat16": 989, "float16": 989},
    "H200": {"float32": 67, "tf32": 495, "bfloat16": 989, "float16": 989},
    "A100": {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312},
    "A10G": {"float32": 31.2, "tf32": 35, "bfloat16": 70, "float16": 70},
    "A10": {"float32": 31.2, "tf32": 62.5, "bfloat16": 125, "float16": 125},
    "A40": {"float32": 37.4, "tf32": 74.8, "bfloat16": 149.7, "float16": 149.7},
    "L40S": {"float32": 91.6, "tf32": 183, "bfloat16": 362, "float16": 362},
    "V100": {"float32": 15.7, "float16": 125},
    "T4": {"float32": 8.1, "float16": 65},
}
"""Dense TFLOP/s by part of the card's name (the first that fits) and kind of product, from the makers' data sheets."""


def peak_of(device: torch.device, kind: str) -> float | None:
    """The card's best TFLOP/s in a kind of product; None where the table does not have it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((rates.get(kind) for card, rates in PEAKS.items() if set(card.split()) <= set(name)), None)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row: seconds of one `unit`, operations in it (None: not counted), the device's peak memory during it."""

    name: str
    unit: str
    seconds: float
    flop: float | None
    peak_bytes: int

    def per(self, unit: str, count: float) -> Stage:
        """The same for one of `count` parts."""
        flop = None if self.flop is None else self.flop / count
        return Stage(name=self.name, unit=unit, seconds=self.seconds / count, flop=flop, peak_bytes=self.peak_bytes)

    def row(self, peak: float | None) -> str:
        """A line of the table; `peak` in TFLOP/s."""
        rate = None if not self.flop or self.seconds <= 0 else self.flop / self.seconds / 1e12
        share = "-" if rate is None or peak is None else f"{100 * rate / peak:.1f} %"
        shown = "-" if rate is None else f"{rate:.4g}"
        cells = (self.name, self.unit, f"{self.seconds:.4g}", shown, share, f"{self.peak_bytes / GIB:.2f}")
        return "| " + " | ".join(cells) + " |"


HEAD = "| stage | of | seconds | TFLOP/s | of the peak | peak memory, GiB |\n|---|---|---|---|---|---|"


class _Counted(TorchDispatchMode):
    """Counts the operations of matrix products and attention; factorisations and what is elementwise are not."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = flop_registry.get(func._overloadpacket)
        if rule is None:
            with self:  # under inference mode a product may come as one operator made of others
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if rule is not None:
            self.flop += rule(*args, **kwargs, out_val=out)
        return out


@dataclass(frozen=True)
class Clock:
    """Times stages on one device. A run before warms up and is counted, unless `once`: then one run is both."""

    device: torch.device
    once: bool = False

    def __call__(self, name: str, run: Callable[[], Any], unit: str = "run") -> Stage:
        """Time `run()`, which leaves nothing behind that makes it quicker the next time."""
        if not self.once:
            return self.timed(name, run, unit, self.count(run))
        counted = _Counted()
        self._forget_peak()
        seconds = self._seconds(run, counted)
        return Stage(name=name, unit=unit, seconds=seconds, flop=counted.flop, peak_bytes=self.peak())

    def count(self, run: Callable[[], Any]) -> float:
        """The operations of `run()`. Counting takes time of its own, so this is not what is timed."""
        counted = _Counted()
        self._seconds(run, counted)
        return counted.flop

    def timed(self, name: str, run: Callable[[], Any], unit: str, flop: float) -> Stage:
        """Time `run()`, whose operations are known."""
        self._forget_peak()
        seconds = self._seconds(run, None)
        return Stage(name=name, unit=unit, seconds=seconds, flop=flop, peak_bytes=self.peak())

    def _seconds(self, run: Callable[[], Any], counted: _Counted | None) -> float:
        self._wait()
        started = time.perf_counter()
        if counted is None:
            run()
        else:
            with counted:
                run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # Linux

    def peak(self) -> int:
        """Most memory in use since the stage began: the card's, or this process's on a CPU (0 where Linux is not)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not Path("/proc/self/status").exists():
            return 0
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
