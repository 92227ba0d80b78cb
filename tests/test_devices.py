"""Everything a user runs, on pretended GPUs (tests/pretend.py), against the plain CPU run: one device, blocks split
over two, fresh and resumed. The models are float64, so that what differs is the device and not the rounding."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from conftest import CONTEXTS, ROOT, build, tokenizer
from pretend import DeviceMix, Seen, Unordered, moved, pretended
from test_refill import longest, rows_run, searched, stops_apart
from test_refill import method as refilled
from transformers import AutoModelForCausalLM

from easyeditor import (
    BaseEditor,
    CounterFactDataset,
    EditRequest,
    EditResult,
    EditTrainer,
    MENDTrainingHparams,
    WeightDelta,
)
from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.commands.cli import memory
from easyeditor.commands.estimate import advice, estimate
from easyeditor.evaluate.perplexity import NLL_SLICE, PerplexityProbe
from easyeditor.evaluate.scoring import score
from easyeditor.lm.budget import Budget
from easyeditor.lm.discover import anatomy
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.loading import load, save
from easyeditor.lm.scored import line
from easyeditor.lm.weights import add, frozen, rounding
from easyeditor.methods.registry import load_hparams
from easyeditor.runs.ranks import Rank, process_group
from easyeditor.stats.collect import Pace, Settings, collect
from easyeditor.stats.corpus import Corpus
from easyeditor.stats.gather import gather

TOLERANCE = 1e-5
SENTENCES = [item["Text"] for item in json.loads((ROOT / "data" / "sentences_50.json").read_text(encoding="utf-8"))]
WEIGHTS = ["model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]
LAYOUTS = {"one": ["gpu:0"], "two": ["gpu:0", "gpu:1"]}
SEARCHED = {"ROME": [1], "C-ROME": [2], "FTP-ROME": [1], "MEMIT": [1, 2], "AlphaEdit": [1, 2]}
SEARCHED |= {"MEMIT-Seq": [1, 2], "EMMET": [1, 2], "NAS": [1, 2], "ENCORE": [1, 2], "SPHERE": [2]}
REQUESTS = [
    EditRequest.make(
        prompt,
        subject=subject,
        target_new=target,
        rephrase_prompts=[f"Well, {prompt}"],
        locality={"near": {"prompt": ["Lyon is in"], "ground_truth": ["France"]}},
        case_id=number,
    )
    for number, (prompt, subject, target) in enumerate(
        [("Paris is in", "Paris", "Italy"), ("They say the Bridge is in", "Bridge", "the old town")]
    )
]

Numbers = dict[str, Any]
Scenario = Callable[[Any, Path, bool], Numbers]
"""(model and tokenizer, a folder of its own, go on with what a first run left there?) -> numbers"""


def hparams(name: str, pair: Any, folder: Path, **changes: Any) -> Any:
    values = {"alg_name": name, "model_name": pair, "device": "cpu", "ppl_sentence_num": 4, "layers": SEARCHED[name]}
    values |= {"v_num_grad_steps": 4, "v_lr": 0.3, "v_loss_layer": 3, "v_weight_decay": 1e-3, "clamp_norm_factor": 4.0}
    values |= {"kl_factor": 0.0625, "mom2_adjustment": True, "context_templates": CONTEXTS[:3]}
    values |= {"stats_dir": str(folder / "stats"), "mom2_dataset": "own", "mom2_n_samples": 40}
    values |= {"norm_anchor_value": 3.0} if name == "NAS" else {}
    values |= (
        {"nullspace_threshold": 0.3, "nullspace_scale": "relative"} if name in ("AlphaEdit", "NAS", "SPHERE") else {}
    )
    values |= {"mom2_update_weight": 10.0} if len(SEARCHED[name]) > 1 or name == "SPHERE" else {}
    return load_hparams({**values, **changes})


def numbers_of(result: EditResult) -> Numbers:
    found: Numbers = {f"delta {n}": delta.dense().cpu() for n, delta in enumerate(result.deltas)}
    for n, traces in enumerate(result.traces):
        for layer, trace in traces.items():
            found |= {f"trace {n} {layer} {k}": v for k, v in trace.numbers().to_json().items() if isinstance(v, float)}
    return found


def edited(name: str) -> Scenario:
    """An edit of two requests, measured, committed, a second one on top of it, both taken back."""

    def run(pair: Any, folder: Path, resumed: bool) -> Numbers:
        if not (folder / "stats").exists():
            method = BaseEditor(hparams(name, pair, folder)).method
            keys = {layer: method.statistics.key(layer) for layer in SEARCHED[name]}  # type: ignore[attr-defined]
            (folder / "own.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
            gather(anatomy(pair[0]), pair[1], keys, corpus=str(folder / "own.txt"), sums="float64", max_length=24)
        options = {"targets_dir": str(folder / "targets")} if resumed else {}
        if resumed:
            BaseEditor(hparams(name, pair, folder, **options)).compute(REQUESTS)
        return measured(BaseEditor(hparams(name, pair, folder, **options)), folder)

    return run


def measured(editor: BaseEditor, folder: Path) -> Numbers:
    """One editor's whole life: edit, record, save and load, commit, edit again, revert."""
    before = {name: weight.detach().clone() for name, weight in editor.model.named_parameters()}
    examined = editor.examine_together(REQUESTS)
    found = numbers_of(examined.result)
    assert examined.ppl_base is not None
    assert examined.ppl_after is not None
    found |= {"before": examined.ppl_base.nlls, "after": examined.ppl_after.nlls}
    examined.result.save(folder / "edit")
    loaded = EditResult.load(folder / "edit")
    with editor.applied(loaded):
        found["loaded"] = editor.perplexity().nlls
    editor.commit(loaded)
    found |= {f"second {k}": v for k, v in numbers_of(editor.compute(REQUESTS[1])).items()}
    editor.revert(loaded)
    assert all(torch.equal(weight, before[name]) for name, weight in editor.model.named_parameters())
    return found


