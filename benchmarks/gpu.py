"""Every stage of editing at the papers' model sizes, on random weights: seconds, TFLOP/s, share of the peak, memory.

  python benchmarks/gpu.py                                        all three shapes, in float32, on the first card
  python benchmarks/gpu.py --shape gpt2-xl --set matmul=tf32      any hyper-parameter of the methods
  python benchmarks/gpu.py --shape gptj-6b --stages memit --passes 20 --memit 100 1000
  python benchmarks/gpu.py --shape llama3-8b --device cpu --dtype bfloat16 --stages edit perplexity --once \\
      --set mom2_adjustment=false                                 a large model through one edit, without a card
  python benchmarks/gpu.py --shape small --device cpu             seconds on a laptop; so it is where no card is

Nothing is fetched: shapes are written here, weights are noise, the tokenizer is trained on this repository's texts.
Operations are those of matrix products and attention, counted by operator; what is elementwise and factorisations are
not in them. A value search is timed with few passes and with more, and the difference is a pass; what is left is the
recording and the first forward. It ends with what all 21,919 single edits of CounterFact would take with perplexity.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from cards import GIB, HEAD, Clock, Stage, peak_of  # noqa: E402
from shapes import INNER, LAYERS, SHAPES, config_of, contexts, documents, random_model, tokenizer  # noqa: E402

from easyeditor.commands.estimate import estimate  # noqa: E402
from easyeditor.editing.easyedit import BaseEditor  # noqa: E402
from easyeditor.lm.loading import resolve_device  # noqa: E402
from easyeditor.methods.registry import load_hparams  # noqa: E402
from easyeditor.stats.factored import Factored  # noqa: E402

COUNTERFACT = 21919
PASSES_OF_AN_EDIT = 18  # of a value search on CounterFact, on average
STAGES = ("search", "keys", "solve", "edit", "perplexity", "statistics", "mend", "memit")
SEARCH = {"v_lr": 0.5, "v_weight_decay": 0.5, "clamp_norm_factor": 4, "kl_factor": 0.0625}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; without a card the small shape on the CPU."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", nargs="+", choices=SHAPES, help="default: the large ones; without a card the small one")
    p.add_argument("--blocks", type=int, help="blocks of the model (default: all)")
    p.add_argument("--device", default="0", help="default: %(default)s")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    p.add_argument("--together", type=int, nargs="+", help="requests searched at once (default: 1 8 32 64)")
    p.add_argument("--memit", type=int, nargs="+", help="requests of one MEMIT edit (default: 100 1000)")
    p.add_argument("--passes", type=int, default=4, help="of a value search, timed (default: %(default)s)")
    p.add_argument("--sentences", type=int, default=50, help="of the perplexity (default: %(default)s)")
    p.add_argument("--once", action="store_true", help="no run before the timed one: where a run takes minutes")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="hyper-parameters of all methods")
    args = p.parse_args(argv)
    on_card = torch.cuda.is_available() and args.device != "cpu"
    if args.shape is None:
        args.shape = ["small"] if not on_card else [name for name in SHAPES if name != "small"]
        if not on_card:
            print("no card here: the small shape on the CPU, whose numbers say nothing about a card")
    small = args.shape == ["small"]
    args.together = args.together or ([1, 4] if small else [1, 8, 32, 64])
    args.memit = args.memit or ([4, 8] if small else [100, 1000])
    return args


class Bench:
    """One model and the stages that are timed on it."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        from easyeditor.commands.cli import quiet_transformers
        from easyeditor.dataset.sentences import load_sentences

        quiet_transformers()
        self.args, self.device = args, resolve_device(args.device)
        self.config, self.clock = config_of(shape, args.blocks), Clock(self.device, args.once)
        depth = self.config.num_hidden_layers
        self.layers = [layer for layer in LAYERS[shape] if layer < depth - 1] or [0]
        self.pair = random_model(self.config, self.device, getattr(torch, args.dtype)), tokenizer()
        self.requests = self._requests(max(*args.together, *args.memit))
        rome = self.hparams("ROME", layers=self.layers[-1:], context_templates=contexts(10, 10))
        self.estimated = estimate(self.config, rome, gpu=self.device.type == "cuda")
        self.editor = BaseEditor(rome, sentences=load_sentences(args.sentences))
        self._hold(self.editor.method)
        self.made: list[Any] = []
        """The edit of stage `edit`, once it was timed."""

    def hparams(self, name: str, **values: Any) -> Any:
        """A method's hyper-parameters for this model."""
        last = self.config.num_hidden_layers - 1
        common = {"alg_name": name, "model_name": self.pair, "device": str(self.device), "dtype": self.args.dtype}
        search = {**SEARCH, "v_loss_layer": last, "v_num_grad_steps": self.args.passes, "mom2_adjustment": True}
        return load_hparams({**common, **search, **values}).override(self.args.set)

    def _requests(self, count: int) -> list[Any]:
        from easyeditor.dataset.reader import read_dataset

        first = {r.subject: r for r in read_dataset(str(ROOT / "data" / "facts.json")).requests}
        if len(first) < count:
            raise SystemExit(f"data/facts.json has {len(first)} subjects, {count} requests were asked for")
        return list(first.values())[:count]

    def _hold(self, method: Any) -> None:
        """Random second moments in the place of collected ones."""
        for layer in method.layers if method.uses_statistics else ():
            width = method.parts.key_width(layer)
            drawn = torch.randn(width, 64, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
            drawn = drawn.to(self.device)
            eye = torch.eye(width, dtype=torch.float64, device=self.device)
            method.statistics._moments[layer] = Factored(eye.addmm_(drawn, drawn.T, alpha=1 / 64))

    # -- stages -----------------------------------------------------------------------------------------------------

    def search(self) -> Iterator[Stage]:
        """The value search at each number of requests: what a pass takes, and the rest."""
        for count in self.args.together:
            first, more = (self.clock("", functools.partial(self._search, count, n)) for n in (1, 1 + self.args.passes))
            assert first.flop is not None
            assert more.flop is not None
            spent, peak = more.seconds - first.seconds, more.peak_bytes
            flop, unit = more.flop - first.flop, "a pass of all R"
            passes = Stage(name=f"search, R = {count}", unit=unit, seconds=spent, flop=flop, peak_bytes=peak)
            yield Stage(name=f"record, R = {count}", unit="all R", **_numbers(first))
            yield passes.per(unit, self.args.passes)

    def _search(self, count: int, passes: int) -> Any:
        from easyeditor.lm.weights import frozen

        method, (layer,) = self.editor.method, self.editor.method.layers
        method.hparams = method.hparams.override([f"v_num_grad_steps={passes}"])  # of the method alone
        with frozen(self.editor.model):
            return method.values(self.requests[:count], method.parts.mlp(layer), layer)

    def keys(self) -> Iterator[Stage]:
        """The keys of requests, in one go."""
        method, count = self.editor.method, min(8, len(self.requests))
        run = functools.partial(method.look_up, self.requests[:count], method.layers[0])
        yield self.clock("keys", run, "a request").per("a request", count)

    def solve(self) -> Iterator[Stage]:
        """The update from a search and a key, with second moments; the first one factorises them."""
        method, (layer,) = self.editor.method, self.editor.method.layers
        (found,), (key,) = self._search(1, 1), method.look_up(self.requests[:1], layer)
        stage = self.clock("solve, after the first", lambda: method.update(layer, found, key), "a request")
        yield Stage(name=stage.name, unit=stage.unit, seconds=stage.seconds, flop=None, peak_bytes=stage.peak_bytes)

    def edit(self) -> Iterator[Stage]:
        """A whole ROME edit with as many passes as were asked for."""
        self.editor.method.hparams.v_num_grad_steps = self.args.passes

        def run() -> None:
            self.made = self.editor.compute_each(self.requests[:1])

        yield self.clock(f"ROME edit, {self.args.passes} passes", run, "an edit")

    def perplexity(self) -> Iterator[Stage]:
        """Perplexity of the unedited and of an edited model; scores and perplexity of edits side by side."""
        editor, count = self.editor, 1 if self.args.once else min(8, len(self.requests))
        requests = self.requests[:count]
        yield self.clock("perplexity, unedited", self._fresh, f"{self.args.sentences} sentences")
        editor.method.hparams.v_num_grad_steps = 2
        results = self.made if count == len(self.made) else editor.compute_each(requests)
        before = editor.measure(requests, [None] * count)
        with editor.applied(results[0]):
            yield self.clock("perplexity, edited", editor.perplexity, f"{self.args.sentences} sentences")
            yield self.clock("scores, edited", lambda: editor.measure(requests[:1], [None]), "an edit")
        edits = [(r, results[n], None, before.only([n])) for n, r in enumerate(requests)]
        if None not in editor.measure_many(edits):
            stage = self.clock("scores and perplexity, side by side", lambda: editor.measure_many(edits))
            yield Stage(name=stage.name, unit=f"an edit of {count}", **_numbers(stage.per("", count)))

    def _fresh(self) -> Any:
        self.editor._probe = None  # what it keeps of the unedited model is part of the first measurement
        return self.editor.perplexity()

    def statistics(self) -> Iterator[Stage]:
        """Second moments of all MEMIT's layers in one pass over text."""
        from easyeditor.stats.collect import Settings, collect
        from easyeditor.stats.corpus import Corpus

        texts = documents()[: 8 if self.args.shape == ["small"] else 64]
        corpus = Corpus(name="bench", identity="bench", documents=texts)
        settings = Settings(layers=tuple(self.layers), samples=len(texts), max_length=1024, batch_tokens=8192)
        tokens = 0

        def run() -> None:
            nonlocal tokens
            tokens = collect(self.editor.method.parts, self.pair[1], corpus, settings).tokens

        stage = self.clock("statistics", run)
        unit = f"{len(self.layers)} layers, {tokens / stage.seconds:,.0f} tokens/s"
        yield Stage(name=stage.name, unit=unit, **_numbers(stage))

    def mend(self) -> Iterator[Stage]:
        """Steps of MEND's training, the first epoch and a later one."""
        from easyeditor import CounterFactDataset, EditTrainer, MENDTrainingHparams
        from easyeditor.lm.weights import frozen

        steps, depth = 10, self.config.num_hidden_layers
        inner = [name.format(n) for n in range(depth - 3, depth) for name in INNER[self.config.model_type]]
        values = {"model_name": self.pair, "device": str(self.device), "inner_params": inner, "accumulate_bs": steps}
        data = CounterFactDataset(ROOT / "data" / "facts.json", 2 * steps, split="train")
        starts = {
            "warming up": 0,
            "MEND, first epoch": steps,
            "MEND, later epochs": steps,
        }  # the second half, unseen, seen

        def runs(trainer: Any) -> list[Callable[[], Any]]:
            return [functools.partial(trainer._steps, range(start, start + steps)) for start in starts.values()]

        with tempfile.TemporaryDirectory() as folder:

            def trainer(name: str) -> Any:
                return EditTrainer(MENDTrainingHparams.from_dict(values), data, folder=Path(folder) / name)

            flop: list[float] = []
            with frozen(self.pair[0]):
                if not self.args.once:  # a step cannot be repeated: another training counts the same ones
                    flop = [self.clock.count(run) for run in runs(trainer("counted"))]
                for number, (name, run) in enumerate(zip(starts, runs(trainer("run")), strict=True)):
                    stage = (
                        self.clock.timed(name, run, "a step", flop[number]) if flop else self.clock(name, run, "a step")
                    )
                    if number:
                        yield stage.per("a step", steps)

    def memit(self) -> Iterator[Stage]:
        """Whole MEMIT edits; the first one factorises second moments."""
        editor = BaseEditor(
            self.hparams("MEMIT", layers=self.layers, mom2_update_weight=15000, context_templates=contexts(0, 5))
        )
        self._hold(editor.method)
        for count in self.args.memit:
            run = functools.partial(editor.method.edit, self.requests[:count])
            name = f"MEMIT of {count:,}, {self.args.passes} passes"
            yield self.clock(name, run, "a request").per("a request", count)


def _numbers(stage: Stage) -> dict[str, Any]:
    return {"seconds": stage.seconds, "flop": stage.flop, "peak_bytes": stage.peak_bytes}


def projection(stages: dict[str, Stage], args: argparse.Namespace) -> str:
    """The time of all of CounterFact's single edits, from the stages; or what is lacking to say it."""
    measured = "scores and perplexity, side by side"
    alone = ("perplexity, edited", "scores, edited")
    after = [stages[measured]] if measured in stages else [stages[name] for name in alone if name in stages]
    found = {}
    for count in args.together:
        if f"search, R = {count}" in stages:
            once, a_pass = (stages[f"{name}, R = {count}"].seconds for name in ("record", "search"))
            found[count] = (once + PASSES_OF_AN_EDIT * a_pass) / count
    if not found or not after or not {"keys", "solve, after the first"} <= stages.keys():
        return f"time for {COUNTERFACT:,} edits: needs the stages search, keys, solve and perplexity"
    best = min(found, key=lambda count: found[count])
    parts = {
        f"search of {PASSES_OF_AN_EDIT} passes, {best} together": found[best],
        "keys": stages["keys"].seconds,
        "solve": stages["solve, after the first"].seconds,
        "scores and perplexity": sum(stage.seconds for stage in after),
    }
    one = sum(parts.values())
    said = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in parts.items())
    return (
        f"projected: {1000 * one:.1f} ms an edit ({said}); {COUNTERFACT:,} edits in {COUNTERFACT * one / 60:,.1f} min"
    )


