"""`ppl_bos`: whether the perplexity sentences begin with BOS, what is recorded of it, and what is warned of."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, rome_hparams, tokenizer

from easyeditor import BaseEditor
from easyeditor.base.errors import ConfigError
from easyeditor.commands import ppl
from easyeditor.dataset.formats import parse
from easyeditor.dataset.sentences import Sentences
from easyeditor.evaluate.perplexity import PerplexityProbe, begins_with_bos
from easyeditor.export.sources import of_record

SENTENCES = ["The mother tongue of Danielle Darrieux is French.", "Paris is the capital of France."]
PROBED = Sentences(name="two", path="none", sha256="none", texts=tuple(SENTENCES))
EDIT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


def edited(tiny: Any, bos: bool, **changes: Any) -> dict[str, Any]:
    editor = BaseEditor(rome_hparams(tiny("llama", bos=bos), **changes), sentences=PROBED)
    return editor.examine(parse(EDIT, "request", 0)).record.to_json()


@pytest.mark.parametrize(
    ("adds", "setting", "begins"),
    [
        (True, "papers", False),
        (True, "auto", True),
        (True, "always", True),
        (False, "auto", False),
        (False, "always", True),
    ],
)
def test_the_setting_reaches_the_probe_and_is_recorded(tiny: Any, adds: bool, setting: str, begins: bool) -> None:
    record = edited(tiny, adds, ppl_bos=setting)
    lm, tok = tiny("llama", bos=adds)
    wanted = PerplexityProbe(lm, tok, SENTENCES, add_start_token=begins).measure()
    assert record["perplexity"]["before"]["bos"] is begins
    assert record["perplexity"]["after"]["bos"] is begins
    assert record["pre"]["ppl"] == pytest.approx(wanted.mean, rel=1e-5)
    assert sum(wanted.tokens) == sum(
        len(tok(s, add_special_tokens=False)["input_ids"]) - (not begins) for s in SENTENCES
    )


def test_no_bos_to_begin_with_is_an_error() -> None:
    tok = copy.deepcopy(tokenizer())
    tok.bos_token = None
    assert not begins_with_bos(tok, "auto")
    with pytest.raises(ConfigError, match="ppl_bos is always, and the tokenizer has no BOS token"):
        begins_with_bos(tok, "always")


def test_a_bos_left_out_is_one_warning(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for bos, setting in ((False, "papers"), (True, "auto"), (True, "papers")):
            edited(tiny, bos, ppl_bos=setting)
    assert [r.getMessage() for r in caplog.records if "BOS" in r.getMessage()] == [
        "perplexity is measured without BOS, as in the papers, and this tokenizer begins every text with one (<s>); "
        "ppl_bos: auto measures with it"
    ]


def test_a_card_says_where_perplexity_is_with_bos(tiny: Any) -> None:
    for bos in (False, True):
        editor = BaseEditor(rome_hparams(tiny("llama", bos=bos), ppl_bos="auto"), sentences=PROBED)
        record = editor.examine(parse(EDIT, "request", 0)).record
        names = [name for name, *_ in of_record(record).rows]
        assert ("perplexity (with BOS)" in names, "perplexity" in names) == (bos, not bos)


def test_an_unedited_model_above_the_threshold_is_one_warning(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    editor = BaseEditor(rome_hparams(tiny("llama"), collapse_threshold=10.0), sentences=PROBED)
    with caplog.at_level(logging.WARNING):
        found = [editor.examine(parse(EDIT, "request", 0)).record.collapse for _ in range(2)]
    assert found[0] is not None
    assert found[0].limit == 5 * found[0].ppl_before
    (told,) = [r.getMessage() for r in caplog.records if "unedited" in r.getMessage()]
    assert "above collapse_threshold (10)" in told
    assert f"collapse_ratio 5: above {5 * found[0].ppl_before:,.0f}" in told
    assert "ppl_bos: auto" in told


def test_the_scripts_flag(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tok = tiny("llama", bos=True)
    lm.save_pretrained(tmp_path / "lm")
    tok.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    found = {}
    for setting in ("papers", "auto"):
        flags = ["--model", tmp_path / "lm", "--data", tmp_path / "texts.txt", "--device", "cpu", "--ppl-bos", setting]
        out = tmp_path / f"{setting}.json"
        monkeypatch.setattr(sys, "argv", [str(ROOT / "ppl.py"), *map(str, flags), "--output", str(out)])
        assert ppl.main() == 0
        found[setting] = json.loads(out.read_text(encoding="utf-8"))["perplexity"]
    assert (found["papers"]["bos"], found["auto"]["bos"]) == (False, True)
    assert found["auto"]["tokens"] == found["papers"]["tokens"] + len(SENTENCES)
