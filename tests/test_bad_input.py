"""Bad input to the scripts: one line that says what to do, exit code 2, no traceback, nothing half-made left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import build, tokenizer
from safetensors.torch import load_file, save_file
from script_runs import Ran, call, file_size_limit, five_requests, memit_yaml, save_tiny, write_yaml

from easyeditor.base.errors import EasyEditorError, ModelError, OutputError
from easyeditor.base.files import write_tensors, write_text
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands import ppl as ppl_script
from easyeditor.dataset.sentences import load_sentences
from easyeditor.lm import embedded
from easyeditor.lm.loading import load, save

DEEP = b"[" * 3_000  # nested deeper than the JSON reader can go
REQUEST = {"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}
STATS = ["mom2_adjustment=true", "stats_dir=stats", "mom2_dataset=wiki", "mom2_n_samples=50"]
STATS_FILE = "wiki_stats/model.layers.1.mlp.down_proj_float32_mom2_50.npz"
WIDTH = 48  # MLP width of tiny llama


def refusal(ran: Ran, *parts: str) -> str:
    """The one error line of a run that must have refused, holding all `parts`."""
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert lines == [ran.err.splitlines()[-1]]
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tiny llama (`m`) and a saved edit of it (`saved`)."""
    root = tmp_path_factory.mktemp("source")
    save_tiny(root / "m")
    return root


@pytest.fixture
def work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the model `m`, its YAML `h.yaml` and `two.txt`; tests may damage them."""
    shutil.copytree(source / "m", tmp_path / "m")
    write_yaml(tmp_path / "h.yaml", "./m", ppl_sentence_num=0)
    (tmp_path / "two.txt").write_text("The first sentence.\nAnd the second.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edit(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """edit(*args) -> Ran: single_case_edit.py --hparams h.yaml *args."""
    return lambda *args: call(single_case_edit, ["--hparams", "h.yaml", *args], monkeypatch, capsys)


@pytest.fixture
def ppl(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """ppl(*args) -> Ran: ppl.py --model ./m *args."""
    return lambda *args: call(ppl_script, ["--model", "./m", "--device", "cpu", *args], monkeypatch, capsys)


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded, or any forward, fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the input was refused")

    monkeypatch.setattr("easyeditor.lm.loading.load", refuse)
    monkeypatch.setattr("easyeditor.editing.measuring.load", refuse)
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)


def damage(path: Path, content: bytes | None) -> None:
    """Replace a file's content; None deletes it."""
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


