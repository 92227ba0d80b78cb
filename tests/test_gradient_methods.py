"""FT-M, LocFT-BF, UltraEdit, LoRA: their authors' numbers, their parts by hand, what they refuse."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from conftest import build, relative, same, states, tokenizer
from golden_numbers import MODELS, fold, pair, request
from test_newer_golden import golden

from easyeditor import BaseEditor, EditRequest, load_hparams
from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.lm.adapters import AdapterSettings, adapted
from easyeditor.lm.prompting import Prompting
from easyeditor.lm.scored import line
from easyeditor.lm.weights import applied, called_with, frozen, trainable
from easyeditor.methods.fine_tuning import Batch, Training, fine_tune, training_row
from easyeditor.methods.ft.method import FT
from easyeditor.methods.ultraedit.method import UltraEdit
from easyeditor.methods.ultraedit.step import deviation, merged, solved, statistics
from easyeditor.values.edit import WeightDelta

LOCFT = 1e-3
"""Relative, for LocFT's change: Adam divides gradients by their size, so that one rounding moves it by 7e-5 in the
authors' own code (README of the golden numbers), and another processor by more."""
ROME = EditRequest.make("They say that the Bridge is in", subject="Bridge", target_new="the old town of Rome")
SEA = EditRequest.make("The sea", subject="sea", target_new="is blue", case_id=1)
BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy", case_id=2)


def made(alg_name: str, model: Any = None, **values: Any) -> BaseEditor:
    """An editor with a method on a loaded pair (a tiny Llama unless another is given)."""
    loaded = model or (build("llama"), tokenizer())
    common = {"alg_name": alg_name, "model_name": loaded, "device": "cpu", "ppl_sentence_num": 0}
    return BaseEditor.from_hparams(load_hparams({**common, **values}))


# LocFT-BF


def locft(model: str, run: str, **changes: Any) -> BaseEditor:
    return made("LocFT-BF", pair(model), **golden(model, "locft")[0]["runs"][run]["hparams"], **changes)


@pytest.mark.parametrize("run", ["batch3", "batch6"])
def test_locft_gives_its_authors_change(run: str) -> None:
    """A Llama's positions are relative, so padding on the left without positions changes nothing: the plain door."""
    meta, wanted = golden("tiny-llama", "locft")
    result = locft("tiny-llama", run).compute([request(n) for n in range(6)])
    assert relative(fold(result.deltas[0].dense()), wanted[f"f32/{run}/delta_W"]) < LOCFT
    size = meta["runs"][run]["hparams"]["batch_size"]
    losses = [
        sum(result.traces[n][2].losses[epoch][0] for n in order[i : i + size]) / size
        for epoch, order in enumerate(meta["runs"][run]["orders"])
        for i in range(0, 6, size)
    ]
    assert losses == pytest.approx(meta["runs"][run]["batch_losses"], rel=LOCFT)


class LeftPadded:
    """The authors' inputs: rows padded on the left, and positions that count the pads."""

    def __init__(self, model: Any, rows: Any, pad: int) -> None:
        width = max(len(row.ids) for row in rows) + 1  # theirs hold the EOS too
        short = [width - 1 - len(row.ids) for row in rows]
        ids = [[pad] * n + list(row.ids) for n, row in zip(short, rows, strict=True)]
        mask = [[0] * n + [1] * len(row.ids) for n, row in zip(short, rows, strict=True)]
        positions = torch.arange(width - 1).expand(len(rows), -1)
        self._inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "position_ids": positions}
        self._model = model
        self._at = [(i, p + n) for i, (n, row) in enumerate(zip(short, rows, strict=True)) for p in row.scored]

    def __call__(self, copies: Any) -> torch.Tensor:
        logits: torch.Tensor = called_with(self._model, copies, **self._inputs).logits
        rows, positions = torch.tensor(self._at).T
        return logits[rows, positions]


