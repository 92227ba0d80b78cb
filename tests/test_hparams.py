"""Hyper-parameters: every shipped and every upstream file loads; every wrong one is refused in a line that helps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_numbers import read

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import field_types
from easyeditor.base.plain_yaml import read_yaml, yaml_path
from easyeditor.methods.memit.hparams import MEMITHyperParams
from easyeditor.methods.mend.hparams import MENDHyperParams, MENDTrainingHparams
from easyeditor.methods.registry import load_hparams
from easyeditor.methods.rome.hparams import ROMEHyperParams

ROOT = Path(__file__).resolve().parents[1]
LOADED = {
    "ROME": ROMEHyperParams,
    "MEMIT": MEMITHyperParams,
    "MEND": MENDHyperParams,
    "TRAINING/MEND": MENDTrainingHparams,
}
FILES = (path for path in ROOT.glob("hparams/**/*.y*ml") if path.parent.name != "survey")  # those are plans
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in FILES)
REQUIRED: dict[str, Any] = {
    "alg_name": "ROME",
    "model_name": "smollm2-135m",
    "layers": [5],
    "v_num_grad_steps": 25,
    "v_lr": 0.5,
    "v_loss_layer": 29,
    "v_weight_decay": 0.001,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": False,
}


@pytest.fixture
def rome() -> ROMEHyperParams:
    return ROMEHyperParams.from_dict(REQUIRED)


def refusal(call: Callable[[], object]) -> str:
    """The message of the ConfigError that `call` must raise; always a single line."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_says(message: str, *parts: str) -> None:
    assert [part for part in parts if part not in message] == [], message


def upstream_cases() -> list[Any]:
    """One case per ROME, MEMIT and MEND file of the two upstream projects."""
    everything = read("hparams_upstream.json")
    return [
        pytest.param(method, values, id=f"{method}-{model}-{source}")
        for method in LOADED
        for model, by in everything[method].items()
        for source, values in by.items()
    ]


# Files that must load


def test_every_model_has_a_file_for_each_method() -> None:
    rome = {Path(name).name for name in SHIPPED if name.startswith("hparams/ROME/")}
    assert len(rome) >= 9
    for method in LOADED:
        assert {Path(name).name for name in SHIPPED if name.startswith(f"hparams/{method}/")} == rome


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_loads_and_starts_with_its_launch_line(name: str) -> None:
    training = "TRAINING" in Path(name).parts
    hparams = MENDTrainingHparams.from_hparams(ROOT / name) if training else load_hparams(str(ROOT / name))
    assert hparams.alg_name in Path(name).parts
    assert not Path(hparams.model_name).is_absolute()
    text = (ROOT / name).read_text(encoding="utf-8")
    comment = re.match(r"(#.*\n)+", text)
    assert comment is not None
    assert re.search(rf"^# python \w+\.py --hparams {re.escape(name)}$", comment[0], re.MULTILINE)


REPEATED = {"MEND internlm-7b": "model_parallel"}
"""Upstream's file that gives a key twice (in both projects), the second time in its last line."""
ONLY_THERE = {
    "MEND llama-7b-instruct-detoxifying": "max_output_length",
    "MEND mistral-7b-detoxifying": "max_output_length",
}
"""EasyEdit's files that differ from those of the same model by one more key."""


