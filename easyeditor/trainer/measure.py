"""Numbers of a training run: what a step came to, sums that become means, over all ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from easyeditor.trainer.passes import StepResult


def numbers(
    outcomes: Sequence[StepResult], cedit: float, cloc: float, *more: Tensor
) -> tuple[list[dict[str, float]], list[float]]:
    """Each step's numbers under the log's names (docs/mend.md says what each means), and `more` numbers; all of them
    are read at once, because a read waits for the device."""
    kept = [
        {
            "edit_loss": o.edit_loss,
            "locality_loss": o.locality_loss,
            "edit_acc": o.accuracy,
            **({} if o.locality_drawdown is None else {"locality_drawdown": o.locality_drawdown}),
        }
        for o in outcomes
    ]
    device = outcomes[0].edit_loss.device
    flat = [value for own in kept for value in own.values()] + list(more)
    read = iter(torch.stack([value.detach().to(device, torch.float64) for value in flat]).tolist())
    found = [{name: next(read) for name in own} for own in kept]
    for own in found:
        own["total_loss"] = cedit * own["edit_loss"] + cloc * own["locality_loss"]
    return found, list(read)


def add(totals: dict[str, float], found: Mapping[str, float]) -> None:
    """Add a step's numbers to sums; how many were added is under `n/…`."""
    for key, value in found.items():
        totals[key] = totals.get(key, 0.0) + value
        totals[f"n/{key}"] = totals.get(f"n/{key}", 0.0) + 1


def anywhere(flag: Tensor) -> Tensor:
    """Is it so on any rank? More than 0 if it is; all stop together."""
    count = flag.float()
    if dist.is_initialized():
        dist.all_reduce(count)
    return count


def gathered(totals: dict[str, float]) -> list[dict[str, float]]:
    """The sums of every rank, in their order."""
    parts: list[Any] = [totals]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, totals)
    return parts


def means(totals: dict[str, float]) -> dict[str, float]:
    """Means over everything added on all ranks."""
    parts = gathered(totals)
    keys = sorted({key for part in parts for key in part if not key.startswith("n/")})
    return {key: sum(p.get(key, 0.0) for p in parts) / sum(p.get(f"n/{key}", 0.0) for p in parts) for key in keys}


def note(found: Mapping[str, float], steps_per_s: float) -> str:
    """The live line."""
    drawdown = f"{found['locality_drawdown']:.2f}" if "locality_drawdown" in found else "–"
    return (
        f"edit {found['edit_loss']:.3f} locality {found['locality_loss']:.4f} "
        f"acc {found['edit_acc']:.2f} drawdown {drawdown} {steps_per_s:.1f} steps/s"
    )


def passed(before: int, now: int, interval: int) -> bool:
    """Was a multiple of `interval` reached?"""
    return now // interval > before // interval
