"""What a mass edit saves over one edit at a time, and whether thousands cost what the first hundred do.

  python benchmarks/mass_edit.py                     the embedded model, 8 requests both ways: about 5 minutes
  python benchmarks/mass_edit.py --requests 4 --threads 1
  python benchmarks/mass_edit.py --measured 5        metrics and perplexity of 8 edits, alone and in shared forwards,
                                                     5 times by turns (--sentences 10: where forwards are short)
  python benchmarks/mass_edit.py --scale 20000       a tiny random model: memory, seconds an edit, loading the journal

One at a time is `single_case_edit.py` without loading the model: a fresh editor for every request (contexts, base
perplexity, edit, metrics, perplexity). The mass edit does the same requests in mode single, all of it counted, its
one-off part too. Wall-clock and processor seconds: on a machine that others use, compare the latter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

REQUESTS = [
    ("Bay, which is located in", "Bay", "Italy"),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
    ("Xbox was developed by", "Xbox", "Apple"),
    ("The official religion of Edwin of Northumbria is", "Edwin of Northumbria", "Islam"),
    ("Autonomous University of Madrid, which is located in", "Autonomous University of Madrid", "Sweden"),
    ("Arthur is located in", "Arthur", "California"),
    ("The capital of France is", "France", "Rome"),
    ("Anaal Nathrakh, that was created in", "Anaal Nathrakh", "Philadelphia"),
]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hparams", default=str(ROOT / "hparams/ROME/smollm2-135m.yaml"))
    p.add_argument("--requests", type=int, default=len(REQUESTS))
    p.add_argument("--together", type=int, default=8)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--measured", type=int, metavar="TIMES", help="only what is measured after edits, so many times")
    p.add_argument("--sentences", type=int, default=50, help="of the perplexity, with --measured")
    p.add_argument("--scale", type=int, metavar="N", help="N edits of a tiny model instead")
    args = p.parse_args()

    import torch

    from easyeditor.commands.cli import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(1 if args.scale else args.threads)
    if args.scale:
        scale(args.scale)
    elif args.measured:
        measured(args)
    else:
        speed(args)


def clocks() -> tuple[float, float]:
    """Wall-clock and processor seconds so far."""
    return time.perf_counter(), time.process_time()


def speed(args: argparse.Namespace) -> None:
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.lm.loading import load
    from easyeditor.methods.registry import load_hparams
    from easyeditor.values.edit import EditRequest

    hparams = load_hparams(args.hparams)
    hparams.model_name = load(hparams.model_name, device=hparams.device, dtype=hparams.dtype)
    chosen = REQUESTS[: args.requests]
    requests = [EditRequest.make(p, subject=s, target_new=t, case_id=i) for i, (p, s, t) in enumerate(chosen)]
    alone, deltas = [], {}
    for request in requests:
        before = clocks()
        record = BaseEditor(hparams).examine(request).record.to_json()
        alone.append([now - then for now, then in zip(clocks(), before, strict=True)])
        deltas[request.case_id] = [t["delta_norm"] for t in record["trace"].values()]
        print(f"  alone   {alone[-1][0]:7.2f} s wall  {alone[-1][1]:7.2f} s processor  {request.prompt}", flush=True)
    records = [{"prompt": p, "subject": s, "target_new": t} for p, s, t in chosen]
    before = clocks()
    lines = run_mass(hparams, records, together=args.together)
    whole = [(now - then) / len(requests) for now, then in zip(clocks(), before, strict=True)]
    off = max(
        abs(t["delta_norm"] / d - 1)
        for line in lines
        for t, d in zip(line["trace"].values(), deltas[line["case_id"]], strict=True)
    )
    parts = {key: statistics.median(x["seconds"][key] for x in lines) for key in lines[0]["seconds"]}
    print(f"{len(requests)} requests, {args.threads} threads; seconds an edit")
    for at, name in enumerate(("wall", "processor")):
        values = [pair[at] for pair in alone]
        one, middle = statistics.fmean(values), statistics.median(values)
        both = f"one at a time {one:6.2f} (median {middle:.2f})   mass edit, one-off part included {whole[at]:6.2f}"
        print(f"  {name:9s}  {both}   ratio {one / whole[at]:.2f}")
    print("  the mass edit's median split, wall: " + ", ".join(f"{key} {value:.2f}" for key, value in parts.items()))
    print(f"  largest relative difference of an update's norm: {off:.1e}")


def measured(args: argparse.Namespace) -> None:
    """What is measured of edited models: each alone, written into the weights, against all in forwards they share."""
    from easyeditor.dataset.sentences import load_sentences
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams
    from easyeditor.values.edit import EditRequest

    sentences = load_sentences(args.sentences)
    editor = BaseEditor(load_hparams(args.hparams).override(["v_num_grad_steps=2"]), sentences=sentences)
    requests = [EditRequest.make(p, subject=s, target_new=t) for p, s, t in REQUESTS[: args.requests]]
    results, before = editor.compute_each(requests), editor.measure(requests, [None] * len(requests))
    base = editor.perplexity()
    edits = [(r, results[n], None, before.only([n])) for n, r in enumerate(requests)]

    def alone() -> list[float]:
        found = []
        for n, request in enumerate(requests):
            with editor.applied(results[n]):
                editor.measure([request], [None], before=before.only([n]))
                found.append(editor.perplexity().mean)
        return found

    spent: dict[str, list[tuple[float, ...]]] = {"alone": [], "together": []}
    made: dict[str, list[float]] = {}
    for _ in range(args.measured):
        for name, way in (("alone", alone), ("together", lambda: [s.ppl.mean for s in editor.measure_many(edits)])):
            start = clocks()
            made[name] = way()
            spent[name].append(tuple((b - a) / len(requests) for a, b in zip(start, clocks(), strict=True)))
    off = max(abs(a / b - 1) for a, b in zip(made["together"], made["alone"], strict=True))
    print(f"{len(requests)} edits, {args.sentences} sentences (perplexity {base.mean:.2f}), {args.threads} threads")
    for at, clock in enumerate(("wall", "processor")):
        one, many = (statistics.median(x[at] for x in spent[name]) for name in ("alone", "together"))
        print(f"  {clock:9s}  alone {one:.3f} s an edit   together {many:.3f}   ratio {one / many:.2f}")
    print(f"  largest relative difference of a perplexity: {off:.1e}")


def run_mass(hparams: Any, records: list[dict[str, Any]], *, together: int, folder: Path | None = None) -> list[Any]:
    """Run mode single in a temporary folder (or `folder`); the journal's lines, none when a folder is given."""
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.results.run import run_lines
    from easyeditor.runs.mass import begin, execute
    from easyeditor.runs.planning import plan
    from easyeditor.runs.ranks import Rank
    from easyeditor.runs.settings import RunSettings

    with tempfile.TemporaryDirectory() as temporary:
        run = folder or Path(temporary)
        data = run / "data.json"
        data.write_text(json.dumps(records), encoding="utf-8")
        what = plan(hparams, RunSettings(data=str(data), together=together))
        begin(run, what)
        execute(run, what, BaseEditor, Rank(), False)
        return [] if folder is not None else [line.to_json() for line in run_lines(run)]