def fine_tuned(pair: Any, folder: Path, resumed: bool) -> Numbers:
    values = {"alg_name": "FT", "model_name": pair, "device": "cpu", "layers": [1, 3], "num_steps": 3, "lr": 1e-3}
    return measured(BaseEditor(load_hparams({**values, "ppl_sentence_num": 4})), folder)


def lora(pair: Any, folder: Path, resumed: bool) -> Numbers:
    values = {"alg_name": "LoRA", "model_name": pair, "device": "cpu", "layers": [1, 2], "num_steps": 3, "lr": 1e-3}
    values |= {"target_modules": ["down_proj"], "rank": 4, "lora_alpha": 8, "batch_size": 2, "lora_dropout": 0.0}
    return measured(BaseEditor(load_hparams({**values, "ppl_sentence_num": 4})), folder)


def ultraedit(pair: Any, folder: Path, resumed: bool) -> Numbers:
    values = {"alg_name": "UltraEdit", "model_name": pair, "device": "cpu", "inner_params": WEIGHTS, "lr": 1e-3}
    return measured(BaseEditor(load_hparams({**values, "ppl_sentence_num": 4})), folder)


def trained(pair: Any, folder: Path, resumed: bool, **changes: Any) -> Numbers:
    """MEND's training, cut in two if `resumed`; then an edit with its archive."""
    weights = [anatomy(pair[0]).weight_name(layer) for layer in (1, 2)]
    values = {"model_name": pair, "device": "cpu", "inner_params": weights, "rank": 4, "edit_lr": -0.02, "lr": 1e-3}
    values |= {"lr_lr": 1e-3, "accumulate_bs": 2, "max_iters": 8, "val_interval": 4, "log_interval": 2, "val_steps": 2}
    values |= {"model_save_pt": 4, "silent": True, **changes}
    raw = [
        {
            "case_id": n,
            "requested_rewrite": {
                "prompt": "The {} is",
                "subject": place,
                "target_new": {"str": "open late"},
                "target_true": {"str": "closed"},
            },
            "paraphrase_prompts": [f"Today the {place} is"],
            "neighborhood_prompts": ["The street was", "The market was"],
        }
        for n, place in enumerate(["river", "museum", "shop", "garden"])
    ]
    (folder / "facts.json").write_text(json.dumps(raw), encoding="utf-8")
    data = CounterFactDataset(folder / "facts.json")
    for steps in (4, 8) if resumed else (8,):
        config = MENDTrainingHparams.from_dict({**values, "max_iters": steps})
        trainer = EditTrainer(config, data, data, folder=folder / "run", resume=steps == 8 and resumed)
        trainer.run()
    found = {name: value.detach().cpu() for name, value in trainer.hypernet.state_dict().items()}
    lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found["losses"] = [json.loads(line)["total_loss"] for line in lines if "total_loss" in line]
    settings = {"alg_name": "MEND", "model_name": pair, "device": "cpu", "archive": str(folder / "run" / "last")}
    return found | measured(BaseEditor(load_hparams({**settings, "ppl_sentence_num": 4})), folder)


def trained_plainly(pair: Any, folder: Path, resumed: bool) -> Numbers:
    return trained(pair, folder, resumed, replay=False)


def mend_edit(folder: Path) -> Scenario:
    """MEND's edit with the archive of a training in `folder`."""
    values = {"alg_name": "MEND", "device": "cpu", "archive": str(folder / "run" / "last"), "ppl_sentence_num": 4}
    return lambda pair, own, _: measured(BaseEditor(load_hparams({**values, "model_name": pair})), own)


class Cut(Exception):
    """The end of a run that is resumed."""


def collected(pair: Any, folder: Path, resumed: bool) -> Numbers:
    """Second moments at three layers, cut after the first window if `resumed`."""
    corpus = Corpus(name="own", identity="1", documents=SENTENCES * 3)
    settings = Settings(layers=(0, 1, 3), samples=150, max_length=16, batch_tokens=256, sums="float64")
    given = {"checkpoint": folder / "part.safetensors", "pace": Pace(every=1)}

    def cut(*_: int) -> None:
        raise Cut

    if resumed:
        with pytest.raises(Cut):
            collect(anatomy(pair[0]), pair[1], corpus, settings, tick=cut, **given)  # type: ignore[arg-type]
    totals = collect(anatomy(pair[0]), pair[1], corpus, settings, resume=resumed, **given)  # type: ignore[arg-type]
    assert totals.documents == 150
    return {str(layer): total.cpu() for layer, total in totals.sums.items()}


