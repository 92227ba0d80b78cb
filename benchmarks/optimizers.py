"""The value search by Adam and by L-BFGS (`v_optimizer`) on the same requests: passes, and what the edits are like.

  python benchmarks/optimizers.py                      ROME and C-ROME, 60 facts: about an hour on one core
  python benchmarks/optimizers.py --data data/hard/smollm2-135m.json --limit 64 --methods ROME C-ROME
  python benchmarks/optimizers.py --methods MEMIT      each fact is an edit of its own

Runs mass_edit.py for each method and optimizer in mode single, keeps the runs in --output, and goes on with what is
there. The last column is the mean difference, L-BFGS less Adam, request by request, with its 95 % interval. ROME and
C-ROME share their searches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from easyeditor.results.run import load_run  # noqa: E402
from easyeditor.values.estimates import difference_of  # noqa: E402
from easyeditor.values.record import EditRecord  # noqa: E402

OPTIMIZERS = ("adam", "lbfgs")
NUMBERS: dict[str, Callable[[EditRecord], float | None]] = {
    "passes": lambda r: max(layer.steps for layer in r.trace.values()),
    "last loss": lambda r: max(layer.loss_last for layer in r.trace.values()),
    "norm of the update": lambda r: max(layer.delta_norm for layer in r.trace.values()),
    "P(target)": lambda r: r.probabilities["target_new"]["after"],
    "rewrite": lambda r: r.after("rewrite_acc"),
    "rephrase": lambda r: r.after("rephrase_acc"),
    "locality": lambda r: r.after("locality_acc"),
    "first places": lambda r: r.after("locality_first_place"),
    "perplexity": lambda r: None if r.collapse is None else r.collapse.ppl_after,
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=["ROME", "C-ROME"])
    p.add_argument("--model", default="smollm2-135m", help="name of the YAML in hparams/METHOD/")
    p.add_argument("--data", default="data/facts.json", help="drawn from with --seed")
    p.add_argument("--limit", type=int, default=60)
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--output", default="results/optimizers", metavar="DIR", help="runs and searches are kept there")
    args = p.parse_args()
    data = Path(args.data).name
    print(f"{args.limit} requests of {data}, seed {args.seed}, {args.model}\n")
    for method in args.methods:
        folders = [Path(args.output, f"{method}-{args.model}-{Path(data).stem}-{name}") for name in OPTIMIZERS]
        for name, folder in zip(OPTIMIZERS, folders, strict=True):
            run(method, name, folder, args)
        table(method, folders)


def run(method: str, optimizer: str, folder: Path, args: argparse.Namespace) -> None:
    """One mass edit, begun or resumed."""
    if (folder / "summary.json").exists():
        return
    hparams = ROOT / "hparams" / ("ROME" if method == "C-ROME" else method) / f"{args.model}.yaml"
    own = ["if_c_rome=true", "if_prefix=true"] if method == "C-ROME" else []
    settings = [f"v_optimizer={optimizer}", f"targets_dir={args.output}/targets", *own]
    begun = ["--data", args.data, "--shuffle", "--seed", str(args.seed), "--limit", str(args.limit), "--output", folder]
    begun += ["--metrics", "first_place", "--hparams", hparams, "--set", *settings]
    flags = ["--resume", folder] if (folder / "manifest.json").exists() else begun
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, ROOT / "mass_edit.py", *flags]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def table(method: str, folders: list[Path]) -> None:
    """Means of both runs and paired differences, as Markdown."""
    first, second = ({e.record.request.case_id: e.record for e in load_run(folder).edits} for folder in folders)
    print(f"| {method} | n | Adam | L-BFGS | difference |\n|---|---|---|---|---|")
    for name, number in NUMBERS.items():
        pairs = [(number(first[case]), number(second[case])) for case in first if case in second]
        known = [pair for pair in pairs if None not in pair]
        adam, lbfgs = ([pair[side] for pair in known] for side in (0, 1))
        difference = difference_of(lbfgs, adam)
        if difference is None:
            continue
        ends = "" if difference.low is None else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
        print(f"| {name} | {len(known)} | {fmean(adam):.3f} | {fmean(lbfgs):.3f} | {difference:+.3f}{ends} |")
    print(flush=True)


if __name__ == "__main__":
    main()
