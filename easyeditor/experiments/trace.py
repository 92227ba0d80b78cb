"""Causal tracing (ROME, section 2), and how far each layer is from the collapse of subjects in first place.

  python -m easyeditor.analysis trace --kept trace.jsonl             20 facts the model knows, 10 samples of noise
  python -m easyeditor.analysis trace --kept trace.jsonl --samples 3 --limit 50

A fact is known when its whole true answer is the model's first choice. Its subject's embeddings get noise of three
standard deviations; then one clean state is put back at one token and layer (or the outputs of a window of MLPs, or of
attentions), and what P(answer) gains is its indirect effect. Every fact is a line of the --kept file as soon as it is
traced: a run cut short goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from easyeditor.analysis.safety import first_place, safety_of
from easyeditor.analysis.traced import curves, fact_table, findings, heat_map, layer_table, role_table, traced_lines
from easyeditor.analysis.tracing import Tracer, known_facts, noise_of
from easyeditor.base.errors import DataError
from easyeditor.base.places import at_least_one, declare
from easyeditor.dataset.reader import read_dataset
from easyeditor.dataset.sets import FACTS
from easyeditor.drawing.outcome import Outcome
from easyeditor.editing.editor import Editor
from easyeditor.experiments.tools.lab import common_flags, hparams_of
from easyeditor.methods.locate.method import LocateMethod


def add_flags(p: argparse.ArgumentParser) -> None:
    """Which facts, how much noise, where the facts' lines are kept."""
    common_flags(p)
    p.add_argument("--facts", metavar="FILE", default=str(FACTS), help="requests with true answers (default: ours)")
    p.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing the file")
    p.add_argument("--limit", type=int, default=20, help="most facts that are traced (default: %(default)s)")
    p.add_argument("--samples", type=int, default=10, help="draws of noise (default: %(default)s, as in the paper)")
    p.add_argument(
        "--window", type=int, help="layers of MLPs or attentions put back (default: 10 of 48, in proportion)"
    )
    p.add_argument("--subjects", type=int, default=16, help="subjects in first place (default: %(default)s)")
    p.add_argument("--kept", metavar="FILE", required=True, help="JSON lines: one for each fact, kept and taken up")
    declare(p, "facts", kept="kept of trace")


def experiment(args: argparse.Namespace, _folder: Path) -> Outcome:
    """Trace every fact that is not kept yet, and average."""
    at_least_one(args, "limit", "samples", "subjects", "window")
    hparams = hparams_of(args)
    requests = read_dataset(args.facts, skip_bad=args.skip_bad).requests
    editor = Editor(hparams)
    assert isinstance(editor.method, LocateMethod)
    parts, seed, model = editor.method.parts, hparams.seed, editor.fingerprint()
    facts, asked = known_facts(parts, editor.tok, requests, args.limit, seed)
    if not facts:
        raise DataError(f"{args.facts}: the model knows none of the {asked} facts asked; give facts it knows (--facts)")
    noise = noise_of(parts, editor.tok, requests)
    tracer = Tracer(
        parts,
        noise,
        samples=args.samples,
        window=args.window,
        seed=seed,
        replay=bool(hparams.replay),
        batch_tokens=editor.method.batch_tokens,
    )
    settings = {"model": model, "noise": noise, "samples": args.samples, "window": tracer.window, "seed": seed}
    lines = traced_lines(tracer, facts, Path(args.kept), settings)
    subjects = first_place(editor.tok, requests, args.subjects, seed)
    safety = safety_of(editor.method, subjects) if subjects else []
    return Outcome(
        tables=[layer_table(lines, safety), role_table(lines), fact_table(lines)],
        figures={"trace": heat_map(lines, tracer.window), "trace_layers": curves(lines, safety)},
        findings=findings(lines),
        look_for="where the states of the subject's last token, and the MLPs there, restore the answer; and whether an "
        "update reaches the key of subjects in first place as it does the others' (reach near 1).",
        config=hparams.to_dict(),
        manifest={
            "experiment": "trace",
            **settings,
            "facts": [fact.request.case_id for fact in facts],
            "subjects": [request.case_id for request in subjects],
            "asked": asked,
            "context_templates": list(editor.method.contexts),
        },
        result={"known": len(facts), "asked": asked, **settings},
    )
