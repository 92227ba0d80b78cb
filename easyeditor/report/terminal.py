"""What a terminal shows: one record in a table and plain words, and a run's summary. Never loads a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from easyeditor.drawing.render import cut
from easyeditor.results.cause import cause, first_place_cure, remedy
from easyeditor.results.shown import ppl_name, shown_ppl, shown_share, shown_size
from easyeditor.values.record import EditRecord, LayerNumbers

LONGEST_ANSWER = 32  # characters of an answer in the table; the line above it has all
LONGEST_ID = 16  # characters of a case id shown
MOST_LISTED = 20  # collapses and lowest denominators shown; all are in summary.json


def print_record(record: EditRecord, console: Console, model_fingerprint: str | None = None) -> None:
    """The before/after table, the update's numbers, and the verdict on an edit of the model with this fingerprint."""
    shown = escape(f"{record.request.prompt} → {record.request.target_new}")
    console.print(f"\n[bold]{record.method}[/bold]: {shown}", highlight=False)
    if record.test_prefix is not None:
        console.print(f"rewrite prompt tested behind the prefix {record.test_prefix!r}", highlight=False, markup=False)
    console.print(_before_after(record))
    for layer, trace in record.trace.items():
        console.print(_layer_line(layer, trace), highlight=False)
    console.print()
    for style, line in verdict(record, model_fingerprint):
        console.print(line, style=style, highlight=False, markup=False)


def _layer_line(layer: int, trace: LayerNumbers) -> str:
    """One layer's update: numerator and denominator where the method has them, size, and how its loss fell."""
    known = [("numerator", trace.numerator_norm), ("denominator", trace.denominator), ("‖ΔW‖", trace.delta_norm)]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in known if value is not None)
    what = "training" if trace.value_norm_before is None else "value search"
    loss = f"loss {trace.loss_first:.3f} → {trace.loss_last:.3f}"
    return f"layer {layer}: {numbers}; {what}: {trace.steps} passes, {loss}"


def verdict(record: EditRecord, model_fingerprint: str | None = None) -> list[tuple[str, str]]:
    """(style, sentence) lines: collapsed or not; where it did or came near, the cause the numbers show, what to try."""
    lines = [_headline(record)]
    if why := cause(record):
        lines.append(("", f"Cause: {why}."))
    if what := remedy(record):
        lines.append(("cyan", f"Try: {what}"))
    if better := first_place_cure(record, model_fingerprint):
        lines.append(("cyan", f"Or: {better}"))
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
    table.add_row(
        escape(f"P({cut(request.target_new, LONGEST_ANSWER)})"), shown_share(new["before"]), shown_share(new["after"])
    )
    if request.ground_truth is not None:
        table.add_row(
            escape(f"P({cut(request.ground_truth, LONGEST_ANSWER)})"),
            shown_share(old["before"]),
            shown_share(old["after"]),
        )
    sentences = record.perplexity.get("sentences")
    if sentences is not None:
        begun = ", with BOS" if record.bos else ""
        title = f"perplexity ({sentences['name']}, {sentences['sentences']} sentences{begun})"
        table.add_row(escape(title), shown_ppl(pre.ppl), shown_ppl(post.ppl))
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Counts, metrics, time and its split, the collapsed, the screen's quality."""
    counts = summary["counts"]
    heading = f"{summary['method']} on {summary['model']}, {summary['mode']}: {summary['data']} ({summary['format']})"
    console.print(f"\n[bold]{escape(heading)}[/bold]", highlight=False)
    if summary["mode"] == "screen":
        _print_screen(summary, console)
        return
    done = f"{counts['edits']} edits of {counts['selected']} requests"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    bad = f", {counts['bad_records']} bad records left out" if counts["bad_records"] else ""
    console.print(f"{done}{failed}{bad}; {counts['collapsed']} collapsed", highlight=False)
    if counts["edits"]:
        console.print(_metrics(summary))
        console.print(_time(summary), highlight=False)
    if summary["collapsed"]:
        console.print(_collapsed(summary["collapsed"]))
    _print_quality(summary, console)
    if summary["guard"]["actions"]:
        acts = ", ".join(f"{action} {count}" for action, count in summary["guard"]["actions"].items())
        console.print(f"guard (on_collapse: {summary['guard']['policy']}): {acts}", highlight=False)
    last = summary["last_evaluation"]
    if last is not None:
        rates = ", ".join(f"{key} {shown_share(last[key])}" for key in ("rewrite_acc", "rephrase_acc", "locality_acc"))
        name = ppl_name(bool((summary["ppl"] or {}).get("bos")))
        line = f"after {last['after']} edits: {name} {shown_ppl(last['ppl'])}; {last['edits']} in the model:"
        console.print(f"{line} {rates}", highlight=False)
    if summary.get("forecast") is not None:
        console.print(summary["forecast"]["words"], highlight=False)