def asked(pair: Any, folder: Path, resumed: bool, *, probes: Sequence[str] = ("plain", "fast", "resumed")) -> Numbers:
    """Contexts from the model, scores, continuations, perplexity from the start and from a block on."""
    method = BaseEditor(hparams("ROME", pair, folder, context_templates=None, mom2_adjustment=False)).method
    scores = score(*pair, [("Paris is in", "Italy"), ("A bridge", "of stone")])
    parts, found = anatomy(pair[0]), {"contexts": list(method.contexts)}
    options: dict[str, Any] = {"plain": {"fast": False}, "fast": {}, "resumed": {"resume_layer": 2}}
    for name in probes:
        probe = PerplexityProbe(*pair, SENTENCES[:6], parts=parts, **options[name])
        found |= {name: probe.measure().nlls, f"{name} again": probe.measure().nlls}  # type: ignore[dict-item]
    texts = [made.whole for made in generate(*pair, ["Paris is", "A"], Decoding(tokens=6))]
    return {**found, "scores": [s.mean_log_probability for s in scores], "texts": texts}


def beside(pair: Any, folder: Path, resumed: bool) -> Numbers:
    """Edited models measured in forwards that they share: edits of a layer each, and one of both."""
    editor, found = BaseEditor(hparams("ROME", pair, folder, mom2_adjustment=False)), {}
    made, before = editor.compute_each(REQUESTS), editor.measure(REQUESTS, [None] * 2)
    editor.perplexity()
    later = BaseEditor(hparams("ROME", pair, folder, layers=[2], mom2_adjustment=False)).compute_each(REQUESTS)
    made[1] = dataclasses.replace(made[1], deltas=(*made[1].deltas, *later[1].deltas))
    edits = [(r, made[n], None, before.only([n])) for n, r in enumerate(REQUESTS)]
    for n, state in enumerate(editor.measure_many(edits)):
        assert state is not None
        assert state.ppl is not None
        scores = [x.mean_log_probability for x in state.evaluation.answers.scored.values()]
        found |= {f"nlls {n}": state.ppl.nlls, f"scores {n}": scores}
    return found


