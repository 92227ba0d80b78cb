"""Second moments: tokens per second and memory of one pass over text, against the plain way of the reference.

  python benchmarks/stats.py                     the embedded model and its Wikipedia excerpt: about 10 minutes
  python benchmarks/stats.py --documents 32 --repeats 2

The ways take turns on the same documents, so that a machine that drifts slows all; figures are medians of one run.
  plain        one layer, a whole forward of all blocks and the output head, one document after another, full products
  1 layer      `python -m easyeditor.stats` for the first of the layers
  5 layers     the same for all layers in one pass; "deepest alone" is what its < 1.3 x is measured against
Long documents are those of the excerpt joined until they reach --long tokens: where the plain way does worst.
The floor is the matrix products at the rate measured for them on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

WAYS = ("plain", "1 layer", "deepest alone", "5 layers")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--layers", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    p.add_argument("--documents", type=int, default=64, help="documents of the excerpt in one measurement")
    p.add_argument("--long", type=int, default=2000, help="tokens of a long document")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = p.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    bench = Bench(args)
    if args.memory_of:
        print(json.dumps(peak(bench, args.memory_of)))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.model}, layers {args.layers}")
    for name, texts in (("short documents", bench.short), ("long documents", bench.long)):
        compare(bench, name, texts, args.repeats)
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory beyond the loaded model, long documents, {way}: {json.loads(done.stdout):.0f} MiB")


class Bench:
    """The model, the documents, and the ways to sum over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        from easyeditor.commands.cli import quiet_transformers
        from easyeditor.lm.discover import anatomy
        from easyeditor.lm.loading import load
        from easyeditor.lm.tokens import encode
        from easyeditor.stats.corpus import open_corpus

        quiet_transformers()
        self.args = args
        self.model, self.tok = load(args.model, device="cpu")
        self.parts = anatomy(self.model)
        corpus = open_corpus("wikipedia-excerpt")
        texts = list(corpus.slice(0, args.documents * 4, 0, 1))
        self.short = texts[: args.documents]
        self.long, text = [], ""
        for piece in texts:
            text += piece + " "
            if len(encode(self.tok, text)) >= args.long:
                self.long.append(text)
                text = ""
        self.long = self.long[: max(1, args.documents // 16)]

    def way(self, name: str, texts: list[str]) -> Callable[[], int]:
        """A function that makes the sums and returns the number of tokens."""
        layers = {"1 layer": self.args.layers[:1], "deepest alone": self.args.layers[-1:], "5 layers": self.args.layers}
        if name == "plain":
            return lambda: self.plain(texts, self.args.layers[0])
        return lambda: self.ours(texts, layers[name])

    def ours(self, texts: list[str], layers: list[int]) -> int:
        from easyeditor.stats.collect import Settings, collect
        from easyeditor.stats.corpus import Corpus

        corpus = Corpus(name="bench", identity="bench", documents=texts)
        longest = self.args.long + 4096
        settings = Settings(layers=tuple(layers), samples=len(texts), max_length=longest, batch_tokens=4096)
        return collect(self.parts, self.tok, corpus, settings).tokens

    def plain(self, texts: list[str], layer: int) -> int:
        import torch

        from easyeditor.lm.hooks import tapped
        from easyeditor.lm.tokens import encode

        width = self.parts.key_width(layer)
        total = torch.zeros(width, width)

        def add(keys_BTK: Any) -> None:
            keys = keys_BTK.flatten(0, 1)
            total.add_(keys.T @ keys)

        tokens = 0
        with torch.inference_mode(), tapped(self.parts.rewrite(layer), on_input=add):
            for text in texts:
                ids = encode(self.tok, text)
                self.model(input_ids=torch.tensor([ids]))
                tokens += len(ids)
        return tokens


def compare(bench: Bench, name: str, texts: list[str], repeats: int) -> None:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens = 0
    for _ in range(repeats):
        for way in WAYS:
            run = bench.way(way, texts)
            started = time.perf_counter()
            tokens = run()
            rates[way].append(tokens / (time.perf_counter() - started))
    median = {way: statistics.median(values) for way, values in rates.items()}
    print(f"\n{name}: {len(texts)}, {tokens / len(texts):.0f} tokens each")
    for way in WAYS:
        floor = tokens / floor_seconds(bench, way, tokens)
        print(
            f"  {way:14s} {median[way]:7.0f} tokens/s   plain x {median[way] / median['plain']:5.2f}   "
            f"at most {floor:6.0f} by its matrix products"
        )
    cost = statistics.median(a / b for a, b in zip(rates["deepest alone"], rates["5 layers"], strict=True))
    print(f"  five layers in one pass cost {cost:.2f} x the deepest alone")


def floor_seconds(bench: Bench, way: str, tokens: int) -> float:
    """Seconds of the matrix products (attention's own left out) at the rate measured for 512 rows."""
    from rome_edit import rate

    blocks = [sum(p.numel() for p in b.parameters() if p.ndim == 2) for b in bench.parts.blocks]
    layers = {"plain": 1, "1 layer": 1, "deepest alone": 1, "5 layers": len(bench.args.layers)}[way]
    deepest = bench.args.layers[0] if way in ("plain", "1 layer") else bench.args.layers[-1]
    width = bench.parts.key_width(deepest)
    if way == "plain":
        passed = sum(blocks) + bench.model.get_output_embeddings().weight.numel()
        outer = width**2
    else:
        passed = sum(blocks[: deepest + 1]) - bench.model.get_parameter(bench.parts.weight_name(deepest)).numel()
        outer = layers * width**2 * 7 // 12
    return 2 * tokens * (passed + outer) / rate(512)


def peak(bench: Bench, way: str) -> float:
    """Peak resident MiB of one way over the long documents, beyond the loaded, touched model."""
    from rome_edit import resident_mib

    for weight in bench.model.parameters():
        float(weight.detach().sum())
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    bench.way(way, bench.long)()
    return resident_mib("VmHWM") - before


if __name__ == "__main__":
    main()
