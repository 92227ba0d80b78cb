"""What a terminal shows: one record in a table and plain words, and a run's summary. Never loads a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from easyeditor.drawing.render import cut, rich_table
from easyeditor.drawing.table import Spec, Table
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


def _before_after(record: EditRecord) -> RichTable:
    pre, post, request = record.pre, record.post, record.request
    rows = [("rewrite accuracy", _mean(pre.rewrite), _mean(post.rewrite))]
    rows += [("rephrase accuracy", _mean(pre.rephrase), _mean(post.rephrase))] if pre.rephrase else []
    rows += [(f"locality ({key})", "1 by definition", _mean(post.locality[key])) for key in request.locality]
    for key in request.portability:
        rows.append((f"portability ({key})", _mean(pre.portability[key]), _mean(post.portability[key])))
    before = record.metrics.get("before", {})
    for name, value in record.metrics.get("after", {}).items():
        rows.append((name, shown_share(before[name].value), shown_share(value.value)))
    for answer, which in ((request.target_new, "target_new"), (request.ground_truth, "ground_truth")):
        if answer is not None:
            known = record.probabilities[which]
            name = f"P({cut(answer, LONGEST_ANSWER)})"
            rows.append((name, shown_share(known["before"]), shown_share(known["after"])))
    sentences = record.perplexity.get("sentences")
    if sentences is not None:
        begun = ", with BOS" if record.bos else ""
        name = f"perplexity ({sentences['name']}, {sentences['sentences']} sentences{begun})"
        rows.append((name, shown_ppl(pre.ppl), shown_ppl(post.ppl)))
    return _framed("", (("", "text"), ("before", "right"), ("after", "right")), rows)


def _framed(title: str, columns: Iterable[Spec], rows: Iterable[Any]) -> RichTable:
    return rich_table(Table.of("", title, columns, rows), framed=True)


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


def _metrics(summary: Mapping[str, Any]) -> RichTable:
    rows = []
    for name, values in summary["metrics"].items():
        before = "1 by definition" if name == "locality_acc" else shown_share(values["before"])
        rows.append((name, before, shown_share(values["after"]), values["edits"]))
    ppl, count = summary["ppl"], summary["counts"]["edits"]
    if ppl is not None:
        name = ppl_name(ppl["bos"])
        rows.append((f"{name}, median", shown_ppl(ppl["before"]), shown_ppl(ppl["median"]), count))
        rows.append((f"{name}, worst", "", shown_ppl(ppl["max"]), count))
    return _framed("", (("mean over edits", "text"), ("before", "right"), ("after", "right"), ("edits", "right")), rows)


def _time(summary: Mapping[str, Any]) -> str:
    each, total = summary["seconds_per_edit"], summary["seconds"]
    parts = []
    for name in ("edit", "metrics", "perplexity"):
        share = total[name] / total["total"] if total["total"] else 0.0
        parts.append(f"{name} {each[name]:.2f} s ({share:.0%})")
    return f"{each['total']:.2f} s an edit (median): {', '.join(parts)}; {summary['edits_per_second']:.3g} edits/s"


def _collapsed(collapsed: list[dict[str, Any]]) -> RichTable:
    title = f"collapsed: {len(collapsed)}" + (f", the first {MOST_LISTED}" if len(collapsed) > MOST_LISTED else "")
    columns: tuple[Spec, ...] = (
        ("case", "", lambda item: cut(str(item["case_id"]), LONGEST_ID)),
        ("prompt → target", "", lambda item: f"{item['prompt']} → {item['target_new']}"),
        ("perplexity", "perplexity", lambda item: item["ppl"]),
        ("denominator", "right", lambda item: shown_size(item["denominator"])),
    )
    return _framed(title, columns, collapsed[:MOST_LISTED])


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
    columns: tuple[Spec, ...] = (
        ("case", "", lambda item: cut(str(item["case_id"]), LONGEST_ID)),
        ("prompt", "", lambda item: item["prompt"]),
        ("denominator", "right", lambda item: shown_size(item["denominator"])),
        ("collapse?", "", lambda item: "predicted" if item["prediction"] else ""),
    )
    console.print(_framed("lowest denominators", columns, screen["lowest"][:MOST_LISTED]))