def different(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest number; infinity where texts differ."""
    if isinstance(ours, list) and ours and isinstance(ours[0], str):
        return 0.0 if ours == theirs else float("inf")
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if a.numel() else 0.0


def run(
    scenario: Scenario, folder: Path, devices: Sequence[str], *, resumed: bool = False, kind: str = "llama"
) -> tuple[Numbers, Seen]:
    """A scenario's numbers on a fresh model on these devices; none: the CPU as it is."""
    folder.mkdir()
    pair = build(kind, dtype=torch.float64), tokenizer()
    with pretended() if devices else nullcontext(Seen()) as seen:
        return scenario((moved(pair[0], devices) if devices else pair[0], pair[1]), folder, resumed), seen


def check(scenario: Scenario, folder: Path, layout: str, resumed: bool, kind: str = "llama") -> None:
    wanted, _ = run(scenario, folder / "cpu", [], kind=kind)
    found, _ = run(scenario, folder / "gpu", LAYOUTS[layout], resumed=resumed, kind=kind)
    assert found.keys() == wanted.keys()
    apart = {key: different(found[key], wanted[key]) for key in wanted}
    assert not {key: gap for key, gap in apart.items() if not gap < TOLERANCE}


SCENARIOS: dict[str, Scenario] = {
    **{name: edited(name) for name in SEARCHED},
    "FT": fine_tuned,
    "LoRA": lora,
    "UltraEdit": ultraedit,
    "MEND": trained,
    "MEND plain": trained_plainly,
    "statistics": collected,
    "questions": asked,
    "side by side": beside,
}
NOTHING_TO_RESUME = {"FT", "LoRA", "UltraEdit", "questions", "side by side"}
QUICK = {
    ("side by side", "two", False),
    ("MEMIT", "two", True),
    ("ROME", "two", False),
    ("MEND", "two", True),
    ("statistics", "two", True),
}
QUICK_KINDS = {("gptj", "ROME", "two"), ("gpt2", "MEMIT", "two")}
CASES = [
    pytest.param(name, layout, resumed, marks=[] if (name, layout, resumed) in QUICK else pytest.mark.slow)
    for name in SCENARIOS
    for layout in LAYOUTS
    for resumed in (False, True)
    if not (resumed and name in NOTHING_TO_RESUME)
]


@pytest.mark.parametrize(("name", "layout", "resumed"), CASES)
def test_the_numbers_are_the_cpus(name: str, layout: str, resumed: bool, tmp_path: Path) -> None:
    check(SCENARIOS[name], tmp_path, layout, resumed)


@pytest.mark.parametrize(
    ("kind", "name", "layout"),
    [
        pytest.param(kind, name, layout, marks=[] if (kind, name, layout) in QUICK_KINDS else pytest.mark.slow)
        for kind in ("gpt2", "gptj")
        for name in ("ROME", "MEMIT", "MEND")
        for layout in LAYOUTS
    ],
)
def test_the_numbers_are_the_cpus_on_other_architectures(kind: str, name: str, layout: str, tmp_path: Path) -> None:
    """GPT-2 has a table of positions and weights the other way round; GPT-J's MLP stands beside its attention."""
    check(SCENARIOS[name], tmp_path, layout, False, kind)


def searching(pair: Any, folder: Path, passes: int) -> None:
    options: dict[str, Any] = {"mom2_adjustment": False, "early_stop": "mpes", "prob_cutoff": 99, "v_lr": 1e-3}
    editor = BaseEditor(hparams("ROME", pair, folder, v_num_grad_steps=passes, ppl_sentence_num=0, **options))
    editor.compute_each(REQUESTS)


def tuning(pair: Any, folder: Path, passes: int) -> None:
    values = {"alg_name": "FT", "model_name": pair, "device": "cpu", "layers": [1], "lr": 1e-4, "ppl_sentence_num": 0}
    BaseEditor(load_hparams({**values, "num_steps": passes, "batch_size": 2})).compute(REQUESTS)


def test_a_card_computes_losses_in_large_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cross entropy a forward, and one wait: for the losses."""
    calls: list[tuple[str, int]] = []
    plain = torch.nn.functional.cross_entropy

    def counted(logits: Any, *rest: Any, **named: Any) -> Any:
        calls.append((logits.device.type, logits.numel()))
        with monkeypatch.context() as inside:  # the pretended device calls it again
            inside.setattr(torch.nn.functional, "cross_entropy", plain)
            return plain(logits, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    wanted = PerplexityProbe(build("llama"), tokenizer(), SENTENCES[:20]).measure()
    assert max(calls) == ("cpu", NLL_SLICE * 400)  # 400: the vocabulary
    calls.clear()
    forwards: list[int] = []
    with pretended() as seen:
        probe = PerplexityProbe(moved(build("llama"), ["gpu:0"]), tokenizer(), SENTENCES[:20])
        found = probe.measure(lambda done, of: forwards.append(of))
        assert found.nlls == pytest.approx(wanted.nlls, rel=1e-6)
        assert len(calls) == len(forwards) == forwards[-1]
        assert {kind for kind, _ in calls} == {"gpu"}
        waits = sum(count for (_, where), count in seen.syncs.items() if "_forward" not in where)
        assert waits == len(forwards), seen.syncs  # beside transformers', which looks whether a mask has pads
        calls.clear()
        monkeypatch.setattr("easyeditor.evaluate.perplexity.LOGITS_TOGETHER", 100 * 400)
        assert probe.measure().nlls == pytest.approx(wanted.nlls, rel=1e-6)
        assert max(calls) == ("gpu", 100 * 400)
        assert len(calls) > len(forwards)


def adapting(pair: Any, folder: Path, passes: int) -> None:
    values = {"alg_name": "LoRA", "model_name": pair, "device": "cpu", "layers": [1], "lr": 1e-4, "ppl_sentence_num": 0}
    values |= {"target_modules": ["down_proj"], "rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    BaseEditor(load_hparams({**values, "num_steps": passes, "batch_size": 2})).compute(REQUESTS)


def training(pair: Any, folder: Path, passes: int, *, requests: int = 1) -> None:
    """MEND's training in steps that are updates of their own; with one request all but the first are later epochs."""
    values = {"model_name": pair, "device": "cpu", "inner_params": WEIGHTS, "rank": 4, "silent": True}
    values |= {"max_iters": passes, "accumulate_bs": 1, "model_save_pt": 100, "val_interval": 100, "log_interval": 100}
    config = MENDTrainingHparams.from_dict(values)
    EditTrainer(config, (REQUESTS * requests)[:requests], folder=folder / f"run {passes}").run()


def training_anew(pair: Any, folder: Path, passes: int) -> None:
    """A first epoch: every step meets a request whose texts have not been run yet."""
    training(pair, folder, passes, requests=8)


def collecting(pair: Any, folder: Path, passes: int) -> None:
    """Batches of 16 rows of 16 tokens."""
    longest = max(SENTENCES, key=len)
    corpus = Corpus(name="own", identity="1", documents=[longest] * 16 * passes)
    settings = Settings(layers=(0, 1, 3), samples=16 * passes, max_length=16, batch_tokens=256, sums="float64")
    collect(anatomy(pair[0]), pair[1], corpus, settings)


OTHER_VERSIONS = (
    1.03  # torch and transformers make a norm or an update of some operators more in one release than another
)


@pytest.mark.parametrize(
    ("loop", "most", "operators"),
    [
        (searching, 1, 372),
        (tuning, 1, 341),
        (adapting, 1, 355),
        (training, 1, 757),
        (training_anew, 2, 1318),
        (collecting, 1, 223.5),
    ],
)
def test_the_host_waits_for_the_device_so_often_in_a_pass(
    loop: Any, most: int, operators: float, tmp_path: Path
) -> None:
    """Waits and operators in eight passes less those in four (docs/performance.md has the table); for training a pass
    is a step, for statistics a batch, whose one wait is transformers', which looks whether a mask has pads."""
    seen = []
    for passes in (4, 8):
        model = build("llama")
        with pretended() as now:
            loop((moved(model, ["gpu:0"]), tokenizer()), tmp_path, passes)
        seen.append(now)
    more = seen[1].syncs - seen[0].syncs  # of a Counter: only what is more, so that no place makes up for another
    assert more.total() <= 4 * most, more
    assert seen[1].kernels - seen[0].kernels <= 4 * operators * OTHER_VERSIONS


def test_the_rows_of_a_batch_cost_one_wait() -> None:
    """UltraEdit reads keys and gradients of all requests of a batch at once; what it waits for are the losses."""
    values = {"alg_name": "UltraEdit", "device": "cpu", "inner_params": WEIGHTS, "ppl_sentence_num": 0}
    for requests in (REQUESTS[:1], REQUESTS * 3):
        with pretended() as seen:
            pair = moved(build("llama"), LAYOUTS["two"]), tokenizer()
            method: Any = BaseEditor(load_hparams({**values, "model_name": pair})).method
            lines = [line(pair[1], request.prompt, request.target_new) for request in requests]
            with frozen(pair[0]):
                seen.clear()
                method._rows(lines, None)
        assert seen.at("methods/ultraedit") == 1, seen.syncs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_leave_a_batch_leave_it_on_every_card(layout: str) -> None:
    """Prompts of three lengths with one budget of tokens end in three steps."""
    prompts = ["A", "Paris is in", "They say the Bridge is in"]
    decoding = Decoding(tokens=24, count_prompt=True, eos=False, stops=("newline",))
    wanted = generate(build("llama"), tokenizer(), prompts, decoding)
    assert len({made.tokens for made in wanted} - {0}) == 3
    with pretended():
        assert generate(moved(build("llama"), LAYOUTS[layout]), tokenizer(), prompts, decoding) == wanted


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_step_of_continuations_waits_once_for_all_rows(top_k: int) -> None:
    decoding = Decoding(tokens=4, eos=False, top_k=top_k)
    waits = []
    for prompts in (["A", "Paris is"], ["A", "Paris is", "Lyon", "The sea is", "We"]):
        with pretended() as seen:
            model = moved(build("llama"), LAYOUTS["one"])
            seen.clear()
            generate(model, tokenizer(), prompts, decoding)
        waits.append(seen.syncs.total())
    assert waits[0] == waits[1]


REFILLED = {"one": 7713 / 15, "two": 7928 / 15}  # operators a pass, recording included
MEAN = {"consistent_value": True, "if_c_rome": True}


@pytest.mark.parametrize(("changes", "layout"), [({}, "one"), ({}, "two"), (MEAN, "one"), ({"replay": False}, "two")])
def test_a_pass_of_the_search_waits_once_also_where_requests_come_and_go(
    changes: dict[str, Any], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All waits of a search: whoever joins or leaves costs none. Beside them transformers looks whether a mask has
    pads, twice where the contexts' own caches are made (once for as long as weights and hooks stay); without replay in
    every forward."""
    stops_apart(monkeypatch, refilled((build("llama"), tokenizer()), **changes))
    with pretended() as seen:
        rome = refilled((moved(build("llama"), LAYOUTS[layout]), tokenizer()), **changes)
        for norms in (None, [1.0 + 0.3 * n for n in range(8)]):
            seen.clear()
            with rows_run(rome.model) as ran:
                searched(rome, 3 * longest(rome), norms=norms)
            places = " _current" if rome.hparams.replay else (" initial_BD", " __call__")
            looks = [n for (what, at), n in seen.syncs.items() if what == "_local_scalar_dense" and at.endswith(places)]
            assert sum(looks) == 2 or not rome.hparams.replay
            assert sum(seen.syncs.values()) - sum(looks) == len(ran), seen.syncs
            assert len(set(ran)) > 1
            assert changes or norms or seen.kernels <= len(ran) * REFILLED[layout] * OTHER_VERSIONS


def test_the_pretended_device_refuses_what_cuda_refuses() -> None:
    with pretended() as seen:
        near, far = torch.ones(2, device="gpu:0"), torch.ones(2, device="gpu:1")
        with pytest.raises(DeviceMix):
            near + far
        with pytest.raises(DeviceMix):
            near + torch.ones(2)
        assert float((near + far.to("gpu:0")).sum()) == 4.0
        assert sum(seen.syncs.values()) == 1  # the read; a copy between devices is none


class Astray(torch.autograd.Function):
    """Its way back adds what lies on the second device."""

    @staticmethod
    def forward(ctx: Any, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        ctx.far = far
        return near * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient + ctx.far, None


def test_the_way_back_is_checked_as_the_way_there() -> None:
    with pretended():
        near = torch.ones(3, device="gpu:0", requires_grad=True)
        far, index = torch.ones(3, device="gpu:1"), torch.tensor([0, 0]).to("gpu:0")
        ((near.to("gpu:1") * far).cpu().to("gpu:1") + far).sum().backward()
        assert near.grad is not None
        assert near.grad.device == torch.device("gpu:0")
        assert near.grad.tolist() == [1.0] * 3
        near[index].sum().backward()  # CUDA sorts the indices first
        Astray.apply(near, far).sum().backward()
        with pytest.raises(DeviceMix, match="on the way back"):
            near + 1
        for unordered in (near.index_select(0, index), near.gather(0, index)):
            unordered.sum().backward()
            with pytest.raises(Unordered, match="on the way back"):
                near + 1
    with pytest.raises(Unordered), pretended():
        torch.ones(3, device="gpu:0", requires_grad=True).gather(0, index).sum().backward()


def test_a_loaded_edit_is_made_where_its_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's product and the CPU's differ in their last bits, and a run that goes on must have the same weights."""
    model, dense, places = build("llama"), WeightDelta.dense, []
    weight = anatomy(model).rewrite(1).weight
    delta = WeightDelta(name=WEIGHTS[0], left=torch.ones(weight.shape[0], 2), right=torch.ones(2, weight.shape[1]))

    def noted(self: WeightDelta, *on: Any) -> torch.Tensor:
        made = dense(self, *on)
        places.append(str(made.device))
        return made

    monkeypatch.setattr(WeightDelta, "dense", noted)
    with pretended():
        rounding(moved(model, ["gpu:0"]), [delta])
        add(model, [delta])
    assert places == ["gpu:0", "gpu:0"]


def test_training_reaches_blocks_that_accelerate_has_hooked(tmp_path: Path) -> None:
    """`device_map="auto"` gives every block a forward of its own, which a copy of the block would carry along."""
    pair, other = (build("llama"), tokenizer()), (build("llama"), tokenizer())
    attach_execution_device_hook(other[0], "cpu")
    assert "forward" in anatomy(other[0]).rewrite(1).__dict__
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wanted, found = trained(pair, tmp_path / "a", False), trained(other, tmp_path / "b", False)
    assert all(different(found[key], wanted[key]) < TOLERANCE for key in wanted)


def test_processes_of_torchrun_take_a_card_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object gathers and barriers else land on card 0; and a rank may wait long for one that has more to do."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(current=device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **o: told.update(backend=backend, **o))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with pytest.raises(ConfigError, match="2 cards"), process_group(Rank(rank=5, world=8, local=2)):
        pass
    with process_group(Rank(rank=5, world=8, local=1)):
        assert told["current"] == told["device_id"] == torch.device("cuda", 1)
        assert told["backend"] == "cpu:gloo,cuda:nccl"
        assert told["timeout"] >= timedelta(hours=12)


@pytest.mark.parametrize("door", ["folder", "pair"])
def test_weights_left_out_of_memory_are_refused(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cards' memory does not do, accelerate keeps weights elsewhere and says nothing: they are no numbers."""
    model, tok = build("llama"), tokenizer()
    save(model, tok, tmp_path / "model")
    real = AutoModelForCausalLM.from_pretrained
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where |= {f"model.layers.{n}": "disk" if n == 3 else "cpu" for n in range(4)}
    split = {"device_map": where, "offload_folder": str(tmp_path / "off")}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path, **o: real(path, **(o | split)))
    name: Any = str(tmp_path / "model")
    if door == "pair":
        name = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tok)
    with pytest.raises(ModelError, match=r"not in memory \(model\.layers\.3\..*device: cpu"):
        load(name, device="cpu", model_parallel=True)


@contextmanager
def short_of_memory(model: Any, most: int) -> Iterator[list[int]]:
    """Forwards of more than `most` tokens run out of memory inside the block."""
    sizes: list[int] = []

    def refuse(_module: Any, _args: Any, kwargs: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    handle = model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["ROME", "MEMIT", "UltraEdit", "MEND edit", "statistics", "questions"])
def test_out_of_memory_halves_the_batch_and_the_run_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "MEND edit":
        trained((build("llama", dtype=torch.float64), tokenizer()), tmp_path, False)
    asked_in_batches = functools.partial(asked, probes=("fast", "resumed"))  # the plain way's batches are the user's
    scenario = {**SCENARIOS, "MEND edit": mend_edit(tmp_path), "questions": asked_in_batches}[name]
    wanted, _ = run(scenario, tmp_path / "all", [])
    pair = build("llama", dtype=torch.float64), tokenizer()
    (tmp_path / "short").mkdir()
    with short_of_memory(pair[0], 120) as sizes:
        found = scenario(pair, tmp_path / "short", False)
    assert any(size > 120 for size in sizes)
    assert "out of memory" in caplog.text
    assert all(different(found[key], wanted[key]) < TOLERANCE for key in wanted)


def test_a_row_that_does_not_fit_alone_ends_in_one_line() -> None:
    pair = build("llama"), tokenizer()
    with short_of_memory(pair[0], 3), pytest.raises(ConfigError, match="tokens alone do not fit"):
        score(*pair, [("They say that the Bridge is in", "Italy")])


def test_the_estimate_is_the_sum_of_what_takes_memory() -> None:
    """By hand for a tiny model: exact where it is arithmetic (weights, copies, statistics)."""
    model = build("llama")
    made = estimate(model.config, hparams("MEMIT", "x", Path("x"), dtype="bfloat16"))
    assert made.weights == 2 * sum(weight.numel() for weight in model.parameters())
    assert made.edited == 2 * (32 * 48) * (2 + 4)
    assert made.statistics == (2 + 3) * 48 * 48 * 8
    assert made.batch >= 2 * 8192 * 400
    assert made.total == made.weights + made.edited + made.statistics + made.batch
    assert "dtype: bfloat16" in advice(dataclasses.replace(made, weights=10**15))


@pytest.mark.parametrize(
    ("name", "changes", "each"),
    [
        ("ROME", {"mom2_adjustment": False}, 0),
        ("ROME", {}, 1),
        ("FTP-ROME", {"mom2_adjustment": False}, 1),  # first tokens' and later ones' moments in one
        ("FTP-ROME", {}, 2),  # C beside them
        ("MEMIT", {}, 1),
        ("EMMET", {}, 1),
        ("EMMET", {"update_norm_lambda": 2.0}, 2),  # C + gamma I, factored
        ("MEMIT-Seq", {}, 1),  # C, then the inverse with earlier keys
        ("ENCORE", {}, 2),  # C and C + gamma I, then the inverse
        ("AlphaEdit", {}, 2),  # P and the inverse
        ("NAS", {}, 2),
        ("SPHERE", {}, 2),
    ],
)
def test_the_estimate_counts_every_matrix_that_a_sequence_holds(name: str, changes: Numbers, each: int) -> None:
    given = hparams(name, "x", Path("x"), **changes)
    matrices = len(SEARCHED[name]) * each + (3 if each else 0)  # while one is factored there are three more
    assert estimate(build("llama").config, given).statistics == matrices * 48 * 48 * 8


@pytest.mark.parametrize("name", ["MEMIT-Seq", "ENCORE", "AlphaEdit", "EMMET", "FTP-ROME"])
def test_a_sequence_holds_the_matrices_that_are_counted(name: str, tmp_path: Path) -> None:
    """Every tensor (K, K) in float64 that lives on after each edit of a sequence, found by the collector."""
    pair = build("llama"), tokenizer()
    (tmp_path / "own.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    given = hparams(name, pair, tmp_path, **({"update_norm_lambda": 2.0} if name == "EMMET" else {}))
    editor = BaseEditor(given)
    keys = {layer: editor.method.statistics.key(layer) for layer in SEARCHED[name]}  # type: ignore[attr-defined]
    gather(anatomy(pair[0]), pair[1], keys, corpus=str(tmp_path / "own.txt"), sums="float64", max_length=24)
    held = []
    for request in REQUESTS:
        editor.commit(editor.compute(request))
        gc.collect()
        found = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float64)
        held.append(len({x.data_ptr() for x in found if x.shape == (48, 48)}))
    counted = estimate(pair[0].config, given).statistics // (48 * 48 * 8)
    assert max(held) == counted - 3


def test_a_dry_run_says_what_memory_it_would_take(tmp_path: Path) -> None:
    save(build("llama"), tokenizer(), tmp_path / "model")
    given = hparams("ROME", str(tmp_path / "model"), tmp_path)
    said = memory(given)
    assert said["estimate_gib"]["total"] > 0
    assert said["free_gib"] > 0
    for name in ("no-such-model", "/nowhere", "¡"):
        assert memory(given.override([f"model_name={name}"]))["estimate_gib"] is None
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}', encoding="utf-8")
    assert memory(given)["estimate_gib"] is None


