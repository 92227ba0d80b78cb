"""First-token protection against ROME, C-ROME and the consistent value: layers, hard requests, ordinary requests.

  python -m easyeditor.analysis protection --kept rows.jsonl                    every layer x four requests x five ways
  python -m easyeditor.analysis protection --kept hard.jsonl --set-name hard --layers 9 --limit 64
  python -m easyeditor.analysis protection --kept normal.jsonl --set-name normal --layers 9 --limit 100

Every edit is a line of the --kept file as soon as it is measured: a run cut short goes on where it was, and a file of
several runs is read as one. What each column means: docs/findings/first-token-protection.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.errors import ConfigError
from easyeditor.base.places import declare
from easyeditor.base.progress import steps
from easyeditor.dataset.sets import DATA, RequestSet, load_collapse, load_normal
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.registry import Evaluation, evaluate
from easyeditor.evaluate.scoring import score
from easyeditor.experiments.tools.lab import Lab, common_flags, hparams_of
from easyeditor.lm.tokens import SLOT
from easyeditor.methods.locate.value_search import Found
from easyeditor.methods.rome.method import ROME
from easyeditor.results.journal import Journal, read_journal
from easyeditor.stats.first_token import first_tokens, later_tokens, moments
from easyeditor.values.edit import EditRequest, WeightDelta
from easyeditor.values.plain import mean

REQUESTS = DATA / "requests" / "first_place_edits.json"
WAYS = ("ROME", "C-ROME", "consistent value", "protected", "both keys")
METRICS = ("rephrase_acc", "locality_acc", "locality_first_place")
PREFIXES = 3  # contexts in which P(target) behind a prefix is measured
TOGETHER = 8  # requests searched before the first of them is measured: what a run cut short loses at most
COLUMNS = (
    *("set", "layer", "case", "prompt", "way", "|dW|", "perplexity", "collapsed"),
    *("P bare", "P behind a prefix", *METRICS),
)
Line = dict[str, Any]


def add_flags(p: argparse.ArgumentParser) -> None:
    """Which requests, layers and ways; where the rows are kept."""
    common_flags(p)
    p.add_argument("--set-name", choices=("sweep", "hard", "normal"), default="sweep", help="default: %(default)s")
    p.add_argument("--collapse", metavar="FILE", help="requests of your own in place of the set's")
    p.add_argument("--limit", type=int, default=4, help="most requests (default: %(default)s)")
    p.add_argument("--layers", type=int, nargs="+", metavar="L", help="default: all")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    p.add_argument("--kept", metavar="FILE", required=True, help="JSON lines: one for each edit, kept and taken up")
    declare(p, "collapse", kept="kept of protection")


def experiment(args: argparse.Namespace, _folder: Path) -> Outcome:
    """Edit the same requests in five ways at every layer asked for, and measure each edit."""
    hparams = hparams_of(args)
    lab = Lab(hparams, _requests(args, str(hparams.model_name), hparams.seed), None)
    layers = lab.method.parts.dense if args.layers is None else args.layers
    lab.method.parts.check_layers(layers, "--layers")
    _collect(lab, layers)
    base = lab.perplexity()
    kept = Path(args.kept)
    known = {_name(line): line for line in read_journal(kept)}
    if any(line["model"] != lab.fingerprint for line in known.values()):
        raise ConfigError(f"--kept {kept}: its edits are of another model; give another file")
    with Journal(kept, "protection") as journal, steps("layers") as show:
        for number, layer in enumerate(layers):
            show(number, len(layers), f"layer {layer}")
            for line in _at_layer(lab, layer, base, args, known):
                journal.append(line)
                known[_name(line)] = line
    wanted = [request.case_id for request in lab.collapse.requests]
    lines = [
        line
        for line in known.values()
        if line["set"] == args.set_name and line["layer"] in layers and line["case"] in wanted
    ]
    return Outcome(
        tables=[_summary(lines, base), _table(lines)],
        figures={"protection": _draw(lines, base, hparams.collapse_threshold)} if len(layers) > 1 else {},
        findings=_findings(lines, base),
        look_for="the way whose worst perplexity stays near the unedited model's while both P are high, and what is "
        "left of locality in first place.",
        **lab.recorded("protection"),
        result={"perplexity_unedited": base, "layers": layers},
    )


def _requests(args: argparse.Namespace, model: str, seed: int) -> RequestSet:
    hard = load_collapse(model, None if args.set_name != "sweep" else str(REQUESTS), args.limit, seed)
    if args.collapse is not None:
        return load_collapse(model, args.collapse, args.limit, seed)
    return load_normal(None, args.limit, seed, hard) if args.set_name == "normal" else hard


def _collect(lab: Lab, layers: Sequence[int]) -> None:
    """The moments of all layers, in one pass each."""
    parts, tok, h = lab.method.parts, lab.editor.tok, lab.hparams
    for texts in (first_tokens(tok), later_tokens(tok)):
        moments(parts, texts, layers, stats_dir=h.stats_dir, model_name=str(lab.editor.model.config.name_or_path))


def _name(line: Line) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("set", "layer", "case", "way"))


def _at_layer(
    lab: Lab, layer: int, base: float, args: argparse.Namespace, known: dict[tuple[Any, ...], Line]
) -> Iterator[Line]:
    """The edits at one layer that are not known yet, measured; their searches are made a few requests at a time."""
    todo = [
        (request, lacking)
        for request in lab.collapse.requests
        if (lacking := [w for w in args.ways if (args.set_name, layer, request.case_id, w) not in known])
    ]
    probe = lab.relaid(layers=[layer])  # its perplexity starts at this layer
    place = {"model": lab.fingerprint, "set": args.set_name, "layer": layer}
    for start in range(0, len(todo), TOGETHER):
        some = todo[start : start + TOGETHER]
        for (request, lacking), edits in zip(some, _edits(lab, layer, some), strict=True):
            before = _asked(lab, request, None)
            measured: dict[Callable[[], WeightDelta], Line] = {}
            for way in lacking:
                if edits[way] not in measured:
                    measured[edits[way]] = _measured(lab, probe, request, edits[way](), base, before)
                yield {**place, "case": request.case_id, "prompt": request.prompt, "way": way, **measured[edits[way]]}


def _measured(lab: Lab, probe: Lab, request: EditRequest, delta: WeightDelta, base: float, before: Evaluation) -> Line:
    """The numbers of one edit, under the names of `COLUMNS`."""
    ppl = probe.perplexity(delta)
    with lab.applied(delta):
        after = _asked(lab, request, before).rows[0]
        bare, *behind = score(lab.editor.model, lab.editor.tok, _prompts(lab, request))
    return {
        "|dW|": delta.norm(),
        "perplexity": ppl,
        "collapsed": lab.collapsed(base, ppl),
        "P bare": bare.probability,
        "P behind a prefix": statistics.fmean(s.probability for s in behind) if behind else None,
        **{name: after[name].value for name in METRICS},
    }


def _edits(
    lab: Lab, layer: int, todo: Sequence[tuple[EditRequest, Sequence[str]]]
) -> list[dict[str, Callable[[], WeightDelta]]]:
    """Each request's updates by way, of the ways that are given with it.

    Only the searches these ways need are made, batched, and each is shared by the ways that can. Where there is one
    key, both keys are the protected update, and the same object.
    """
    plain = lab.relaid(layers=[layer]).method
    ours = lab.relaid(
        layers=[layer], if_c_rome=True, consistent_value=True, protect_first_tokens=True, both_keys=True
    ).method
    rome, c_rome = plain.hparams, plain.hparams.override(["if_c_rome=true"])
    consistent = c_rome.override(["consistent_value=true"])
    requests = [request for request, _ in todo]

    def asked(*ways: str) -> list[int]:
        return [n for n, (_, lacking) in enumerate(todo) if {*ways} & {*lacking}]

    def searched(method: ROME, at: list[int]) -> dict[int, Found]:
        found = method.values([requests[n] for n in at], method.parts.mlp(layer), layer) if at else []
        return dict(zip(at, found, strict=True))

    value, mean = searched(plain, asked("ROME", "C-ROME")), searched(ours, asked(*WAYS[2:]))
    both = asked("both keys")
    found = ours.search_bare([requests[n] for n in both], [mean[n] for n in both], layer)
    bare = {n: own for n, own in zip(both, found, strict=True) if own is not None}
    lookups = plain.look_up(requests, layer)

    def ways(n: int) -> dict[str, Callable[[], WeightDelta]]:
        def protected() -> WeightDelta:
            return ours.update(layer, mean[n], lookups[n])[0]

        return {
            "ROME": lambda: plain.update(layer, value[n], lookups[n], rome)[0],
            "C-ROME": lambda: plain.update(layer, value[n], lookups[n], c_rome)[0],
            "consistent value": lambda: ours.update(layer, mean[n], lookups[n], consistent)[0],
            "protected": protected,
            "both keys": (lambda: ours.update(layer, mean[n], lookups[n], bare=bare[n])[0]) if n in bare else protected,
        }

    return [ways(n) for n in range(len(requests))]


def _asked(lab: Lab, request: EditRequest, before: Evaluation | None) -> Evaluation:
    return evaluate(lab.editor.model, lab.editor.tok, [request], METRICS, settings=Settings(), before=before)


def _prompts(lab: Lab, request: EditRequest) -> list[tuple[str, str]]:
    """The bare prompt first, then behind the first contexts that hold text."""
    texts = [SLOT, *[text for text in lab.method.contexts if text != SLOT][:PREFIXES]]
    return [(text.replace(SLOT, request.prompt), request.target_new) for text in texts]


def _table(lines: Sequence[Line]) -> Table:
    rows = [[line[column] for column in COLUMNS] for line in lines]
    return Table.of("edits", "every edit", COLUMNS, rows, longest=0)


def _values(lines: Sequence[Line], way: str, column: str, layer: int | None = None) -> list[float]:
    """A column's values of one way, `null` perplexities (not finite) as infinity, other nulls left out."""
    chosen = [line[column] for line in lines if line["way"] == way and layer in (None, line["layer"])]
    if column == "perplexity":
        return [float("inf") if value is None else value for value in chosen]
    return [value for value in chosen if value is not None]


