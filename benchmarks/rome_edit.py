"""Seconds, tokens and memory of a ROME edit and of a perplexity probe, plain against replay, on one model.

  python benchmarks/rome_edit.py                            the embedded model, 3 requests, 3 repeats: about 9 minutes
  python benchmarks/rome_edit.py --repeats 1 --requests 1
  python benchmarks/rome_edit.py --count                    no clock: what blocks run over in edits of one pass
  python benchmarks/rome_edit.py --rates                    float32 products by PyTorch's kernels and by oneDNN's

Plain and replay take turns, so that a machine that drifts slows both; figures are medians, ratios are of one run.
The floor is the matrix products that remain, at the matmul rate measured for their shapes on this machine.
Peak memory is that of a fresh process for each mode, beyond what the loaded model itself takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

REQUESTS = [
    ("Bay, which is located in", "Bay", "Italy"),
    ("Xbox was developed by", "Xbox", "Apple"),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hparams", default=str(ROOT / "hparams/ROME/smollm2-135m.yaml"))
    p.add_argument("--requests", type=int, default=len(REQUESTS))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--count", action="store_true", help="count what blocks run over instead of timing")
    p.add_argument("--rates", action="store_true", help="time products alone, by number of rows")
    p.add_argument("--memory-of", choices=("plain", "replay", "ppl-plain", "ppl-fast"), help=argparse.SUPPRESS)
    args = p.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_memory(args)))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.hparams}")
    if args.rates:
        for tokens in (22, 44, 132, 440):
            of = {kernels: rate(tokens, kernels) / 1e9 for kernels in ("torch", "onednn")}
            print(f"{tokens:4d} rows   torch {of['torch']:4.0f} GFLOP/s   oneDNN {of['onednn']:4.0f}")
        return
    editor = make_editor(args.hparams)
    if args.count:
        count_tokens(editor, args)
        return
    time_edits(editor, args)
    time_perplexity(editor, args)
    for mode in ("plain", "replay", "ppl-plain", "ppl-fast"):
        command = [sys.executable, __file__, "--hparams", args.hparams, "--memory-of", mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory beyond the loaded model, {mode}: {json.loads(done.stdout)['beyond_mib']:.0f} MiB")


def make_editor(hparams: str, **settings: Any) -> Any:
    from easyeditor.commands.cli import quiet_transformers
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams

    quiet_transformers()
    return BaseEditor(load_hparams(hparams).override([f"{k}={v}" for k, v in settings.items()]))


def request(number: int) -> Any:
    from easyeditor.values.edit import EditRequest

    prompt, subject, target = REQUESTS[number]
    return EditRequest.make(prompt, subject=subject, target_new=target)


def time_edits(editor: Any, args: argparse.Namespace) -> None:
    """Edits, the two paths taking turns; contexts are generated before the clock starts."""
    print(f"contexts generated: {len(editor.method.contexts)}")
    ratios = []
    for number in range(args.requests):
        made = request(number)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats):
            for replay in (False, True):
                editor.method.hparams.replay = replay
                started = time.perf_counter()
                trace = editor.method.edit([made]).trace[editor.method.layers[0]]
                seconds[replay].append(time.perf_counter() - started)
        plain, fast = statistics.median(seconds[False]), statistics.median(seconds[True])
        ratios.append(plain / fast)
        work = {replay: count_work(editor, made, trace.steps, replay) for replay in (False, True)}
        print(f"\n{made.prompt} -> {made.target_new}: {trace.steps} passes of the value search")
        for name, value, replay in (("plain", plain, False), ("replay", fast, True)):
            tokens, flop, floor = work[replay]
            print(
                f"  {name:7s} {value:7.2f} s   {tokens:7,d} tokens computed   {flop / 1e12:6.2f} TFLOP   "
                f"floor {floor:6.2f} s   {value / floor:4.2f} x floor"
            )
        print(f"  plain / replay: {plain / fast:.2f} x")
    if ratios:
        print(f"\nedit, plain / replay, median over requests: {statistics.median(ratios):.2f} x\n")


def count_tokens(editor: Any, args: argparse.Namespace) -> None:
    """Tokens, summed over blocks, of edits one after another whose search has one pass: recording, keys, that pass."""
    method, ran = editor.method, [0]
    assert method.contexts
    method.hparams.v_num_grad_steps = 1
    for block in method.parts.blocks:
        block.mlp.register_forward_hook(lambda _m, _a, out: ran.__setitem__(0, ran[0] + out.shape[0] * out.shape[1]))
    for number in range(args.requests):
        ran[0] = 0
        method.edit([request(number)])
        print(f"{request(number).prompt}: {ran[0]:,d} tokens times blocks")


def count_work(editor: Any, made: Any, passes: int, replay: bool) -> tuple[int, float, float]:
    """One value search: tokens, floating-point operations of its matrix products, and their seconds at the rate."""
    from easyeditor.lm.replay import row_forward
    from easyeditor.methods.locate.rows import kl_row, target_rows

    method, layer = editor.method, editor.method.layers[0]
    rows, _ = target_rows(method.tok, made, method.contexts, method.hparams.fact_token)
    rows.append(kl_row(method.tok, made, method.hparams.fact_token))
    forward = row_forward(method.parts, method.parts.mlp(layer), layer, [rows], replay=replay)
    per_block = [sum(p.numel() for p in b.parameters() if p.ndim == 2) for b in method.parts.blocks]
    head = editor.model.get_output_embeddings().weight.numel()
    scored = sum(len(row.scored) for row in rows)
    tokens, updates = forward.tokens_per_call, passes - 1
    above, everything = sum(per_block[layer + 1 :]), sum(per_block)
    if replay:
        recorded = sum(len(row.ids) for row in rows)
        in_blocks = 2 * tokens * above * (passes + updates)
        in_head = 2 * scored * head * (passes + updates)
        once = 2 * recorded * everything
        floor = in_blocks / rate(tokens) + in_head / rate(scored, head=True) + once / rate(512)
        return recorded + tokens * passes, in_blocks + in_head + once, floor
    in_blocks = 2 * tokens * (everything * passes + above * updates)
    in_head = 2 * tokens * head * (passes + updates)
    return tokens * passes, in_blocks + in_head, (in_blocks + in_head) / rate(tokens)


_RATES: dict[tuple[int, str, bool], float] = {}


def rate(tokens: int, kernels: str = "auto", *, head: bool = False) -> float:
    """Measured float32 FLOP/s of x @ W^T for `tokens` rows, by the kernels that an edit takes: MLP-shaped weights, more
    than a cache holds, or a head."""
    import torch

    from easyeditor.lm.precision import products

    key = (tokens, kernels, head)
    if key not in _RATES:
        shapes = [(49152, 576)] if head else [(1536, 576)] * 40
        weights = [torch.randn(*shape) for shape in shapes]
        x = torch.randn(tokens, 576)
        times = []
        for _ in range(9):
            started = time.perf_counter()
            with products("exact", kernels):  # type: ignore[arg-type]
                for weight in weights:
                    torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - started)
        _RATES[key] = 2 * tokens * sum(w.numel() for w in weights) / statistics.median(times)
    return _RATES[key]


def probes(editor: Any) -> dict[str, Any]:
    from easyeditor.evaluate.perplexity import PerplexityProbe

    texts, batch = editor.sentences.texts, editor.hparams.ppl_batch_size
    plain = PerplexityProbe(editor.model, editor.tok, texts, fast=False, batch_size=batch)
    fast = PerplexityProbe(
        editor.model, editor.tok, texts, parts=editor.method.parts, resume_layer=editor.method.layers[0]
    )
    return {"plain": plain, "fast": fast}


def time_perplexity(editor: Any, args: argparse.Namespace) -> None:
    """Perplexity: plain, fast on an unseen model (before an edit), fast resumed above the edited layer (after it)."""
    both = probes(editor)
    seconds: dict[str, list[float]] = {"plain": [], "fast, before": [], "fast, after": []}
    for _ in range(max(3, args.repeats)):
        fresh = probes(editor)["fast"]
        for name, probe in (("plain", both["plain"]), ("fast, before", fresh), ("fast, after", fresh)):
            started = time.perf_counter()
            report = probe.measure()
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    per_block = [sum(p.numel() for p in b.parameters() if p.ndim == 2) for b in editor.method.parts.blocks]
    head = editor.model.get_output_embeddings().weight.numel()
    scored = sum(report.tokens)
    tokens = scored + len(report.tokens)
    skipped = {"plain": 0, "fast, before": 0, "fast, after": editor.method.layers[0]}
    print(f"perplexity of {len(report.tokens)} sentences ({editor.sentences.name}), {tokens} tokens")
    for name, value in median.items():
        floor = 2 * (tokens * sum(per_block[skipped[name] :]) + scored * head) / rate(512)
        print(f"  {name:13s} {value:6.2f} s   floor {floor:5.2f} s   plain / this: {median['plain'] / value:.2f} x")


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of one edit or one probe beyond that of the loaded, touched model, in this fresh process."""
    editor = make_editor(args.hparams)
    for weight in editor.model.parameters():
        float(weight.detach().sum())  # memory-mapped weights become resident
    contexts = editor.method.contexts
    assert contexts
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    if args.memory_of.startswith("ppl"):
        probe = probes(editor)[args.memory_of.removeprefix("ppl-")]
        probe.measure()
        probe.measure()
    else:
        editor.method.hparams.replay = args.memory_of == "replay"
        editor.method.edit([request(0)])
    return {"beyond_mib": resident_mib("VmHWM") - before}


def resident_mib(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process, from Linux's /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
