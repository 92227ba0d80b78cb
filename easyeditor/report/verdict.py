"""What one record says, in a table and in plain words. Reads records only, never a model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyeditor.results.collapse import cause, remedy
from easyeditor.results.record import EditRecord, LayerNumbers
from easyeditor.results.shown import shown_ppl, shown_share


def print_record(record: EditRecord, console: Console) -> None:
    """The before/after table, the update's numbers, and the verdict."""
    shown = escape(f"{record.request.prompt} → {record.request.target_new}")
    console.print(f"\n[bold]{record.method}[/bold]: {shown}", highlight=False)
    if record.test_prefix is not None:
        console.print(f"rewrite prompt tested behind the prefix {record.test_prefix!r}", highlight=False, markup=False)
    console.print(_before_after(record))
    for layer, trace in record.trace.items():
        console.print(_layer_line(layer, trace), highlight=False)
    console.print()
    for style, line in verdict(record):
        console.print(line, style=style, highlight=False, markup=False)


def _layer_line(layer: int, trace: LayerNumbers) -> str:
    """One layer's update: numerator and denominator where the method has them, size, and how its loss fell."""
    known = [("numerator", trace.numerator_norm), ("denominator", trace.denominator), ("‖ΔW‖", trace.delta_norm)]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in known if value is not None)
    what = "training" if trace.value_norm_before is None else "value search"
    loss = f"loss {trace.loss_first:.3f} → {trace.loss_last:.3f}"
    return f"layer {layer}: {numbers}; {what}: {trace.steps} passes, {loss}"


def verdict(record: EditRecord) -> list[tuple[str, str]]:
    """(style, sentence) lines: collapsed or not; where it did or came near, the cause the numbers show, what to try."""
    lines = [_headline(record)]
    if why := cause(record):
        lines.append(("", f"Cause: {why}."))
    if what := remedy(record):
        lines.append(("cyan", f"Try: {what}"))
    return lines


def _headline(record: EditRecord) -> tuple[str, str]:
    collapse = record.collapse
    if collapse is None:
        return "yellow", "Perplexity was not measured (ppl_sentence_num: 0), so there is no verdict on collapse."
    after = shown_ppl(collapse.ppl_after)
    change = f"perplexity {shown_ppl(collapse.ppl_before)} → {after}, threshold {shown_ppl(collapse.limit)}"
    if collapse.collapsed:
        return "bold red", f"COLLAPSED ({change})"
    worked = record.post.rewrite[0] == 1
    return ("bold green", f"NO COLLAPSE ({change}); the edit {'took' if worked else 'did not take on this prompt'}.")


def _before_after(record: EditRecord) -> Table:
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    pre, post, request = record.pre, record.post, record.request
    table.add_row("rewrite accuracy", _mean(pre.rewrite), _mean(post.rewrite))
    if pre.rephrase:
        table.add_row("rephrase accuracy", _mean(pre.rephrase), _mean(post.rephrase))
    for key in request.locality:
        table.add_row(escape(f"locality ({key})"), "1 by definition", _mean(post.locality[key]))
    for key in request.portability:
        table.add_row(escape(f"portability ({key})"), _mean(pre.portability[key]), _mean(post.portability[key]))
    before = record.metrics.get("before", {})
    for name, value in record.metrics.get("after", {}).items():
        table.add_row(escape(name), shown_share(before[name].value), shown_share(value.value))
    new, old = record.probabilities["target_new"], record.probabilities["ground_truth"]
    table.add_row(escape(f"P({request.target_new})"), shown_share(new["before"]), shown_share(new["after"]))
    if request.ground_truth is not None:
        table.add_row(escape(f"P({request.ground_truth})"), shown_share(old["before"]), shown_share(old["after"]))
    sentences = record.perplexity.get("sentences")
    if sentences is not None:
        title = f"perplexity ({sentences['name']}, {sentences['sentences']} sentences)"
        table.add_row(escape(title), shown_ppl(pre.ppl), shown_ppl(post.ppl))
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"