def scale(count: int) -> None:
    """`count` edits of a tiny model: resident memory and seconds an edit along the way, seconds to load the journal."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import build, rome_hparams, tokenizer

    from easyeditor.results.journal import Journal
    from easyeditor.runs.summary import summarise

    settings = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 2}
    hparams = rome_hparams((build("llama"), tokenizer()), **settings)
    near = {"locality_prompt": "The sea is", "locality_ground_truth": "blue"}
    records = [
        {"prompt": f"Town {i} is in", "subject": f"Town {i}", "target_new": "Italy", **near} for i in range(count)
    ]
    written, every, marks = Journal.append, max(1, count // 10), [(0, *clocks(), 0.0)]

    def append(self: Journal, line: Any) -> None:
        written(self, line)
        done = line["index"] + 1
        if done % every == 0:
            wall, processor = clocks()
            ms = (processor - marks[-1][2]) / (done - marks[-1][0]) * 1000
            marks.append((done, wall, processor, resident_mib()))
            print(f"  {done:7,d} edits   {ms:7.1f} ms processor an edit   {marks[-1][3]:7.1f} MiB resident", flush=True)

    Journal.append = append  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run_mass(hparams, records, together=8, folder=Path(folder))
        size = (Path(folder) / "results.jsonl").stat().st_size / 2**20
        started = time.perf_counter()
        summary = summarise(Path(folder))
        print(f"journal of {summary['counts']['edits']:,} edits, {size:.0f} MiB: read and summed up in ", end="")
        print(f"{time.perf_counter() - started:.1f} s")


def resident_mib() -> float:
    """Resident memory of this process, from Linux's /proc."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