# YAML, flags, requests


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "no such file"), (b"", "the file is empty"), (bytes(range(256)), "not a readable UTF-8")],
    ids=["missing", "empty", "binary"],
)
def test_yaml(edit: Any, work: Path, content: bytes | None, part: str) -> None:
    damage(work / "h.yaml", content)
    refusal(edit("--dry-run"), "h.yaml", part)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--set", "if_crome=true"], ["unknown key 'if_crome'", "did you mean 'if_c_rome'?"]),
        (["--set", "v_lr"], ["write key=value"]),
        (["--set", "layers=[9]"], ["layers", "layer 9 is out of range", "layers 0 to 3"]),
        (["--set", "v_loss_layer=4"], ["v_loss_layer", "layer 4 is out of range", "layers 0 to 3"]),
        (["--set", "v_loss_layer=-1"], ["v_loss_layer", "out of range"]),
        (["--device", "cuda:99"], ["'cuda:99' cannot be used", "try cpu or a GPU number"]),
        (["--device", "tpu"], ["'tpu' cannot be used", "try cpu or a GPU number"]),
        (["--device", "meta"], ["'meta'"]),
        (["--dtype", "float8"], ["dtype is 'float8'", "'float32', 'float16'"]),
        (["--set", "kl_factor=1e39"], ["finite"]),
        (["--set", "context_templates=['a {} {}']"], ["exactly one {}"]),
        (["--set", "rewrite_module_tmp=model.layers.{}.mlp"], ["cannot edit a LlamaMLP"]),
        (
            ["--set", "rewrite_module_tmp=model.layer.{}.mlp.down_proj"],
            ["rewrite_module_tmp", "near: 'model.layers.{}"],
        ),
        (["--set", "if_prefix=true", "context_templates=['{}']"], ["if_prefix needs a context"]),
        (["--request", "r.json", "--prompt", "x"], ["--request and --prompt were given"]),
        (["--prompt", "Bay is in"], ["--prompt needs --subject, --target-new"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_edit_flags(edit: Any, flags: list[str], parts: list[str]) -> None:
    refusal(edit(*flags), *parts)


LONG = "word " * 3000


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompt": "Rome is in"}, ["subject 'Bay' is not in the prompt 'Rome is in'", "mark its place with {}"]),
        ({"subject": ""}, ["subject is empty"]),
        ({"target_new": " "}, ["target_new is empty"]),
        ({"prompt": "{} and {}"}, ["prompt has 2 '{}'", "mark the subject once"]),
        ({"prompt": "{} is in", "subject": LONG}, ["request 0: prompt with", "tokens; the limit is 128"]),
        ({"target_new": LONG}, ["tokens; the limit is 128"]),
        (
            {"locality_prompt": LONG, "locality_ground_truth": "a"},
            ["locality.neighborhood with its answer has"],
        ),
        ({"prompt": "Bay \ud800 is in"}, ["r.json"]),
        ({"ground_truth": "\udcff"}, ["r.json"]),
        ({"locality_prompt": ["a", "b"], "locality_ground_truth": "c"}, ["2 prompts but 1 ground truths"]),
        ({"target_new": {"text": "Italy"}}, ["r.json", "target_new must be text, found dict"]),
        ({"rephrase_prompt": True}, ["r.json", "rephrase_prompts must be non-empty texts"]),
    ],
    ids=lambda value: f"{next(iter(value))}={next(iter(value.values()))!r:.12}" if isinstance(value, dict) else "",
)
def test_request(edit: Any, work: Path, changes: dict[str, Any], parts: list[str]) -> None:
    (work / "r.json").write_text(json.dumps({**REQUEST, **changes}), encoding="utf-8")
    refusal(edit("--request", "r.json"), *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"prompt":', "not readable as JSON"),
        (b"\xff\x00", "not readable as JSON"),
        (DEEP, "not readable as JSON"),
        (b"[]", "holds 0 records"),
        (b"[{}, {}]", "holds 2 records"),
        (b'"Bay"', "must be a JSON object, found str"),
        (b'{"prompt": "Bay is in"}', "of no known format"),
        (b'{"requested_rewrite": {"prompt": "Bay"}}', "malformed counterfact record"),
    ],
)
def test_request_file(edit: Any, work: Path, content: bytes, part: str) -> None:
    (work / "r.json").write_bytes(content)
    refusal(edit("--request", "r.json"), "r.json", part)


def test_prompt_that_is_not_utf8(edit: Any) -> None:
    prompt = os.fsdecode(b"Bay \xff is in")  # as Python reads such a byte from the command line
    refusal(edit("--prompt", prompt, "--subject", "Bay", "--target-new", "Italy"))


# Models


def without(name: str) -> Callable[[Path], None]:
    """A damage: one tensor is missing from the checkpoint."""

    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return drop


@pytest.mark.parametrize("script", ["edit", "ppl"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="missing"),
        pytest.param(lambda folder: [p.unlink() for p in folder.iterdir()], id="empty"),
        pytest.param(lambda folder: (shutil.rmtree(folder), folder.write_text("x")), id="a-file"),
        pytest.param(lambda folder: os.truncate(folder / "model.safetensors", 9999), id="truncated"),
        pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(b"\x9c" * 999), id="garbage"),
        pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(b""), id="no-bytes"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), id="no-weights"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="no-config"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="wrong-config"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{"), id="wrong-tokenizer"),
        pytest.param(without("model.layers.2.mlp.down_proj.weight"), id="tensor-missing"),
    ],
)
def test_model_folder(request: Any, work: Path, script: str, spoil: Callable[[Path], object]) -> None:
    run = request.getfixturevalue(script)
    spoil(work / "m")
    refusal(run(), "./m: ")


def test_a_refused_run_leaves_no_empty_run_folder(edit: Any, work: Path) -> None:
    shutil.rmtree(work / "m")
    refusal(edit(), "./m: ")
    refusal(edit("--output", "run"), "./m: ")
    assert [p.name for p in work.rglob("*") if p.is_dir()] in ([], ["results"])