@pytest.mark.parametrize(("method", "values"), upstream_cases())
def test_upstream_file_loads_with_its_values(
    method: str, values: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = yaml.safe_dump(values, sort_keys=False)
    repeated = REPEATED.get(f"{method} {request.node.callspec.id.removeprefix(method + '-').rpartition('-')[0]}")
    if repeated is not None:
        text += f"{repeated}: {str(values[repeated]).lower()}\n"
    (tmp_path / "upstream.yaml").write_text(text, encoding="utf-8")
    hparams = LOADED[method].from_hparams(tmp_path / "upstream")
    types = field_types(LOADED[method])
    for key, value in values.items():
        found = getattr(hparams, key)
        if types[key] is float:
            value = float(value)  # PyYAML reads 5e-1 as text
        if key == "context_template_length_params":
            found = [list(pair) for pair in found]
        assert (found, type(found)) == (value, type(value)), key


@pytest.mark.parametrize("name", ONLY_THERE)
def test_easyedits_detoxifying_files_load(name: str, tmp_path: Path) -> None:
    method, _, model = name.partition(" ")
    values = read("hparams_upstream.json")[method]["-".join(model.split("-")[:2])]["easyedit"]
    text = yaml.safe_dump({**values, "max_length": 2048, ONLY_THERE[name]: 600})
    (tmp_path / "upstream.yaml").write_text(text, encoding="utf-8")
    assert MENDHyperParams.from_hparams(tmp_path / "upstream").max_length == 2048


@pytest.mark.parametrize("value", ["true", "[1, 2]", "{a: 1}", "null"])
def test_a_key_given_twice_is_a_warning_where_the_values_agree_and_an_error_where_they_differ(
    value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(f"alg_name: ROME\nreplay: {value}\n# again\nreplay: {value}\n", encoding="utf-8")
    assert read_yaml(path)["replay"] == yaml.safe_load(value)
    (message,) = [record.getMessage() for record in caplog.records]
    assert_says(message, str(path), "'replay'", "line 4", "same value")
    path.write_text(f"replay: {value}\nreplay: 7\n", encoding="utf-8")
    assert_says(refusal(lambda: read_yaml(path)), str(path), "duplicate key 'replay'", "line 2")


@pytest.mark.parametrize(
    ("name", "file"),
    [("x/qwen2.5-7b", "x/qwen2.5-7b.yaml"), ("gpt2-xl", "gpt2-xl.yaml"), ("a.yaml", "a.yaml"), ("a.yml", "a.yml")],
)
def test_yaml_is_appended_only_when_missing(name: str, file: str) -> None:
    assert yaml_path(name) == yaml_path(Path(name)) == Path(file)


def test_a_name_with_a_dot_loads_with_and_without_the_ending() -> None:
    name = str(ROOT / "hparams/ROME/qwen2.5-7b")
    assert ROMEHyperParams.from_hparams(name) == ROMEHyperParams.from_hparams(name + ".yaml") == load_hparams(name)


# JSON, as the ROME, MEMIT and AlphaEdit repositories keep hyper-parameters

NOT_THERE = {"alg_name", "model_name", "stats_dir", "device", "fp16", "model_parallel", "batch_size", "if_prefix"}
"""Keys of EasyEdit's YAML files that those JSON files have not."""


@pytest.mark.parametrize(
    ("method", "model", "others"),
    [
        ("ROME", "gpt2-xl", {"bias_update": False, "dynamic": False, "dynamic_multiplier": 1}),
        ("ROME", "gpt-j-6B", {"mom2_update_weight": 1000, "nullspace_threshold": 2e-2}),
        ("MEMIT", "gpt2-xl", {"calculate_objective_value": False, "emmet_lambda": 0.1, "wd_power_law": [-0.9, 0.2]}),
    ],
)
def test_a_json_file_has_the_values_of_the_yaml(
    method: str, model: str, others: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = next(iter(read("hparams_upstream.json")[method][model].values()))
    written = {key: value for key, value in wanted.items() if key not in NOT_THERE}
    path = tmp_path / method / f"{model}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**written, **others}, indent="\t"), encoding="utf-8")
    sets = ["device=cpu", f"model_name={wanted['model_name']}"]
    for found in (load_hparams(path, sets), load_hparams(str(path), sets), LOADED[method].from_hparams(path, sets)):
        assert type(found) is LOADED[method]
        assert {key: getattr(found, key) for key in ("alg_name", "model_name", "device")} == {
            **{key: wanted[key] for key in ("alg_name", "model_name")},
            "device": "cpu",
        }
        numbers = json.loads(json.dumps(found.to_dict()))
        assert len(written) > 10
        for key, value in written.items():
            assert numbers[key] == (float(value) if isinstance(numbers[key], float) else value), key
    assert all("read and not used: " + ", ".join(others) in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 3
    assert_says(refusal(lambda: load_hparams(path)), str(path), "'model_name' is missing", "--set model_name=")
    path.write_text(json.dumps({**written, "v_weigth_decay": 1}), encoding="utf-8")
    assert_says(refusal(lambda: load_hparams(path, sets)), "'v_weigth_decay'", "did you mean 'v_weight_decay'?")
    path.write_text('{"v_lr": 1, "v_lr": 2}', encoding="utf-8")
    assert_says(refusal(lambda: load_hparams(path)), str(path), "not valid JSON", "duplicate key 'v_lr'")


@pytest.mark.parametrize(
    ("file", "folder", "name"),
    [
        ("C_ROME/my-model.json", "my-model", "my-model"),
        ("C_ROME/my-model.json", "hugging_cache/my-model", "./hugging_cache/my-model"),
        ("R-ROME/org_my-model.json", "org/my-model", "org/my-model"),
        ("FTP-ROME/smollm2-135m.json", "hugging_cache/smollm2-135m", "smollm2-135m"),
    ],
)
def test_a_json_file_takes_method_and_model_from_where_it_is(
    file: str, folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("easyeditor.lm.embedded.cache_folder", lambda: tmp_path)
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
    Path(file).parent.mkdir()
    values = {key: value for key, value in REQUIRED.items() if key not in ("alg_name", "model_name")}
    Path(file).write_text(json.dumps(values), encoding="utf-8")
    found = load_hparams(file)
    assert (found.alg_name, found.model_name) == (file.split("/")[0].replace("_", "-"), name)
    monkeypatch.chdir(Path(file).parent)
    assert load_hparams(Path(file).name, [f"model_name={name}"]) == found


# --set comes before the check, so it can repair a file


@pytest.mark.parametrize(
    ("wrong", "settings"),
    [
        ({"v_lr": "half"}, ["v_lr=0.5"]),
        ({"layers": [5, 5]}, ["layers=[5]"]),
        ({"alg_name": "ROMEO"}, ["alg_name=ROME"]),
        ({"alg_name": None, "model_name": 7}, ["alg_name=ROME", "model_name=smollm2-135m"]),
    ],
)
def test_a_setting_repairs_a_file(wrong: dict[str, Any], settings: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**REQUIRED, **wrong}), encoding="utf-8")
    refusal(lambda: load_hparams(path))
    assert load_hparams(path, settings) == ROMEHyperParams.from_hparams(path, settings)
    assert load_hparams(path, settings) == ROMEHyperParams.from_dict(REQUIRED)
    assert_says(refusal(lambda: load_hparams(path, [*settings, "vlr=1"])), "--set vlr=1", "did you mean 'v_lr'?")
    assert_says(refusal(lambda: load_hparams(path, [*settings, "v_lr=two"])), f"{path} with --set", "v_lr is 'two'")


def test_a_file_for_training_is_called_that() -> None:
    path = ROOT / "hparams/TRAINING/MEND/smollm2-135m.yaml"
    says = ("for training MEND", f"pretrain_mend.py --hparams {path}", "hparams/MEND/")
    assert_says(refusal(lambda: load_hparams(path)), *says)
    values = {**read_yaml(path), "cache_mb": 7}
    assert_says(refusal(lambda: load_hparams(values)), "for training MEND")


# Files that must be refused


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    for name in ("gpt2-xl", "gpt-j-6B"):
        (tmp_path / f"{name}.yaml").write_text("alg_name: ROME\n")
    message = refusal(lambda: load_hparams(str(tmp_path / "gpt2xl")))
    assert_says(message, str(tmp_path / "gpt2xl.yaml"), "no such file", "gpt2-xl.yaml")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param(b"", ["the file is empty"], id="empty"),
        pytest.param(b"# only a comment\n", ["the file is empty"], id="comment"),
        pytest.param(b"\x89PNG\xff\xfe\x00\x80", ["not a readable UTF-8 text file", "0x89"], id="binary"),
        pytest.param(b"alg_name: \x00\n", ["not valid YAML", "#x0000"], id="nul"),
        pytest.param(b"- alg_name\n", ["`key: value`", "found list"], id="list"),
        pytest.param(b"ROME\n", ["`key: value`", "found str"], id="text"),
        pytest.param(b"layers: [1,\n", ["not valid YAML", "line 2"], id="invalid"),
        pytest.param(b"alg_name: 2001-99-99\n", ["alg_name is '2001-99-99'"], id="no-such-date"),
        pytest.param(b"layers: !!int five\n", ["not valid YAML", "five"], id="no-such-int"),
        pytest.param(b"v_lr: 1\n# again\nv_lr: 2\n", ["duplicate key 'v_lr'", "line 3"], id="duplicate"),
        pytest.param(b"v_lr: 1\n", ["alg_name is None", "allowed: ", "ROME"], id="no-alg_name"),
        pytest.param(b"alg_name: ROMEO\n", ["alg_name is 'ROMEO'", "allowed: ", "ROME"], id="other-alg_name"),
        pytest.param(b"alg_name: [ROME]\n", ["alg_name is ['ROME']", "allowed: ", "ROME"], id="list-alg_name"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert_says(refusal(lambda: load_hparams(str(path))), f"{path}: ", *parts)


def test_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    assert_says(refusal(lambda: load_hparams(str(tmp_path / "x"))), str(tmp_path / "x.yaml"), "not a readable")


# Values that must be refused


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("vlr", 0.5, ["unknown key 'vlr' for ROMEHyperParams", "did you mean 'v_lr'?"]),
        ("v_num_grad_steps", "many", ["is 'many' (str)", "allowed: int"]),
        ("v_num_grad_steps", 2.5, ["is 2.5 (float)", "allowed: int"]),
        ("v_num_grad_steps", None, ["is None (NoneType)", "allowed: int"]),
        ("v_num_grad_steps", True, ["is True (bool)", "allowed: int"]),
        ("v_lr", True, ["is True (bool)", "allowed: float"]),
        ("v_lr", "half", ["is 'half' (str)", "allowed: float"]),
        ("device", True, ["is True", "allowed: int or str"]),
        ("layers", [True], ["is [True]", "allowed: list[int]"]),
        ("layers", 5, ["is 5 (int)", "allowed: list[int]"]),
        ("layers", "5", ["is '5' (str)", "allowed: list[int]"]),
        ("mom2_dataset", ["wikipedia"], ["is ['wikipedia'] (list)", "allowed: str"]),
        ("mom2_adjustment", "maybe", ["is 'maybe' (str)", "allowed: bool"]),
        ("fact_token", "first", ["is 'first' (str)", "one of 'subject_last', 'subject_first'"]),
        ("if_prefix", "some", ["is 'some' (str)", "allowed: bool or one of 'all'"]),
        ("context_template_length_params", [[5]], ["is [[5]] (list)", "allowed: list[tuple[int, int]]"]),
        ("context_template_length_params", [[5, 0]], ["is [(5, 0)]", "both above 0"]),
        ("alg_name", "MEMIT", ["is 'MEMIT'", "allowed: one of 'ROME'"]),
        ("layers", [], ["is []", "allowed: a list of at least one layer"]),
        ("layers", [3, -1], ["is [3, -1]", "allowed: layer numbers from 0"]),
        ("layers", [5, 5], ["is [5, 5]", "allowed: each layer once"]),
        ("rewrite_module_tmp", "h.5.mlp", ["is 'h.5.mlp'", "allowed: a module path with one {}"]),
        ("layer_module_tmp", "h.{}.{}", ["is 'h.{}.{}'", "allowed: a module path with one {}"]),
        ("v_lr", float("nan"), ["is nan", "allowed: a finite number"]),
        ("v_weight_decay", float("nan"), ["is nan", "allowed: "]),
        ("kl_factor", -0.1, ["is -0.1", "allowed: 0 or more"]),
        ("ppl_batch_size", 0, ["is 0", "allowed: 1 or more"]),
        ("consistent_value", True, ["true needs if_c_rome: true"]),
    ],
)
def test_wrong_value_is_refused(key: str, value: Any, parts: list[str]) -> None:
    message = refusal(lambda: ROMEHyperParams.from_dict({**REQUIRED, key: value}, where="my.yaml"))
    assert_says(message, "my.yaml: ", key, *parts)


@pytest.mark.parametrize("key", [key for key in REQUIRED if key != "alg_name"])
def test_missing_required_key_is_named(key: str) -> None:
    values = {name: value for name, value in REQUIRED.items() if name != key}
    assert_says(refusal(lambda: ROMEHyperParams.from_dict(values)), f"key '{key}' is missing", "ROMEHyperParams")


def test_several_problems_come_in_one_error() -> None:
    values = {**REQUIRED, "layer": 5, "seed": "x", "fact_token": "first"}
    del values["v_loss_layer"]
    message = refusal(lambda: ROMEHyperParams.from_dict(values))
    assert_says(message, "'layer'", "did you mean 'layers'?", "seed is 'x'", "fact_token", "'v_loss_layer' is missing")


# override: --set key=value


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("v_lr=5e-1", 0.5),
        ("v_lr = 1", 1.0),
        ("seed=3", 3),
        ("if_c_rome=true", True),
        ("if_prefix=all", "all"),
        ("if_prefix=false", False),
        ("layers=[3, 4]", [3, 4]),
        ("context_template_length_params=[[2, 5]]", [(2, 5)]),
        ("rewrite_module_tmp=null", None),
        ("rewrite_module_tmp=", None),
        ("device=cuda:1", "cuda:1"),
        ("model_name=./a=b", "./a=b"),
    ],
)
def test_override_types_the_value_and_leaves_the_original(rome: ROMEHyperParams, setting: str, value: Any) -> None:
    key = setting.partition("=")[0].strip()
    found = getattr(rome.override([setting]), key)
    assert (found, type(found)) == (value, type(value))
    assert rome == ROMEHyperParams.from_dict(REQUIRED)


