"""Texts longer than the context: strided windows against a plain loop, what is skipped, and the line that refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, tokenizer
from script_runs import call, save_tiny

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.commands import ppl
from easyeditor.evaluate.perplexity import PerplexityProbe

TEXTS = [
    "The sea is blue.",
    "They say that the Bridge is in the old town by the river. " * 6,
    "Bay is in Rome and " * 22,
]
SIZE = 128


def by_the_definition(model: Any, ids: list[int], stride: int) -> tuple[float, int]:
    """Mean NLL and tokens of one text: windows of the model's positions, `stride` apart; a token is scored in the first
    window that has it, one forward each."""
    nlls, scored = [], 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + SIZE]
        with torch.no_grad():
            logs = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        nlls += [-float(logs[at - begin - 1, ids[at]]) for at in range(scored, begin + len(window))]
        scored = begin + len(window)
        if scored == len(ids):
            break
    return math.fsum(nlls) / len(nlls), len(nlls)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [40, SIZE - 1])
def test_strided_windows_score_every_token_once(stride: int, bos: bool, fast: bool) -> None:
    model, tok = build("llama"), tokenizer()
    found = PerplexityProbe(model, tok, TEXTS, add_start_token=bos, fast=fast, stride=stride, batch_size=2).measure()
    for i, text in enumerate(TEXTS):
        ids = [tok.bos_token_id] * bos + tok(text, add_special_tokens=False)["input_ids"]
        nll, count = by_the_definition(model, ids, stride)
        assert found.nlls[i] == pytest.approx(nll, rel=1e-5)
        assert found.tokens[i] == count == len(ids) - 1
    short = PerplexityProbe(model, tok, TEXTS[:1], add_start_token=bos, fast=fast).measure()
    assert found.nlls[0] == pytest.approx(short.nlls[0], rel=1e-6)


def test_a_long_text_is_named_with_the_ways_out() -> None:
    model, tok = build("llama"), tokenizer()
    with pytest.raises(DataError, match=r"^sentence 3 \('Bay is.* the limit is 128 .*--skip-long, --window STRIDE"):
        PerplexityProbe(model, tok, TEXTS)
    for stride in (0, SIZE):
        with pytest.raises(ConfigError, match="allowed: 1 to 127"):
            PerplexityProbe(model, tok, TEXTS, stride=stride)


def test_the_script_has_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "m")
    (tmp_path / "t.txt").write_text("\n\n".join([*TEXTS[1:], TEXTS[0]]) + "\n \n")
    flags = ["--model", tmp_path / "m", "--data", tmp_path / "t.txt", "--device", "cpu", "--json"]
    refused = call(ppl, flags, monkeypatch, capsys)
    assert (refused.code, refused.out) == (2, "")
    skipped = call(ppl, [*flags, "--skip-long"], monkeypatch, capsys)
    assert [one["number"] for one in skipped.json["worst"]] == [3]
    assert (skipped.json["too_long"], skipped.json["perplexity"]["sentences"]) == ([1, 2], 1)
    windows = call(ppl, [*flags, "--window", "64"], monkeypatch, capsys).json
    assert (windows["window"], windows["perplexity"]["sentences"]) == (64, 3)
    assert call(ppl, [*flags, "--window", "0"], monkeypatch, capsys).code == 2
    assert call(ppl, [*flags, "--window", "9", "--skip-long"], monkeypatch, capsys).code == 2
