"""FT: the reference's weights from its inputs, the right inputs by default, replay and plain path alike, every door."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runs
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, build, relative, same, states, tokenizer
from golden_numbers import FINE_TUNED, fold, pair, read, tensors
from golden_numbers import request as golden_request

from easyeditor import BaseEditor, EditRequest, EditResult, FTHyperParams
from easyeditor.base.errors import ConfigError, DataError, NumericalError
from easyeditor.base.hparams import field_types
from easyeditor.commands import cli, single_case_edit
from easyeditor.lm.discover import anatomy
from easyeditor.lm.joining import spaced
from easyeditor.lm.tokens import encode
from easyeditor.lm.tuned import TunedForward
from easyeditor.lm.weights import called_with, trainable
from easyeditor.methods.fine_tuning import Batch, Training, fine_tune, row_losses, training_row
from easyeditor.methods.ft.method import FT
from easyeditor.report.terminal import verdict

BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")
LONG = EditRequest.make(
    "They say that the Bridge is in", subject="Bridge", target_new="the old town of Rome", case_id=1
)
SHORT = EditRequest.make("The sea", subject="sea", target_new="is blue", case_id=2)
REQUESTS = [BAY, LONG, SHORT]


def hparams(pair: Any, **changes: Any) -> FTHyperParams:
    values = {"model_name": pair, "alg_name": "FT", "device": "cpu", "layers": [1], "num_steps": 3, "lr": 1e-3}
    return FTHyperParams.from_dict({**values, "ppl_sentence_num": 0, **changes})


def edit(
    kind: str, requests: list[EditRequest] = REQUESTS, *, model: Any = None, bos: bool = False, **changes: Any
) -> EditResult:
    pair = (model or build(kind), tokenizer(bos))
    return FT(*pair, hparams(pair, **changes)).edit(requests)


# The reference's numbers


DTYPES = {"f32": torch.float32, "f64": torch.float64}


def golden_method(model: str, dtype: str) -> FT:
    values = read("inputs.json")["hparams"]["FT"][model]
    loaded = pair(model, DTYPES[dtype])
    return FT(*loaded, FTHyperParams.from_dict({**values, "model_name": loaded, "device": "cpu"}))


class LeftPadded:
    """Quirks 4b and 11: rows padded on the left, positions that count the pads, read at sum(mask) - 1 of the padded
    row: often a pad, which attends to everything evenly, because all its keys are masked with the same number."""

    def __init__(self, model: Any, tok: Any, texts: list[str]) -> None:
        rows = [encode(tok, text) for text in texts]
        width = max(map(len, rows))
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        seen = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, None, :]
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        ids = torch.tensor([[tok.pad_token_id] * (width - len(row)) + row for row in rows])
        self._inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(width).expand_as(ids)}
        self._model, self._at = model, real.sum(1) - 1

    def __call__(self, copies: Any) -> torch.Tensor:
        logits: torch.Tensor = called_with(self._model, copies, **self._inputs).logits
        return logits[torch.arange(len(self._at)), self._at]


def mistaken_batches(model: str, dtype: str, entry: dict[str, Any], requests: list[EditRequest]) -> list[Batch]:
    """The reference's inputs: a BOS among the targets where its tokenizer puts one, pads where pad is not unk."""
    lm, tok = pair(model, DTYPES[dtype])
    batches = []
    for at in range(0, len(requests), 3):
        chunk = requests[at : at + 3]
        targets = [list(tok(spaced(request.target_new))["input_ids"]) for request in chunk]
        assert targets == entry["target_ids"][at : at + 3]
        width = max(map(len, targets))
        if tok.pad_token_id != tok.unk_token_id:
            targets = [target + [tok.pad_token_id] * (width - len(target)) for target in targets]
        rows = [training_row(tok, request, "prompt_last")[0] for request in chunk]
        forward: Any = TunedForward(anatomy(lm), rows, first=2, replay=True)
        if entry["padding_side"] == "left":
            forward = LeftPadded(lm, tok, [request.prompt for request in chunk])
        batches.append(Batch(forward=forward, labels=tuple((tuple(target),) for target in targets)))
    return batches


