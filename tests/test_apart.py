"""A training split that shares no text with the held-out requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from easyeditor import CounterFactDataset, EditRequest
from easyeditor.base.errors import DataError
from easyeditor.commands import pretrain_mend
from easyeditor.dataset.training import apart

FACTS = ROOT / "data" / "facts.json"


def texts(request: EditRequest) -> set[str]:
    probed = [prompt for probe in request.locality.values() for prompt in probe.prompts]
    return {request.prompt, *request.rephrase_prompts, *probed}


def made(prompt: str, *probes: str, rephrase: str = "Say it otherwise") -> EditRequest:
    locality = {"near": {"prompt": list(probes), "ground_truth": [f"of {p}" for p in probes]}} if probes else None
    return EditRequest.make(
        prompt, subject=None, target_new="Rome", rephrase_prompts=[rephrase], locality=locality, case_id=prompt
    )


def test_shared_probes_go_and_requests_that_share_their_prompt_or_lose_all_probes() -> None:
    train = [
        made("A is", "B is", "C is", "D is"),
        made("B is", "C is"),  # edits what a held-out request probes
        made("E is", "C is", rephrase="X is"),  # a paraphrase that is a held-out prompt
        made("F is", "X is"),  # nothing but a held-out prompt to keep
        made("G is"),
    ]
    kept = apart(train, [made("X is", "B is", "D is", rephrase="other words")])
    assert [request.prompt for request in kept] == ["A is", "G is"]
    assert kept[0].locality["near"].prompts == ("C is",)
    assert kept[0].locality["near"].answers == ("of C is",)
    assert train[0].locality["near"].prompts == ("B is", "C is", "D is")


def test_the_facts_have_such_a_split() -> None:
    train, *held_out = (CounterFactDataset(FACTS, split=name) for name in ("train", "validation", "test"))
    unseen = {text for data in held_out for request in data for text in texts(request)}
    assert any(unseen & texts(request) for request in train)
    kept = apart(train, [request for data in held_out for request in data])
    assert len(kept) == 1020
    assert not any(unseen & texts(request) for request in kept)
    assert all(request.locality for request in kept)


def test_the_scripts_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dry-run", "--output", str(tmp_path / "out"), "--apart"]
    monkeypatch.setattr(sys, "argv", ["pretrain_mend.py", *flags])
    assert pretrain_mend.main() == 0
    assert json.loads(capsys.readouterr().out)["requests"] == {"train": 1020, "validation": 232}
    monkeypatch.setattr(sys, "argv", ["pretrain_mend.py", *flags, str(FACTS)])
    with pytest.raises(DataError, match="--apart leaves no request"):
        pretrain_mend.main()
