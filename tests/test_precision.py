"""`matmul: tf32` holds in edits and measurements, not in statistics, and is gone afterwards. (No card is needed: what
is set is what is looked at.)"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXTS, ROOT, build, rome_hparams, tokenizer

from easyeditor import BaseEditor, EditRequest
from easyeditor.base.errors import ConfigError, StatsError
from easyeditor.lm import precision
from easyeditor.lm.loading import save
from easyeditor.lm.precision import products
from easyeditor.methods.locate.norm_anchor import NormAnchor
from easyeditor.methods.registry import load_hparams
from easyeditor.stats import first_token

sys.path.insert(0, str(ROOT / "benchmarks"))

import dtypes

REQUEST = {"prompt": "Bay, which is located in", "target_new": "Italy", "subject": "Bay"}


def now() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[set[str], set[str]]:
    """What is set in the forwards of an edit's statistics, and in its others."""
    collecting, others, inside = set(), set(), []
    moments = first_token.add_rows

    def add_rows(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        try:
            return moments(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(first_token, "add_rows", add_rows)
    settings = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 50}
    hparams = rome_hparams(
        (build("llama"), tokenizer()), **settings, protect_first_tokens=True, stats_dir=str(tmp_path), **changes
    )
    editor = BaseEditor.from_hparams(hparams)
    editor.model.model.layers[0].register_forward_pre_hook(
        lambda *_: (collecting if inside else others).add(now()) or None
    )
    editor.edit(prompts=REQUEST["prompt"], target_new="Italy", subject="Bay", verbose=False)
    return collecting, others


def test_tf32_is_set_for_edits_and_measurements_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = now()
    assert seen(tmp_path, monkeypatch, matmul="tf32") == ({"ieee"}, {"tf32"})
    assert now() == before


def test_products_are_exact_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(tmp_path, monkeypatch) == ({"ieee"}, {"ieee"})


def test_what_was_set_comes_back_after_an_error() -> None:
    before = now()
    with pytest.raises(ZeroDivisionError), products("tf32"):
        raise ZeroDivisionError
    assert now() == before


# Which kernels a CPU takes


@pytest.mark.skipif(not precision._has_onednn(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv1d", [False, True])
def test_onednn_gives_the_same_products_and_gradients(
    bias: bool, conv1d: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 128, generator=generator)
    own = torch.randn(160, generator=generator)
    given = torch.randn(3, 20, 128, generator=generator)

    def run() -> list[torch.Tensor]:
        x, w, b = (t.clone().requires_grad_() for t in (given, weight, own))
        if conv1d:
            y = torch.addmm(b, x.reshape(-1, 128), w.t()).reshape(3, 20, 160)
        else:
            y = torch.nn.functional.linear(x, w, b if bias else None)
        y.square().sum().backward()
        return [y.detach()] + [t.grad for t in (x, w, b) if t.grad is not None]

    plain = run()
    assert not calls
    with products("exact", "onednn"):
        found = run()
    assert len(calls) == 3  # forward, the gradient of x, that of the weight
    assert len(plain) == len(found) == 3 + (bias or conv1d)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    run()
    assert len(calls) == 3  # not outside the block


@pytest.mark.skipif(not precision._has_onednn(), reason="this build of PyTorch has no oneDNN")
def test_onednn_is_not_for_few_rows_small_matrices_or_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with products("exact", "onednn"):
        torch.nn.functional.linear(torch.ones(15, 128), torch.ones(128, 128))
        torch.nn.functional.linear(torch.ones(16, 128), torch.ones(127, 128))
        torch.nn.functional.linear(torch.ones(16, 128).double(), torch.ones(128, 128).double())
        torch.nn.functional.linear(torch.ones(0, 128), torch.ones(128, 128))
        assert not calls
        torch.nn.functional.linear(torch.ones(16, 128), torch.ones(128, 128))
    assert len(calls) == 1
    with products("exact", "torch"):
        torch.nn.functional.linear(torch.ones(16, 128), torch.ones(128, 128))
    assert len(calls) == 1


@pytest.mark.skipif(not precision._has_onednn(), reason="this build of PyTorch has no oneDNN")
def test_an_edit_is_the_same_by_either_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SMALLEST_MATRIX", 1)
    calls, found = counted(monkeypatch), {}
    for kernels in ("torch", "onednn"):
        hparams = rome_hparams((build("llama"), tokenizer()), v_num_grad_steps=5, cpu_products=kernels)
        found[kernels] = BaseEditor.from_hparams(hparams).compute([REQUEST])
        assert bool(calls) == (kernels == "onednn")
    for plain, other in zip(found["torch"].deltas, found["onednn"].deltas, strict=True):
        torch.testing.assert_close(other.dense(), plain.dense(), rtol=1e-3, atol=1e-4)


def test_a_build_without_onednn_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_onednn", lambda: False)
    line = "cpu_products: onednn: this build of PyTorch has no oneDNN"
    with pytest.raises(ConfigError, match=line), products("exact", "onednn"):
        pass
    with products("exact", "auto"):
        pass


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every product that oneDNN computes."""
    calls: list[int] = []
    own = precision._multiplied

    def multiplied(*args: Any) -> Any:
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(precision, "_multiplied", multiplied)
    return calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_benchmark_edits_in_both_dtypes(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same search in the narrow dtype: another v*, but near."""
    save(build("llama"), tokenizer(), tmp_path / "model")
    values = {"alg_name": "ROME", "model_name": str(tmp_path / "model"), "device": "cpu", "layers": [1], "v_lr": 0.1}
    values |= {"v_loss_layer": 3, "v_num_grad_steps": 3, "context_templates": CONTEXTS[:2], "mom2_adjustment": False}
    values |= {"v_weight_decay": 1e-3, "clamp_norm_factor": 4, "kl_factor": 0.0625, "ppl_sentence_num": 3}
    (tmp_path / "h.yaml").write_text(json.dumps(values), encoding="utf-8")
    rows = dtypes.main(["--hparams", str(tmp_path / "h.yaml"), "--dtype", dtype, "--requests", "2"])
    assert len(rows) == 2
    assert all(0 < row["apart"] < 1 for row in rows)
    assert all(row["narrow_ppl"] == pytest.approx(row["ppl"], rel=0.05) for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| median |")


# What is kept on disk


def test_a_search_in_tf32_is_not_read_by_an_exact_run(tmp_path: Path) -> None:
    """Each mode finds its own again; searches saved before there was a choice are exact."""
    pair, counts = (build("llama"), tokenizer()), []
    made = EditRequest.make(REQUEST["prompt"], subject="Bay", target_new="Italy")
    for matmul in ("exact", "tf32", "exact", "tf32"):
        passes: list[str] = []
        hparams = rome_hparams(pair, targets_dir=str(tmp_path), v_num_grad_steps=3, matmul=matmul)
        method = BaseEditor.from_hparams(hparams).method
        method.edit([made], lambda *step, passes=passes: passes.append(step[2]))
        counts.append(len(passes))
    assert counts == [3, 3, 0, 0]


def test_a_norm_anchor_measured_in_tf32_is_not_read_by_an_exact_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, anchors = (build("llama"), tokenizer()), []
    values = {"alg_name": "NAS", "model_name": pair, "device": "cpu", "layers": [1], "v_num_grad_steps": 1}
    values |= {"v_lr": 0.5, "v_loss_layer": 3, "v_weight_decay": 0.5, "clamp_norm_factor": 4, "kl_factor": 0.06}
    values |= {
        "mom2_adjustment": True,
        "mom2_update_weight": 10.0,
        "stats_dir": str(tmp_path),
        "nas_restart": 2,
        "ppl_sentence_num": 0,
    }
    measured = iter([[1.0], [2.0]])
    monkeypatch.setattr(NormAnchor, "pilot_norms", lambda self, requests: next(measured))
    for matmul in ("exact", "tf32", "exact", "tf32"):
        anchor = NormAnchor(BaseEditor.from_hparams(load_hparams({**values, "matmul": matmul})).method)  # type: ignore[arg-type]
        anchors.append(anchor._measured())
    assert anchors == [1.0, 2.0, 1.0, 2.0]
    for kept in tmp_path.rglob("norm-anchor-*.json"):
        kept.write_text("{}")
    with pytest.raises(StatsError, match=r"norm-anchor-.*delete it"):
        anchor._measured()
