"""Training MEND on a tiny model: it learns, stops, resumes to the same weights, and says what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build, same, states, tokenizer
from safetensors.torch import load_file
from script_runs import Ran, call, save_tiny

from easyeditor import CounterFactDataset, EditRequest, EditTrainer, MENDTrainingHparams, ZsreDataset
from easyeditor.base.errors import ConfigError, DataError, NumericalError, OutputError
from easyeditor.commands import pretrain_mend
from easyeditor.dataset.training import apart
from easyeditor.lm.discover import anatomy
from easyeditor.methods.mend.archive import read_archive
from easyeditor.results.journal import read_journal
from easyeditor.results.run import TRAINING
from easyeditor.trainer import editor as training
from easyeditor.trainer.tasks import Tasks

FACTS = ROOT / "data" / "facts.json"
WEIGHTS = ["model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"]
PLACES = ["river", "museum", "shop", "garden", "school", "street", "market", "station"]


def records() -> list[dict[str, Any]]:
    """CounterFact records about places."""
    made = []
    for number, place in enumerate(PLACES):
        rewrite = {"prompt": "The {} is", "subject": place, "target_true": {"str": "closed"}}
        rewrite["target_new"] = {"str": ["open", "late"][number % 2]}
        texts = {"paraphrase_prompts": [f"Today the {place} is", f"They say the {place} is"]}
        texts["neighborhood_prompts"] = [f"The {other} was" for other in PLACES if other != place][:3]
        made.append({"case_id": number, "split": "train", "requested_rewrite": rewrite, **texts})
    return made


def write(path: Path, raw: Any) -> Path:
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def settings(pair: Any, **changes: Any) -> MENDTrainingHparams:
    values = {"model_name": pair, "device": "cpu", "inner_params": WEIGHTS, "rank": 8, "edit_lr": -0.02, "lr": 3e-3}
    values |= {"lr_lr": 3e-3, "accumulate_bs": 2, "max_iters": 12, "val_interval": 4, "log_interval": 4, "val_steps": 4}
    return MENDTrainingHparams.from_dict({**values, "model_save_pt": 6, "silent": True, **changes})


@pytest.fixture
def data(tmp_path: Path) -> CounterFactDataset:
    return CounterFactDataset(write(tmp_path / "facts.json", records()))


@pytest.fixture
def pair() -> Any:
    return build("llama"), tokenizer()


def trained(pair: Any, data: Any, folder: Path, *, resume: bool = False, **changes: Any) -> EditTrainer:
    trainer = EditTrainer(settings(pair, **changes), data, data, folder=folder, resume=resume)
    trainer.run()
    return trainer


def test_training_lowers_the_losses_and_leaves_the_model_alone(
    pair: Any, data: CounterFactDataset, tmp_path: Path
) -> None:
    before = states(pair[0])
    result = EditTrainer(settings(pair, max_iters=60, val_interval=20), data, data, folder=tmp_path / "run").run()
    assert same(pair[0], before)
    assert (result.steps, result.reason) == (60, "max_iters reached")
    entries = list(read_journal(tmp_path / "run" / TRAINING))
    trains = [entry for entry in entries if entry["kind"] == "train"]
    validations = [entry for entry in entries if entry["kind"] == "validation"]
    assert [entry["step"] for entry in trains] == list(range(4, 61, 4))
    assert [entry["step"] for entry in validations] == [20, 40, 60]
    assert validations[-1]["edit_loss"] < 0.7 * trains[0]["edit_loss"]
    assert {"edit_loss", "locality_loss", "edit_acc", "locality_drawdown"} <= trains[0].keys() & validations[0].keys()
    best = min(validations, key=lambda entry: entry["total_loss"])
    assert result.best == {"step": best["step"], "total_loss": best["total_loss"]}
    described = json.loads((tmp_path / "run" / "archive.json").read_text())["training"]
    assert described["step"] == best["step"]
    assert described["validation"]["total_loss"] == best["total_loss"]
    assert json.loads((tmp_path / "run" / "last" / "archive.json").read_text())["training"]["step"] == 60


def test_the_archive_is_the_best_and_edits(pair: Any, data: CounterFactDataset, tmp_path: Path) -> None:
    from easyeditor import BaseEditor, MENDHyperParams

    trained(pair, data, tmp_path / "run", max_iters=40)
    hparams = MENDHyperParams.from_dict({"model_name": pair, "archive": str(tmp_path / "run"), "ppl_sentence_num": 0})
    examined = BaseEditor(hparams).examine(data[0])
    after, before = (examined.record.probabilities["target_new"][when] for when in ("after", "before"))
    assert after > 2 * before


@pytest.mark.parametrize("replay", [True, False])
def test_a_killed_and_resumed_run_ends_with_the_same_weights(
    replay: bool, pair: Any, data: CounterFactDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(pair, data, tmp_path / "whole", replay=replay)

    class Killed(BaseException):
        pass

    steps = EditTrainer._steps

    def killing(self: EditTrainer, which: range) -> Any:
        if which.start == 10:
            raise Killed
        return steps(self, which)

    monkeypatch.setattr(EditTrainer, "_steps", killing)
    with pytest.raises(Killed):
        trained(pair, data, tmp_path / "cut", replay=replay)
    monkeypatch.setattr(EditTrainer, "_steps", steps)
    (tmp_path / "cut" / "log.jsonl").open("a").write('{"kind": "train", "st')
    resumed = trained(pair, data, tmp_path / "cut", replay=replay, resume=True)
    for (name, a), b in zip(whole.hypernet.state_dict().items(), resumed.hypernet.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = (load_file(tmp_path / name / training.STATE) for name in ("whole", "cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    timing = {"seconds": 0, "steps_per_s": 0}
    whole_log, cut_log = (list(read_journal(tmp_path / name / TRAINING)) for name in ("whole", "cut"))
    assert [{**entry, **timing} for entry in whole_log] == [{**entry, **timing} for entry in cut_log]


def test_early_stopping_stops(pair: Any, data: CounterFactDataset, tmp_path: Path) -> None:
    options = {"max_iters": 1000, "val_interval": 4, "early_stop_patience": 8, "lr": 1e-12, "lr_lr": 1e-12}
    trainer = EditTrainer(settings(pair, norm=False, **options), data, data, folder=tmp_path / "run")
    result = trainer.run()
    assert result.reason == "no better validation for 8 steps"
    assert 8 < result.steps <= 40
    assert (tmp_path / "run" / training.STATE).exists()


@pytest.mark.parametrize(
    ("when", "every", "message"),
    [(4, 2, "the hypernetwork is not finite after step 6"), (6, 6, "the loss is not finite (nan in training step 9)")],
)
def test_nan_stops_and_keeps_the_last_checkpoint(
    when: int,
    every: int,
    message: str,
    pair: Any,
    data: CounterFactDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = EditTrainer(settings(pair, val_interval=every), data, data, folder=tmp_path / "run")
    update = EditTrainer._update

    def poisoned(self: EditTrainer) -> None:
        update(self)
        if self.progressed.step == when:
            with torch.no_grad():
                self.hypernet.edit_lrs.fill_(float("nan"))

    monkeypatch.setattr(EditTrainer, "_update", poisoned)
    with pytest.raises(NumericalError) as caught:
        trainer.run()
    assert message in str(caught.value)
    assert str(tmp_path / "run" / training.STATE) in str(caught.value)
    kept = load_file(tmp_path / "run" / training.STATE)
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())
    assert read_archive(str(tmp_path / "run"), anatomy(pair[0])).trained


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(
    pair: Any,
    data: CounterFactDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = EditTrainer(settings(pair, max_iters=2), data, folder=tmp_path / "run")
    for name in ("model", "tok", "config"):
        with pytest.raises(ConfigError, match=f"EditTrainer.{name} cannot be assigned"):
            setattr(trainer, name, getattr(trainer, name))
    before = {name: value.clone() for name, value in trainer.hypernet.named_parameters()}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(float("inf")))
    trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in trainer.hypernet.named_parameters())
    assert trainer.progressed.skipped == 1
    assert "the gradient is not finite; this update is left out" in caplog.text


def test_gradients_are_clipped(pair: Any, data: CounterFactDataset, tmp_path: Path) -> None:
    moved = []
    for clip in (1e9, 1e-3):
        options = {"grad_clip": clip, "opt": "SGD", "lr": 1.0, "lr_lr": 1.0, "max_iters": 2}
        trainer = EditTrainer(settings(pair, **options), data, folder=tmp_path / f"{clip}")
        before = torch.cat([p.detach().flatten() for p in trainer.hypernet.parameters()])
        trainer.run()
        after = torch.cat([p.detach().flatten() for p in trainer.hypernet.parameters()])
        moved.append(float((after - before).norm()))
    assert moved[0] > 1e-2
    assert moved[1] == pytest.approx(1e-3, rel=1e-2)


def test_accumulated_steps_make_one_update(pair: Any, data: CounterFactDataset, tmp_path: Path) -> None:
    """Four steps accumulated move the parameters by the mean of the four gradients."""
    options = {"opt": "SGD", "lr": 0.1, "lr_lr": 0.1, "norm": False, "grad_clip": 1e9}
    together = EditTrainer(settings(pair, accumulate_bs=4, max_iters=4, **options), data, folder=tmp_path / "a")
    start = together.hypernet.edit_lrs.detach().clone()
    together.run()
    singles = []
    for step in range(4):
        one = EditTrainer(settings(pair, accumulate_bs=1, **options), data, folder=tmp_path / f"b{step}")
        one._steps(range(step, step + 1))
        singles.append(one.hypernet.edit_lrs.detach() - start)
    torch.testing.assert_close(together.hypernet.edit_lrs.detach() - start, sum(singles) / 4, rtol=1e-4, atol=1e-7)


def test_every_request_comes_once_an_epoch(data: CounterFactDataset) -> None:
    tasks = Tasks(tokenizer(), data, seed=3, outer=2, locality=1, longest=128)
    ranks = [[tasks.training(step, 2, rank, 2).draws for step in range(2)] for rank in range(2)]
    epoch = [draw.pool.key[1] for draws in (*ranks[0], *ranks[1]) for draw in draws]
    assert sorted(epoch) == list(range(8))
    again = Tasks(tokenizer(), data, seed=3, outer=2, locality=1, longest=128)
    assert again.training(1, 2, 1, 2) == tasks.training(1, 2, 1, 2)
    task = tasks.training(0, 1, 0, 1)
    assert (len(task.edit), len(task.outer), len(task.locality)) == (1, 2, 1)
    assert task.outer[0] == task.edit[0]
    validated = [tasks.validation(number).draws[0].pool.key[1] for number in range(8)]
    assert sorted(validated) == list(range(8))
    assert validated != list(range(8))
    assert tasks.validation(3) == again.validation(3)


# What is refused


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(
    pair: Any, data: CounterFactDataset, tmp_path: Path
) -> None:
    trained(pair, data, tmp_path / "run", max_iters=2)
    with pytest.raises(OutputError, match="holds a training run already; --resume"):
        EditTrainer(settings(pair), data, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another training \(lr .*0.5"):
        EditTrainer(settings(pair, lr=0.5), data, folder=tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"another training \(data '8 requests .* instead of '7 requests"):
        EditTrainer(settings(pair), data[:7], data, folder=tmp_path / "run", resume=True)
    (tmp_path / "run" / training.STATE).write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable checkpoint"):
        EditTrainer(settings(pair), data, data, folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_params": None}, "inner_params is None; allowed: the names"),
        ({"combine": True, "x_only": True}, "x_only and combine are true"),
        ({"combine": False, "x_only": True, "delta_only": True}, "x_only and delta_only are true; choose one"),
        ({"train_base": True}, "train_base is True; allowed: false"),
        ({"dropout": 0.1}, "dropout is 0.1; allowed: 0"),
        ({"half": True}, "half is True; allowed: false; say fp16"),
        ({"accumulate_bs": 0}, "accumulate_bs is 0; allowed: 1 or more"),
        ({"rank": 0}, "rank is 0; allowed: 1 or more, or null"),
        ({"inner_params": [WEIGHTS[0]] * 2}, "allowed: each weight once"),
        ({"early_stop_key": "loss"}, "early_stop_key is 'loss' .*one of 'loss/total_edit_val'"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("tiny", **changes)


def test_data_that_cannot_train_is_refused(tmp_path: Path) -> None:
    bare = [{"prompt": "The river is", "subject": "river", "target_new": "open"}]
    with pytest.raises(DataError, match="no request has locality prompts"):
        Tasks(tokenizer(), CounterFactDataset(write(tmp_path / "a.json", bare)), seed=0, outer=1, locality=1, longest=9)
    with pytest.raises(DataError, match="holds no records of split 'test'"):
        CounterFactDataset(write(tmp_path / "b.json", records()), split="test")
    with pytest.raises(DataError, match="record 0: record with fields"):
        CounterFactDataset(write(tmp_path / "c.json", [{"x": 1}]))
    with pytest.raises(DataError, match="expected a JSON list"):
        CounterFactDataset(write(tmp_path / "d.json", 5))


ZSRE = {"src": "Who owns the river?", "subject": "river", "alt": "the museum", "rephrase": "The river is whose?"}
ZSRE |= {"answers": ["nobody"], "loc": "nq question: who sings", "loc_ans": "Garth"}


def test_every_format_comes_through_the_one_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records without a new answer (`alt`) are left out and counted, as EasyEdit's class does; others that are bad are
    refused, or left out with `skip_bad`."""
    found = ZsreDataset(write(tmp_path / "zsre.json", [ZSRE, ZSRE]), 1, None)
    assert [request.rephrase_prompts for request in found] == [("The river is whose?",)]
    assert found[0].locality["neighborhood"].prompts == ("who sings",)
    bad = {**ZSRE, "src": ""}
    found = ZsreDataset(write(tmp_path / "zsre.json", [ZSRE, {**ZSRE, "alt": ""}, {**ZSRE, "subject": "elsewhere"}]))
    assert ([r.case_id for r in found], [b.number for b in found.dataset.bad]) == ([0, 2], [1])
    assert "zsre.json: bad records left out: 1; the first: record 1" in caplog.text
    with pytest.raises(DataError, match=r"record 1: request 1: prompt is empty; .* --skip-bad leaves"):
        ZsreDataset(write(tmp_path / "bad.json", [ZSRE, bad]))
    assert len(ZsreDataset(tmp_path / "bad.json", skip_bad=True)) == 1
    edit = {"prompt": "{} is in", "subject": "Bay", "target_new": {"str": "Rome"}, "target_true": {"str": "Wales"}}
    chain = {"requested_rewrite": [edit, {**edit, "subject": "Oslo"}], "questions": ["Who?"], "new_answer": "I"}
    lines = tmp_path / "chains.jsonl"
    lines.write_text(f"{json.dumps(chain)}\n{json.dumps(chain)}\n")
    assert [r.case_id for r in CounterFactDataset(lines, 1)] == ["0-1", "0-2"]