def test_a_tied_head_is_not_a_missing_tensor(ppl: Any, work: Path) -> None:
    save_tiny(work / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(work / "tied/model.safetensors")
    assert ppl("--model", "tied", "--data", "two.txt").code == 0


# Sentence files and ppl.py's flags


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("d.txt", None, "no such file"),
        ("d.txt", b" \n\n", "no sentences"),
        ("d.txt", b"First one.\n\na\n", "sentence 2 has fewer than 2 tokens"),
        ("d.txt", b"abc\0def", "NUL bytes"),
        ("d.txt", b"\xff\xfea\x00", "not a readable UTF-8"),
        ("d.txt", b"First one.\na\n", "sentence 2 has fewer than 2 tokens"),
        ("d.txt", LONG.encode(), "tokens; the limit is 128"),
        ("d.json", b"[1,", "wrong JSON"),
        ("d.json", b"", "wrong JSON"),
        ("d.json", DEEP, "wrong JSON"),
        ("d.json", b'{"Text": "a b"}', "expected a JSON list"),
        ("d.json", b"[]", "no sentences"),
        ("d.json", b'["a b", 3]', "sentence 2 is empty or not a text"),
        ("d.json", b'[{"text": "a b"}]', "sentence 1 is empty or not a text"),
        ("d.json", b'["a b", ""]', "sentence 2 is empty"),
        ("d.json", b'["a \\ud800 b"]', "sentence 1"),
    ],
)
def test_sentence_file(ppl: Any, work: Path, name: str, content: bytes | None, part: str) -> None:
    if content is not None:
        (work / name).write_bytes(content)
    refusal(ppl("--data", name), part)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--sentences", "7"], ["--sentences", "choose from"]),
        (["--sentences", "50", "--data", "x"], ["--data and --sentences were both given"]),
        (["--device", "cuda:99"], ["'cuda:99' cannot be used"]),
        (["--device", "tpu"], ["'tpu' cannot be used"]),
        (["--device", "meta"], ["'meta'"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--batch-size", "0"], ["--batch-size is 0", "1 or more"]),
        (["--edit", "nowhere"], ["nowhere", "--save-edit"]),
        (["--data", "two.txt", "--output", "m"], ["--output m is the place of --model"]),
        (["--data", "two.txt", "--output", "."], ["--output . contains --model"]),
    ],
    ids=" ".join,
)
def test_ppl_flags(ppl: Any, flags: list[str], parts: list[str]) -> None:
    refusal(ppl(*flags), *parts)


def test_sentences_that_are_not_here_say_where_to_get_them(
    edit: Any, ppl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_sentences, "__defaults__", (tmp_path,))  # in place of data/
    parts = [str(tmp_path / "ME-PPL/ME-PPL_1k.json"), "github.com/WanliYoung/Collapse-in-Model-Editing"]
    refusal(ppl("--sentences", "1000"), *parts)
    refusal(edit("--set", "ppl_sentence_num=1000"), *parts)


# Places to write to


@pytest.mark.parametrize("flag", ["--save-model", "--save-edit"])
@pytest.mark.parametrize("place", ["m", "h.yaml", "h.yaml/below"])
@pytest.mark.usefixtures("nothing_computed")
def test_place_to_save_is_refused_before_anything_is_computed(edit: Any, work: Path, flag: str, place: str) -> None:
    before = sorted(work.rglob("*"))
    refusal(edit(flag, place), place)
    assert sorted(work.rglob("*")) == before


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(("one", "other"), [("--save-model", "--save-edit"), ("--save-model", "--output")])
def test_two_things_saved_to_one_place_are_refused_before_anything_is_computed(edit: Any, one: str, other: str) -> None:
    refusal(edit(one, "new", other, "new"), "is the place of", one, other)


@pytest.mark.parametrize("place", ["two.txt", "two.txt/below"])
def test_run_folder_at_or_below_a_file(edit: Any, place: str) -> None:
    refusal(edit("--output", place), f"{place}: ")


