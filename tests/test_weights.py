"""An edit is a value: computing it leaves the model alone, applying it is undone bit-exactly, its files are checked."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy
import pytest
import torch
from conftest import ARCHITECTURES, build, relative, rome_hparams, tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from easyeditor import BaseEditor, EditRequest, EditResult, FTHyperParams, WeightDelta
from easyeditor.base.errors import ConfigError, DataError, NumericalError, OutputError
from easyeditor.base.files import plain
from easyeditor.lm import weights
from easyeditor.lm.discover import anatomy
from easyeditor.lm.ledger import Ledger
from easyeditor.methods.ft.method import FT
from easyeditor.methods.rome.method import ROME

BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy", locality=None)
BRIDGE = EditRequest.make(
    "They say that the Bridge is in",
    subject="Bridge",
    target_new="Rome",
    ground_truth="London",
    rephrase_prompts=["Where is the Bridge? In"],
    locality={"near": {"prompt": ["The sea is", "I am"], "ground_truth": ["blue", "here"]}},
    case_id="b-1",
)
SHORT = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"]}
SAMPLED = {"context_templates": None, "context_template_length_params": [[3, 5], [4, 5]], "v_num_grad_steps": 2}


def editor_of(model: Any, *, bos: bool = False, **changes: Any) -> BaseEditor:
    return BaseEditor(rome_hparams((model, tokenizer(bos)), **{**SHORT, **changes}))


def method_of(model: Any, **changes: Any) -> ROME:
    pair = (model, tokenizer())
    return ROME(*pair, rome_hparams(pair, **{**SHORT, **changes}))


def tuning(model: Any, **changes: Any) -> FTHyperParams:
    """FT on a tiny model: two layers, two epochs of two batches."""
    values = {"model_name": (model, tokenizer()), "device": "cpu", "layers": [1, 2], "num_steps": 2, "lr": 1e-2}
    return FTHyperParams.from_dict({**values, "ppl_sentence_num": 0, **changes})


def bits(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer to the last bit, as digests."""
    named = [*model.named_parameters(), *model.named_buffers()]
    flat = {name: t.detach().reshape(-1).contiguous().view(torch.uint8) for name, t in named}
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in flat.items()}


def picture(model: nn.Module) -> list[Any]:
    """Everything an edit must leave as it was."""
    modules = dict(model.named_modules())
    return [
        bits(model),
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in modules.items()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        {name: m.__dict__["forward"] for name, m in modules.items() if "forward" in m.__dict__},
    ]


def worn(kind: str) -> Any:
    """A model whose flags and modes are not all alike, with a hook of its owner's."""
    model = build(kind)
    parts = anatomy(model)
    parts.block(0).train()
    parts.rewrite(1).weight.requires_grad_(False)
    parts.block(3).register_forward_hook(lambda *_: None)
    return model


def noise(model: Any, layer: int, scale: float = 1.0) -> WeightDelta:
    parts = anatomy(model)
    shape = parts.rewrite(layer).weight.shape
    return WeightDelta(
        name=parts.weight_name(layer), full=scale * torch.randn(shape, generator=torch.Generator().manual_seed(layer))
    )


# The model is left as it was


class Stop(Exception):
    """Raised by a test in the middle of something."""


STOPS = [Stop, KeyboardInterrupt]


class Fuse:
    """A hook that counts its calls and stops inside call number `last` (0: never)."""

    def __init__(self) -> None:
        self.calls = self.last = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.last:
            raise STOPS[self.last % 2]