@pytest.mark.parametrize("run", ["batch3", "batch6"])
@pytest.mark.parametrize("model", MODELS)
def test_locft_from_its_authors_inputs(model: str, run: str) -> None:
    meta, wanted = golden(model, "locft")
    said = meta["runs"][run]
    pad = said["pad"]["id"]
    method = locft(model, run).method
    assert isinstance(method, FT)
    lm, tok = pair(model)
    rows = [training_row(tok, request(n), "target_new", Prompting(eos=True)) for n in range(6)]
    for (row, labels), full, prompt in zip(rows, meta["full_ids"], meta["prompt_ids"], strict=True):
        assert ([*row.ids, labels[-1][0]], row.scored[0]) == (full, len(prompt) - 1)
        assert labels[-1] == (tok.eos_token_id,)

    def epoch(number: int) -> list[Batch]:
        order, size = said["orders"][number - 1], said["hparams"]["batch_size"]
        chunks = [[rows[n] for n in order[i : i + size]] for i in range(0, 6, size)]
        return [
            Batch(forward=LeftPadded(lm, [row for row, _ in chunk], pad), labels=tuple(labels for _, labels in chunk))
            for chunk in chunks
        ]

    copies = trainable(lm, method.weight_names)
    settings = Training(num_steps=said["epochs"], lr=said["hparams"]["lr"], weight_decay=0.0, bound=None)
    losses = fine_tune(copies, epoch, settings)
    (name,) = copies
    assert relative(fold(copies[name].detach() - lm.get_parameter(name).detach()), wanted[f"f32/{run}/delta_W"]) < LOCFT
    size = said["hparams"]["batch_size"]
    means = [sum(e[i : i + size]) / size for e in losses for i in range(0, 6, size)]
    assert means == pytest.approx(said["batch_losses"], rel=LOCFT)


def test_pads_and_batches_are_nothing_to_a_request_s_own_loss() -> None:
    """GPT-2 counts positions, and the authors' pads with them; here a row's first loss is what it has alone."""
    loaded = (build("gpt2"), tokenizer())
    alone, together = (
        made("LocFT-BF", loaded, layers=[1], num_steps=1, batch_size=3).compute(requests).traces[0][1].losses[0]
        for requests in ([SEA], [SEA, ROME, BAY])
    )
    assert alone == pytest.approx(together, rel=1e-5)


def test_an_order_is_drawn_anew_in_each_epoch_and_the_same_in_each_run() -> None:
    method = made("LocFT-BF", layers=[1], batch_size=2, num_steps=4).method
    assert isinstance(method, FT)
    orders = method._orders(6)
    assert orders == method._orders(6)
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert method._orders(2) == [[0, 1]] * 4  # all in one batch


def test_a_last_order_that_happens_to_be_the_first_does_not_stand_for_all() -> None:
    """Seed 2 draws [1, 2, 0], [0, 2, 1], [1, 2, 0] of three requests, two in a batch: three epochs in their orders."""
    editor = made("LocFT-BF", layers=[1], batch_size=2, num_steps=3, seed=2)
    method = editor.method
    assert isinstance(method, FT)
    orders = method._orders(3)
    assert orders[0] == orders[2] != orders[1]
    lines = [training_row(editor.tok, r, "target_new", Prompting(eos=True)) for r in (SEA, ROME, BAY)]
    copies = trainable(editor.model, method.weight_names)
    settings = Training(num_steps=3, lr=5e-4, weight_decay=0.0, bound=None)
    with frozen(editor.model):
        losses = fine_tune(copies, lambda n: method._batches(lines, orders[n - 1]), settings)
    result = editor.compute([SEA, ROME, BAY])
    (name,) = copies
    before = editor.model.get_parameter(name).detach()
    assert torch.equal(result.deltas[0].dense(), copies[name].detach() - before)
    by_request = [[epoch[order.index(n)] for epoch, order in zip(losses, orders, strict=True)] for n in range(3)]
    assert [[loss for (loss,) in trace[1].losses] for trace in result.traces] == by_request


def test_ft_m_is_ft_with_its_mask() -> None:
    loaded = (build("llama"), tokenizer())
    rest = {"layers": [1], "num_steps": 2, "lr": 1e-3}
    masked, plain = (made(name, loaded, objective_optimization="target_new", **rest) for name in ("FT-M", "FT"))
    a, b = (editor.compute([ROME, SEA]).deltas[0].dense() for editor in (masked, plain))
    assert torch.equal(a, b)
    assert (masked.method.title, made("FT-M", loaded, norm_constraint=1e-3, **rest).method.title) == ("FT-M", "FT-M-L")
    with pytest.raises(ConfigError, match="objective_optimization is 'prompt_last'; allowed: 'target_new'"):
        made("FT_M", loaded, objective_optimization="prompt_last", **rest)


