"""The solves of locate-then-edit against plain elimination: processor seconds, and how far the answers are apart.

  python benchmarks/solves.py                                      6 processor seconds
  python benchmarks/solves.py --widths 1536 3072 6400   keys of SmolLM2, GPT-2, GPT-2-XL: two minutes of processor time

ROME's C^-1 k: C factored once a layer and one pair of triangular solves a request, against an elimination of C for each
request. MEMIT's (lambda C + K K^T)^-1 K: C factored once and a system of the smaller of N and K, against an elimination
of width K. A batch of a sequence after others: what is held in place is an inverse that every batch changes by a term
of rank N. All of it in float64, by the functions the methods call; C is drawn, its eigenvalues over four decades. Plain
and quick run in turns; shown are medians, and the median of each pair's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from easyeditor.methods.locate.held import Held
from easyeditor.methods.locate.updates import answering, whitened
from easyeditor.stats.factored import Factored

WEIGHT = 15000.0  # lambda of MEMIT's files
Row = tuple[float | int, ...]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", type=int, nargs="+", default=[768, 1536], help="K (default: %(default)s)")
    p.add_argument("--requests", type=int, nargs="+", default=[1, 10, 100, 1000], help="N (default: %(default)s)")
    p.add_argument("--batches", type=int, default=30, help="of the sequence (default: %(default)s)")
    p.add_argument("--batch", type=int, default=10, help="requests in each of them (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args(argv)


def moment(width: int) -> Tensor:
    """A second moment (K, K): a diagonal over four decades, and 64 directions that stand out."""
    drawn = torch.randn(width, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.logspace(-3, 1, width, dtype=torch.float64).diag().addmm_(drawn, drawn.T, alpha=1 / 64)


def keys(width: int, count: int, seed: int = 1) -> Tensor:
    """Keys as columns (K, N)."""
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clocked(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Processor seconds, and the answer."""
    started = time.process_time()
    made = run()
    return time.process_time() - started, made


def paired(plain: Callable[[], Tensor], quick: Callable[[], Tensor], repeats: int) -> Row:
    """Median seconds of both, the median ratio, and the largest relative difference."""
    spent: list[tuple[float, float]] = []
    for _ in range(repeats):
        (slow, wanted), (fast, found) = clocked(plain), clocked(quick)
        spent.append((slow, max(fast, 1e-9)))
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    slows, fasts = zip(*spent, strict=True)
    return statistics.median(slows), statistics.median(fasts), statistics.median(a / b for a, b in spent), apart


def rome(width: int, repeats: int) -> Row:
    """(K, seconds to factor C, plain, quick, ratio, difference): a request's C^-1 k."""
    c_KK, k_K = moment(width), keys(width, 1)[:, 0]
    once, held = (
        statistics.median(clocked(lambda: Factored(c_KK)._packed_KK)[0] for _ in range(repeats)),
        Factored(c_KK),
    )
    return width, once, *paired(lambda: torch.linalg.solve(c_KK, k_K), lambda: whitened(k_K, held), repeats)


def memit(width: int, count: int, repeats: int) -> Row:
    """(K, N, plain, quick, ratio, difference): (lambda C + K K^T)^-1 K with C factored already."""
    c_KK, k_KN = moment(width), keys(width, count)
    held = Factored(c_KK)
    return (
        width,
        count,
        *paired(
            lambda: torch.linalg.solve(torch.addmm(c_KK, k_KN, k_KN.T, beta=WEIGHT), k_KN),
            lambda: answering(k_KN, whitened(k_KN, held) / WEIGHT, 1.0),
            repeats,
        ),
    )


def sequence(width: int, count: int, batches: int) -> list[Row]:
    """(K, batches before, seconds, difference) of each batch's solve, the update of what is held in it; the last
    against the plain solve with all keys before it."""
    c_KK, held = moment(width), Held()
    factor, rows = Factored(c_KK), []

    def first() -> Tensor:
        return factor.inverse() / WEIGHT

    held.inverse(0, first)
    for number in range(1, batches + 1):
        held = Held(held, {0: keys(width, count, number)})
        own_KN = keys(width, count, batches + number)

        def batch(state: Held = held, own_KN: Tensor = own_KN) -> Tensor:
            inverse_KK = state.inverse(0, first)
            assert inverse_KK is not None
            return answering(own_KN, inverse_KK @ own_KN, 1.0)

        seconds, made = clocked(batch)
        rows.append((width, number, seconds))
    every = [*(keys(width, count, n) for n in range(1, batches + 1)), own_KN]
    wanted = torch.linalg.solve(WEIGHT * c_KK + sum(k @ k.T for k in every), own_KN)
    return [*rows[:-1], (*rows[-1], float((made - wanted).abs().max() / wanted.abs().max()))]


def say(title: str, head: str, rows: Sequence[Row]) -> None:
    """A table."""
    columns = head.split(" | ")
    print(f"\n{title}\n\n| {head} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else f"{x:.3g}" for x in row) + " |", flush=True)


def thirds(rows: Sequence[Row]) -> list[Row]:
    """Medians over each third of a sequence: (K, batches before from, to, seconds)."""
    parts = [rows[i * len(rows) // 3 : (i + 1) * len(rows) // 3] for i in range(3)]
    return [(p[0][0], p[0][1], p[-1][1], statistics.median(row[2] for row in p)) for p in parts if p]


def main(argv: list[str] | None = None) -> dict[str, list[Row]]:
    """All three tables."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.repeats}, processor seconds, float64")
    found = {"rome": [rome(width, args.repeats) for width in args.widths]}
    head = "K | factor C, once | plain, s | quick, s | plain / quick | difference"
    say("ROME's key, a request", head, found["rome"])
    found["memit"] = [memit(width, count, args.repeats) for width in args.widths for count in args.requests]
    say("MEMIT, an edit of N", "K | N | plain, s | quick, s | plain / quick | difference", found["memit"])
    found["sequence"] = sequence(args.widths[0], args.batch, args.batches)
    title = f"a batch of {args.batch} after others; the last one's difference: {found['sequence'][-1][3]:.1e}"
    say(title, "K | batches before, from | to | s", thirds(found["sequence"]))
    return found


if __name__ == "__main__":
    main()
