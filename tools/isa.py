"""The golden and the embedded tests under several instruction sets and thread counts: `make isa`.

  python tools/isa.py                        every combination; exit code 1 if one of them fails
  python tools/isa.py --quick                without the embedded model
  python tools/isa.py --sets sse --threads 2 -- -x -k rome
        some combinations; what follows -- goes to pytest

torch chooses its kernels when it is loaded, so every combination is a process of its own. A set asks for less than the
processor has: ATen's own kernels, oneDNN's, and MKL's (MKL_ENABLE_INSTRUCTIONS is heard on Intel processors only,
MKL_CBWR on all). tests/conftest.py takes the number of threads from TEST_THREADS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
SETS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
    },
}
THREADS = (1, 2)


def golden_files() -> list[str]:
    """Test files that read the reference's numbers or run the embedded model."""
    found = ((path, path.read_text(encoding="utf-8")) for path in sorted(TESTS.glob("test_*.py")))
    return [str(path) for path, text in found if "golden_numbers" in text or "smol:" in text]


def tested(name: str, threads: int, flags: list[str]) -> tuple[int, str]:
    """pytest's exit code and last line under one set of instructions with so many threads."""
    environment = {**os.environ, **SETS[name], "TEST_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, *golden_files()]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "\n".join([*(f"    {line}" for line in failed), f"    {lines[-1]}"])


def main() -> int:
    """Run the combinations asked for, and say how each ended."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    p.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    p.add_argument("--quick", action="store_true", help="without the embedded model")
    p.add_argument("flags", nargs="*", metavar="-- FLAG", help="for pytest")
    args = p.parse_args()
    flags = [*(["-m", "not embedded"] if args.quick else []), *args.flags]
    worst = 0
    for name in args.sets:
        for threads in args.threads:
            started = time.perf_counter()
            code, said = tested(name, threads, flags)
            print(f"{name}, threads {threads}: exit code {code}, {time.perf_counter() - started:.0f} s\n{said}")
            sys.stdout.flush()
            worst = max(worst, code)
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