QUICK = {("tiny-gpt2", "f32/r4"), ("tiny-llama", "f32/r1"), ("tiny-llama", "f32/batch6")}
KEYS = [f"f32/r{i}" for i in range(6)] + ["f64/r1"]
KEYS += [f"{d}/{b}" for d in ("f32", "f64") for b in ("batch6", "batch6_leftpad")]
CASES = [
    pytest.param(model, key, id=f"{model}-{key}", marks=[] if (model, key) in QUICK else [pytest.mark.slow])
    for model in ("tiny-gpt2", "tiny-llama")
    for key in KEYS
]


@pytest.mark.parametrize(("model", "key"), CASES)
def test_the_reference_s_weights_from_its_inputs(model: str, key: str) -> None:
    entry, dtype, deltas = read(f"ft_{model}.json")[key], key[:3], tensors(f"ft_{model}.safetensors")
    method = golden_method(model, dtype)
    assert method.weight_names == entry["weights"]  # for gpt2 the filter takes the projection's bias too
    copies = trainable(method.model, method.weight_names)
    h = method.hparams
    training = Training(num_steps=h.num_steps, lr=h.lr, weight_decay=h.weight_decay, bound=h.bound)
    epochs = fine_tune(
        copies, mistaken_batches(model, dtype, entry, [golden_request(i) for i in entry["requests"]]), training
    )
    for name in entry["weights"]:
        start, end, delta = (
            method.model.get_parameter(name).detach(),
            copies[name].detach(),
            deltas[f"{key}/{name}/delta"],
        )
        assert relative(fold(end - start), delta) < FINE_TUNED
        if dtype == "f64":
            assert relative(fold(end), fold(start) + delta) < 1e-12
    losses = [sum(epoch[i : i + 3]) / len(epoch[i : i + 3]) for epoch in epochs for i in range(0, len(epoch), 3)]
    assert losses == pytest.approx(entry["losses"], rel=1e-5)


@pytest.mark.parametrize("number", [1, 5])
def test_where_the_reference_is_right_the_method_gives_its_edit(number: int) -> None:
    """gpt2 has no BOS, a single request no pads: `prompt_last` through the method's own door is the reference's."""
    meta, deltas = read("ft_tiny-gpt2.json"), tensors("ft_tiny-gpt2.safetensors")
    result = golden_method("tiny-gpt2", "f32").edit([golden_request(number)])
    for delta in result.deltas:
        assert relative(fold(delta.dense()), deltas[f"f32/r{number}/{delta.name}/delta"]) < FINE_TUNED
    losses = [row[0] for row in result.trace[2].losses]
    assert losses == pytest.approx(meta[f"f32/r{number}"]["losses"], rel=1e-5)


# Right by default


def test_prompt_last_scores_every_target_token_at_the_prompt_s_own_end() -> None:
    tok = tokenizer(bos=True)
    row, labels = training_row(tok, LONG, "prompt_last")
    prompt = encode(tok, LONG.prompt)
    target = tok(" " + LONG.target_new, add_special_tokens=False)["input_ids"]
    assert prompt[0] == tok.bos_token_id
    assert (row.ids, row.scored) == (tuple(prompt), (len(prompt) - 1,))
    assert labels == (tuple(target),)
    assert tok.bos_token_id not in target


def test_target_new_scores_each_target_token_at_its_own_position() -> None:
    tok = tokenizer(bos=True)
    row, labels = training_row(tok, LONG, "target_new")
    prompt = encode(tok, LONG.prompt)
    target = tok(" " + LONG.target_new, add_special_tokens=False)["input_ids"]
    assert len(target) > 3
    assert row.ids == (*prompt, *target[:-1])
    assert row.scored == tuple(range(len(prompt) - 1, len(prompt) + len(target) - 1))
    assert labels == tuple((token,) for token in target)