# A training split that shares no text with the held-out requests


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


# The script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *args: call(pretrain_mend, [*args], monkeypatch, capsys)


def write_yaml(path: Path, model: Path) -> Path:
    values = settings(str(model)).to_dict()
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
    return path


def test_the_script_trains_resumes_and_reports(tmp_path: Path, script: Any) -> None:
    facts, run = write(tmp_path / "facts.json", records()), tmp_path / "run"
    hparams = write_yaml(tmp_path / "m.yaml", save_tiny(tmp_path / "model"))
    args = ["--hparams", hparams, "--train", facts, "--val", facts, "--output", run, "--train-size", 5]
    ran = script(*args, "--max-iters", 4)
    assert ran.code == 0, ran.err
    assert "4 steps (max_iters reached); best: " in ran.out
    ran = script(*args, "--max-iters", 8)
    assert ran.code == 2
    assert "holds a training run already" in ran.err
    assert script(*args, "--max-iters", 8, "--resume").code == 0
    assert [entry["step"] for entry in read_journal(run / TRAINING) if entry["kind"] == "train"] == [4, 8]
    assert json.loads((run / "config.json").read_text())["max_iters"] == 8
    assert "packages" in json.loads((run / "manifest.json").read_text())


def test_a_dry_run_of_the_script_counts_what_is_left_out(tmp_path: Path, script: Any) -> None:
    zsre = write(tmp_path / "zsre.json", [ZSRE, {**ZSRE, "alt": ""}, {**ZSRE, "src": " "}])
    hparams = write_yaml(tmp_path / "m.yaml", save_tiny(tmp_path / "model"))
    args = ["--hparams", hparams, "--train", zsre, "--dry-run"]
    bare = write(tmp_path / "bare.json", [{key: ZSRE[key] for key in ("src", "subject", "alt")}])
    for flags, message in (
        ([], "zsre.json: record 2: request 2: prompt is empty"),
        (["--skip-bad", "--train", bare], "no request has locality prompts"),
    ):
        ran = script(*args, *flags)
        assert ran.code == 2
        assert message in ran.err
    found = script(*args, "--skip-bad").json
    assert (found["requests"]["train"], [b["record"] for b in found["sets"]["train"]["bad"]]) == (1, [1, 2])