def test_a_tokenizer_without_an_eos_and_an_eos_without_a_place() -> None:
    model, tok = build("llama"), tokenizer()
    stripped = type(tok)(tokenizer_object=tok.backend_tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has no EOS token"):
        made("LocFT-BF", (model, stripped), layers=[1]).compute(SEA)
    with pytest.raises(ConfigError, match="target_eos is True; allowed: false with objective_opt"):
        made("FT", (model, tok), layers=[1], num_steps=1, lr=1e-3, target_eos=True)


def test_locfts_own_file_loads(caplog: pytest.LogCaptureFixture) -> None:
    values = {"model_name_or_path": "m", "data_path": "./data/a.json", "save_model_dir": "./saves", "layer": 22}
    values |= {"rewrite_module": "model.layers.{}.mlp.down_proj.weight", "lr": "5.0e-4", "batch_size": 100}
    h = load_hparams({"alg_name": "LocFT-BF", **values, "num_steps": 25, "device": 0})
    assert (h.layers, h.rewrite_module_tmp, h.lr) == ([22], values["rewrite_module"], 5e-4)  # type: ignore[attr-defined]
    assert "read and not used: data_path, save_model_dir" in caplog.text
    with pytest.raises(ConfigError, match="rewrite_module and rewrite_module_tmp are the same setting; give one"):
        load_hparams({"alg_name": "LocFT-BF", **values, "rewrite_module_tmp": "x.{}"})


# UltraEdit

ULTRA = 1e-4
"""Relative: ten times what one rounding moves the authors' own updates by (1e-5)."""


def ultraedit(model: Any, **values: Any) -> BaseEditor:
    return made("UltraEdit", model, **values)


@pytest.mark.parametrize("model", MODELS)
def test_ultraedit_over_two_turns_by_its_authors_numbers(model: str) -> None:
    """The second turn is computed on the model of the first and with its statistics; the batches repeat a request."""
    meta, wanted = golden(model, "ultraedit")
    lm, tok = pair(model)
    values = {key: meta[key] for key in ("modules", "lr", "batch_size", "n_edits", "editor_batch_size")}
    editor = ultraedit((copy.deepcopy(lm), tok), **values)
    method = editor.method
    assert isinstance(method, UltraEdit)
    for turn in ("turn1", "turn2"):
        numbers = [n for batch in meta["runs"][turn]["batches"] for n in batch]
        lines = [line(tok, request(n).prompt, request(n).target_new) for n in numbers]
        rows, _ = method._rows(lines, None)
        result = editor.compute([request(n) for n in numbers])
        assert len(result.requests) == len(numbers)
        for layer, module, delta in zip((2, 3), meta["modules"], result.deltas, strict=True):
            keys_NK, gradients_ND = torch.cat(rows[module]).tensor_split([-48], dim=1)
            assert relative(fold(keys_NK), wanted[f"f32/{turn}/layer{layer}/keys"]) < ULTRA
            assert relative(fold(gradients_ND), wanted[f"f32/{turn}/layer{layer}/values_grad"]) < ULTRA
            assert relative(fold(delta.dense()), wanted[f"f32/{turn}/layer{layer}/delta_W"]) < ULTRA
        editor.commit(result)
        (known_3W,) = method._memory.state.values()
        assert float(known_3W[0, 0]) == float(wanted[f"f32/{turn}/norm/n"])
        assert relative(known_3W[1], wanted[f"f32/{turn}/norm/mean"]) < ULTRA
        assert relative(deviation(known_3W), wanted[f"f32/{turn}/norm/std"]) < ULTRA


def test_ultraedit_takes_a_repeated_request_twice_and_refuses_two_that_contradict() -> None:
    editor = ultraedit((build("llama"), tokenizer()), **FEW)
    once, twice = editor.compute([ROME, SEA]), editor.compute([ROME, SEA, ROME])
    assert [request.case_id for request in twice.requests] == [0, 1, 0]
    assert float(twice.memory["norm.48x32"][0, 0]) > float(once.memory["norm.48x32"][0, 0])
    other = EditRequest.make("The sea", subject="sea", target_new="is red", case_id=3)
    with pytest.raises(DataError, match="requests 1 and 3 contradict each other"):
        editor.compute([SEA, ROME, other])


def rows(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    """But for the published spread: N times the unbiased variance in each part, where N - 1 times would be the sum."""
    known = merged(merged(statistics(rows(4)), statistics(rows(3, seed=1))), statistics(rows(1, seed=2)))
    whole = torch.cat([rows(4), rows(3, seed=1), rows(1, seed=2)])
    assert torch.allclose(known[1], whole.mean(0))
    surplus = rows(4).var(0) + rows(3, seed=1).var(0)
    assert torch.allclose(known[2], whole.var(0) * 7 + surplus)
    assert torch.allclose(deviation(known), (whole.var(0) + surplus / 7).sqrt())


@pytest.mark.parametrize("count", [3, 9])
def test_the_smaller_system_gives_the_same_step(count: int) -> None:
    keys, wanted = rows(count), rows(count, 4, seed=1)
    left, right = solved(keys, wanted)
    assert (right is None) == (count > 5)
    step = left if right is None else left @ right
    assert torch.allclose(step.T, torch.linalg.inv(keys.T @ keys + torch.eye(5)) @ keys.T @ wanted)


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("FT-M", {"layers": [1, 2], "num_steps": 2, "lr": 1e-3}),
    ("LocFT-BF", {"layers": [1], "num_steps": 2, "batch_size": 2}),
    ("LoRA", {"layers": [1, 2], "num_steps": 2, "lr": 1e-3, "target_modules": ["down_proj"], "rank": 2}),
    ("UltraEdit", {"inner_params": ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]}),
]