def run(shape: str, args: argparse.Namespace, say: Callable[[str], Any] = print) -> dict[str, Stage]:
    """Time the stages of one shape, and say what is found."""
    bench = Bench(shape, args)
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    kind = "tf32" if "matmul=tf32" in args.set and args.dtype == "float32" else args.dtype
    peak = peak_of(bench.device, kind)
    known = f"peak {peak:g} TFLOP/s" if peak else "its peak is not in the table of benchmarks/cards.py"
    if card == "CPU":
        known = f"{torch.get_num_threads()} threads"
    made, size = bench.estimated, sum(p.numel() for p in bench.pair[0].parameters())
    depth = bench.config.num_hidden_layers
    say(f"\n{shape}, {depth} blocks, {size / 1e9:.2f} billion weights, {kind}")
    say(f"torch {torch.__version__}, {card}, {known}")
    parts = ", ".join(f"{key} {getattr(made, key) / GIB:.2f}" for key in ("weights", "edited", "statistics", "batch"))
    say(f"memory of a ROME edit with perplexity, estimated: {made.total / GIB:.2f} GiB ({parts})\n")
    say(HEAD)
    found: dict[str, Stage] = {}
    for name in args.stages:
        try:
            for stage in getattr(bench, name)():
                found[stage.name] = stage
                say(stage.row(peak))
        except torch.OutOfMemoryError:
            say(f"| {name} | does not fit in the memory | - | - | - | - |")
    say("\n" + projection(found, args))
    return found


def main() -> None:
    """All shapes asked for, one after another."""
    args = arguments()
    for shape in args.shape:
        run(shape, args, functools.partial(print, flush=True))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
