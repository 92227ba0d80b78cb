"""What one record says, in a table and in plain words. Reads records only, never a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TYPICAL_DENOMINATOR = 2.0
"""Edits that keep a model whole have a |denominator| above this (Fall of ROME, table 2; docs/metrics.md)."""


def print_record(record: Mapping[str, Any], console: Console) -> None:
    """The before/after table, the update's numbers, and the verdict."""
    request = record["requested_rewrite"]
    shown = escape(f"{request['prompt']} → {request['target_new']}")
    console.print(f"\n[bold]{record['method']}[/bold]: {shown}", highlight=False)
    if record["test_prefix"] is not None:
        console.print(
            f"rewrite prompt tested behind the prefix {record['test_prefix']!r}", highlight=False, markup=False
        )
    console.print(_before_after(record))
    for layer, trace in record["trace"].items():
        console.print(_layer_line(layer, trace), highlight=False)
    console.print()
    for style, line in verdict(record):
        console.print(line, style=style, highlight=False, markup=False)


def _layer_line(layer: str, trace: Mapping[str, Any]) -> str:
    """One layer's update: numerator and denominator where the method has them, size, and how its loss fell."""
    known = [
        ("numerator", trace["numerator_norm"]),
        ("denominator", trace["denominator"]),
        ("‖ΔW‖", trace["delta_norm"]),
    ]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in known if value is not None)
    what = "training" if trace["value_norm_before"] is None else "value search"
    loss = f"loss {trace['loss_first']:.3f} → {trace['loss_last']:.3f}"
    return f"layer {layer}: {numbers}; {what}: {trace['steps']} passes, {loss}"


def verdict(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(style, sentence) lines: collapsed or not, the cause the numbers show, what to try."""
    lines = [_headline(record)]
    layer, trace = min(record["trace"].items(), key=lambda item: _size(item[1]["denominator"]))
    small = _size(trace["denominator"]) < TYPICAL_DENOMINATOR
    collapsed = record["collapse"] is not None and record["collapse"]["collapsed"]
    denominator = trace["denominator"]
    if small:
        cause = (
            f"Cause: the denominator at layer {layer} is {denominator:.3g} (typical is > {TYPICAL_DENOMINATOR:g}): the "
            f"key of the bare prompt (norm {trace['key_norm']:.3g}) hardly overlaps the mean key over contexts (norm "
            f"{trace['prefixed_key_norm']:.3g}), and the update is divided by it."
        )
        lines.append(("", cause))
    elif collapsed and trace["value_norm_before"] is None:
        size = max(trace["delta_norm"] for trace in record["trace"].values())
        cause = f"The method has no denominator; the weights moved by ‖ΔW‖ {size:.3g}. Try fewer or smaller steps."
        lines.append(("", cause))
    elif collapsed and denominator is None:
        lines.append(("", f"The method has no denominator; {_growth(trace)}"))
    elif collapsed:
        cause = f"The denominator is ordinary ({denominator:.3g}), so the keys are not the cause; {_growth(trace)}"
        lines.append(("", cause))
    if small and record["remedy"]:
        lines.append(("cyan", f"Try: --set {record['remedy']}  (the mean key on both sides; docs/metrics.md)"))
    return lines


def _growth(trace: Mapping[str, Any]) -> str:
    growth = trace["value_norm_after"] / trace["value_norm_before"]
    return (
        f"the value grew {growth:.3g}-fold. Try a smaller clamp_norm_factor, fewer v_num_grad_steps, or another layer."
    )


def _headline(record: Mapping[str, Any]) -> tuple[str, str]:
    collapse = record["collapse"]
    if collapse is None:
        return "yellow", "Perplexity was not measured (ppl_sentence_num: 0), so there is no verdict on collapse."
    after = "not finite" if not collapse["finite"] else _number(collapse["ppl_after"])
    change = f"perplexity {_number(collapse['ppl_before'])} → {after}, threshold {_number(collapse['limit'])}"
    if collapse["collapsed"]:
        return "bold red", f"COLLAPSED ({change})"
    worked = record["post"]["rewrite_acc"][0] == 1
    return ("bold green", f"NO COLLAPSE ({change}); the edit {'took' if worked else 'did not take on this prompt'}.")


def _before_after(record: Mapping[str, Any]) -> Table:
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    pre, post, request = record["pre"], record["post"], record["requested_rewrite"]
    table.add_row("rewrite accuracy", _mean(pre["rewrite_acc"]), _mean(post["rewrite_acc"]))
    if "rephrase_acc" in pre:
        table.add_row("rephrase accuracy", _mean(pre["rephrase_acc"]), _mean(post["rephrase_acc"]))
    for key in request["locality"]:
        table.add_row(escape(f"locality ({key})"), "1 by definition", _mean(post["locality"][f"{key}_acc"]))
    for key in request["portability"]:
        table.add_row(
            escape(f"portability ({key})"),
            _mean(pre["portability"][f"{key}_acc"]),
            _mean(post["portability"][f"{key}_acc"]),
        )
    new, old = record["probabilities"]["target_new"], record["probabilities"]["ground_truth"]
    table.add_row(escape(f"P({request['target_new']})"), _small(new["before"]), _small(new["after"]))
    if request["ground_truth"] is not None:
        table.add_row(escape(f"P({request['ground_truth']})"), _small(old["before"]), _small(old["after"]))
    if record["collapse"] is not None:
        sentences = record["perplexity"]["sentences"]
        title = f"perplexity ({sentences['name']}, {sentences['sentences']} sentences)"
        table.add_row(escape(title), _number(pre["ppl"]), _number(post["ppl"]))
    return table


def _size(denominator: float | None) -> float:
    return math.inf if denominator is None else abs(denominator)


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value < 0.01 else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
