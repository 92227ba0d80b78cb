"""100 requests in one MEMIT batch, and the same 100 one by one with ROME, with and without second moments.

  python benchmarks/memit_100.py --data FILE        FILE: any dataset the library reads; about 80 minutes on two cores
  python benchmarks/memit_100.py --data FILE --limit 20 --output /tmp/memit-20

Three runs of mass_edit.py on the embedded model, resumed where they are there already; the two ROME runs share their
value searches. Rewrite accuracy is token-level and teacher-forced. MEMIT's perplexity is that of the one model that
holds all edits; ROME's are of one model for each edit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--output", default=str(ROOT / "results" / "memit-100"))
    p.add_argument("--memit", default="hparams/MEMIT/smollm2-135m.yaml")
    p.add_argument("--rome", default="hparams/ROME/smollm2-135m.yaml")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs, such as stats_dir=DIR")
    args = p.parse_args()

    out = Path(args.output)
    shared = [*args.set, f"targets_dir={out / 'targets'}"]
    moments = ["mom2_adjustment=true", "mom2_dataset=wikipedia-excerpt", "mom2_n_samples=500", "collect_stats=auto"]
    batch = ["--mode", "batch", "--batch-size", str(args.limit)]
    runs = {
        f"MEMIT, {args.limit} at once": ("memit", args.memit, shared, batch),
        "ROME, one by one": ("rome", args.rome, shared, []),
        "ROME with C, one by one": ("rome-moments", args.rome, [*shared, *moments], []),
    }
    for name, hparams, settings, mode in runs.values():
        make(out / name, args, hparams, settings, mode)
    print("| method | rewrite | perplexity before | after: median | worst | collapsed | s per request |")
    print("|---|---|---|---|---|---|---|")
    for title, (name, *_) in runs.items():
        print(row(title, out / name, args.limit))


def make(run: Path, args: argparse.Namespace, hparams: str, settings: list[str], mode: list[str]) -> None:
    """One run of mass_edit.py, or the rest of it."""
    command = [sys.executable, str(ROOT / "mass_edit.py")]
    if (run / "config.json").exists():
        command += ["--resume", str(run)]
    else:
        command += ["--hparams", hparams, "--data", args.data, "--limit", str(args.limit), "--output", str(run)]
        command += ["--set", *settings, *mode]
    subprocess.run(command, cwd=ROOT, check=True)


def row(title: str, run: Path, limit: int) -> str:
    """The table's line of a run: its first `limit` requests."""
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    edits: list[dict[str, Any]] = [line for line in lines if line["kind"] == "edit" and line["index"] < limit]
    accuracy = statistics.fmean(edit["post"]["rewrite_acc"][0] for edit in edits)
    after = [edit["post"]["ppl"] or float("inf") for edit in edits]
    collapsed = sum(edit["collapse"]["collapsed"] for edit in edits)
    seconds = statistics.fmean(edit["seconds"]["edit"] for edit in edits)
    before = edits[0]["collapse"]["ppl_before"]
    return (
        f"| {title} | {accuracy:.1%} of {len(edits)} | {before:.1f} | {statistics.median(after):.1f} | "
        f"{max(after):,.1f} | {collapsed} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    main()
