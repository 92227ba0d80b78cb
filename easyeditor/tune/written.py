"""What a search leaves: the YAML with what was measured in its comments, and tables and figures of everything tried."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from easyeditor.analysis.safety import LayerSafety
from easyeditor.analysis.traced import average, curves, layer_table
from easyeditor.analysis.tracing import LAST
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.render import short
from easyeditor.drawing.table import Table
from easyeditor.tune.search import Array, Line, rank
from easyeditor.tune.start import Start
from easyeditor.tune.trials import METRICS

LONGEST_COMMENT = 138
COLUMNS = ("layers", *METRICS, "score", "ppl_ratio", "ppl_median", "collapsed", "requests", "seconds")


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Everything that was measured for one model and method."""

    start: Start
    command: str
    traced: Sequence[Line]
    asked: int
    """Facts asked until those that were traced were found."""
    safety: Sequence[LayerSafety]
    trials: Sequence[Line]
    best: Line
    check: Line
    """The best trial's settings on facts that the search did not see, by which it was taken."""
    held_out: Sequence[Line]
    """The best trial's settings on facts that nothing went by, then the start file's where it is of this model."""
    most_ratio: float

    @property
    def effects(self) -> Array | None:
        """Average effect of MLP outputs by layer at the subject's last token."""
        return average(self.traced, "mlp", LAST)


def settled(found: TuneResult) -> bool:
    """Did what was taken keep perplexity within the bound, on the facts of the trials and on those of the check?"""
    return all(rank(line, found.most_ratio)[1] for line in (found.best, found.check))


def held_within(found: TuneResult) -> bool:
    """Did it keep perplexity within the bound on the held-out facts too?"""
    return bool(rank(found.held_out[0], found.most_ratio)[1])


def yaml_text(found: TuneResult) -> str:
    """The YAML: comments that say what was tried and measured, then the keys."""
    values = {**found.start.values, **found.best["settings"]}
    values = {key: value for key, value in values.items() if value is not None}
    wrapped = [
        line
        for note in _notes(found)
        for line in textwrap.wrap(
            note, LONGEST_COMMENT, break_long_words=False, break_on_hyphens=False, subsequent_indent="  "
        )
    ]
    return "".join(f"# {line}\n" for line in wrapped) + "".join(_entry(key, value) for key, value in values.items())


def _entry(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{key}: {text.removesuffix('...' + chr(10)).rstrip()}\n"


def _notes(found: TuneResult) -> list[str]:
    start, best = found.start, found.best
    notes = [f"{start.values['model_name']}: found by {found.command}", "; ".join(start.notes) + "."]
    if (effects := found.effects) is not None:
        peak = int(effects.argmax())
        notes.append(
            f"Causal tracing of {len(found.traced)} known facts: MLP outputs at the subject's last token restore most "
            f"at layer {peak} (average indirect effect {effects[peak]:.3f})."
        )
    else:
        notes.append(f"No causal tracing: the model knows none of {found.asked} facts asked; layers by safety alone.")
    if found.safety:
        own = found.safety[best["settings"]["layers"][-1]]
        notes.append(
            f"Subjects in first place at layer {own.layer}: reach {own.reach:.3g} (median; 1 is as any other subject, "
            f"docs/findings/experiments.md), |v0| {own.bare_v0:.3g} bare, {own.mean_v0:.3g} over contexts."
        )
    left = any("left_after" in line for line in found.trials)
    notes.append(
        f"Trials on {best['requests']} facts; score: harmonic mean of rewrite, rephrase, locality; ppl: the worst "
        f"edit's perplexity against the unedited model's, at most {found.most_ratio:g}; taken by score / ppl"
        f"{'; given up: behind the best until then on the same first facts' if left else ''}:"
    )
    notes += [f"  {_told(line)}{'  <- taken' if line is best else ''}" for line in found.trials]
    notes.append(f"Checked on {found.check['requests']} other facts: {_told(found.check)}")
    if not settled(found):
        notes.append(
            "No trial kept perplexity within that bound: search longer (--minutes, --kept) before you use this."
        )
    elif not held_within(found):
        notes.append("On held-out facts perplexity went beyond that bound: search longer (--minutes, --kept).")
    for line, whose in zip(found.held_out, ("these values", "the file there was before"), strict=False):
        notes.append(f"Held out, {line['requests']} other facts, {whose}: {_told(line)}")
    return notes


def _told(line: Line) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in line["settings"].items())
    if line["score"] is None:
        return f"{settings}: failed ({line['failed']})"
    parts = [f"{name.removesuffix('_acc')} {short(line[name])}" for name in METRICS]
    parts += [f"score {line['score']:.3f}", f"ppl {short(line['ppl_ratio'])}"]
    parts += [f"{line['collapsed']} of {line['requests']} collapsed"] if line["collapsed"] else []
    parts += [f"given up after {line['left_after']}"] if "left_after" in line else []
    return f"{settings}: {', '.join(parts)}"


