"""The gradient methods (FT-M, LocFT-BF, UltraEdit, LoRA): their authors' numbers, their parts by hand, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build, relative, same, states, tokenizer
from golden_numbers import MODELS, fold, pair, request
from test_newer_golden import golden

from easyeditor import BaseEditor, EditRequest, load_hparams
from easyeditor.errors import ConfigError, ModelError
from easyeditor.lm.weights import called_with, trainable
from easyeditor.methods.ft.method import FT, training_row
from easyeditor.methods.ft.training import Batch, Training, fine_tune

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
    method = locft(model, run).method
    assert isinstance(method, FT)
    lm, tok = pair(model)
    rows = [training_row(tok, request(n), "target_new", eos=True) for n in range(6)]
    for (row, labels), full, prompt in zip(rows, meta["full_ids"], meta["prompt_ids"], strict=True):
        assert ([*row.ids, labels[-1][0]], row.scored[0]) == (full, len(prompt) - 1)
        assert labels[-1] == (tok.eos_token_id,)

    def epoch(number: int) -> list[Batch]:
        order, size = said["orders"][number - 1], said["hparams"]["batch_size"]
        chunks = [[rows[n] for n in order[i : i + size]] for i in range(0, 6, size)]
        return [
            Batch(forward=LeftPadded(lm, [row for row, _ in chunk], said["pad"]["id"]), labels=tuple(x for _, x in chunk))
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
    with pytest.raises(ConfigError, match="target_eos is True; allowed: false with objective_optimization: prompt_last"):
        made("FT", (model, tok), layers=[1], num_steps=1, lr=1e-3, target_eos=True)


def test_locfts_own_file_loads(caplog: pytest.LogCaptureFixture) -> None:
    values = {"model_name_or_path": "m", "data_path": "./data/a.json", "save_model_dir": "./saves", "layer": 22}
    values |= {"rewrite_module": "model.layers.{}.mlp.down_proj.weight", "lr": "5.0e-4", "batch_size": 100}
    h = load_hparams({"alg_name": "LocFT-BF", **values, "num_steps": 25, "device": 0})
    assert (h.layers, h.rewrite_module_tmp, h.lr) == ([22], values["rewrite_module"], 5e-4)  # type: ignore[attr-defined]
    assert "read and not used: data_path, save_model_dir" in caplog.text
    with pytest.raises(ConfigError, match="rewrite_module and rewrite_module_tmp are the same setting; give one"):
        load_hparams({"alg_name": "LocFT-BF", **values, "rewrite_module_tmp": "x.{}"})