def test_off_is_off_though_yaml_reads_it_as_false(rome: ROMEHyperParams, tmp_path: Path) -> None:
    assert rome.override(["collect_stats=off"]).collect_stats == "off"
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(REQUIRED) + "collect_stats: off\n")
    assert ROMEHyperParams.from_hparams(str(tmp_path / "my.yaml")).collect_stats == "off"
    message = refusal(lambda: rome.override(["collect_stats=on"]))
    assert_says(message, "collect_stats is True", "one of 'off', 'auto'")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("vlr=1", ["--set vlr=1", "unknown key 'vlr'", "did you mean 'v_lr'?"]),
        ("v_lr", ["--set v_lr", "write key=value"]),
        ("v_lr=[1", ["--set v_lr=[1", "not readable as YAML"]),
        ("seed=2024-13-45", ["--set", "seed is '2024-13-45' (str)"]),
        ("seed=soon", ["--set", "seed is 'soon' (str)", "allowed: int"]),
        ("v_lr=", ["v_lr is None (NoneType)", "allowed: float"]),
        ("layers=5", ["layers is 5 (int)", "allowed: list[int]"]),
        ("layers=[5, 5]", ["--set", "layers is [5, 5]", "each layer once"]),
        ("v_lr=.nan", ["--set", "v_lr is nan", "a finite number"]),
        ("alg_name=MEMIT", ["alg_name is 'MEMIT'", "allowed: one of 'ROME'"]),
    ],
)
def test_override_refuses(rome: ROMEHyperParams, setting: str, parts: list[str]) -> None:
    assert_says(refusal(lambda: rome.override([setting])), *parts)


