"""CounterFact and ZsRE run by lm-evaluation-harness itself, found as it finds tasks, give our ES, PS and NS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, build, rome_hparams, tokenizer
from script_runs import save_tiny

from easyeditor import BaseEditor, EditRequest
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.dataset.reader import read_dataset
from easyeditor.evaluate.registry import evaluate
from easyeditor.export.harness import tasks
from easyeditor.export.write import export
from easyeditor.lm.weights import applied
from easyeditor.values.edit import WeightDelta

HARNESS = ROOT / "easyeditor" / "export" / "harness"
OURS = {"efficacy": "ES", "paraphrase": "PS", "neighborhood": "NS"}
BRIDGE = EditRequest.make(
    "The Bridge is in",
    subject="Bridge",
    target_new="the town of Rome",
    ground_truth=" London",
    rephrase_prompts=["Where is the Bridge? In", "The Bridge lies in"],
    locality={
        "neighborhood": {"prompt": ["The Forum is in"], "ground_truth": ["Rome"]},
        "distracting": {"prompt": ["You are"], "ground_truth": ["here"]},
    },
)
SEA = EditRequest.make("The sea is", subject="sea", target_new="blue")


def test_documents_by_hand() -> None:
    tok = tokenizer()
    made = tasks.documents([BRIDGE, SEA], tok)
    assert [(doc["kind"], doc["case"], doc["query"], doc["choices"]) for doc in made] == [
        ("efficacy", 0, "The Bridge is in", [" the town of Rome", " London"]),
        ("paraphrase", 0, "Where is the Bridge? In", [" the town of Rome", " London"]),
        ("paraphrase", 0, "The Bridge lies in", [" the town of Rome", " London"]),
        ("neighborhood", 0, "The Forum is in", [" Rome", " the town of Rome"]),
        ("efficacy", 1, "The sea is", [" blue"]),
    ]
    assert made[0]["lengths"] == [len(tok(text)["input_ids"]) for text in (" the town of Rome", " London")]


def test_results_are_per_token_and_means_go_by_record() -> None:
    doc = {"kind": "efficacy", "case": 3, "lengths": [4, 1]}
    assert tasks.results(doc, [(-4.0, False), (-2.0, True)]) == {"efficacy": (3, 1.0), "efficacy_greedy": (3, 0.0)}
    assert tasks.results({**doc, "lengths": [1, 1]}, [(-4.0, True), (-2.0, False)])["efficacy"] == (3, 0.0)
    assert tasks.results({**doc, "lengths": [1]}, [(-4.0, True)]) == {"efficacy_greedy": (3, 1.0)}
    assert tasks.mean_of_records([(0, 1.0), (0, 0.0), (0, 0.0), (1, 1.0)]) == pytest.approx((1 / 3 + 1) / 2)


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="easyeditor_zsre: answers are compared per token, so name a tokenizer"):
        tasks.zsre()
    with pytest.raises(ConfigError, match="no tokenizer at") as refused:
        tasks.counterfact(pretrained=str(tmp_path / "nothing"))
    assert "\n" not in str(refused.value)
    tokenizer().save_pretrained(tmp_path / "t")
    monkeypatch.setenv("EASYEDITOR_ZSRE", str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="no such file"):
        tasks.zsre(tokenizer=str(tmp_path / "t"))


def test_files_are_named_by_the_metadata_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer().save_pretrained(tmp_path / "t")
    for name, request in (("a", BRIDGE), ("b", SEA)):
        (tmp_path / f"{name}.json").write_text(json.dumps([request.to_json()]))
    monkeypatch.setenv("EASYEDITOR_COUNTERFACT", str(tmp_path / "a.json"))
    named = {"tokenizer": str(tmp_path / "t")}
    assert tasks.counterfact(**named)["test"][0]["query"] == BRIDGE.prompt
    assert tasks.counterfact(**named, counterfact=str(tmp_path / "b.json"))["test"][0]["query"] == SEA.prompt


@pytest.mark.parametrize("kind", ["model", "checkpoint", "adapter"])
@pytest.mark.parametrize("name", ["easyeditor_counterfact", "easyeditor_zsre"])
def test_the_harness_finds_the_tasks_and_its_numbers_are_ours(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model in memory, and of an edit that was exported."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is optional: pip install -r requirements-eval.txt")
    from lm_eval import evaluate as run
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    save_tiny(tmp_path / "m")
    kept = json.loads((ROOT / "data" / "facts.json").read_text())[:6]
    source = tmp_path / "facts.json"
    source.write_text(json.dumps(kept))
    monkeypatch.setenv(name.upper(), str(source))
    manager = TaskManager(
        include_path=str(HARNESS), include_defaults=False, metadata={"pretrained": str(tmp_path / "m")}
    )
    assert manager.all_tasks == ["easyeditor_counterfact", "easyeditor_zsre"]
    model, tok = build("llama"), tokenizer()
    requests = read_dataset(str(source)).requests
    deltas: tuple[WeightDelta, ...] = ()
    loaded: dict[str, Any] = {"pretrained": model, "tokenizer": tok, "backend": "causal"}
    if kind != "model":
        edit = BaseEditor(rome_hparams((model, tok))).compute(requests[0])
        export(model, tok, [edit], tmp_path / "made", kind=kind, base=str(tmp_path / "m"))  # type: ignore[arg-type]
        adapter = {"pretrained": str(tmp_path / "m"), "peft": str(tmp_path / "made")}
        loaded = {**(adapter if kind == "adapter" else {"pretrained": str(tmp_path / "made")}), "dtype": "float32"}
        deltas = edit.deltas
    found: Any = run(
        lm=HFLM(**loaded, batch_size=4, device="cpu"),
        task_dict=manager.load([name]),
        bootstrap_iters=0,
        log_samples=False,
    )
    numbers = {key.removesuffix(",none"): v for key, v in found["results"][name].items() if key.endswith(",none")}
    with applied(model, deltas):
        ours = evaluate(model, tok, requests, list(OURS.values())).summary()
    assert {key: numbers[key] for key in OURS} == pytest.approx({key: ours[own]["mean"] for key, own in OURS.items()})
    assert {f"{key}_greedy" for key in OURS} <= numbers.keys()