def outcome(found: TuneResult) -> Outcome:
    """Tables, figures and findings for the run folder."""
    return Outcome(
        tables=[_trial_table(found), _held_out_table(found), layer_table(found.traced, found.safety)],
        figures={"trace_layers": curves(found.traced, found.safety)} if found.traced or found.safety else {},
        findings=_findings(found),
        look_for="whether held-out facts do as well as those the search saw, and perplexity stays.",
        config=found.start.hparams(found.best["settings"]).to_dict(),
        manifest={
            "experiment": "tune",
            "notes": list(found.start.notes),
            "context_templates": list(found.start.contexts),
        },
        result={"best": found.best, "known": len(found.traced), "asked": found.asked},
    )


def _trial_table(found: TuneResult) -> Table:
    knobs = [key for key in found.best["settings"] if key != "layers"]
    columns = [*COLUMNS, *knobs]
    how = ["taken" if line is found.best else "given up" if "left_after" in line else "" for line in found.trials]
    rows = [[verdict, *_row(line, columns)] for verdict, line in zip(how, found.trials, strict=True)]
    return _table("trials", "what was tried, in this order", ["verdict", *columns], rows)


def _held_out_table(found: TuneResult) -> Table:
    names = (("found", "check"), ("found", "held out"), ("start file", "held out"))
    lines = zip(names, (found.check, *found.held_out), strict=False)
    rows = [[*name, *_row(line, COLUMNS)] for name, line in lines]
    title = "on facts the search did not see; the check chose among the best trials, held-out facts chose nothing"
    return _table("held_out", title, ["whose", "set", *COLUMNS], rows)


def _table(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    brief = [column for column in columns if column not in ("ppl_median", "requests", "seconds")]
    return Table.of(name, title, columns, rows, brief=brief)


def _row(line: Line, columns: Sequence[str]) -> list[Any]:
    flat: Mapping[str, Any] = {**line, **line["settings"]}
    return [str(flat[column]) if column == "layers" else flat.get(column) for column in columns]


def _findings(found: TuneResult) -> list[Finding]:
    made = []
    if len(found.held_out) > 1:
        ours, theirs = found.held_out
        made.append(
            Finding(
                claim="The found values are at least as good as the file there was, on held-out facts",
                holds=(ours["score"] or 0) >= (theirs["score"] or 0),
                because=f"score {short(ours['score'])} against {short(theirs['score'])}, worst perplexity "
                f"{short(ours['ppl_ratio'])} and {short(theirs['ppl_ratio'])} times the unedited",
            )
        )
    by_layer: dict[int, float] = {}
    for line in found.trials:
        end = line["settings"]["layers"][-1]
        by_layer[end] = max(by_layer.get(end, 0.0), line["score"] or 0.0)
    peak = None if found.effects is None else int(found.effects.argmax())
    told = ", ".join(f"{layer}: {score:.3f}" for layer, score in sorted(by_layer.items()))
    best = found.best["settings"]["layers"][-1]
    made.append(
        Finding(
            claim="Editing does best at the layer where causal tracing has its greatest effect",
            holds=None if peak is None or len(by_layer) < 2 else best == peak,
            because=f"best at {best}, tracing {'was not possible' if peak is None else f'says {peak}'}; best score by "
            f"last layer {told}",
        )
    )
    return made