def _summary(lines: Sequence[Line], base: float) -> Table:
    rows = []
    for layer in sorted({line["layer"] for line in lines}):
        for way in WAYS:
            ppl = _values(lines, way, "perplexity", layer)
            if not ppl:
                continue
            means = [mean(_values(lines, way, column, layer)) for column in COLUMNS[8:]]
            collapsed = sum(_values(lines, way, "collapsed", layer))
            rows.append([layer, way, len(ppl), statistics.median(ppl), max(ppl), int(collapsed), *means])
    columns = ["layer", "way", "edits", "median perplexity", "worst perplexity", "collapsed", *COLUMNS[8:]]
    return Table.of("summary", f"means over edits; unedited perplexity {base:.1f}", columns, rows)


def _findings(lines: Sequence[Line], base: float) -> list[Finding]:
    ours = [line for line in lines if line["way"] == "both keys"]
    if not ours:
        return []
    hit = sorted({line["layer"] for line in ours if line["collapsed"]})
    worst = max(_values(lines, "both keys", "perplexity"))
    bare, first = (mean(_values(lines, "both keys", column)) for column in ("P bare", "locality_first_place"))
    median = statistics.median(_values(lines, "both keys", "perplexity"))
    told = f"mean P on the bare prompt {bare:.3f}, median perplexity {median / base:.2f} x unedited"
    return [
        Finding(
            claim="With first-token protection and both keys no edit collapses",
            holds=not hit,
            because=f"{len(ours)} edits at {len({line['layer'] for line in ours})} layers, worst perplexity "
            f"{worst:,.1f}, unedited {base:.1f}; layers that collapse: {', '.join(map(str, hit)) or 'none'}",
        ),
        Finding(
            claim="The bare prompt is answered (P at least 0.9) at less than 1.1 times the perplexity",
            holds=bare is not None and bare >= 0.9 and median < 1.1 * base,
            because=told,
        ),
        Finding(
            claim="Other subjects in first place keep their answers (at least 0.9 of them)",
            holds=None if first is None else first >= 0.9,
            because="no value" if first is None else f"mean {first:.3f}",
        ),
    ]


