"""This checkout against another one: the same work by both, in turns, medians and ratios.

  git worktree add ../before COMMIT && python benchmarks/against.py ../before
  python benchmarks/against.py ../before --work edit perplexity --repeats 5 --threads 1

Every measurement is a process of its own, which loads the embedded model and does what is not counted (contexts,
statistics) first; the two checkouts take turns, so that a machine that drifts slows both. Seconds of the clock, and of
all threads' processors. `mass-N` are N edits of mode single with their perplexities; `memit-N`: one edit of N requests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SINGLE = {
    "edit Bay": ("Bay, which is located in", "Bay", "Italy"),
    "edit Xbox": ("Xbox was developed by", "Xbox", "Apple"),
    "edit Danielle Darrieux": ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
}
WORK = (*SINGLE, "mass-8", "mass-64", "memit-64", "perplexity", "mend steps", "statistics")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("other", type=Path, help="folder of the other checkout, with the model in its hugging_cache/")
    p.add_argument("--work", nargs="+", default=["edit", "mass-8", "memit-64", "perplexity", "mend", "statistics"])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.threads)))
        return
    print(f"{args.threads} threads, {args.repeats} repeats, medians; other: {args.other}")
    for work in (w for w in WORK if any(w.startswith(asked) for asked in args.work)):
        turns = [[measured(folder, work, args.threads) for folder in (args.other, HERE)] for _ in range(args.repeats)]
        (other, other_cpu), (this, this_cpu) = (
            [statistics.median(turn[side][clock] for turn in turns) for clock in (0, 1)] for side in (0, 1)
        )
        ratio = statistics.median(turn[0][0] / turn[1][0] for turn in turns)
        cpu = statistics.median(turn[0][1] / turn[1][1] for turn in turns)
        print(
            f"{work:24} other {other:7.2f} s ({other_cpu:7.2f} processor)   this {this:7.2f} s ({this_cpu:7.2f})   "
            f"other / this {ratio:5.2f} (processor {cpu:5.2f})",
            flush=True,
        )


def measured(folder: Path, work: str, threads: int) -> tuple[float, float]:
    """Seconds of the clock and of processors that `work` takes in the checkout `folder`."""
    command = [sys.executable, __file__, str(folder), "--one", work, "--threads", str(threads)]
    env = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work} in {folder}: {done.stderr.strip().splitlines()[-1]}")
    clock, cpu = json.loads(done.stdout.splitlines()[-1])
    return clock, cpu


def one(work: str, threads: int) -> tuple[float, float]:
    """Do `work` with the checkout that is the working folder."""
    import torch

    from easyeditor.commands.cli import quiet_transformers

    torch.set_num_threads(threads)
    quiet_transformers()
    todo = prepared(work)
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    todo()
    return time.perf_counter() - started, sum(os.times()[:4]) - cpu  # of what it started, too


def prepared(work: str) -> Callable[[], Any]:
    """What is to be timed; everything that is not is done."""
    if work == "mend steps":
        return mend()
    if work == "statistics":
        return collecting()
    from easyeditor import BaseEditor, load_hparams

    method = "MEMIT" if work.startswith("memit") else "ROME"
    editor = BaseEditor.from_hparams(load_hparams(f"hparams/{method}/smollm2-135m.yaml"))
    if work == "perplexity":
        return editor.perplexity
    editor.compute([facts(1)[0]])  # contexts, statistics
    if work in SINGLE:
        prompt, subject, target = SINGLE[work]
        return lambda: editor.compute([{"prompt": prompt, "subject": subject, "target_new": target}])
    if method == "MEMIT":
        return lambda: editor.compute(facts(int(work.split("-")[1]) + 1)[1:])
    return mass(int(work.split("-")[1]))


def facts(count: int) -> list[dict[str, Any]]:
    """The first requests of the project's own file, one of each subject."""
    found: dict[str, dict[str, Any]] = {}
    for record in json.loads((HERE / "data/facts.json").read_text(encoding="utf-8")):
        rewrite = record["requested_rewrite"]
        if len(found) == count:
            break
        fields = {
            "prompt": rewrite["prompt"],
            "subject": rewrite["subject"],
            "target_new": rewrite["target_new"]["str"],
        }
        found.setdefault(rewrite["subject"], fields)
    return list(found.values())


def mass(count: int) -> Callable[[], Any]:
    """mass_edit.py's own command, the loading of the model and its own one-off work included."""
    folder = tempfile.TemporaryDirectory()
    flags = ["--data", "data/facts.json", "--limit", str(count), "--output", str(Path(folder.name) / "run")]
    command = [sys.executable, "mass_edit.py", "--hparams", "hparams/ROME/smollm2-135m.yaml", *flags]

    def run() -> None:
        with folder:
            subprocess.run(command, check=True, capture_output=True)

    return run


def mend() -> Callable[[], Any]:
    """Ten steps on requests that were never seen, in the reference's setting."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    from mend import INNER

    from easyeditor import CounterFactDataset, EditTrainer, MENDTrainingHparams
    from easyeditor.lm.weights import frozen

    values = {"model_name": "smollm2-135m", "device": "cpu", "inner_params": INNER, "rank": 1920, "lr": 1e-6}
    values |= {"outer_prompts": 1, "locality_prompts": 1, "accumulate_bs": 5}
    data = CounterFactDataset(HERE / "data" / "facts.json", 10, split="train")
    folder = tempfile.TemporaryDirectory()
    trainer = EditTrainer(MENDTrainingHparams.from_dict(values), data, folder=Path(folder.name) / "run")

    try:
        from easyeditor.lm.precision import products  # as the trainer's `run` does; older checkouts have none
    except ImportError:
        products = nullcontext  # type: ignore[assignment]

    def steps() -> None:
        with folder, frozen(trainer.model), products("exact"):
            for first in (0, 5):
                trainer._steps(range(first, first + 5))

    return steps


def collecting() -> Callable[[], Any]:
    """The second moments of five layers over 32 documents."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    from stats import Bench

    bench = Bench(argparse.Namespace(model="smollm2-135m", layers=[3, 4, 5, 6, 7], documents=32, long=2000))
    return lambda: bench.ours(bench.short, bench.args.layers)


if __name__ == "__main__":
    main()
