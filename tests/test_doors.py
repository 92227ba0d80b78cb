"""What every door refuses whoever passes it: YAML, JSON, flags, torchrun's environment, error lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from script_runs import Ran, call, save_tiny, write_yaml

import easyeditor.commands.stats as stats_main
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import parse_json
from easyeditor.base.hparams import HyperParams
from easyeditor.base.plain_yaml import read_yaml
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands import ppl as ppl_script
from easyeditor.dataset.formats import parse
from easyeditor.dataset.reader import read_dataset
from easyeditor.runs.ranks import rank_of
from easyeditor.values.edit import EditRequest

REQUEST = {"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """script(module, *args) -> Ran, in a folder that holds `h.yaml`, a YAML of a model that is not there."""
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "h.yaml", "./m", ppl_sentence_num=0)
    return lambda module, *args: call(module, list(args), monkeypatch, capsys)


def refusal(ran: Ran, *parts: str) -> None:
    """One line of at most 500 characters, exit code 2, nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) <= 500
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


# YAML


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &a [1]\nb: *a\n", "alias"),
        (BOMB, "alias"),
        ("a: &a [*a]\n", "alias"),
        ("a: &a\n  <<: *a\n", "alias"),
        ("a: !!binary aGVsbG8=\n", "tag:yaml.org,2002:binary"),
        ("a: !!set {x, y}\n", "tag:yaml.org,2002:set"),
        ("a: !!omap [x: 1]\n", "tag:yaml.org,2002:omap"),
        (f"a: {'9' * 400}\n", "63 bits"),
        (f"a: [1, -{2**63}]\n", "63 bits"),
        ('a: "\\ud800"\n', "UTF-8"),
        ('"\\ud800": 1\n', "UTF-8"),
        ("a: " + "x" * 300_000 + "\n", "characters"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_yaml_holds_plain_values_only(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "h.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=part):
        read_yaml(tmp_path / "h.yaml")


def test_a_date_in_yaml_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("model_name: 2020-01-01\n", encoding="utf-8")
    assert read_yaml(tmp_path / "h.yaml") == {"model_name": "2020-01-01"}


@pytest.mark.parametrize(
    "setting",
    [
        f"seed={'9' * 400}",
        f"seed={2**63}",
        f"seed=-{2**63}",
        "model_name=!!binary aGVsbG8=",
        "model_name=&a [*a]",
        'stats_dir="a\\0b"',
        'stats_dir="\\ud800"',
        "model_name=[a, b]",
        "model_name=null",
        "model_name=''",
        "layers=" + "[" * 400,
        "layers=[" + "1, " * 100_000 + "1]",
    ],
    ids=lambda value: repr(value[:24]),
)
def test_overrides_hold_plain_values_only(script: Any, setting: str) -> None:
    refusal(script(single_case_edit, "--hparams", "h.yaml", "--set", setting, "--dry-run"))


@pytest.mark.parametrize("seed", [2**62, -(2**62), 10**400])
def test_a_seed_leaves_room_for_the_numbers_of_draws(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        HyperParams.from_dict({"alg_name": "X", "model_name": "m", "seed": seed})


def test_a_run_s_shuffle_seed_is_bounded_too(script: Any, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([REQUEST]), encoding="utf-8")
    refusal(script(mass_edit, "--hparams", "h.yaml", "--data", "d.json", "--dry-run", "--seed", "9" * 400), "seed")


# JSON


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udc00x": 1}', '[["\\uDBff"]]', f"[{'1' * 400}]", f"-{2**63}"])
def test_json_that_no_file_of_ours_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"UTF-8|63 bits"):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    ['"\\ud83d\\ude00"', "9223372036854775807", "0.12345678901234567890123", '"\\\\ud800"', '"1234567890123456789012"'],
)
def test_json_that_only_looks_like_it_is_read(text: str) -> None:
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"case_id": "\ud800"},
        {"case_id": ["a"]},
        {"case_id": 1.5},
        {"case_id": True},
        {"case_id": 10**400},
        {"locality": {"\ud800": {"prompt": "a", "ground_truth": "b"}}},
        {"locality": ["a"]},
        {"portability": "a"},
        {"prompt": "Bay " + "x" * 200_000},
        {"rephrase_prompt": "x" * 200_000},
        {"locality_prompt": "x" * 200_000, "locality_ground_truth": "a"},
        {"ground_truth": "x" * 200_000},
    ],
    ids=lambda changes: ascii(changes)[:40],
)
def test_a_record_holds_texts_and_a_case_id(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        parse({**REQUEST, **changes}, "here")
    (tmp_path / "d.json").write_text(json.dumps([{**REQUEST, **changes}, REQUEST]), encoding="utf-8")
    read = read_dataset(str(tmp_path / "d.json"), skip_bad=True)  # a bad record, not a bad file
    assert ([b.number for b in read.bad], len(read.requests)) == ([0], 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 3},
        {"prompt": None},
        {"subject": "Rome"},
        {"subject_start": 1},
        {"subject_start": "0"},
        {"subject_start": -9},
        {"subject_start": True},
        {"target_new": ""},
        {"target_new": ["a"]},
        {"ground_truth": 3},
        {"rephrase_prompt": "text"},
        {"rephrase_prompt": [3]},
        {"locality": []},
        {"locality": {"a": {"prompt": ["a"], "ground_truth": []}}},
        {"portability": {"a": 3}},
        {"case_id": []},
        {"generation_prompts": [""]},
    ],
    ids=ascii,
)
def test_a_saved_request_is_checked_like_a_new_one(changes: dict[str, Any]) -> None:
    whole = EditRequest.make(
        "Bay is in", subject="Bay", target_new="Italy", rephrase_prompts=["Where is Bay?"]
    ).to_json()
    assert EditRequest.from_json(whole).to_json() == whole
    with pytest.raises(DataError):
        EditRequest.from_json({**whole, **changes})
    for key in whole:
        with pytest.raises(DataError):
            EditRequest.from_json({k: v for k, v in whole.items() if k != key})