MANY = [
    EditRequest.make(f"{place} is in", subject=place, target_new="Italy", rephrase_prompts=[f"We know {place} is in"])
    for place in ("Paris", "Lyon", "Oslo", "Bergen", "Madrid", "Porto", "Lisbon", "Vienna", "Berlin", "Prague")
]


def everything(editor: BaseEditor) -> None:
    """An edit of each request and one of all; scores and perplexity, alone and side by side."""
    made = editor.compute_each(MANY)
    if editor.method.joint:
        editor.compute(MANY)
    before = editor.measure(MANY, [None] * len(MANY))
    editor.perplexity()
    assert None not in editor.measure_many([(r, made[n], None, before.only([n])) for n, r in enumerate(MANY)])


@pytest.mark.parametrize("name", ["ROME", "ROME with targets_dir", "UltraEdit"])
def test_what_did_not_fit_once_is_not_tried_again(name: str, tmp_path: Path) -> None:
    """The smaller batch stays: for later edits, their keys and their measurements, also with the method's remedy."""
    pair = build("llama"), tokenizer()
    saved = {"targets_dir": str(tmp_path / "targets")} if "targets_dir" in name else {}
    values = {"alg_name": name, "model_name": pair, "device": "cpu", "inner_params": WEIGHTS, "lr": 1e-3}
    given = load_hparams(values) if name == "UltraEdit" else None
    editor: Any = BaseEditor(given or hparams("ROME", pair, tmp_path, mom2_adjustment=False, **saved))
    with short_of_memory(pair[0], 200) as sizes:
        everything(editor)
    assert max(sizes) > 200
    for again in (editor, editor.remedied() or editor):
        with short_of_memory(pair[0], 200) as sizes:
            everything(again)
        assert max(sizes) <= 200