def _metrics(summary: Mapping[str, Any]) -> Table:
    table = Table(show_header=True, header_style="bold")
    for title in ("mean over edits", "before", "after", "edits"):
        table.add_column(title, justify="left" if title.startswith("mean") else "right")
    for name, values in summary["metrics"].items():
        before = "1 by definition" if name == "locality_acc" else shown_share(values["before"])
        table.add_row(name, before, shown_share(values["after"]), str(values["edits"]))
    ppl = summary["ppl"]
    if ppl is not None:
        count = str(summary["counts"]["edits"])
        name = ppl_name(ppl["bos"])
        table.add_row(f"{name}, median", shown_ppl(ppl["before"]), shown_ppl(ppl["median"]), count)
        table.add_row(f"{name}, worst", "", shown_ppl(ppl["max"]), count)
    return table


def _time(summary: Mapping[str, Any]) -> str:
    each, total = summary["seconds_per_edit"], summary["seconds"]
    parts = []
    for name in ("edit", "metrics", "perplexity"):
        share = total[name] / total["total"] if total["total"] else 0.0
        parts.append(f"{name} {each[name]:.2f} s ({share:.0%})")
    return f"{each['total']:.2f} s an edit (median): {', '.join(parts)}; {summary['edits_per_second']:.3g} edits/s"


def _collapsed(collapsed: list[dict[str, Any]]) -> Table:
    title = f"collapsed: {len(collapsed)}" + (f", the first {MOST_LISTED}" if len(collapsed) > MOST_LISTED else "")
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("case", no_wrap=True, max_width=LONGEST_ID)
    table.add_column("prompt → target")
    table.add_column("perplexity", justify="right", no_wrap=True)
    table.add_column("denominator", justify="right", no_wrap=True)
    for item in collapsed[:MOST_LISTED]:
        text = _one_line(f"{item['prompt']} → {item['target_new']}")
        table.add_row(_one_line(str(item["case_id"])), text, shown_ppl(item["ppl"]), shown_size(item["denominator"]))
    return table


def _print_quality(summary: Mapping[str, Any], console: Console) -> None:
    screen = summary["screen"]
    if screen is not None:
        console.print(
            f"screen (|denominator| < {screen['threshold']:g} predicts a collapse): {screen['predicted']} predicted, "
            f"precision {shown_share(screen['precision'])}, recall {shown_share(screen['recall'])}",
            highlight=False,
        )


def _print_screen(summary: Mapping[str, Any], console: Console) -> None:
    counts, screen = summary["counts"], summary["screen"]
    if screen is None:
        console.print("nothing screened", highlight=False)
        return
    rule = f"|denominator| < {screen['threshold']:g}"
    console.print(
        f"{counts['screened']} requests, {screen['predicted']} predicted to collapse ({rule})", highlight=False
    )
    table = Table(title="lowest denominators", title_justify="left", header_style="bold")
    table.add_column("case", no_wrap=True, max_width=LONGEST_ID)
    table.add_column("prompt")
    table.add_column("denominator", justify="right", no_wrap=True)
    table.add_column("collapse?", no_wrap=True)
    for item in screen["lowest"][:MOST_LISTED]:
        guess = "predicted" if item["prediction"] else ""
        table.add_row(
            _one_line(str(item["case_id"])), _one_line(item["prompt"]), shown_size(item["denominator"]), guess
        )
    console.print(table)


def _one_line(text: str) -> Text:
    """Cut where there is no room; the other columns stay whole."""
    return Text(text, no_wrap=True, overflow="ellipsis")