# Flags and error lines


def not_utf8(text: str) -> str:
    return text + os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (single_case_edit, ["--hparams", not_utf8("h.yaml")]),
        (single_case_edit, ["--output", not_utf8("run")]),
        (single_case_edit, ["--save-edit", "a\0b"]),
        (single_case_edit, ["--set", "model_name=" + not_utf8("m")]),
        (mass_edit, ["--data", not_utf8("d.json")]),
        (mass_edit, ["--resume", "a\0b"]),
        (ppl_script, ["--model", not_utf8("m")]),
        (ppl_script, ["--output", "a\0b"]),
        (stats_main, ["--model", not_utf8("m"), "--layers", "1"]),
    ],
    ids=lambda value: ascii(value[0]) if isinstance(value, list) else value.__name__.rpartition(".")[2],
)
def test_flags_are_utf8_without_nul(script: Any, tmp_path: Path, module: Any, flags: list[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    refusal(script(module, *flags))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (single_case_edit, ["--hparams", "loop"]),
        (single_case_edit, ["--hparams", "h.yaml", "--request", "loop"]),
        (single_case_edit, ["--hparams", "h.yaml", "--output", "loop/run"]),
        (single_case_edit, ["--hparams", "h.yaml", "--save-edit", "loop"]),
        (single_case_edit, ["--hparams", "h.yaml", "--save-edit", "loop", "--save-model", "loop/m"]),
        (mass_edit, ["--hparams", "h.yaml", "--data", "loop"]),
        (mass_edit, ["--resume", "loop"]),
        (mass_edit, ["--union", "loop", "--collect-collapsed", "loop"]),
        (ppl_script, ["--model", "loop/m"]),
        (ppl_script, ["--model", "h.yaml", "--data", "loop"]),
        (ppl_script, ["--model", "h.yaml", "--output", "loop/x.json"]),
        (ppl_script, ["--model", "h.yaml", "--edit", "loop"]),
        (stats_main, ["--hparams", "loop"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else value.__name__.rpartition(".")[2],
)
def test_a_loop_of_links_is_one_line(script: Any, tmp_path: Path, module: Any, flags: list[str]) -> None:
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    before = sorted(tmp_path.rglob("*"))
    refusal(script(module, *flags))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "stats_dir=[" + "x" * 9000],
        ["--hparams", "x" * 9000],
        ["--what" + "x" * 9000],
    ],
    ids=["request", "path", "parser"],
)
def test_an_error_line_has_500_characters_at_most(script: Any, flags: list[str]) -> None:
    refusal(script(single_case_edit, *flags), " … ")


