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
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.dataset.sets import RequestSet
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome, ResultTable
from easyeditor.experiments.tools.lab import Lab, common_flags, set_flags
from easyeditor.experiments.tools.projection import pca_plane, separation, silhouette, tsne_plane, unit
from easyeditor.methods.locate.key_files import dump_keys
from easyeditor.methods.locate.updates import whitened

Array = np.ndarray[Any, np.dtype[Any]]
APART = 0.95  # two sets are called apart when this share of pairs is in the expected order
BORDER = 0.25  # silhouettes (0 mixed, 1 apart) above it: two clouds

COLUMNS = ("set", "case", "prompt", "denominator", "C-ROME denominator", "|k^u|", "|kbar|", "cos(k^u, kbar)")


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets and the common flags."""
    common_flags(p)
    set_flags(p, limit=24)


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Read the keys, save them, compare and draw them."""
    lab = Lab.of(args)
    keys: dict[str, dict[str, Array]] = {}
    rows: list[list[Any]] = []
    for one in lab.sets:
        keys[one.name], measured = _keys_of(lab, one, folder / "keys" / one.name)
        rows += measured
    summary = _summary(rows)
    drawn = _draw(keys, lab.hparams.mom2_adjustment, lab.hparams.seed)
    identity = "" if lab.hparams.mom2_adjustment else "; C is the identity here, so C^-1 kbar = kbar"
    return Outcome(
        tables=[
            ResultTable(name="summary", title=f"keys at layer {lab.layer}", columns=summary[0], rows=summary[1:]),
            ResultTable(name="requests", title="every request", columns=COLUMNS, rows=rows, printed=False),
        ],
        figures={"keys": drawn},
        findings=_findings(rows, keys),
        look_for="open marks (k^u) of the collapse set away from its filled marks (kbar) in keys.png, which shows "
        f"directions only (all keys scaled to unit length){identity}.",
        config=lab.config(),
        manifest=lab.manifest("keys"),
    )


def _keys_of(lab: Lab, one: RequestSet, folder: Path) -> tuple[dict[str, Array], list[list[Any]]]:
    moment = lab.method.statistics.moment(lab.layer) if lab.hparams.mom2_adjustment else None
    plain, mean, direction, rows = [], [], [], []
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
            rows.append([one.name, request.case_id, request.prompt, *denominators, *norms, cosine])
            plain.append(wide_K.cpu().numpy())
            mean.append(lookup.mean_K.cpu().numpy())
            direction.append(solved_K.cpu().numpy())
            show(number, len(one.requests), str(request.subject))
    return {"k^u": np.stack(plain), "kbar": np.stack(mean), "C^-1 kbar": np.stack(direction)}, rows


def _summary(rows: list[list[Any]]) -> list[list[Any]]:
    made: list[list[Any]] = [
        ["set", "requests", "mean |denominator|", "smallest", "mean |k^u|", "mean |kbar|", "mean cos"]
    ]
    for name in ("collapse", "normal"):
        numbers = np.array([row[3:] for row in rows if row[0] == name], dtype=np.float64)
        size = np.abs(numbers[:, 0])
        made.append([name, len(numbers), float(size.mean()), float(size.min()), *map(float, numbers[:, 2:].mean(0))])
    return made


def _findings(rows: list[list[Any]], keys: dict[str, dict[str, Array]]) -> list[Finding]:
    cosines = {name: np.array([row[7] for row in rows if row[0] == name]) for name in ("collapse", "normal")}
    apart = separation(-cosines["normal"], -cosines["collapse"])
    plain, mean = (silhouette(keys["collapse"][kind], keys["normal"][kind]) for kind in ("k^u", "kbar"))
    return [
        Finding(
            claim="In collapse cases k^u lies far from kbar, in normal cases near it",
            holds=bool(apart >= APART),
            because=f"mean cosine {cosines['collapse'].mean():.2f} against {cosines['normal'].mean():.2f}; "
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
    planes = [("k^u", "kbar")] + ([("C^-1 kbar",)] if solved else [])
    titles = []
    for kinds in planes:
        shown = " and ".join(kinds).replace("kbar", "k̄").replace("C^-1", "C⁻¹").replace("k^u", "kᵘ")
        titles += [f"{shown}, PCA", f"{shown}, t-SNE"]
    figure = figures.panels(titles, columns=2)
    axes = figure.get_axes()
    for row, kinds in enumerate(planes):
        _draw_row(axes[2 * row : 2 * row + 2], keys, kinds, seed)
    figures.legend_below(figure, axes[0], 4)
    return figure


def _draw_row(axes: Any, keys: dict[str, dict[str, Array]], kinds: tuple[str, ...], seed: int) -> None:
    clouds = [(name, kind, keys[name][kind]) for name in ("collapse", "normal") for kind in kinds]
    points = unit(np.concatenate([cloud for _, _, cloud in clouds]))
    plane, shares = pca_plane(points)
    for ax, flat, kind_of in ((axes[0], plane, "PCA"), (axes[1], tsne_plane(points, seed), "t-SNE")):
        if flat is None:
            ax.text(0.5, 0.5, "t-SNE needs at least 4 points", ha="center", transform=ax.transAxes)
            continue
        cuts = np.split(flat, np.cumsum([len(cloud) for _, _, cloud in clouds])[:-1])
        groups = [
            Group(
                label=f"{name} {'kᵘ' if kind == 'k^u' else 'k̄'}",
                values=cut,
                color=figures.COLLAPSE if name == "collapse" else figures.NORMAL,
                marker="^" if name == "collapse" else "o",
                filled=kind != "k^u",
            )
            for (name, kind, _), cut in zip(clouds, cuts, strict=True)
        ]
        first, second = (
            (f"PC 1 ({shares[0]:.0%} of variance)", f"PC 2 ({shares[1]:.0%})")
            if kind_of == "PCA"
            else ("t-SNE 1", "t-SNE 2")
        )
        figures.cloud(ax, groups, first, second)