def _draw(lines: Sequence[Line], base: float, threshold: float) -> Figure:
    titles = ("Worst perplexity after one edit", "P(target), bare prompt", "Other subjects in first place")
    figure = canvas.panels(titles, width=4.8)
    looks = zip(
        WAYS,
        (ORANGE, VERMILLION, SKY, BLUE, GREEN),
        ("^", "o", "v", "s", "D"),
        strict=True,
    )
    layers = sorted({line["layer"] for line in lines})
    axes = figure.get_axes()
    for way, color, marker in looks:
        if not _values(lines, way, "perplexity"):
            continue
        for ax, column in zip(axes, ("perplexity", "P bare", "locality_first_place"), strict=True):
            values = [_values(lines, way, column, layer) for layer in layers]
            most = [(max(v) if column == "perplexity" else statistics.fmean(v)) if v else np.nan for v in values]
            group = Group(label=way, values=np.array([most]), color=color, marker=marker)
            figures.curves(ax, layers, [group], "layer", column)
    axes[0].axhline(threshold, color=GREY, linestyle=":", linewidth=1)
    axes[0].axhline(base, color=BLACK, linewidth=0.7)
    canvas.log_axis(axes[0], "y")
    canvas.legend_below(figure, axes[0], len(WAYS))
    return figure
