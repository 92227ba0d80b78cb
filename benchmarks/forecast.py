"""How often the forecast of a sequence's perplexity was right: every prefix of recorded runs against what came.

  python benchmarks/forecast.py RUN ...        run folders of mass_edit.py (modes sequential and batch)

A threshold is so many times the perplexity of the unedited model (--times), so a sequence gives several crossings.
A forecast counts where the threshold was crossed later, or where the sequence went on for twice the way predicted and
did not cross it. It was right where the true way was within a factor of two of the one predicted
(easyeditor/results/forecast.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--times", type=float, nargs="+", default=[1.5, 2, 4, 10], help="thresholds (default: %(default)s)")
    args = p.parse_args()
    print("\n".join(table(args.runs, args.times)))


def table(runs: Sequence[Path], times: Sequence[float]) -> list[str]:
    """A row for each run and threshold, and one for all of a threshold."""
    from easyeditor.results.forecast import Told, looked_back, points_of
    from easyeditor.results.run import load_run

    lines = [
        "| sequence | perplexity | threshold | crossed at edit | predicted | right | median true way / predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    everything: dict[float, list[Told]] = {factor: [] for factor in times}
    for run in map(load_run, runs):
        points = points_of(run.edits)
        if len(points) < 2:
            continue
        seen = f"{points[0][1]:,.1f} → {points[-1][1]:,.1f} in {points[-1][0]}"
        for factor in times:
            limit = factor * points[0][1]
            told = looked_back(points, limit)
            crossed = next((at for at, ppl in points if not ppl <= limit), None)
            everything[factor] += told
            lines.append(row(run.label, seen, f"{factor:g} ×", "—" if crossed is None else str(crossed), told))
    for factor, told in everything.items():
        lines.append(row("all", "", f"{factor:g} ×", "", told))
    lines.append(row("all", "", "", "", [one for told in everything.values() for one in told]))
    return lines


def row(name: str, seen: str, limit: str, crossed: str, told: Sequence[object]) -> str:
    """One row of the table."""
    from easyeditor.results.forecast import Told

    made = [one for one in told if isinstance(one, Told)]
    right = sum(one.right for one in made)
    ways = [one.true / one.predicted for one in made if one.true is not None]
    share = f"{right} ({right / len(made):.0%})" if made else ""
    middle = f"{statistics.median(ways):.2f}" if ways else ""
    return f"| {name} | {seen} | {limit} | {crossed} | {len(made)} | {share} | {middle} |"


if __name__ == "__main__":
    main()