@pytest.mark.parametrize("target", ["Italy", " Italy"])
def test_a_leading_space_of_the_target_is_not_doubled(target: str) -> None:
    request = EditRequest.make("Bay is in", subject="Bay", target_new=target)
    assert training_row(tokenizer(), request, "target_new") == training_row(
        tokenizer(), EditRequest.make("Bay is in", subject="Bay", target_new="Italy"), "target_new"
    )


def test_row_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, math.log(7.0)]])
    losses = row_losses(logits, [((0, 1),), ((0,), (1,))])
    assert losses.tolist() == pytest.approx([math.log(2), (-math.log(3 / 4) - math.log(7 / 8)) / 2])


class Line:
    """One weight w, two words with logits (w, 0): the loss of word 0 is log(1 + exp(-w))."""

    def __call__(self, copies: Any) -> torch.Tensor:
        return torch.stack([copies["w"], torch.zeros(1, dtype=copies["w"].dtype)]).T


def train(start: float, **changes: Any) -> tuple[float, list[list[float]]]:
    copies = {"w": torch.tensor([start], requires_grad=True)}
    settings = Training(**{"num_steps": 4, "lr": 0.5, "weight_decay": 0.0, "bound": None, **changes})
    epochs = fine_tune(copies, [Batch(forward=Line(), labels=(((0,),),))], settings)
    return float(copies["w"].detach()), epochs


def test_adam_steps_by_hand() -> None:
    """Adam's first step is lr in the direction of the sign; every loss is measured before its step."""
    value, epochs = train(0.0, num_steps=1)
    assert value == pytest.approx(0.5, abs=1e-6)
    assert epochs == [[pytest.approx(math.log(2))]]
    assert train(0.0, num_steps=2)[1][1] == [pytest.approx(math.log(1 + math.exp(-0.5)))]


def test_the_bound_holds_every_value_near_its_start() -> None:
    assert train(0.0)[0] > 1.5
    assert train(0.0, bound=0.7)[0] == pytest.approx(0.7)
    assert train(0.0, bound=0.1)[0] == pytest.approx(0.1)


def test_training_ends_when_the_loss_is_small_and_takes_no_step_there() -> None:
    value, epochs = train(5.0)  # log(1 + exp(-5)) = 0.0067
    assert (value, len(epochs)) == (5.0, 1)
    assert len(train(4.0, lr=1.0)[1]) == 2  # 0.018, then 0.0067
    assert len(train(4.0)[1]) == 3


def test_a_batch_that_is_done_takes_no_step_while_others_do() -> None:
    copies = {"w": torch.tensor([4.8], requires_grad=True)}
    done = Batch(forward=Line(), labels=(((0,),),))
    undone = Batch(forward=lambda c: Line()(c) * 0 + torch.tensor([[0.0, 0.0]]), labels=(((0,),),))
    epochs = fine_tune(copies, [done, undone], Training(num_steps=3, lr=0.5, weight_decay=0.0, bound=None))
    assert len(epochs) == 3
    assert float(copies["w"].detach()) == pytest.approx(4.8)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(NumericalError, match=r"not finite in pass 1; nothing was changed"):
        train(math.nan)


# Replay, batches, padding


@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_edits_equal_the_plain_path(kind: str, objective: str) -> None:
    """Layers 1 and 2; rows of different length in one batch, and a batch of one after it."""
    model = build(kind)
    settings = {"model": model, "bos": objective == "target_new", "layers": [2, 1], "batch_size": 2}
    plain, replay = (edit(kind, replay=r, objective_optimization=objective, **settings) for r in (False, True))
    assert [d.name for d in replay.deltas] == [d.name for d in plain.deltas]
    for a, b in zip(replay.deltas, plain.deltas, strict=True):
        assert float(b.dense().abs().max()) > 1e-4
        # Adam divides by the gradient's size: where that is ~0 a rounding error decides the direction of a step
        assert relative(a.dense(), b.dense()) < 2e-2
    for ours, other in zip(replay.traces, plain.traces, strict=True):
        assert [row[0] for row in ours[1].losses] == pytest.approx([row[0] for row in other[1].losses], rel=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 3])