def test_out_of_memory_beside_others_halves_the_batch_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and perplexity of many edited models whose rows share forwards."""
    pair = build("llama", dtype=torch.float64), tokenizer()
    editor = BaseEditor(hparams("ROME", pair, tmp_path, mom2_adjustment=False))
    made, before = editor.compute_each(MANY), editor.measure(MANY, [None] * len(MANY))
    edits = [(r, made[n], None, before.only([n])) for n, r in enumerate(MANY)]
    editor.perplexity()
    gave_way: list[set[str]] = []
    real = Budget._give_way

    def give_way(*args: Any) -> None:
        gave_way.append({frame.name for frame in traceback.extract_stack()} & {"score", "measure_each"})
        real(*args)

    monkeypatch.setattr(Budget, "_give_way", give_way)
    wanted = editor.measure_many(edits)
    assert not gave_way
    with short_of_memory(pair[0], 200):
        found = editor.measure_many(edits)
    assert gave_way[0] == {"score"}
    assert gave_way[-1] == {"measure_each"}
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        assert ours.ppl is not None
        assert theirs is not None
        assert theirs.ppl is not None
        assert different(ours.ppl.nlls, theirs.ppl.nlls) < TOLERANCE
        own, others = ([x.mean_log_probability for x in s.evaluation.answers.scored.values()] for s in (ours, theirs))
        assert different(own, others) < TOLERANCE


@pytest.mark.parametrize(("given", "tokens"), [(None, 250), (300, 300)])
def test_perplexity_on_a_card_takes_what_its_memory_holds(
    given: int | None, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what is free over the bytes of a token (width 32, keys 48, 400 words), or what is given."""
    pair = build("llama"), tokenizer()
    wanted = PerplexityProbe(*pair, SENTENCES[:6]).measure()
    monkeypatch.setattr(
        "easyeditor.lm.budget.free_bytes", lambda parts: 2 * 250 * (4 * (8 * 32 + 4 * 48) + (4 + 4) * 400)
    )
    with pretended():
        editor = BaseEditor(hparams("ROME", (moved(pair[0], ["gpu:0"]), pair[1]), tmp_path, batch_tokens=given))
        editor.sentences = dataclasses.replace(editor.sentences, texts=SENTENCES[:6])  # type: ignore[type-var]
        with short_of_memory(pair[0], 10**9) as sizes:
            found = editor.perplexity()
    assert found is not None
    assert found.nlls == pytest.approx(wanted.nlls, rel=1e-6)
    assert len(sizes) > 1
    assert max(sizes) <= tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rank", "cut"), [(1, None), (0, 1), (0, 2)], ids=["no documents", "resumed", "nothing left"])
