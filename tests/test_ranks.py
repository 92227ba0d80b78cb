"""What the scripts that several processes may run have in common: which card each takes, and its flags."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from script_runs import Ran, call, record_of, write_yaml

import easyeditor.commands.stats as stats_main
from easyeditor.base.errors import ConfigError
from easyeditor.commands import mass_edit, pretrain_mend

SCRIPTS = ["mass_edit", "pretrain_mend", "stats"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """start(script, values, *flags) -> how it ended, and the device it took (None: it took none), as the second of two
    processes on a machine, with these values in its YAML."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    (tmp_path / "data.json").write_text(json.dumps([record_of("Bay")]), encoding="utf-8")
    taken: list[Any] = []

    def load(*_: Any, device: Any, **rest: Any) -> Any:
        taken.append(device)
        raise ConfigError(f"enough: {rest.get('model_parallel')}")

    monkeypatch.setattr(stats_main, "process_group", lambda rank: nullcontext())
    monkeypatch.setattr("easyeditor.lm.loading.load", load)

    def run(script: str, values: dict[str, Any], *flags: str) -> tuple[Ran, Any]:
        taken.clear()
        if script == "pretrain_mend":
            values = {"model_name": "./m", "inner_params": ["model.layers.1.mlp.down_proj.weight"], **values}
            (tmp_path / "t.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
            files = ["--hparams", "t.yaml", "--train", "data.json", "--dry-run"]
            ran = call(pretrain_mend, [*files, *flags], monkeypatch, capsys)
            return ran, ran.json["hparams"]["device"] if ran.code == 0 else None
        write_yaml(tmp_path / "h.yaml", "./m", **values)
        if script == "stats":
            return call(stats_main, ["--hparams", "h.yaml", *flags], monkeypatch, capsys), taken[0] if taken else None
        files = ["--hparams", "h.yaml", "--data", "data.json", "--output", "run", "--dry-run"]
        ran = call(mass_edit, [*files, *flags], monkeypatch, capsys)
        return ran, ran.json["hparams"]["device"] if ran.code == 0 else None

    return run


def refused(ran: Ran, part: str) -> None:
    assert ran.code == 2
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert part in lines[0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("device", "flags", "taken"),
    [
        (0, (), 1),
        ("cuda:0", (), 1),
        ("cuda", (), 1),
        (0, ("--device", "cuda"), 1),
        (0, ("--device", "cpu"), "cpu"),
        ("cpu", (), "cpu"),
    ],
)
def test_each_process_takes_its_own_card_or_all_the_cpu(
    script: str, device: Any, flags: tuple[str, ...], taken: Any, start: Any
) -> None:
    if script == "stats" and (device, flags) == ("cpu", ()):
        taken = 1  # it reads model and statistics of the YAML, and no device
    assert start(script, {"device": device}, *flags)[1] == taken


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", ["1", "cuda:0"])
def test_one_card_for_all_processes_is_refused(script: str, device: str, start: Any) -> None:
    refused(start(script, {}, "--device", device)[0], f"--device {device} with 2 processes")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_over_all_cards_is_one_processs(script: str, start: Any) -> None:
    """Each process would spread its model over the others' cards, and NCCL's ranks must not share one."""
    refused(start(script, {"model_parallel": True})[0], "model_parallel with 2 processes")


def test_statistics_of_a_model_over_all_cards(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML's model_parallel counts for them, too."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    refused(start("stats", {"model_parallel": True})[0], "enough: True")
    refused(start("stats", {})[0], "enough: False")


def test_training_has_the_flag_of_the_other_scripts(start: Any) -> None:
    for flags in (("--matmul", "tf32"), ("--set", "matmul=exact", "--matmul", "tf32")):
        ran, _ = start("pretrain_mend", {}, *flags)
        assert ran.json["hparams"]["matmul"] == "tf32"