@pytest.mark.parametrize(("name", "values"), COUNTED, ids=[name for name, _ in COUNTED])
def test_the_size_of_an_update_is_computed_once_for_all_requests(
    name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(way: str, plain: Any) -> Any:
        def ask(*args: Any) -> Any:
            asked.append(way)
            return plain(*args)

        return ask

    for way in ("norm", "dense"):
        monkeypatch.setattr(WeightDelta, way, counted(way, getattr(WeightDelta, way)))
    counts = []
    for requests in ([SEA], [SEA, ROME, BAY]):
        asked.clear()
        made(name, **values).compute(requests)
        counts.append(sorted(asked))
    assert counts[0] == counts[1]


FEW = {"inner_params": ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj.weight"], "lr": 1e-3}


def test_ultraedit_leaves_no_request_out_and_knows_itself_the_earlier_ones() -> None:
    """Three requests two at a time: the last group is of one, not dropped as upstream; the memory goes to the bit."""
    editor = ultraedit((build("llama"), tokenizer()), **FEW, batch_size=7, batch_size_once=2)
    clean = states(editor.model)
    a, b, c = editor.compute([ROME, SEA, BAY]), editor.compute([SEA]), editor.compute([BAY, SEA])
    assert same(editor.model, clean)
    assert all(trace[1].losses == () and trace[1].loss_first is not None for trace in a.traces)
    tokens = sum(len(line(editor.tok, r.prompt, r.target_new).labels) for r in (ROME, SEA, BAY))
    assert float(a.memory["norm.48x32"][0, 0]) == 2 * tokens
    assert b.deltas[0].left is not None
    assert b.deltas[0].left.shape == (32, len(line(editor.tok, SEA.prompt, SEA.target_new).labels))
    editor.commit(a)
    fresh = editor.compute([BAY, SEA])
    assert relative(fresh.deltas[0].dense(), c.deltas[0].dense()) > 0.01
    editor.commit(c)
    wanted = dict(editor.method._memory.state)  # type: ignore[attr-defined]
    editor.revert_all()
    for result in (a, b, c):
        editor.commit(result)
    editor.revert(b)
    assert all(torch.equal(wanted[k], v) for k, v in editor.method._memory.state.items())  # type: ignore[attr-defined]


def test_ultraedit_lowers_every_request_s_loss() -> None:
    result = ultraedit((build("llama"), tokenizer()), **FEW).compute([ROME, SEA, BAY])
    for trace in result.traces:
        assert trace[1].loss_last is not None
        assert trace[1].loss_first is not None
        assert trace[1].loss_last < trace[1].loss_first


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_more_answer_tokens_than_a_key_is_wide(kind: str) -> None:
    """The dense update, in the weight's own orientation, is that of the factors."""
    small: dict[str, Any] = {"n_inner": 6} if kind == "gpt2" else {"intermediate_size": 6}
    model, tok = build(kind, **small), tokenizer()
    path = "transformer.h.1.mlp.c_proj" if kind == "gpt2" else "model.layers.1.mlp.down_proj"
    editor = ultraedit((model, tok), inner_params=[path], lr=1e-2)
    result = editor.compute([ROME, SEA, BAY])
    (delta,) = result.deltas
    assert delta.full is not None
    assert delta.full.shape == model.get_parameter(f"{path}.weight").shape
    assert result.traces[0][1].loss_last < result.traces[0][1].loss_first  # type: ignore[operator]


def test_one_answer_token_alone_changes_nothing_and_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    editor = ultraedit((build("llama"), tokenizer()), inner_params=FEW["inner_params"][:1])  # type: ignore[index]
    one = EditRequest.make("The sea", subject="sea", target_new="a")
    assert len(line(editor.tok, one.prompt, one.target_new).labels) == 1
    assert editor.compute(one).deltas[0].norm() == 0
    assert "UltraEdit: the edit changes nothing: a single answer token" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"inner_params": ["model.layers.9.mlp.down_proj"]},
            "'model.layers.9.mlp.down_proj.weight' is no parameter of Llama",
        ),
        ({"inner_params": ["lm_head"]}, "'lm_head.weight' is not the weight of a layer inside one of "),
        ({"inner_params": []}, "inner_params is \\[\\]; allowed: each module once"),
        ({"inner_params": ["a", "a.weight"]}, "each module once"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size_once": 0}, "batch_size_once is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"modules": ["a"], "inner_params": ["b"]}, "modules and inner_params are the same setting"),
    ],
)
def test_ultraedit_refuses(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        ultraedit((build("llama"), tokenizer()), **{**FEW, **changes})
    assert "\n" not in str(caught.value)


def test_a_memory_of_another_model_is_refused() -> None:
    editor = ultraedit((build("llama"), tokenizer()), **FEW)
    result = editor.compute([ROME, SEA])
    foreign = dataclasses.replace(result, memory={name: t[:, :-1] for name, t in result.memory.items()})
    before = states(editor.model)
    with pytest.raises(DataError, match="another model's"):
        editor.commit(foreign)
    assert same(editor.model, before)


def test_easyedits_ultraedit_file_loads(caplog: pytest.LogCaptureFixture) -> None:
    values = {"alg_name": "ULTRAEDIT", "device": 0, "model_name": "m", "model_class": "A", "tokenizer_class": "B"}
    values |= {"class_name": "A"}  # phi-4.yaml's name for it
    values |= {"tokenizer_name": "m", "inner_params": ["model.layers.18.mlp.gate_proj"], "dropout": 0.0, "lr": "1e-6"}
    values |= {"no_grad_layers": None, "token": "mask", "batch_size": 100, "batch_size_once": 10, "half": True}
    values |= {"editor_batch_size": 1024, "silent": False, "model_parallel": False, "results_dir": "./results"}
    h = load_hparams(values)
    assert (h.alg_name, h.lr, h.together) == ("UltraEdit", 1e-6, 10)  # type: ignore[attr-defined]
    told = caplog.messages[0].rpartition("read and not used: ")[2].split(", ")
    assert {"class_name", "dropout", "editor_batch_size", "half", "model_class", "results_dir"} <= {*told}


# LoRA

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "num_steps": 4, "lr": 5e-3, "lora_dropout": 0.1}


