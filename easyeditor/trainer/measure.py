"""Numbers of a training run: what a step came to, sums that become means, over all ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from easyeditor.trainer.passes import StepResult


def numbers(outcome: StepResult, cedit: float, cloc: float) -> dict[str, float]:
    """One step's numbers under the log's names; docs/mend.md says what each means."""
    edit, locality = float(outcome.edit_loss.detach()), float(outcome.locality_loss.detach())
    found = {
        "edit_loss": edit,
        "locality_loss": locality,
        "total_loss": cedit * edit + cloc * locality,
        "edit_acc": sum(outcome.accuracy) / len(outcome.accuracy),
    }
    if outcome.locality_drawdown is not None:
        found["locality_drawdown"] = outcome.locality_drawdown
    return found


def add(totals: dict[str, float], found: Mapping[str, float]) -> None:
    """Add a step's numbers to sums; how many were added stands under `n/…`."""
    for key, value in found.items():
        totals[key] = totals.get(key, 0.0) + value
        totals[f"n/{key}"] = totals.get(f"n/{key}", 0.0) + 1


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


def note(outcome: StepResult, steps_per_s: float) -> str:
    """The live line."""
    drawdown = "–" if outcome.locality_drawdown is None else f"{outcome.locality_drawdown:.2f}"
    accuracy = sum(outcome.accuracy) / len(outcome.accuracy)
    return (
        f"edit {float(outcome.edit_loss.detach()):.3f} locality {float(outcome.locality_loss.detach()):.4f} "
        f"acc {accuracy:.2f} drawdown {drawdown} {steps_per_s:.1f} steps/s"
    )


def passed(before: int, now: int, interval: int) -> bool:
    """Was a multiple of `interval` reached?"""
    return now // interval > before // interval
