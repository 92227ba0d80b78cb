"""benchmarks/gpu.py: it runs without a card, its random models are the real ones', its counts are right."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoModelForCausalLM

from easyeditor import EditTrainer
from easyeditor.methods.memit.method import MEMIT

sys.path.insert(0, str(ROOT / "benchmarks"))

import cards
import gpu
import shapes

WIDTHS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"n_embd": 32, "n_head": 4},
    "gptj-6b": {"n_embd": 32, "n_head": 4, "rotary_dim": 4},
    "llama3-8b": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
}


def test_every_stage_runs_without_a_card_and_ends_with_the_projected_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = gpu.arguments(["--sentences", "4", "--passes", "2", "--memit", "2", "--together", "1", "2"])
    assert "no card here: the small shape on the CPU" in capsys.readouterr().out
    said: list[str] = []
    found = gpu.run("small", args, said.append)
    assert [name.partition(",")[0] for name in found] == [
        *("record", "search") * 2,
        *("keys", "solve", "ROME edit", "perplexity", "perplexity", "scores", "scores and perplexity"),
        *("statistics", "MEND", "MEND", "MEMIT of 2"),
    ]
    assert all(stage.seconds > 0 for name, stage in found.items() if not name.startswith("search"))  # a difference
    assert all((stage.flop is None) == name.startswith("solve") for name, stage in found.items())
    assert "21,919 edits in" in said[-1]
    assert f"{found['keys'].seconds * 1000:.1f} ms" in said[-1]


def test_without_a_stage_that_it_needs_nothing_is_projected() -> None:
    args = gpu.arguments(
        ["--shape", "small", "--device", "cpu", "--stages", "keys", "--memit", "1", "--sentences", "2"]
    )
    assert "needs the stages" in gpu.projection(gpu.run("small", args, lambda _: None), args)


@pytest.mark.parametrize("shape", WIDTHS)
def test_a_random_model_has_the_tables_of_one_built_as_usual(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, values = shapes.SHAPES[shape]
    monkeypatch.setitem(shapes.SHAPES, shape, (kind, {**values, **WIDTHS[shape], "vocab_size": 300}))
    config = shapes.config_of(shape, blocks=3)
    made = shapes.random_model(config, torch.device("cpu"), torch.float32)
    usual = AutoModelForCausalLM.from_config(config)
    tables = dict(usual.named_buffers())
    assert all(torch.equal(table, tables.pop(name)) for name, table in made.named_buffers())
    assert not tables
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in usual.named_parameters()}
    usual.load_state_dict(made.state_dict())
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, usual.eval()(input_ids=ids).logits)
        assert float(made(input_ids=ids).logits.std()) > 0


def test_operations_are_counted_forward_and_backward() -> None:
    clock = cards.Clock(torch.device("cpu"), once=True)
    x, weight = torch.ones(3, 5), torch.ones(7, 5, requires_grad=True)
    product = 2 * 3 * 5 * 7

    def plain() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(x, weight)

    assert clock("", plain).flop == product
    assert clock("", lambda: torch.nn.functional.linear(x, weight).sum().backward()).flop == 2 * product


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "tf32", 378),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("Tesla T4", "bfloat16", None),
        ("A card of tomorrow", "float32", None),
    ],
)
def test_a_cards_peak_is_that_of_its_name(
    name: str, kind: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert cards.peak_of(torch.device("cuda", 0), kind) == peak
    stage = cards.Stage(name="x", unit="y", seconds=2.0, flop=2e12, peak_bytes=cards.GIB)
    share = "-" if peak is None else f"{100 / peak:.1f} %"
    assert stage.row(peak) == f"| x | y | 2 | 1 | {share} | 1.00 |"


@pytest.mark.parametrize("once", [False, True])
def test_counting_is_not_timed(once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting by operator takes longer than the operators do on a card: what is counted is not what is timed, unless
    one run has to be both."""
    counted: dict[str, list[bool]] = {"mend": [], "memit": []}

    def watch(kind: Any, name: str, stage: str) -> None:
        real = getattr(kind, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            counted[stage].append(bool(_get_current_dispatch_mode_stack()))
            return real(*args, **kwargs)

        monkeypatch.setattr(kind, name, watched)

    watch(EditTrainer, "_steps", "mend")
    watch(MEMIT, "edit", "memit")
    flags = ["--shape", "small", "--device", "cpu", "--stages", "mend", "memit", "--memit", "2", "--passes", "1"]
    args = gpu.arguments([*flags, "--sentences", "2", "--together", "1", *["--once"] * once])
    found = gpu.run("small", args, lambda _: None)
    assert counted["memit"] == ([True] if once else [True, False])
    assert counted["mend"] == [True] * 3 + [False] * 3 * (not once)
    assert all(stage.flop and stage.seconds > 0 for stage in found.values())
