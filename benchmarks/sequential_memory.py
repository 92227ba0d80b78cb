"""Memory of the process along a long sequence of kept FT edits, and that all of them can still be taken back.

  MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/sequential_memory.py        2,000 edits; two minutes on one core
  python benchmarks/sequential_memory.py --edits 200

The model is a Llama of random weights (2 blocks, hidden width 128, MLP width 512): each edit is a dense delta of 256
KiB, so that 2,000 of them are 500 MiB, which is what keeping all in memory would take. Printed is the resident size
of the process after every tenth of the sequence, the deltas held in memory, and those in files. The variable makes
glibc give every freed delta back to the system at once; without it the resident size also holds what malloc keeps.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import build, tokenizer  # noqa: E402

from easyeditor import BaseEditor, EditRequest, load_hparams  # noqa: E402
from easyeditor.lm.weights import snapshot  # noqa: E402

WIDTHS = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
MIB = 2**20


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--edits", type=int, default=2000)
    args = p.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("easyeditor").setLevel(logging.ERROR)
    values = {"alg_name": "FT", "layers": [1], "num_steps": 1, "lr": 1e-5, "device": "cpu", "ppl_sentence_num": 0}
    editor = BaseEditor(load_hparams({**values, "model_name": (build("llama", **WIDTHS), tokenizer())}))
    before = snapshot(editor.model, editor.method.weight_names)
    size = sum(weight.numel() * weight.element_size() for weight in before.values())
    print(f"an edit: {size / MIB:.2f} MiB; all {args.edits}: {size * args.edits / MIB:.0f} MiB")
    print(f"{'edits':>6} {'resident, MiB':>14} {'held, MiB':>10} {'in files':>9} {'s':>6}")
    started = time.perf_counter()
    for number in range(1, args.edits + 1):
        request = EditRequest.make(f"Person {number} lives in", subject=None, target_new="Italy")
        editor.commit(editor.compute(request))
        if number % max(1, args.edits // 10) == 0 or number == 1:
            shelf = editor._ledger._shelf
            held = shelf.held_bytes
            filed, spent = len(shelf) - held // size, time.perf_counter() - started
            print(f"{number:>6} {resident() / MIB:>14.0f} {held / MIB:>10.1f} {filed:>9} {spent:>6.0f}", flush=True)
    print(f"largest resident size: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    editor.revert_all()
    after = snapshot(editor.model, editor.method.weight_names)
    equal = all(torch.equal(after[name], weight) for name, weight in before.items())
    print(f"all taken back, bit-equal to the original: {equal}")


def resident() -> int:
    """Resident size of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
