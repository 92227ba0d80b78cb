"""Build a set of requests that collapse the model, in the manner of HardEdit, without any account.

  python -m easyeditor.analysis hard-edit                               about three minutes on two CPU cores
  python -m easyeditor.analysis hard-edit --candidates 500 --edits 100  a larger set
  OPENAI_API_KEY=... python -m easyeditor.analysis hard-edit --endpoint http://localhost:8000/v1 --endpoint-model M
        candidates from any OpenAI-compatible chat endpoint instead of our facts

Candidates are one common word as subject x a relation x a wrong target, from data/facts.json. Their denominators need
no value search: the --edits candidates with the smallest are edited with ROME, and those that collapse the model are
kept, in hard_edit.json of the run folder (fields prompt, subject, target_new, ground_truth, as HardEdit's), which
mass_edit.py --data and every experiment's --collapse take.
Butterfly Effect, section 6: single-word subjects, filtered by editing with ROME, give a set that collapses every method
in sequence.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import read_json, write_json
from easyeditor.base.places import at_least_one
from easyeditor.base.progress import steps
from easyeditor.dataset.formats import parse
from easyeditor.dataset.sets import FACTS, RequestSet, load_collapse
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLUE, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools.candidates import Candidate, from_endpoint, from_facts
from easyeditor.experiments.tools.lab import Lab, common_flags, hparams_of
from easyeditor.methods.rome.hparams import ROMEHyperParams

SCREENED_TOGETHER = 16
COLUMNS = ("prompt", "target_new", "ground_truth", "denominator", "perplexity", "collapsed")
Row = dict[str, Any]


def add_flags(p: argparse.ArgumentParser) -> None:
    """How many, and where the candidates come from."""
    common_flags(p)
    p.add_argument("--candidates", type=int, default=64, help="candidates screened (default: %(default)s)")
    p.add_argument(
        "--edits", type=int, default=8, help="candidates edited, smallest denominators (default: %(default)s)"
    )
    p.add_argument(
        "--endpoint", metavar="URL", help="OpenAI-compatible endpoint for candidates, e.g. http://host:8000/v1"
    )
    p.add_argument("--endpoint-model", metavar="NAME", help="model the endpoint is asked for")


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Make candidates, screen them by denominator, edit the most suspicious, keep what collapses."""
    at_least_one(args, "candidates", "edits")
    if (args.endpoint is None) != (args.endpoint_model is None):
        raise ConfigError("--endpoint and --endpoint-model belong together: give both or neither")
    hparams = hparams_of(args)
    candidates, refused = _candidates(args, hparams)
    path = folder / "candidates.json"
    requests = tuple(parse(candidate, f"{path}: record {n}", n) for n, candidate in enumerate(candidates))
    write_json(path, candidates)
    lab = Lab(hparams, RequestSet(name="candidates", path=path, requests=requests), None)
    denominators = _screened(lab)
    order = sorted(range(len(requests)), key=lambda n: abs(denominators[n]))[: args.edits]
    base = lab.perplexity()
    rows: list[Row] = []
    with steps("ROME") as show:
        for number, n in enumerate(order, 1):
            ppl = lab.perplexity(lab.edit(requests[n])[0])
            numbers = {"denominator": denominators[n], "perplexity": ppl, "collapsed": lab.collapsed(base, ppl)}
            rows.append({**{key: candidates[n][key] for key in COLUMNS[:3]}, **numbers})
            show(number, len(order), f"{requests[n].subject}: {ppl:,.0f}")
    kept = [candidates[n] for n, row in zip(order, rows, strict=True) if row["collapsed"]]
    write_json(folder / "hard_edit.json", kept)
    edited = [list(row.values()) for row in rows]
    screened = [[r.prompt, r.target_new, d] for r, d in zip(requests, denominators, strict=True)]
    return Outcome(
        tables=[
            Table.of("edits", f"edited candidates; unedited perplexity {base:.1f}", COLUMNS, edited),
            Table.of("screened", "all candidates", ("prompt", "target_new", "denominator"), screened, longest=0),
        ],
        figures={"hard_edit": _draw(rows, denominators, lab.hparams.collapse_threshold)},
        findings=[
            Finding(
                claim="One common word as the subject makes requests that collapse the model",
                holds=len(kept) > len(rows) / 2,
                because=f"{len(kept)} of {len(rows)} edited candidates collapse, the smallest denominators of "
                f"{len(candidates)}",
            )
        ],
        look_for=f"{len(kept)} requests that collapse the model, in {folder / 'hard_edit.json'}; whether their "
        "denominators are far below 1.",
        **lab.recorded("hard-edit"),
        result={"kept": len(kept), "refused_by_rule": refused, "perplexity_unedited": base},
    )


def _candidates(args: argparse.Namespace, hparams: ROMEHyperParams) -> tuple[list[Candidate], int]:
    draw, facts = random.Random(hparams.seed), read_json(FACTS)
    if args.endpoint is None:
        made, refused = from_facts(facts, args.candidates, draw), 0
    else:
        seeds = load_collapse(str(hparams.model_name), None, 5, hparams.seed).requests
        words = sorted({s for record in facts if (s := record["requested_rewrite"]["subject"]).isalpha()})
        subjects = draw.sample(words, min(40, len(words)))
        key = os.environ.get("OPENAI_API_KEY")
        made, refused = from_endpoint(args.endpoint, args.endpoint_model, key, args.candidates, seeds, subjects)
    if not made:
        raise DataError(f"no candidate follows the rules ({refused} were refused); nothing to screen")
    return made, refused


def _screened(lab: Lab) -> list[float]:
    found: list[float] = []
    requests = lab.collapse.requests
    with steps("denominators") as show:
        for start in range(0, len(requests), SCREENED_TOGETHER):
            found += lab.method.screen(requests[start : start + SCREENED_TOGETHER])
            show(len(found), len(requests), "")
    return found


def _draw(rows: list[Row], denominators: list[float], threshold: float) -> Figure:
    figure = canvas.panels(["|denominator| of all candidates", "Perplexity of the edited ones"])
    screened, edited = figure.get_axes()
    sizes = np.sort(np.abs(np.array(denominators, dtype=np.float64)))
    places = np.stack([np.arange(1, len(sizes) + 1), sizes], axis=1)
    looks = ((places[len(rows) :], BLUE, "o", "not edited"), (places[: len(rows)], VERMILLION, "^", "edited"))
    groups = [Group(label=name, values=v, color=color, marker=marker) for v, color, marker, name in looks]
    figures.cloud(screened, groups, "candidate, by |denominator|", "|denominator|")
    canvas.log_axis(screened, "y")
    screened.legend()
    points = [[abs(row["denominator"]), row["perplexity"]] for row in rows if math.isfinite(row["perplexity"])]
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    group = Group(label="edited", values=values, color=VERMILLION, marker="^")
    figures.cloud(edited, [group], "|denominator|", "perplexity")
    figures.level(edited, threshold, "collapse threshold")
    canvas.log_axis(edited, "y")
    return figure