# torchrun's environment


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"RANK": "9" * 400, "WORLD_SIZE": "2"}, "RANK is"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2"}, "RANK"),
    ],
    ids=str,
)
def test_torchrun_s_environment_is_checked(env: dict[str, str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        rank_of(env)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "one"},
        {"RANK": "0", "WORLD_SIZE": "x"},
        {"LOCAL_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    ],
    ids=str,
)
def test_every_script_under_torchrun_says_so_in_one_line(
    script: Any, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refusal(script(stats_main, "--model", "m", "--layers", "1"))
    assert not dist.is_initialized()
    if "MASTER_ADDR" not in env:
        from easyeditor.commands import pretrain_mend

        refusal(script(pretrain_mend))
        refusal(script(mass_edit, "--data", "d.json"))


# python -m easyeditor.stats: its YAML is typed like every other


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"layers": "1"}, "layers"),
        ({"layers": 1}, "layers"),
        ({"layers": ["one"]}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": [1, 1]}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"mom2_n_samples": "many"}, "mom2_n_samples"),
        ({"mom2_n_samples": None}, "mom2_n_samples"),
        ({"mom2_n_samples": 1.5}, "mom2_n_samples"),
        ({"mom2_n_samples": 0}, "mom2_n_samples"),
        ({"mom2_dtype": "float99"}, "mom2_dtype"),
        ({"mom2_dataset": 3}, "mom2_dataset"),
        ({"mom2_dataset": ["x"]}, "mom2_dataset"),
        ({"stats_dir": {"a": 1}}, "stats_dir"),
        ({"model_name": 7}, "model_name"),
        ({"layer_module_tmp": 3}, "layer_module_tmp"),
        ({"rewrite_module_tmp": "no slot"}, "rewrite_module_tmp"),
        ({"mom2_n_sample": 5}, "did you mean"),
    ],
    ids=str,
)
def test_statistics_read_a_typed_yaml(script: Any, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    write_yaml(tmp_path / "s.yaml", "./m", **{"layers": [1], "mom2_n_samples": 10, **changes})
    refusal(script(stats_main, "--hparams", "s.yaml"), part)


@pytest.mark.parametrize(
    "flags",
    [
        ["--every", "0"],
        ["--every", "-4"],
        ["--every-seconds", "0"],
        ["--every-seconds", "nan"],
        ["--samples", "0"],
        ["--max-length", "0"],
        ["--batch-tokens", "-1"],
        ["--tokens-per-dim", "0"],
        ["--layers", "1", "1"],
        ["--layers", "-1"],
        ["--corpus", ""],
        ["--output", ""],
        ["--samples", "9" * 30],
    ],
    ids=" ".join,
)
def test_statistics_check_their_flags_before_a_model_is_loaded(script: Any, tmp_path: Path, flags: list[str]) -> None:
    refusal(script(stats_main, "--hparams", "h.yaml", *flags), flags[0])


def test_statistics_of_a_typed_yaml_are_collected(script: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    (tmp_path / "c.txt").write_text("The first sentence.\nAnd the second.\n", encoding="utf-8")
    write_yaml(tmp_path / "s.yaml", "./m", mom2_dataset="c.txt", mom2_n_samples="2", stats_dir="here")
    ran = script(stats_main, "--hparams", "s.yaml", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert Path(ran.out.strip()) == Path("here/m/c_stats/model.layers.1.mlp.down_proj_float32_mom2_2.npz")
    assert Path(ran.out.strip()).exists()