def test_ppl_output_below_a_file(ppl: Any) -> None:
    refusal(ppl("--data", "two.txt", "--output", "h.yaml/x.json"), "h.yaml/x.json: cannot be made")


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk(edit: Any, ppl: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyeditor.base.files.os.fsync", full_disk)
    refusal(edit("--output", "run"), "run/config.json: cannot be written (No space left on device)")
    refusal(
        ppl("--data", "two.txt", "--output", "numbers.json"),
        "numbers.json: cannot be written (No space left on device)",
    )
    assert sorted(p.name for p in work.iterdir()) == ["h.yaml", "m", "two.txt"]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda place: write_text(place, "x" * 9000), id="text"),
        pytest.param(lambda place: write_tensors(place, {"a": torch.zeros(5000)}), id="tensors"),
        pytest.param(lambda place: save(build("llama"), tokenizer(), place), id="model"),
    ],
)
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with file_size_limit(8192), pytest.raises(OutputError, match="new"):
        write(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_as_readable_as_texts(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "x")
    write_tensors(tmp_path / "tensors", {"a": torch.ones(1)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode


@pytest.mark.parametrize("place", ["a-file/new", "a-folder", "a-pipe"])
@pytest.mark.parametrize("write", [lambda p: write_text(p, "x"), lambda p: write_tensors(p, {"a": torch.ones(1)})])
def test_what_is_in_the_way_stays(tmp_path: Path, place: str, write: Callable[[Path], None]) -> None:
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "a-folder").mkdir()
    os.mkfifo(tmp_path / "a-pipe")
    with pytest.raises(OutputError, match=place):
        write(tmp_path / place)
    assert (tmp_path / "a-pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-file", "a-folder", "a-pipe"]


# Second-moment statistics


def moments(total: Any = None, count: Any = 10) -> Callable[[Path], None]:
    """A maker of a statistics file: the sum of k k^T (the identity by default) and the number of tokens."""
    arrays = {"mom2.mom2": np.eye(WIDTH) if total is None else total, "mom2.count": count}
    return lambda path: np.savez(path, **arrays)


def halved(path: Path) -> None:
    moments()(path)
    os.truncate(path, path.stat().st_size // 2)


def bare_array(path: Path) -> None:
    with open(path, "wb") as sink:
        np.save(sink, np.eye(WIDTH))


@pytest.mark.parametrize("folder", ["m", "._m"])
def test_good_statistics_are_used(edit: Any, work: Path, folder: str) -> None:
    path = work / "stats" / folder / STATS_FILE
    path.parent.mkdir(parents=True)
    moments(np.diag(np.arange(1.0, WIDTH + 1)))(path)
    plain, adjusted = edit("--json").json, edit("--json", "--set", *STATS).json
    assert adjusted["trace"]["1"]["denominator"] != plain["trace"]["1"]["denominator"]


def test_missing_statistics_name_both_places_and_the_way_out(edit: Any) -> None:
    places = [f"stats/m/{STATS_FILE}", f"stats/._m/{STATS_FILE}"]  # upstream's two spellings of a folder's name
    refusal(edit("--set", *STATS), *places, "mom2_adjustment", "false")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "", id="empty"),
        pytest.param(lambda path: path.write_bytes(b"\x80\x04junk"), "", id="garbage"),
        pytest.param(halved, "", id="truncated"),
        pytest.param(bare_array, "", id="not-an-archive"),
        pytest.param(lambda path: np.savez(path, other=1), "", id="key-missing"),
        pytest.param(moments(np.array([{}], dtype=object)), "is object of shape", id="pickled"),
        pytest.param(moments(np.eye(WIDTH + 1)), "shape (49, 49)", id="other-width"),
        pytest.param(moments(np.ones(WIDTH)), "shape (48,)", id="vector"),
        pytest.param(moments(np.eye(WIDTH) * np.nan), "finite False", id="nan"),
        pytest.param(moments(np.zeros((WIDTH, WIDTH))), "", id="zeros"),
        pytest.param(moments(-np.eye(WIDTH)), "", id="negative"),
        pytest.param(moments(count=0), "", id="count-zero"),
        pytest.param(moments(count=[1, 2]), "", id="count-list"),
        pytest.param(moments(count="many"), "", id="count-text"),
    ],
)
def test_damaged_statistics(edit: Any, work: Path, make: Callable[[Path], object], part: str) -> None:
    path = work / "stats/m" / STATS_FILE
    path.parent.mkdir(parents=True)
    make(path)
    refusal(edit("--set", *STATS), f"stats/m/{STATS_FILE}", part)


