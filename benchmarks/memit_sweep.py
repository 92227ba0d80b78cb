"""MEMIT's layers, clamp and weight of the statistics (lambda) for one model: what each choice edits, what it costs.

  python benchmarks/memit_sweep.py                    24 own facts on the embedded model: about half an hour

One batch of requests for every choice. The targets z depend on the last layer and the clamp only, so each is searched
once and read back for the others. Statistics must be there for all layers named, or are collected first.
Columns: token-level accuracy on the rewritten prompts and their paraphrases, agreement on neighbours, perplexity.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAYERS = ["3,4,5,6,7", "5,6,7", "7", "3,4,5", "5"]
LAMBDAS = [50.0, 500.0, 2000.0, 5000.0, 15000.0]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hparams", default=str(ROOT / "hparams/MEMIT/smollm2-135m.yaml"))
    p.add_argument("--data", default=str(ROOT / "data/facts.json"))
    p.add_argument("--requests", type=int, default=24)
    p.add_argument("--seed", type=int, default=0, help="which requests are drawn")
    p.add_argument("--layers", nargs="+", default=LAYERS)
    p.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS)
    p.add_argument("--clamps", type=float, nargs="+", default=[0.75, 2.0], help="clamp_norm_factor of the search")
    p.add_argument("--targets", metavar="DIR", help="keep the searches there (default: a temporary folder)")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()

    import torch

    from easyeditor.commands.cli import quiet_transformers
    from easyeditor.dataset.reader import read_dataset
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams

    torch.set_num_threads(args.threads)
    quiet_transformers()
    everything = list({r.subject: r for r in read_dataset(args.data).requests}.values())
    requests = random.Random(args.seed).sample(everything, args.requests)
    hparams = load_hparams(args.hparams).override(args.set)
    before = None
    print(f"{len(requests)} requests of {Path(args.data).name} (seed {args.seed}), {args.hparams}")
    print("| layers | clamp | lambda | rewrite | rephrase | locality | perplexity | search loss |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for layers, clamp in itertools.product(args.layers, args.clamps):
            for weight in args.lambdas:
                chosen = [f"layers=[{layers}]", f"clamp_norm_factor={clamp}", f"mom2_update_weight={weight}"]
                chosen.append(f"targets_dir={args.targets or folder}")
                editor = BaseEditor(hparams.override(chosen))
                if before is None:
                    before = [editor.score(r) for r in requests]
                    ppl = editor.perplexity()
                    said = means([replace(one, locality=one.agreement(one)) for one in before])
                    print(f"| none | | | {said} | {ppl.mean:.1f} | |", flush=True)
                result = editor.compute(requests)
                with editor.applied(result):
                    after = [editor.score(r) for r in requests]
                    ppl = editor.perplexity()
                said = means(
                    [replace(new, locality=new.agreement(old)) for new, old in zip(after, before, strict=True)]
                )
                loss = statistics.fmean([t[editor.method.layers[-1]].loss_last for t in result.traces])
                print(f"| {layers} | {clamp:g} | {weight:g} | {said} | {ppl.mean:.1f} | {loss:.3f} |", flush=True)


def means(sides: list[Any]) -> str:
    """Columns of the three accuracies: means within a request, then over requests."""
    from easyeditor.values.plain import mean

    rows = [side.means() for side in sides]
    columns = (mean(row.get(name) for row in rows) for name in ("rewrite_acc", "rephrase_acc", "locality_acc"))
    return " | ".join("–" if value is None else f"{value:.3f}" for value in columns)


if __name__ == "__main__":
    main()
