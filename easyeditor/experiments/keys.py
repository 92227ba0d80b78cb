"""The keys of collapse and normal cases: C^-1 kbar, k^u and kbar, saved and drawn in two dimensions (PCA and t-SNE).

  python -m easyeditor.analysis keys                              about a minute on two CPU cores: no value search
  python -m easyeditor.analysis keys --limit 50 --collapse my_hard.json --normal my_normal.json
  python -m easyeditor.analysis keys --set mom2_adjustment=true mom2_dataset=wikipedia-excerpt mom2_n_samples=500
        with real statistics (python -m easyeditor.stats); without them C is the identity and C^-1 kbar = kbar

Fall of ROME, section 3: in collapse cases k^u, the key of the bare prompt, lies far from kbar, the mean over contexts;
in normal cases the two lie together. The run folder holds the keys in upstream's layout (`save_keys: true`), by set:
keys/<set>/C_keys_with_prefix/keyN.npy, keys_without_prefix/, keys_with_prefix/, N in the order of requests.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.dataset.sets import RequestSet
from easyeditor.drawing import canvas
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools.lab import SETS, Lab, column, common_flags, group, set_flags
from easyeditor.experiments.tools.projection import draw_planes, separation, silhouette
from easyeditor.methods.locate.key_files import dump_keys
from easyeditor.methods.locate.updates import whitened

Array = np.ndarray[Any, np.dtype[Any]]
APART = 0.95  # two sets are called apart when this share of pairs is in the expected order
BORDER = 0.25  # silhouettes (0 mixed, 1 apart) above it: two clouds

KINDS = {"k^u": "kᵘ", "kbar": "k̄", "C^-1 kbar": "C⁻¹ k̄"}
"""The kinds of keys, and how figures write them."""
COLUMNS = ("set", "case", "prompt", "denominator", "C-ROME denominator", "|k^u|", "|kbar|", "cos(k^u, kbar)")


class Row(NamedTuple):
    """One request, in the order of `COLUMNS`."""

    set: str
    case: Any
    prompt: str
    denominator: float
    mean_denominator: float
    plain_norm: float
    mean_norm: float
    cosine: float


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets and the common flags."""
    common_flags(p)
    set_flags(p, limit=24)


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Read the keys, save them, compare and draw them."""
    lab = Lab.of(args)
    keys: dict[str, dict[str, Array]] = {}
    rows: list[Row] = []
    for one in lab.sets:
        keys[one.name] = _keys_of(lab, one, folder / "keys" / one.name, rows)
    identity = "" if lab.hparams.mom2_adjustment else "; C is the identity here, so C^-1 kbar = kbar"
    return Outcome(
        tables=[
            _summary(rows, f"keys at layer {lab.layer}"),
            Table.of("requests", "every request", COLUMNS, rows, longest=0),
        ],
        figures={"keys": _draw(keys, lab.hparams.mom2_adjustment, lab.hparams.seed)},
        findings=_findings(rows, keys),
        look_for="open marks (k^u) of the collapse set away from its filled marks (kbar) in keys.png, which shows "
        f"directions only (all keys scaled to unit length){identity}.",
        **lab.recorded("keys"),
    )


def _keys_of(lab: Lab, one: RequestSet, folder: Path, rows: list[Row]) -> dict[str, Array]:
    """The keys (N, K) of a set by kind, saved in `folder`; a row for each request."""
    moment = lab.method.statistics.moment(lab.layer) if lab.hparams.mom2_adjustment else None
    found = []
    with steps(f"{one.name} keys") as show:
        for number, request in enumerate(one.requests, 1):
            lookup = lab.look_up(request)
            solved_K = whitened(lookup.mean_K, moment)
            u_K = solved_K / solved_K.norm()
            dump_keys(folder, solved_K, lookup.plain_K, lookup.mean_K)
            wide_K = lookup.plain_K.double()
            norms = float(wide_K.norm()), float(lookup.mean_K.norm())
            cosine = float(wide_K @ lookup.mean_K) / (norms[0] * norms[1])
            denominators = float(wide_K @ u_K), float(lookup.mean_K @ u_K)
            rows.append(Row(one.name, request.case_id, request.prompt, *denominators, *norms, cosine))
            found.append([key_K.cpu().numpy() for key_K in (wide_K, lookup.mean_K, solved_K)])
            show(number, len(one.requests), str(request.subject))
    return {kind: np.stack(keys) for kind, keys in zip(KINDS, zip(*found, strict=True), strict=True)}


def _summary(rows: list[Row], title: str) -> Table:
    made = []
    for name in SETS:
        own = [row for row in rows if row.set == name]
        sizes = np.abs(column(own, "denominator"))
        means = np.array([(row.plain_norm, row.mean_norm, row.cosine) for row in own]).mean(0)
        made.append([name, len(own), float(sizes.mean()), float(sizes.min()), *map(float, means)])
    columns = ["set", "requests", "mean |denominator|", "smallest", "mean |k^u|", "mean |kbar|", "mean cos"]
    return Table.of("summary", title, columns, made)


def _findings(rows: list[Row], keys: dict[str, dict[str, Array]]) -> list[Finding]:
    collapse, normal = (column(rows, "cosine", set=name) for name in SETS)
    apart = separation(-normal, -collapse)
    plain, mean = (silhouette(keys["collapse"][kind], keys["normal"][kind]) for kind in ("k^u", "kbar"))
    return [
        Finding(
            claim="In collapse cases k^u lies far from kbar, in normal cases near it",
            holds=apart >= APART,
            because=f"mean cosine {collapse.mean():.2f} against {normal.mean():.2f}; "
            f"{apart:.0%} of collapse-normal pairs in that order",
        ),
        Finding(
            claim="The sets differ in k^u, and hardly in kbar",
            holds=plain > BORDER > mean if plain is not None and mean is not None else None,
            because="needs 2 requests a set"
            if plain is None or mean is None
            else f"silhouette of the collapse cases among all: k^u {plain:.2f}, kbar {mean:.2f}; border {BORDER}",
        ),
    ]


def _draw(keys: dict[str, dict[str, Array]], solved: bool, seed: int) -> Figure:
    planes = [["k^u", "kbar"], *([["C^-1 kbar"]] if solved else [])]
    shown = [" and ".join(KINDS[kind] for kind in kinds) for kinds in planes]
    figure = canvas.panels([f"{kinds}, {plane}" for kinds in shown for plane in ("PCA", "t-SNE")], columns=2)
    axes = figure.get_axes()
    for row, kinds in enumerate(planes):
        groups = [
            group(name, keys[name][kind], label=f"{name} {KINDS[kind]}", filled=kind != "k^u")
            for name in SETS
            for kind in kinds
        ]
        draw_planes(axes[2 * row : 2 * row + 2], groups, seed)
    canvas.legend_below(figure, axes[0], 4)
    return figure