def structure(model: Any) -> Any:
    """The modules with their hooks and attributes, and which parameters ask for gradients."""
    return (
        [(name, id(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
         for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_s_delta_is_what_the_adapters_did(kind: str) -> None:
    """The adapted model and the model with the delta answer alike; afterwards the model is what it was, module by
    module; the draws outside are not touched."""
    model, tok = build(kind), tokenizer()
    target = ["c_attn"] if kind == "gpt2" else ["q_proj", "mlp.down_proj"]
    paths = [f"transformer.h.{n}.attn.c_attn" for n in (1, 2)] if kind == "gpt2" else ["model.layers.1.mlp.down_proj"]
    before, built = states(model), structure(model)
    inputs = torch.tensor([tok("The sea is blue")["input_ids"]])
    settings = AdapterSettings(rank=3, alpha=6.0, dropout=0.0)
    drawn = torch.random.get_rng_state()
    with frozen(model), adapted(model, paths, settings, seed=1) as adapters:
        for parameter in adapters.trained().values():
            with torch.no_grad():
                parameter.normal_(0, 0.2)
        wanted = model(inputs).logits
        deltas = adapters.deltas()
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert same(model, before)
    assert structure(model) == built
    with applied(model, deltas):
        assert relative(model(inputs).logits.detach(), wanted.detach()) < 1e-5
    editor = made("LoRA", (model, tok), **{**QV, "target_modules": target}, layers=[1, 2], rank=3)
    result = editor.compute([SEA, ROME])
    assert structure(model) == built
    assert same(model, before)
    assert [delta.name for delta in result.deltas] == editor.method.weight_names
    assert all(delta.left is not None and delta.left.shape[1] == 3 for delta in result.deltas)
    assert editor.method.layers == [1, 2]
    for trace in result.traces:
        assert (trace[1].steps, len(trace[1].losses)) == (4, 4)
        assert trace[1].loss_last < trace[1].loss_first  # type: ignore[operator]


def test_lora_draws_from_its_seed_alone() -> None:
    loaded = (build("llama"), tokenizer())
    first = made("LoRA", loaded, **QV).compute([SEA]).sha256()
    torch.rand(3)
    assert made("LoRA", loaded, **QV).compute([SEA]).sha256() == first
    assert made("LoRA", loaded, **QV, seed=1).compute([SEA]).sha256() != first
    assert made("LoRA", loaded, **{**QV, "lora_dropout": 0.0}).compute([SEA]).sha256() != first


def test_lora_s_replay_is_the_plain_forward() -> None:
    loaded = (build("llama"), tokenizer())
    fast, plain = (
        made("LoRA", loaded, **{**QV, "lora_dropout": 0.0}, layers=[2, 3], replay=replay).compute([SEA, ROME]).deltas
        for replay in (True, False)
    )
    assert all(relative(a.dense(), b.dense()) < 1e-3 for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_narrow_model_are_trained_in_float32(dtype: torch.dtype) -> None:
    """In float16 Adam's epsilon is 0, so an adapter of that type is NaN after a step. The change is float32's but for
    the model's own roundings (bfloat16: 0.09 at most, over four steps that each divide by the gradient's size)."""
    settings = AdapterSettings(rank=2, alpha=4.0, dropout=0.0)
    model = build("llama", dtype=dtype)
    with frozen(model), adapted(model, ["model.layers.1.mlp.down_proj"], settings, seed=0) as adapters:
        assert {parameter.dtype for parameter in adapters.trained().values()} == {torch.float32}
    values: dict[str, Any] = {**QV, "lora_dropout": 0.0}
    wide, narrow = (
        made("LoRA", (build("llama", dtype=d), tokenizer()), **values, dtype="auto").compute([SEA, ROME]).deltas
        for d in (torch.float32, dtype)
    )
    assert all(relative(a.dense(), b.dense()) < 0.5 for a, b in zip(narrow, wide, strict=True))


def test_a_model_is_whole_again_after_an_error_inside() -> None:
    model, tok = build("llama"), tokenizer()
    before, built = states(model), structure(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("LoRA", (model, tok), **QV).method.edit([SEA], stop)
    assert structure(model) == built
    assert same(model, before)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_modules": ["c_attn"]}, "'c_attn' ends no module's path in the blocks of LlamaForCausalLM; it has"),
        ({"target_modules": ["lm_head"]}, "'lm_head' ends no module's path in the blocks"),
        ({"target_modules": []}, "target_modules is \\[\\]; allowed: each module once"),
        ({"target_modules": ["mlp"]}, "cannot edit a LlamaMLP"),
        ({"layers": [9]}, "layer 9 is out of range"),
        ({"rank": 0}, "rank is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_type": "dora"}, "lora_type is 'dora'"),
        ({"lora_r": 4, "rank": 4}, "lora_r and rank are the same setting"),
    ],
)
def test_lora_refuses(changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=told) as caught:
        made("LoRA", (build("llama"), tokenizer()), **{**QV, **changes})
    assert "\n" not in str(caught.value)


def test_easyedits_lora_files_load(caplog: pytest.LogCaptureFixture) -> None:
    values = {"alg_name": "LoRA", "model_name": "m", "device": 0, "lora_type": "adalora", "layers": [], "num_steps": 70}
    values |= {"batch_size": 1, "max_length": 50, "lr": "5e-3", "weight_decay": 0, "kl_factor": 0, "rank": 8}
    values |= {"lora_alpha": 32, "lora_dropout": 0.1, "norm_constraint": False, "target_modules": ["q_proj", "v_proj"]}
    h = load_hparams({**values, "model_parallel": False})
    assert (h.rank, h.lr, h.lora_type) == (8, 5e-3, "lora")  # type: ignore[attr-defined]
    assert "read and not used: kl_factor, norm_constraint" in caplog.text
    assert "lora_type 'adalora' is read as 'lora'" in caplog.text
    assert load_hparams({"alg_name": "LoRA", "model_name": "m", "lora_type": "lora", "lora_r": 4, "num_steps": 1,
                         "lr": 1e-3, "target_modules": ["q_proj"]}).rank == 4  # type: ignore[attr-defined]  # fmt: skip