def test_forwards_agree_in_logits_and_gradients(kind: str, layer: int) -> None:
    model, tok = build(kind), tokenizer(layer == 0)
    parts = anatomy(model)
    rows = [training_row(tok, request, "target_new")[0] for request in REQUESTS]
    answers = []
    for replay in (False, True):
        copies = trainable(model, [parts.weight_name(layer)])
        copies = {name: (w + 0.01).detach().requires_grad_() for name, w in copies.items()}
        logits = TunedForward(parts, rows, first=layer, replay=replay)(copies)
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        answers.append((logits.detach(), *torch.autograd.grad((logits * probe).sum(), list(copies.values()))))
    for plain, replayed in zip(*answers, strict=True):
        assert relative(replayed, plain) < 1e-4


def test_the_layers_below_the_first_trained_one_run_once() -> None:
    model = build("llama")
    runs = []
    handle = anatomy(model).mlp(0).register_forward_hook(lambda *_: runs.append(1))
    try:
        edit("llama", [BAY], model=model, layers=[2], num_steps=5)
        assert len(runs) == 1
        edit("llama", [BAY], model=model, layers=[2], num_steps=5, replay=False)
        assert len(runs) == 6
    finally:
        handle.remove()


def test_a_loss_does_not_depend_on_its_batch_or_the_padding_side() -> None:
    """First epoch: nothing is trained yet, so every request's loss is its own."""
    model = build("gpt2")
    tok = tokenizer()
    first = [t[1].loss_first for t in edit("gpt2", model=model, batch_size=3, num_steps=1).traces]
    alone = [edit("gpt2", [r], model=model, num_steps=1).trace[1].loss_first for r in REQUESTS]
    assert first == pytest.approx(alone, rel=1e-5)
    for request, loss in zip(REQUESTS, first, strict=True):
        ids = encode(tok, request.prompt)
        target = tok(spaced(request.target_new))["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
        assert loss == pytest.approx(-logs[target].mean().item(), rel=1e-5)


# Doors


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_edit_works_and_is_reverted_exactly(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    before = states(model)
    editor = BaseEditor(
        hparams((model, tokenizer()), objective_optimization="target_new", num_steps=60, lr=2e-2, batch_size=2)
    )
    records, edited, originals = editor.edit(
        [BAY.prompt, LONG.prompt], [BAY.target_new, LONG.target_new], subject=["Bay", "Bridge"], verbose=False
    )
    assert edited is model
    assert [r["post"]["rewrite_acc"] for r in records] == [[1.0], [1.0]]
    assert all(torch.equal(originals[name], before[name]) for name in originals)
    assert set(originals) == set(editor.method.weight_names)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == set(
        originals
    )
    editor.revert_all()
    assert same(model, before)
    records, _, _ = editor.batch_edit(
        [BAY.prompt, LONG.prompt], [BAY.target_new, LONG.target_new], subject=["Bay", "Bridge"], verbose=False
    )
    assert [r["post"]["rewrite_acc"] for r in records] == [[1.0], [1.0]]
    editor.revert_all()
    result = editor.compute(BAY)
    with editor.applied(result):
        wanted = states(model)
    loaded = EditResult.load(result.save(tmp_path / "edit"))  # gpt2's holds a bias
    with editor.applied(loaded):
        assert same(model, wanted)
    assert same(model, before)


@pytest.mark.parametrize("bound", [False, 1e-4], ids=["ft", "ft-l"])
def test_single_case_edit_takes_a_yaml_of_it(
    bound: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("gpt2").save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    values = {"alg_name": "FT", "model_name": str(tmp_path / "m"), "device": "cpu", "layers": [1], "num_steps": 4}
    values |= {
        "lr": "1e-1",
        "norm_constraint": bound,
        "ppl_sentence_num": 3,
        "collapse_threshold": 1e-3 if bound else 1e9,
    }
    (tmp_path / "ft.yaml").write_text(yaml.safe_dump({**values, "collapse_ratio": 1.0 if bound else 5.0}))
    folder = tmp_path / "saved"
    monkeypatch.setattr(sys, "argv", ["x", "--hparams", str(tmp_path / "ft"), "--save-edit", str(folder)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.run(single_case_edit.main)
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert ("FT-L: Bay" if bound else "FT: Bay") in out
    assert "denominator " not in out.split("COLLAPSE")[0]
    assert "training: 4 passes, loss " in out
    assert "NO COLLAPSE" in out or "the method has no denominator; the weights moved by" in " ".join(out.split())
    assert [delta.dense().ndim for delta in EditResult.load(folder).deltas] == [2, 1]


def test_the_verdict_on_a_collapse_names_what_moved() -> None:
    trace = edit("llama", [BAY]).trace[1].numbers()
    lines = verdict(replace(fake_runs.edit(0, ppl=9e9).record, trace={1: trace}))
    assert lines[0][1].startswith("COLLAPSED")
    assert [text for _, text in lines[1:]] == [
        f"Cause: the method has no denominator; the weights moved by ‖ΔW‖ {trace.delta_norm:.3g}.",
        "Try: fewer or smaller steps",
    ]
    assert len(verdict(replace(fake_runs.edit(0, ppl=93.0).record, trace={1: trace}))) == 1


def test_trained_are_the_parameters_whose_name_contains_the_template() -> None:
    c_proj = "transformer.h.1.mlp.c_proj"
    template = "transformer.h.{}.mlp.c_proj"
    assert [d.name for d in edit("gpt2", [BAY]).deltas] == [f"{c_proj}.weight", f"{c_proj}.bias"]
    only = edit("gpt2", [BAY], rewrite_module_tmp=f"{template}.weight").deltas
    assert [d.name for d in only] == [f"{c_proj}.weight"]
    whole = edit("gpt2", [BAY], rewrite_module_tmp="transformer.h.{}.mlp", layers=[1, 3]).deltas
    assert len(whole) == 8
    assert {d.name.split(".")[2] for d in whole} == {"1", "3"}


def test_the_trace_holds_losses_and_sizes_and_no_keys() -> None:
    result = edit("llama", layers=[1, 2], num_steps=4, norm_constraint=1e-3)
    assert [sorted(trace) for trace in result.traces] == [[1, 2]] * 3
    for trace in result.traces:
        for layer in (1, 2):
            norm = float(next(d for d in result.deltas if f".{layer}." in d.name).dense().norm())
            assert trace[layer].delta_norm == pytest.approx(norm)
            assert (trace[layer].steps, len(trace[layer].losses)) == (4, 4)
            assert trace[layer].loss_last < trace[layer].loss_first
            assert trace[layer].denominator is trace[layer].numerator_norm is trace[layer].key_norm is None
    assert max(float(d.dense().abs().max()) for d in result.deltas) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    result = edit("llama", [BAY], model=build("llama", dtype=dtype), lr=0.01)
    assert result.deltas[0].dense().dtype == torch.promote_types(dtype, torch.float32)
    wide = edit("llama", [BAY], model=build("llama", dtype=dtype).float(), lr=0.01)
    assert result.trace[1].losses[0][0] == pytest.approx(wide.trace[1].losses[0][0], rel=2e-2)
    cosine = torch.nn.functional.cosine_similarity(
        result.deltas[0].dense().double().flatten(), wide.deltas[0].dense().double().flatten(), dim=0
    )
    assert cosine > 0.8


# Hyper-parameters and bad input


def upstream_cases() -> list[Any]:
    """One case per text FT file of the two upstream projects."""
    models = read("hparams_upstream.json")["FT"]
    return [pytest.param(v, id=f"{model}-{source}") for model, by in models.items() for source, v in by.items()]


@pytest.mark.parametrize("values", upstream_cases())
def test_upstream_file_loads_with_its_values(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "upstream.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    loaded = FTHyperParams.from_hparams(tmp_path / "upstream")
    types = field_types(FTHyperParams)
    for key, value in values.items():
        if types[key] is float or (key == "norm_constraint" and isinstance(value, str)):
            value = float(value)  # PyYAML reads 5e-4 as text
        if value == "promptz_last":  # upstream's chatglm4-9b.yaml, where its own code stops
            value = "prompt_last"
            assert "'promptz_last' is read as 'prompt_last'" in caplog.text
        found = getattr(loaded, key)
        assert (found, type(found)) == (value, type(value)), key
    assert loaded.bound == (None if values["norm_constraint"] is False else float(values["norm_constraint"]))


def test_the_files_of_the_rome_folder_s_models_are_there() -> None:
    folder = Path(__file__).resolve().parents[1] / "hparams"
    assert {p.name for p in (folder / "ROME").iterdir()} <= {p.name for p in (folder / "FT").iterdir()}


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("norm_constraint", True, "norm_constraint is True; allowed: a number above 0, or false"),
        ("norm_constraint", 0.0, "norm_constraint is 0.0; allowed: a number above 0, or false"),
        ("norm_constraint", -1, "norm_constraint is -1.0; allowed: a number above 0, or false"),
        ("norm_constraint", "tight", "norm_constraint is 'tight'"),
        ("objective_optimization", "target", "one of 'prompt_last', 'target_new'"),
        ("kl_factor", 0.1, "kl_factor is 0.1; allowed: 0: fine-tuning has no KL term"),
        ("num_steps", 0, "num_steps is 0; allowed: 1 or more"),
        ("batch_size", 0, "batch_size is 0; allowed: 1 or more"),
        ("lr", 0, "lr is 0.0; allowed: a number above 0"),
        ("weight_decay", -1, "weight_decay is -1.0; allowed: 0 or more"),
        ("layers", [], "layers is []; allowed: a list of at least one layer"),
        ("layers", [1, 1], "each layer once"),
        ("layers", [-1], "layer numbers from 0"),
        ("rewrite_module_tmp", "mlp.down_proj", "a module path with one {}"),
        ("num_step", 3, "did you mean 'num_steps'?"),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any, parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hparams("m", **{key: value})
    assert parts in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"layers": [4]}, "layers: layer 4 is out of range; LlamaForCausalLM has layers 0 to 3"),
        (
            {"rewrite_module_tmp": "model.layers.{}.mlp.c_proj"},
            "is part of no parameter's name in LlamaForCausalLM; near",
        ),
        ({"kind": "gpt2", "rewrite_module_tmp": "ln_{}."}, "also names 'transformer.h.0.ln_1.weight', which is not in"),
        ({"layer_module_tmp": "model.h.{}"}, "layer_module_tmp: 'model.h.{}' names no module"),
    ],
)
def test_what_the_model_does_not_have_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        edit(**{"kind": "llama", "requests": [BAY], **changes})
    assert part in str(caught.value)


def test_a_prompt_longer_than_the_model_is_refused() -> None:
    long = EditRequest.make("Bay " * 200 + "is in", subject="Bay", target_new="Rome")
    with pytest.raises(DataError, match=r"request 0: prompt with target_new has \d+ tokens; the limit is 128"):
        edit("llama", [long])


def test_a_perplexity_sentence_is_not_held_to_upstream_s_max_length() -> None:
    """Upstream's files say 40, which its fine-tuning does not read; sentences have more tokens than that."""
    editor = BaseEditor(hparams((build("llama"), tokenizer()), max_length=2, ppl_sentence_num=3))
    report = editor.perplexity()
    assert report is not None
    assert max(report.tokens) > 2


@pytest.mark.slow
def test_the_shipped_file_edits_the_embedded_model(smol: Any) -> None:
    """What its comment promises: the new answer comes out, for a target of several tokens too."""
    folder = Path(__file__).resolve().parents[1] / "hparams" / "FT"
    shipped = FTHyperParams.from_hparams(folder / "smollm2-135m")
    shipped.model_name, shipped.device, shipped.ppl_sentence_num = smol, "cpu", 0
    editor = BaseEditor(shipped)
    for subject, target in [("Xbox", "Apple Computer in Cupertino")]:
        request = EditRequest.make(f"{subject} is owned by", subject=subject, target_new=target)
        assert editor.examine(request).record.post.rewrite == (1.0,)