def test_statistics_are_checked_before_the_edit_is_searched(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("the value was searched before the statistics were looked for")

    monkeypatch.setattr("easyeditor.methods.locate.method.search_values", searched)
    refusal(edit("--set", *STATS), "no second-moment statistics")


# Saved edits


def described(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage: edit.json says something else."""

    def rewrite(folder: Path) -> None:
        raw = json.loads((folder / "edit.json").read_text(encoding="utf-8"))
        change(raw)
        (folder / "edit.json").write_text(json.dumps(raw), encoding="utf-8")

    return rewrite


def factors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A damage: edit.safetensors holds other tensors."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "edit.safetensors")
        save_file(change(tensors), folder / "edit.safetensors")

    return rewrite


@pytest.fixture(scope="module")
def saved(source: Path) -> Path:
    """A saved edit of tiny llama."""
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams

    hparams = load_hparams(str(write_yaml(source / "h.yaml", source / "m", ppl_sentence_num=0)))
    return BaseEditor(hparams).compute(REQUEST).save(source / "saved")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: (folder / "edit.json").unlink(), id="no-description"),
        pytest.param(lambda folder: (folder / "edit.safetensors").unlink(), id="no-tensors"),
        pytest.param(lambda folder: shutil.rmtree(folder), id="no-folder"),
        pytest.param(lambda folder: (folder / "edit.json").write_text("{"), id="wrong-json"),
        pytest.param(lambda folder: (folder / "edit.json").write_bytes(b"\xff"), id="binary-json"),
        pytest.param(lambda folder: (folder / "edit.json").write_bytes(DEEP), id="deep-json"),
        pytest.param(lambda folder: (folder / "edit.json").write_text("[]"), id="list"),
        pytest.param(lambda folder: os.truncate(folder / "edit.safetensors", 100), id="truncated"),
        pytest.param(lambda folder: (folder / "edit.safetensors").write_bytes(b"\x9c" * 99), id="garbage"),
        pytest.param(described(lambda raw: raw.update(format=2)), id="format"),
        pytest.param(described(lambda raw: raw.pop("trace")), id="no-trace"),
        pytest.param(described(lambda raw: raw["deltas"][0].update(tensors=[])), id="no-factors"),
        pytest.param(described(lambda raw: raw["deltas"][0].update(tensors=["left"])), id="one-factor"),
        pytest.param(factors(lambda t: {"0.left": t["0.left"]}), id="factor-missing"),
        pytest.param(factors(lambda t: {**t, "0.left": t["0.left"][:, 0].clone()}), id="flat-factor"),
        pytest.param(factors(lambda t: {**t, "0.left": t["0.left"].repeat(1, 2)}), id="other-rank"),
        pytest.param(factors(lambda t: {**t, "0.left": t["0.left"].int()}), id="integers"),
        pytest.param(factors(lambda t: {**t, "0.left": t["0.left"] * torch.nan}), id="nan"),
    ],
)
def test_damaged_saved_edit(ppl: Any, work: Path, saved: Path, spoil: Callable[[Path], object]) -> None:
    shutil.copytree(saved, work / "saved")
    spoil(work / "saved")
    refusal(ppl("--data", "two.txt", "--edit", "saved"), "edit")


# What the embedded model says


@pytest.mark.parametrize("error", [ModelError("no network: put X at Y"), OutputError("the cache is read-only")])
def test_scripts_pass_on_what_the_embedded_model_says(
    edit: Any, ppl: Any, monkeypatch: pytest.MonkeyPatch, error: EasyEditorError
) -> None:
    def ensure(_: embedded.Embedded) -> Path:
        raise error

    monkeypatch.setattr(embedded, "ensure", ensure)
    refusal(edit("--set", "model_name=smollm2-135m"), str(error))
    refusal(ppl("--model", "smollm2-135m"), str(error))


def test_load_takes_the_embedded_model_from_its_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ensure", lambda _: source / "m")
    model, _ = load(embedded.DEFAULT, device="cpu")
    assert model.config.name_or_path == str(source / "m")


@pytest.mark.parametrize(("threshold", "count"), [(0.5, "0 of 48"), (2.0, "48 of 48")])
def test_a_null_space_without_a_direction_or_with_all_is_refused_and_not_kept(
    threshold: float, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memit = memit_yaml(five_requests(tmp_path))  # C is the identity
    before = sorted((tmp_path / "stats").rglob("*"))
    values = yaml.safe_load(memit.read_text(encoding="utf-8"))
    values |= {"alg_name": "AlphaEdit", "nullspace_threshold": threshold}
    memit.write_text(yaml.safe_dump(values), encoding="utf-8")
    flags = ["--hparams", memit, "--data", tmp_path / "five.json", "--output", tmp_path / "run", "--mode", "batch"]
    ran = call(mass_edit, flags, monkeypatch, capsys)
    refusal(ran, f"layer 1: the null space of C below absolute threshold {threshold:g} has {count} directions")
    assert sorted((tmp_path / "stats").rglob("*")) == before
