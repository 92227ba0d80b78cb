"""MEMIT on many requests: seconds per request batched against one at a time, and how the cost grows.

  python benchmarks/memit.py                          the embedded model, own facts: about 15 minutes
  python benchmarks/memit.py --sizes 1 8 --grow 100   shorter
  python benchmarks/memit.py --count --sizes 8 64     no clock: passes, rows and tokens of the searches (ROME, too)

Searching targets is nearly all of the cost; it is timed batched (rows of several requests in one forward) and one
request at a time. What comes after (keys, values, the solve, a delta per layer) is timed apart, up to --grow requests,
with targets drawn at random beforehand: its cost does not depend on what the targets are.
The statistics must be there (`python -m easyeditor.stats --hparams …`) or are collected first, outside the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hparams", default=str(ROOT / "hparams/MEMIT/smollm2-135m.yaml"))
    p.add_argument("--data", default=str(ROOT / "data/facts.json"))
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    p.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--one-at-a-time", type=int, default=8, help="at most this many requests are searched singly")
    p.add_argument("--grow", type=int, nargs="+", default=[10, 100, 1000])
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--count", action="store_true", help="count the searches' passes, rows and tokens, and time nothing")
    args = p.parse_args()

    import torch

    from easyeditor.commands.cli import quiet_transformers
    from easyeditor.dataset.reader import read_dataset
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams

    torch.set_num_threads(args.threads)
    quiet_transformers()
    editor = BaseEditor(load_hparams(args.hparams).override([*args.set, "ppl_sentence_num=0"]))
    requests = distinct(read_dataset(args.data).requests[: max(*args.sizes, *args.grow) * 2])
    assert editor.method.contexts
    if args.count:
        for size in args.sizes:
            count(editor, requests[:size])
        return
    for layer in editor.method.layers:
        editor.method.moment(layer)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.hparams}, {Path(args.data).name}")
    print("\nsearch of the targets")
    for size in args.sizes:
        search(editor, requests[:size], args)
    print("\nkeys, current values, solve and deltas (targets given)")
    for size in args.grow:
        rest(editor, requests[:size])


def distinct(requests: list[Any]) -> list[Any]:
    """One request of each subject, so that none is dropped or contradicts another."""
    return list({r.subject: r for r in requests}.values())


def count(editor: Any, requests: list[Any]) -> None:
    """How many forwards with gradients a search of requests takes, and how full they are."""
    import torch

    from easyeditor.lm.weights import frozen

    layer, sizes = editor.method.layers[-1], []
    module = getattr(editor.method, "site", editor.method.parts.mlp(layer))

    def see(_module: Any, args: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():
            sizes.append(tuple((args[0] if args else inputs["input_ids"]).shape))

    handle = editor.model.base_model.register_forward_pre_hook(see, with_kwargs=True)
    with frozen(editor.model):
        found = editor.method.values(requests, module, layer)
    handle.remove()
    rows, tokens = sum(b for b, _ in sizes), sum(b * t for b, t in sizes)
    print(
        f"  {len(requests):5d} requests, {sum(len(f.losses) for f in found):6d} passes of one request: "
        f"{len(sizes):5d} forwards, {rows / len(sizes):6.1f} rows each, {tokens:8,d} tokens, {rows:7,d} rows in all",
        flush=True,
    )


def search(editor: Any, requests: list[Any], args: argparse.Namespace) -> None:
    """Seconds per request of the value search, batched and one at a time."""
    from easyeditor.lm.weights import frozen

    layer = editor.method.layers[-1]
    module = editor.method.parts.block(layer)
    single = requests[: args.one_at_a_time]
    batched, alone = [], []
    with frozen(editor.model):
        for _ in range(args.repeats):
            started = time.perf_counter()
            found = editor.method.values(requests, module, layer)
            batched.append((time.perf_counter() - started) / len(requests))
            started = time.perf_counter()
            for request in single:
                editor.method.values([request], module, layer)
            alone.append((time.perf_counter() - started) / len(single))
    one, many = statistics.median(alone), statistics.median(batched)
    passes = statistics.mean(len(f.losses) for f in found)
    print(
        f"  {len(requests):5d} requests   {many:6.2f} s each together   {one:6.2f} s each alone (of {len(single)})   "
        f"{one / many:4.2f} x   {passes:4.1f} passes",
        flush=True,
    )


def rest(editor: Any, requests: list[Any]) -> None:
    """Seconds of everything after the search."""
    import torch

    from easyeditor.methods.locate.value_search import Found

    if not requests:
        return
    with tempfile.TemporaryDirectory() as folder:
        editor.method.hparams.targets_dir = folder
        store = editor.method._store(editor.method.parts.block(editor.method.layers[-1]))
        generator = torch.Generator().manual_seed(0)
        width = editor.model.config.hidden_size
        for request in requests:
            drawn = torch.randn(2, width, generator=generator)
            store.write(request, Found(initial_D=drawn[0], offset_D=drawn[1], losses=[(1.0, 1.0, 0.0, 0.0)]))
        started = time.perf_counter()
        editor.method.edit(requests)
        seconds = time.perf_counter() - started
        editor.method.hparams.targets_dir = None
    print(f"  {len(requests):5d} requests   {seconds:7.2f} s   {seconds / len(requests):6.3f} s each", flush=True)


if __name__ == "__main__":
    main()