def test_the_script_leaves_out_what_is_held_out(tmp_path: Path, script: Any) -> None:
    flags = ["--dry-run", "--output", tmp_path / "out", "--apart"]
    assert script(*flags).json["requests"] == {"train": 1020, "validation": 232}
    ran = script(*flags, FACTS)
    assert ran.code == 2
    assert "--apart leaves no request" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val", "x.json"], "--val without --train"),
        (["--train", "none.json"], "none.json: no such file"),
        (["--set", "ranks=3"], "unknown key 'ranks' for MENDTrainingHparams; did you mean 'rank'?"),
        (["--hparams", "hparams/TRAINING/MEND/gpt2"], "no such file; in hparams/TRAINING/MEND there are: gpt2-xl.yaml"),
        (["--train-size", "0"], "--train-size is 0; allowed: 1 to"),
    ],
)
def test_the_script_refuses(flags: list[str], message: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = script(*flags)
    assert ran.code == 2
    assert message in ran.err


# Several processes


@pytest.mark.slow
def test_two_processes_share_gradients_and_statistics(tmp_path: Path) -> None:
    """Two ranks of one step each end where one process with two steps per update does."""
    yaml = write_yaml(tmp_path / "m.yaml", save_tiny(tmp_path / "model"))
    facts = write(tmp_path / "facts.json", records())
    common = ["pretrain_mend.py", "--hparams", str(yaml), "--train", str(facts)]
    common += ["--set", "norm=false", "opt=SGD", "lr=0.1"]
    draws = ["outer_prompts=0", "locality_prompts=0", "cedit=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, folder, settings_ in (
        (torchrun, "two", ["accumulate_bs=1", "max_iters=3"]),
        ([], "one", ["accumulate_bs=2", "max_iters=6"]),
    ):
        command = [sys.executable, *start, *common, *draws, *settings_, "--output", str(tmp_path / folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    two, single = (load_file(tmp_path / name / training.STATE) for name in ("two", "one"))
    for key in (key for key in two if key.startswith("hypernet.")):
        torch.testing.assert_close(two[key], single[key], rtol=1e-4, atol=1e-6)
    assert not torch.equal(two["hypernet.edit_lrs"], torch.full_like(two["hypernet.edit_lrs"], -0.02))


def test_a_type_that_is_not_known_is_trained(data: CounterFactDataset, tmp_path: Path) -> None:
    trainer = trained((build("olmo2"), tokenizer()), data, tmp_path / "run", max_iters=2)
    assert trainer.parts.architecture.rewrite == "model.layers.{}.mlp.down_proj"
    assert trainer.progressed.step == 2