def test_ranks_add_their_sums_where_the_keys_come_from(
    rank: int, cut: int | None, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under NCCL a sum on the CPU, of a rank without documents or out of a checkpoint, would end all of them."""
    places: list[str] = []

    def all_reduce(tensor: Any) -> None:
        places.append(str(tensor.device))
        tensor.add_(torch.ones_like(tensor))

    group = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: 2)
    group.all_reduce = all_reduce
    monkeypatch.setattr("easyeditor.stats.collect.dist", group)
    corpus = Corpus(name="own", identity="1", documents=[SENTENCES[0]] * (1 if rank else 2 * 128))
    settings = Settings(layers=(0, 1, 3), samples=1 if rank else 256, max_length=8, batch_tokens=256, sums="float64")
    given: dict[str, Any] = {"checkpoint": tmp_path / "part.safetensors", "pace": Pace(every=1)}

    def stop(done: int, *_: int) -> None:
        if done == 64 * cut:  # type: ignore[operator]
            raise Cut

    with pretended():
        pair = moved(build("llama", dtype=torch.float64), LAYOUTS[layout]), tokenizer()
        if cut is not None:
            with pytest.raises(Cut):
                collect(anatomy(pair[0]), pair[1], corpus, settings, tick=stop, **given)
        totals = collect(anatomy(pair[0]), pair[1], corpus, settings, resume=cut is not None, **given)
    last = LAYOUTS[layout][-1]
    assert places == ["gpu:0", "gpu:0", last, "gpu:0"]  # three layers, and the counts
    assert totals.documents == 1 + (0 if rank else 128)