@pytest.mark.parametrize("if_c_rome", [False, True], ids=["rome", "c-rome"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_computing_and_applying_leaves_the_model_as_it_was(kind: str, if_c_rome: bool) -> None:
    model = worn(kind)
    editor, before = editor_of(model, if_c_rome=if_c_rome), picture(model)
    result = editor.compute([BRIDGE, BAY][if_c_rome:])
    assert picture(model) == before
    for stop in (None, *STOPS):
        with suppress(*STOPS), editor.applied(result) as edited:
            assert edited is model
            changed = {name for name, value in bits(model).items() if value != before[0][name]}
            assert changed == {anatomy(model).weight_name(1)}
            if stop is not None:
                raise stop
        assert picture(model) == before


PATHS = [(kind, True) for kind in ARCHITECTURES] + [("gpt2", False), ("llama", False)]


@pytest.mark.parametrize(("kind", "replay"), PATHS, ids=lambda v: {True: "replay", False: "plain"}.get(v, v))
def test_an_interrupted_edit_leaves_the_model_as_it_was(kind: str, replay: bool) -> None:
    """Stopped inside a forward of the second edit, which runs with the first applied: in the search and at the keys."""
    model = worn(kind)
    method = method_of(model, replay=replay)
    fuse = Fuse()
    anatomy(model).block(0).register_forward_pre_hook(fuse)
    before = picture(model)
    method.edit([BAY, BRIDGE])
    total = fuse.calls
    for last in (total - 1, total):
        fuse.calls, fuse.last = 0, last
        with pytest.raises((Stop, KeyboardInterrupt)):
            method.edit([BAY, BRIDGE])
        assert fuse.calls == last
        assert picture(model) == before


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fine_tuning_leaves_the_model_as_it_was(kind: str) -> None:
    """And so does applying its deltas, which gpt2's biases are among; a commit is reverted bit-exactly."""
    model = worn(kind)
    editor, before = BaseEditor(tuning(model)), picture(model)
    result = editor.compute([BRIDGE, BAY])
    assert picture(model) == before
    for stop in (None, *STOPS):
        with suppress(*STOPS), editor.applied(result):
            changed = {name for name, value in bits(model).items() if value != before[0][name]}
            assert changed == set(editor.method.weight_names)
            if stop is not None:
                raise stop
        assert picture(model) == before
    editor.commit(result)
    assert bits(model) != before[0]
    editor.revert(result)
    assert picture(model) == before


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_interrupted_fine_tuning_leaves_the_model_as_it_was(kind: str, replay: bool) -> None:
    """Stopped inside each forward, where the trained copies stand in the weights' place, and between the epochs."""
    model = worn(kind)
    method = FT(model, tokenizer(), tuning(model, replay=replay))
    fuse = Fuse()
    anatomy(model).block(2).register_forward_hook(fuse)
    before = picture(model)
    method.edit([BAY, BRIDGE])
    total = fuse.calls
    assert total >= 4
    for last in range(1, total + 1):
        fuse.calls, fuse.last = 0, last
        with pytest.raises((Stop, KeyboardInterrupt)):
            method.edit([BAY, BRIDGE])
        assert fuse.calls == last
        assert picture(model) == before
    fuse.last = 0
    for stop in STOPS:

        def progress(done: int, of: int, note: str, stop: type[BaseException] = stop) -> None:
            raise stop

        with pytest.raises(stop):
            method.edit([BAY, BRIDGE], progress)
        assert picture(model) == before


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("step", [1, 2])
def test_stopping_at_a_step_of_the_search_leaves_the_model_as_it_was(step: int, stop: type[BaseException]) -> None:
    model = worn("llama")
    before, steps = picture(model), []

    def progress(done: int, of: int, note: str) -> None:
        steps.append((done, of))
        if len(steps) == 2 + step:  # in the second request
            raise stop

    with pytest.raises(stop):
        method_of(model).edit([BAY, BRIDGE], progress)
    assert steps[-1] == (step, 2)
    assert picture(model) == before


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_sampling_of_contexts_leaves_the_model_as_it_was(stop: type[BaseException]) -> None:
    model = worn("gpt2")
    calls = []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise stop

    anatomy(model).block(2).register_forward_pre_hook(count)
    before = picture(model)
    with pytest.raises(stop):
        _ = method_of(model, **SAMPLED).contexts
    assert picture(model) == before


# Commit and revert


@pytest.fixture
def pair_of_edits() -> tuple[BaseEditor, EditResult, EditResult]:
    editor = editor_of(build("llama"), layers=[1, 2])
    return editor, editor.compute(BAY), editor.compute(BRIDGE)


def test_revert_is_bit_exact_and_happens_once(pair_of_edits: tuple[BaseEditor, EditResult, EditResult]) -> None:
    editor, first, second = pair_of_edits
    before = bits(editor.model)
    editor.commit(first)
    assert bits(editor.model) != before
    editor.revert(first)
    assert bits(editor.model) == before
    for result in (first, second):
        with pytest.raises(DataError, match="not committed"):
            editor.revert(result)
    assert bits(editor.model) == before


def test_reverting_one_of_two_equals_the_other_alone(pair_of_edits: tuple[BaseEditor, EditResult, EditResult]) -> None:
    editor, first, second = pair_of_edits
    before = bits(editor.model)
    with editor.applied(first):
        first_alone = bits(editor.model)
    with editor.applied(second):
        second_alone = bits(editor.model)
    editor.commit(first)
    editor.commit(second)
    both = bits(editor.model)
    assert both not in (first_alone, second_alone)
    editor.revert(first)
    assert bits(editor.model) == second_alone
    editor.commit(first)
    editor.revert(second)
    assert bits(editor.model) == first_alone
    editor.revert_all()
    assert bits(editor.model) == before
    with pytest.raises(DataError, match="not committed"):
        editor.revert(first)


def test_an_edit_committed_twice_is_taken_back_twice() -> None:
    model = build("llama")
    ledger, before = Ledger(model), bits(model)
    ledger.commit([noise(model, 1)])
    once = bits(model)
    ledger.commit([noise(model, 1)])
    assert ledger.revert([noise(model, 1)])
    assert bits(model) == once
    assert ledger.revert([noise(model, 1)])
    assert bits(model) == before
    assert not ledger.revert([noise(model, 1)])


def test_a_loaded_edit_reverts_the_committed_one(
    tmp_path: Path, pair_of_edits: tuple[BaseEditor, EditResult, EditResult]
) -> None:
    editor, first, second = pair_of_edits
    before = bits(editor.model)
    editor.commit(first)
    with pytest.raises(DataError, match="not committed"):
        editor.revert(second)
    editor.revert(EditResult.load(first.save(tmp_path / "edit")))
    assert bits(editor.model) == before


def test_a_revert_that_cannot_be_done_changes_nothing() -> None:
    """Float16: the second edit alone leaves the range, which the first kept it in."""
    model = build("llama", dtype=torch.float16)
    ledger, parts = Ledger(model), anatomy(model)
    shape = parts.rewrite(1).weight.shape
    down, up = (WeightDelta(name=parts.weight_name(1), full=torch.full(shape, v)) for v in (-60000.0, 70000.0))
    ledger.commit([down])
    ledger.commit([up])
    both = bits(model)
    with pytest.raises(NumericalError):
        ledger.revert([down])
    assert bits(model) == both
    assert len(ledger) == 2


# Deltas


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_deltas_have_the_orientation_of_their_weight(kind: str) -> None:
    """Outputs first for Linear, inputs first for Conv1D; the edited module answers the key with the value."""
    model = build(kind)
    module = anatomy(model).rewrite(1)
    result = method_of(model).edit([BAY])
    (delta,), vectors = result.deltas, result.trace[1].vectors
    assert delta.dense().shape == module.weight.shape
    assert torch.linalg.matrix_rank(delta.dense()) == 1
    with torch.no_grad(), weights.applied(model, [delta]):
        assert relative(module(vectors["key"]), vectors["target"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype=dtype)
    editor, name = editor_of(model), anatomy(model).weight_name(1)
    before = model.get_parameter(name).detach().clone()
    result = editor.compute(BAY)
    factors = list(result.deltas[0].tensors().values())
    assert {t.dtype for t in factors} == {torch.promote_types(dtype, torch.float32)}
    with editor.applied(result):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model.get_parameter(name), (before + result.deltas[0].dense()).to(dtype))
        assert not torch.equal(model.get_parameter(name), before)
    wide = editor_of(build(kind, dtype=dtype).to(torch.float32)).compute(BAY)
    assert relative(result.deltas[0].dense(), wide.deltas[0].dense()) < (1e-5 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["low-rank", "full", "trained"])
def test_a_delta_survives_its_file(kind: str, form: str, tmp_path: Path) -> None:
    """`trained`: fine-tuning's, for gpt2 a bias, which has one dimension."""
    model = build(kind)
    if form == "trained":
        delta = FT(model, tokenizer(), tuning(model)).edit([BAY]).deltas[-1]
        assert delta.dense().ndim == (1 if kind == "gpt2" else 2)
    else:
        delta = noise(model, 1) if form == "full" else method_of(model).edit([BAY]).deltas[0]
    delta.save(tmp_path / "delta.safetensors")
    loaded = WeightDelta.load(tmp_path / "delta.safetensors")
    assert loaded.name == delta.name
    assert loaded.tensors().keys() == delta.tensors().keys()
    assert all(torch.equal(value, loaded.tensors()[key]) for key, value in delta.tensors().items())
    assert [path.name for path in tmp_path.iterdir()] == ["delta.safetensors"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_edit_survives_its_files(kind: str, tmp_path: Path) -> None:
    editor = editor_of(build(kind), layers=[1, 2])
    result = editor.compute([BAY, BRIDGE])
    loaded = EditResult.load(result.save(tmp_path / "edit"))
    assert loaded.requests == result.requests == (BAY, BRIDGE)
    assert loaded.trace_json() == result.trace_json()
    assert [trace.keys() for trace in loaded.traces] == [{1, 2}, {1, 2}]
    for name in ("method", "contexts", "seconds", "model_fingerprint"):
        assert getattr(loaded, name) == getattr(result, name)
    assert loaded.hparams == plain(result.hparams)
    with editor.applied(result):
        edited = bits(editor.model)
    with editor.applied(loaded):
        assert bits(editor.model) == edited


# Damaged and foreign files


def rewrite_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    (folder / "edit.json").write_text(json.dumps(change(raw) or raw), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no json": lambda f: (f / "edit.json").unlink(),
    "no tensors": lambda f: (f / "edit.safetensors").unlink(),
    "cut json": lambda f: cut(f / "edit.json"),
    "cut tensors": lambda f: cut(f / "edit.safetensors"),
    "empty json": lambda f: (f / "edit.json").write_bytes(b""),
    "empty tensors": lambda f: (f / "edit.safetensors").write_bytes(b""),
    "binary json": lambda f: (f / "edit.json").write_bytes(b"\x89\xff\x00"),
    "garbage tensors": lambda f: (f / "edit.safetensors").write_bytes(b"\xff" * 64),
    "folder for json": lambda f: ((f / "edit.json").unlink(), (f / "edit.json").mkdir()),
    "folder for tensors": lambda f: ((f / "edit.safetensors").unlink(), (f / "edit.safetensors").mkdir()),
    "json list": lambda f: rewrite_json(f, lambda raw: [raw]),
    "other format": lambda f: rewrite_json(f, lambda raw: raw.update(format=99)),
    "no requests": lambda f: rewrite_json(f, lambda raw: raw.pop("requests") and None),
    "null deltas": lambda f: rewrite_json(f, lambda raw: raw.update(deltas=None)),
    "one more delta": lambda f: rewrite_json(f, lambda raw: raw["deltas"].append(raw["deltas"][0])),
    "unknown factor": lambda f: rewrite_json(f, lambda raw: raw["deltas"][0].update(tensors=["up"])),
    "half a delta": lambda f: rewrite_json(f, lambda raw: raw["deltas"][0].update(tensors=["left"])),
    "layer no number": lambda f: rewrite_json(f, lambda raw: raw.update(trace=[{"one": raw["trace"][0]["1"]}])),
    "trace key": lambda f: rewrite_json(f, lambda raw: raw["trace"][0]["1"].pop("denominator") and None),
    "locality": lambda f: rewrite_json(f, lambda raw: raw["requests"][0].update(locality={"near": 1})),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return editor_of(build("llama")).compute(BAY).save(tmp_path_factory.mktemp("saved") / "edit")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_edit_is_refused_in_one_line(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edit"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    EditResult.load(folder)
    DAMAGES[damage](folder)
    with pytest.raises(DataError) as caught:
        EditResult.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(cut, id="cut"),
        pytest.param(lambda path: path.write_bytes(b"\xff" * 64), id="garbage"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="folder"),
        pytest.param(lambda path: save_file({"left": torch.ones(2, 1)}, path, {"name": "w"}), id="half"),
        pytest.param(lambda path: save_file({"full": torch.ones(2, 2)}, path), id="unnamed"),
    ],
)
def test_a_damaged_delta_is_refused_in_one_line(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    WeightDelta(name="w", full=torch.ones(20, 20)).save(path)
    damage(path)
    with pytest.raises(DataError) as caught:
        WeightDelta.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


NAME = "model.layers.1.mlp.down_proj.weight"  # (32, 48)
FOREIGN = {
    "shape": WeightDelta(name=NAME, full=torch.ones(3, 3)),
    "flat": WeightDelta(name=NAME, full=torch.ones(32 * 48)),
    "transposed": WeightDelta(name=NAME, left=torch.ones(48, 1), right=torch.ones(1, 32)),
    "ranks": WeightDelta(name=NAME, left=torch.ones(32, 2), right=torch.ones(1, 48)),
    "flat factor": WeightDelta(name=NAME, left=torch.ones(32), right=torch.ones(1, 48)),
    "no such parameter": WeightDelta(name=NAME.replace("weight", "bias"), full=torch.ones(32, 48)),
    "no such module": WeightDelta(name="transformer.h.1.mlp.c_proj.weight", full=torch.ones(32, 48)),
    "module": WeightDelta(name="model.layers.1.mlp", full=torch.ones(32, 48)),
    "no name": WeightDelta(name="", full=torch.ones(32, 48)),
}


@pytest.mark.parametrize("bad", FOREIGN.values(), ids=FOREIGN)
def test_an_edit_of_another_model_is_refused_and_nothing_changes(bad: WeightDelta) -> None:
    model = build("llama")
    editor, good = editor_of(model), noise(model, 1)
    before = picture(model)
    result = EditResult(method="ROME", requests=(BAY,), deltas=(good, bad), traces=({},))
    with pytest.raises(DataError), editor.applied(result):
        pytest.fail("applied")
    assert picture(model) == before
    with pytest.raises(DataError):
        editor.commit(result)
    assert picture(model) == before
    with pytest.raises(DataError, match="not committed"):
        editor.revert(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "overflow"])
def test_a_non_finite_delta_is_refused_and_nothing_changes(value: float) -> None:
    """1e30 is finite, the product of two is not."""
    model = build("llama")
    editor, good = editor_of(model), noise(model, 1)
    bad = WeightDelta(name=good.name, left=torch.full((32, 1), value), right=torch.full((1, 48), value))
    before = picture(model)
    result = EditResult(method="ROME", requests=(BAY,), deltas=(good, bad), traces=({},))
    with pytest.raises(NumericalError, match="not finite"), editor.applied(result):
        pytest.fail("applied")
    assert picture(model) == before
    with pytest.raises(NumericalError, match="not finite"):
        editor.commit(result)
    assert picture(model) == before


def test_a_model_that_gives_no_numbers_cannot_be_edited() -> None:
    model = build("llama")
    with torch.no_grad():
        anatomy(model).mlp(3).up_proj.weight.fill_(float("inf"))
    editor, before = editor_of(model), picture(model)
    with pytest.raises(NumericalError, match="not finite"):
        editor.edit("Bay is in", "Italy", subject="Bay", verbose=False)
    assert picture(model) == before


# Seeds


def global_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state())]


@pytest.mark.parametrize("bos", [False, True], ids=["plain-start", "bos"])
def test_the_seed_decides_the_contexts_and_the_edit(bos: bool) -> None:
    """Whatever the global generators hold, which stay as they are."""
    model, found = build("llama"), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = global_state()
        found.append(editor_of(model, bos=bos, seed=seed, **SAMPLED).compute(BAY))
        assert global_state() == before
    one, again, other = found
    assert one.contexts == again.contexts
    assert torch.equal(one.deltas[0].dense(), again.deltas[0].dense())
    assert one.contexts != other.contexts
    assert not torch.equal(one.deltas[0].dense(), other.deltas[0].dense())
    for result in found:
        assert len(result.contexts) == 11
        assert result.contexts[0] == "{}"
        assert [text for text in result.contexts if text.count("{}") != 1 or text.count("{") != 1] == []
        assert not any("<s>" in text or "</s>" in text for text in result.contexts)


def test_contexts_are_sampled_once() -> None:
    method = method_of(build("llama"), **SAMPLED)
    assert method.edit([BAY]).contexts == method.edit([BRIDGE]).contexts == method.contexts


# accelerate


@pytest.mark.parametrize("hooks", [False, True], ids=["auto", "hooked"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_dispatched_model_gets_the_same_edit(kind: str, hooks: bool, tmp_path: Path) -> None:
    """`hooked`: accelerate replaces the forward of every module, as it does over several devices."""
    model = build(kind)
    wanted = method_of(model).edit([BAY]).deltas[0].dense()
    model.save_pretrained(tmp_path)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    if hooks:
        spread = accelerate.dispatch_model(spread, {"": "cpu"}, main_device="cpu", force_hooks=True)
        assert any("forward" in module.__dict__ for module in spread.modules())
    before = picture(spread)
    for replay in (True, False):
        assert relative(method_of(spread, replay=replay).edit([BAY]).deltas[0].dense(), wanted) < 1e-4
        assert picture(spread) == before


# Memory of a long sequence


def test_a_ledger_holds_bounded_memory_and_takes_back_what_lies_in_files(tmp_path: Path) -> None:
    model, plain = build("llama"), build("llama")
    size = noise(model, 1).dense().numel() * 4
    ledger, before, names = Ledger(model, held_bytes=3 * size), bits(model), [1, 2, 3, 1, 2, 3, 1, 2]
    edits = [noise(model, layer, scale) for scale, layer in enumerate(names, 1)]
    for number, edit in enumerate(edits):
        saved = (
            EditResult(method="x", requests=(BAY,), deltas=(edit,), traces=({},)).save(tmp_path / "saved")
            if number == 4
            else None
        )
        ledger.commit([edit], saved)
        assert ledger._shelf.held_bytes <= 3 * size
    files = Path(ledger._shelf._folder.name)
    assert len(list(files.iterdir())) == len(edits) - 3 - 1
    ledger.commit([replace(edits[0]), noise(model, 2)] * 3)  # larger than what may be held
    assert ledger._shelf.held_bytes <= 3 * size
    assert ledger.revert([replace(edits[0]), noise(model, 2)] * 3)
    for gone in (4, 0, 6):  # in the saved edit, in a file, in memory
        assert ledger.revert([replace(edits[gone])])
        assert not ledger.revert([noise(model, 1, 0.5)])
    for n in (1, 2, 3, 5, 7):
        weights.add(plain, [edits[n]])
    assert bits(model) == bits(plain)
    ledger.revert_all()
    assert bits(model) == before
    assert not files.exists()
    ledger.commit([edits[0]])
    assert len(ledger) == 1


def test_a_change_is_the_same_to_the_last_bit_however_its_factors_lie() -> None:
    model = build("llama")
    (rows, columns), draw = anatomy(model).rewrite(1).weight.shape, torch.Generator().manual_seed(3)
    left, right = torch.randn(7, rows, generator=draw).T, torch.randn(7, 2 * columns, generator=draw)[:, ::2]
    delta = WeightDelta(name=anatomy(model).weight_name(1), left=left, right=right)
    loaded = replace(delta, left=left.contiguous(), right=right.contiguous())
    assert torch.equal(delta.dense(), loaded.left @ loaded.right)
    ledger = Ledger(model, held_bytes=0)
    ledger.commit([delta])
    (found,) = ledger._shelf[0]
    assert torch.equal(found.dense(), delta.dense())
    assert ledger.revert([loaded])


def test_a_full_disk_leaves_the_model_and_the_ledger_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    ledger = Ledger(model, held_bytes=0)
    ledger.commit([noise(model, 1)])
    once = bits(model)

    def full(*_: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setattr("easyeditor.lm.ledger.write_tensors", full)
    with pytest.raises(OutputError):
        ledger.commit([noise(model, 2)])
    assert bits(model) == once
    assert len(ledger) == 1
    assert ledger.revert([noise(model, 1)])


# Rounding


@pytest.mark.parametrize(("dtype", "lossy"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_what_rounding_takes_of_an_edit_is_recorded_and_warned_of(
    dtype: torch.dtype, lossy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates of 1e-3 of weights around 0.15: half a unit in the last place of bfloat16 (2^-9) swallows many."""
    model = build("llama", dtype=dtype)
    editor = BaseEditor(tuning(model, layers=[1], num_steps=1, lr=1e-3, objective_optimization="target_new"))
    result = editor.compute(BAY)
    (record,) = editor.examine_together([BAY], result=result).records
    ((name, found),) = record.rounding.items()
    before = model.get_parameter(name).detach().double().clone()
    intended = result.deltas[0].dense().double()
    with editor.applied(result):
        written = model.get_parameter(name).detach().double() - before
    assert found["intended"] == pytest.approx(float(intended.norm()))
    assert found["written"] == pytest.approx(float(written.norm()))
    assert found["lost"] == pytest.approx(float((written - intended).norm() / intended.norm()))
    assert (found["lost"] > 0.05) == lossy
    warned = [r.getMessage() for r in caplog.records if "lost in rounding" in r.getMessage()]
    assert len(warned) == lossy
    assert not warned or (name in warned[0] and "bfloat16" in warned[0])


# One owner


def moved(model: nn.Module, size: float) -> EditResult:
    """An edit of one weight, all values alike."""
    name = "model.layers.1.mlp.down_proj.weight"
    delta = WeightDelta(name=name, full=torch.full_like(model.get_parameter(name), size))
    return EditResult(deltas=(delta,), requests=(BAY,), traces=({},), contexts=(), seconds=0.0, method="FT")


def test_a_change_while_another_is_open_is_refused_and_nothing_is_lost() -> None:
    model = build("llama")
    first, second = editor_of(model), editor_of(model)
    start, one, two = weights.fingerprint(model), moved(model, 1.0), moved(model, 2.0)
    first.commit(one)
    kept = weights.fingerprint(model)
    for change in (
        lambda: first.commit(two),
        lambda: first.revert(one),
        first.revert_all,
        lambda: second.commit(two),
    ):
        for block in (second.applied(two), first.applied(two), first.original()):
            with block, pytest.raises(ConfigError, match="leave its block before"):
                change()
            assert weights.fingerprint(model) == kept
    with first.applied(two), second.applied(one), first.original():
        assert weights.fingerprint(model) == start
    assert weights.fingerprint(model) == kept

    second.commit(two)
    both = weights.fingerprint(model)
    for change in (lambda: first.revert(one), first.revert_all, lambda: first.commit(two), first.original().__enter__):
        with pytest.raises(ConfigError, match="another editor committed edits to this model later"):
            change()
        assert weights.fingerprint(model) == both
    second.revert(two)
    assert weights.fingerprint(model) == kept
    first.commit(two)
    first.revert_all()
    assert weights.fingerprint(model) == start


def test_blocks_left_in_another_order_or_of_two_threads_leave_the_model_as_it_was() -> None:
    model = build("llama")
    editor = editor_of(model)
    start, one, two = weights.fingerprint(model), moved(model, 1.0), moved(model, 2.0)
    outer, inner = editor.applied(one), editor.applied(two)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ConfigError, match="left before one that was begun inside it"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert weights.fingerprint(model) == start

    def other() -> None:
        for change in (editor.applied(two).__enter__, lambda: editor.commit(two)):
            with pytest.raises(ConfigError, match="another thread"):
                change()

    with editor.applied(one), ThreadPoolExecutor(1) as pool:
        pool.submit(other).result()
    assert weights.fingerprint(model) == start
    with editor.applied(one), editor_of(build("llama")).applied(two):
        pass  # another model
