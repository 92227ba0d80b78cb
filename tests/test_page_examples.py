"""The pages' examples run: a metric, a model, the library's calls, a record (a method: tests/test_seam.py)."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import test_replay
import torch
import yaml
from conftest import ROOT
from script_runs import save_tiny, write_yaml

import easyeditor
from easyeditor.commands import evaluate as evaluate
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands import report as report
from easyeditor.dataset.formats import FORMATS, parse
from easyeditor.evaluate.metric import Answers, Settings, Value
from easyeditor.evaluate.registry import GROUPS, METRICS
from easyeditor.lm import architectures
from easyeditor.lm.generate import Generated
from easyeditor.values.edit import EditRequest

LONGEST_README = 150  # lines
BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")


def blocks(page: str) -> dict[str, str]:
    """A page's code blocks by the file they belong to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(r"```\w+ (\S+)\n(.*?)```", text, re.DOTALL))


# docs/add-a-metric.md


@pytest.fixture
def stutter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's metric, installed as the page says."""
    made = blocks("docs/add-a-metric.md")
    (tmp_path / "stutter.py").write_text(made["easyeditor/evaluate/stutter.py"], encoding="utf-8")
    monkeypatch.setattr(easyeditor.evaluate, "__path__", [*easyeditor.evaluate.__path__, str(tmp_path)])
    line, _, group = made["easyeditor/evaluate/registry.py"].partition("\n\n")
    names: dict[str, Any] = {}
    exec(line, names)
    added = eval("{" + group + "}", names)
    monkeypatch.setitem(GROUPS, "stutter", added["stutter"])
    for metric in added["stutter"]:
        monkeypatch.setitem(METRICS, metric.name, metric)
    yield importlib.import_module("easyeditor.evaluate.stutter")
    del sys.modules["easyeditor.evaluate.stutter"]


@pytest.mark.parametrize(
    ("text", "share"), [("The the THE the", 3 / 4), (" Italy. It is in Italy", 1 / 5), ("…", None)]
)
def test_the_page_s_metric_by_hand(text: str, share: float | None, stutter: Any) -> None:
    metric = METRICS["stutter"]
    (ask,) = metric.asks(BAY, Settings())
    written = Generated(text=text, whole=BAY.prompt + text, stop="newline", tokens=4)
    found = metric.value(BAY, Answers(settings=Settings(), generated={ask: written}))
    if share is None:
        assert found == Value(value=None, reason="the model wrote no words")
    else:
        assert found.value == pytest.approx(share)


def test_the_page_s_metric_is_known_everywhere(
    stutter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    facts = [{"prompt": "Bay, which is located in", "subject": "Bay", "target_new": "Italy"}]
    (tmp_path / "one.json").write_text(json.dumps(facts))
    begin = ["--hparams", settings, "--metrics", "stutter", "--output"]
    single = script(single_case_edit, *begin, "single", "--json")
    many = script(mass_edit, *begin, "many", "--data", "one.json")
    apart = script(
        evaluate, "--model", "llama", "--data", "one.json", "--device", "cpu", "--metrics", "stutter", "--json"
    )
    assert (single.code, many.code, apart.code) == (0, 0, 0), single.err + many.err + apart.err
    share = apart.json["after"]["rows"][0]["stutter"]["value"]
    assert single.json["metrics"]["before"]["stutter"]["value"] == share
    assert 0 <= share < 1
    assert "stutter" in json.loads((tmp_path / "many/summary.json").read_text())["metrics"]
    assert script(report, "many").code == 0
    assert "stutter" in (tmp_path / "many/report/tables/collapse.csv").read_text(encoding="utf-8")


# docs/add-a-model.md


@pytest.fixture
def olmo(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The page's tiny model; its row is not in the table yet."""
    made = blocks("docs/add-a-model.md")
    for name, sizes in eval("{" + made["tests/conftest.py"] + "}", {"_LLAMA": conftest._LLAMA}).items():
        monkeypatch.setitem(conftest.TINY, name, sizes)
    test_replay.model.cache_clear()
    return made


def row(made: dict[str, str]) -> architectures.Architecture:
    """The page's row of the table."""
    code = "{" + made["easyeditor/lm/architectures.py"] + "}"
    return eval(code, {"Architecture": architectures.Architecture})["olmo2"]


def test_the_page_s_yaml_needs_no_row_and_the_row_no_names(
    olmo: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    """Without the row the plain way, with it replay without the three names: the same edit."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(olmo["hparams/ROME/olmo2-1b.yaml"])
    small = {"layers": [1], "v_num_grad_steps": 6, "v_loss_layer": 3, "ppl_sentence_num": 2, "device": "cpu"}
    small |= {"model_name": str(save_tiny(tmp_path / "olmo", "olmo2")), "context_templates": ["{}", "You. {}"]}
    named = {key: value for key, value in settings.items() if key.endswith("_tmp")}
    short = {key: value for key, value in (settings | small).items() if key not in named}
    assert len(named) == 3
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(short | named))
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    run = ["--json", "--hparams"]
    plain, found = (script(single_case_edit, *run, f"{file}.yaml", "--output", file) for file in ("named", "short"))
    assert (plain.code, found.code) == (0, 0), plain.err + found.err
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", row(olmo))
    replay = script(single_case_edit, *run, "short.yaml", "--output", "replay")
    assert replay.code == 0, replay.err
    (before,), (same,), (after,) = (ran.json["trace"].values() for ran in (plain, found, replay))
    for number in ("numerator_norm", "denominator", "delta_norm"):
        assert same[number] == before[number]
        assert after[number] == pytest.approx(before[number], rel=test_replay.TOLERANCE)


def test_the_page_s_row_passes_the_test_it_names_and_a_wrong_flag_does_not(
    olmo: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = row(olmo)
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", right)
    test_replay.test_every_architecture_has_a_tiny_model()
    test_replay.test_forwards_agree_in_logits_and_gradients("olmo2", 1)
    wrong = architectures.Architecture(block=right.block, mlp=right.mlp, rewrite=right.rewrite)
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", wrong)
    with pytest.raises(AssertionError):
        test_replay.test_forwards_agree_in_logits_and_gradients("olmo2", 1)


# docs/library.md, docs/data.md


def test_the_library_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its blocks, one after another, on a tiny model."""
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code:
        exec(block.replace("hparams/ROME/smollm2-135m", str(settings)), names)
    assert len(code) == 4
    assert torch.equal(names["again"].deltas[0].dense(), names["result"].deltas[0].dense())
    assert names["record"]["requested_rewrite"]["target_new"] == "English"
    assert not names["editor"].edited
    assert "gen_rewrite_contains" in names["found"].row(0)
    assert capsys.readouterr().out.count("\n") == 5


def test_the_readme_is_short_and_its_call_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= LONGEST_README
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("./hparams/ROME/smollm2-135m", str(settings)), names)
    assert names["metrics"][0]["requested_rewrite"]["target_new"] == "English"


def test_the_data_page_s_record_is_read_whole() -> None:
    (found,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    (raw,) = json.loads(found)
    request = parse(raw, "docs/data.md")
    assert (request.case_id, request.ground_truth, len(request.rephrase_prompts)) == ("france", "Paris", 1)
    assert (request.locality.keys(), request.portability.keys()) == ({"neighborhood"}, {"one_hop"})
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    listed = [set(re.findall(r"`(\w+)`", row.split("|")[2])) for row in page.splitlines() if row.startswith("| ")]
    assert [needed for needed, _ in FORMATS.values() if needed not in listed] == []
