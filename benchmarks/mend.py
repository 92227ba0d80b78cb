"""MEND training: steps per second of the shared passes against the plain way, memory, and the reference's figure.

  python benchmarks/mend.py                     the embedded model, the reference's setting: rank 1920, up and down
                                                projections of the last three layers, batch 1 (about ten minutes)
  python benchmarks/mend.py --rank 64           the rank of the archive that comes with the repository

The plain way is what the reference does: full forwards for base locality, edit, post-edit and locality, every position
through the output head, nothing kept. Both ways make the same numbers (tests/test_mend.py). `first epoch` runs on
requests never seen, `later epochs` on kept ones. CPU seconds are those of all threads: on a busy machine they say more
than the clock. Each way runs in a process of its own, so that its peak memory is its.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from easyeditor.commands.cli import parser, quiet_transformers, run  # noqa: E402

REFERENCE = 1.12  # steps/s of the reference implementation in this setting, two CPU threads, 2.4 GB
INNER = [f"model.layers.{layer}.mlp.{part}.weight" for layer in (27, 28, 29) for part in ("up_proj", "down_proj")]


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("--rank", type=int, default=1920, help="rank of the hypernetwork (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="steps timed (default: %(default)s)")
    p.add_argument("--accumulate", type=int, default=10, help="steps of one update (default: %(default)s)")
    p.add_argument("--outer", type=int, default=1, help="texts that must give the answer (the reference: 1)")
    p.add_argument("--locality", type=int, default=1, help="locality prompts of a step (the reference: 1)")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    p.add_argument("--way", choices=("plain", "shared"), help="time one way in this process and print JSON")
    return p.parse_args()


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Time one way: an epoch over `steps` requests, and a second one."""
    import torch

    from easyeditor import CounterFactDataset, EditTrainer, MENDTrainingHparams
    from easyeditor.lm.precision import products
    from easyeditor.lm.weights import frozen

    torch.set_num_threads(args.threads)
    quiet_transformers()
    values = {"model_name": "smollm2-135m", "device": "cpu", "inner_params": INNER, "rank": args.rank, "lr": 1e-6}
    values |= {"outer_prompts": args.outer, "locality_prompts": args.locality, "accumulate_bs": args.accumulate}
    hparams = MENDTrainingHparams.from_dict({**values, "replay": args.way == "shared"})
    data = CounterFactDataset(ROOT / "data" / "facts.json", args.steps, split="train")
    with tempfile.TemporaryDirectory() as folder:
        trainer = EditTrainer(hparams, data, folder=Path(folder) / "run")
        rates, cpu_s = [], []
        with frozen(trainer.model), products(hparams.matmul, hparams.cpu_products):
            for epoch in range(2):
                started, cpu_started = time.perf_counter(), time.process_time()
                for step in range(0, args.steps, args.accumulate):
                    trainer._steps(range(epoch * args.steps + step, epoch * args.steps + step + args.accumulate))
                rates.append(args.steps / (time.perf_counter() - started))
                cpu_s.append((time.process_time() - cpu_started) / args.steps)
    return {"rates": rates, "cpu_s": cpu_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> int:
    """Both ways, one after the other."""
    args = arguments()
    if args.way is not None:
        print(json.dumps(timed(args)))
        return 0
    found = {}
    for way in ("plain", "shared"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"rank {args.rank}, {args.outer} outer and {args.locality} locality prompts, {args.threads} threads")
    print("| way | first epoch, steps/s | later epochs, steps/s | CPU s a step, first and later | peak memory |")
    print("|---|---|---|---|---|")
    for way, result in found.items():
        rates, cpu_s = ([f"{value:.2f}" for value in result[key]] for key in ("rates", "cpu_s"))
        print(f"| {way} | {rates[0]} | {rates[1]} | {cpu_s[0]}, {cpu_s[1]} | {result['peak_mb']:.0f} MB |")
    by_clock = [found["shared"]["rates"][epoch] / found["plain"]["rates"][epoch] for epoch in (0, 1)]
    by_cpu = [found["plain"]["cpu_s"][epoch] / found["shared"]["cpu_s"][epoch] for epoch in (0, 1)]
    print(f"shared against plain by the clock: {by_clock[0]:.1f}x in the first epoch, {by_clock[1]:.1f}x in later ones")
    print(f"by CPU seconds: {by_cpu[0]:.1f}x and {by_cpu[1]:.1f}x")
    later = found["shared"]["rates"][1]
    print(f"reference, two threads: {REFERENCE} steps/s, 2.4 GB; shared passes against it: {later / REFERENCE:.1f}x")
    return 0


if __name__ == "__main__":
    run(main)