def test_override_names_a_wrongly_assigned_attribute(rome: ROMEHyperParams) -> None:
    rome.v_lr = "half"  # type: ignore[assignment]
    assert_says(refusal(lambda: rome.override(["seed=1"])), "v_lr is 'half'", "allowed: ")


# checked: the library's own copy


def test_checked_types_assigned_attributes_in_a_copy(rome: ROMEHyperParams) -> None:
    pair = (object(), object())
    rome.model_name = pair
    rome.v_lr = "5e-1"  # type: ignore[assignment]
    before = dict(vars(rome), layers=[5])
    copy = rome.checked()
    copy.layers.append(6)
    assert (copy.model_name, copy.v_lr) == (pair, 0.5)
    assert vars(rome) == before


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("v_lr", -1.0, ["v_lr is -1.0", "a number above 0"]),
        ("layers", "5", ["layers is '5' (str)", "list[int]"]),
        ("alg_name", "MEMIT", ["alg_name is 'MEMIT'", "one of 'ROME'"]),
    ],
)
def test_checked_refuses_a_wrong_assignment(rome: ROMEHyperParams, key: str, value: Any, parts: list[str]) -> None:
    setattr(rome, key, value)
    assert_says(refusal(rome.checked), "ROMEHyperParams: ", *parts)
    assert getattr(rome, key) == value
