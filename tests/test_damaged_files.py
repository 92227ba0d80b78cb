"""Files, texts and settings with something wrong in them, and what is no regular file: refused, with the reason."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, rome_hparams, tokenizer
from fake_runs import edit_line, sequential_lines
from safetensors.torch import load_file, save_file
from script_runs import save_tiny, stand_in, write_yaml

from easyeditor.base.errors import ConfigError, DataError, EasyEditorError, NumericalError, StatsError
from easyeditor.base.files import parse_json, read_json
from easyeditor.base.hparams import HyperParams, read_json_list
from easyeditor.base.plain_yaml import read_yaml
from easyeditor.commands import mass_edit
from easyeditor.dataset.formats import parse
from easyeditor.dataset.reader import read_dataset, read_sample
from easyeditor.dataset.sentences import read_sentences
from easyeditor.lm.discover import anatomy
from easyeditor.lm.loading import load
from easyeditor.methods.mend.archive import read_archive, write_archive
from easyeditor.methods.mend.convert import load_tensors
from easyeditor.methods.mend.hparams import MENDHyperParams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.rome.method import ROME
from easyeditor.results.journal import read_journal
from easyeditor.results.run import recorded
from easyeditor.runs.ranks import rank_of
from easyeditor.runs.watching import KEYS, saved_keys
from easyeditor.stats import corpus
from easyeditor.stats.corpus import open_corpus
from easyeditor.stats.store import Manifest, read_manifest, read_moment, write_moment
from easyeditor.values.edit import EditRequest, EditResult, WeightDelta

WIDTH = 6
NAME = "model.layers.1.mlp.down_proj.weight"
REQUEST = {"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}
BAY = EditRequest.make(**REQUEST, rephrase_prompts=["Where is Bay?"])
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
NOT_READ = r"^.*edit: "

Read = Callable[[Path], object]


def bad(
    read: Callable[[Path, Any], object], content: Any, error: Any, part: str | None = None, *, name: str = ""
) -> Any:
    """A row: what reads, what it is given, the error, and what the error says."""
    label = f"{read.__name__}-{name or ascii(content)}"
    return pytest.param(lambda folder: read(folder, content), error, part, id=label[:60])


# Readers, each given a folder and what is wrong


def yaml(folder: Path, text: str) -> None:
    (folder / "h.yaml").write_text(text, encoding="utf-8")
    read_yaml(folder / "h.yaml")


def seed(_: Path, value: int) -> None:
    HyperParams.from_dict({"alg_name": "X", "model_name": "m", "seed": value})


def json_text(_: Path, text: str) -> None:
    parse_json(text)


def record(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "d.json").write_text(json.dumps([{**REQUEST, **changes}, REQUEST]), encoding="utf-8")
    read = read_dataset(str(folder / "d.json"), skip_bad=True)  # a bad record, not a bad file
    assert ([b.number for b in read.bad], len(read.requests)) == ([0], 1)
    parse({**REQUEST, **changes}, "here")


def saved_request(_: Path, changes: dict[str, Any]) -> None:
    EditRequest.from_json({key: v for key, v in {**BAY.to_json(), **changes}.items() if v is not ...})


def environment(_: Path, env: dict[str, str]) -> None:
    rank_of(env)


def moment() -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(40, WIDTH))
    return keys.T @ keys


def header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """An .npy file that claims a shape and holds nothing."""
    packed = io.BytesIO()
    np.lib.format.write_array_header_1_0(packed, {"descr": kind, "fortran_order": False, "shape": shape})
    return packed.getvalue()


def npz(path: Path, total: Any, count: Any = 40) -> Path:
    """A statistics file of arrays, or of an .npy file's bytes as they are."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in (("mom2.mom2", total), ("mom2.count", count)):
            packed = io.BytesIO()
            if not isinstance(value, bytes):
                np.save(packed, np.asarray(value))
            archive.writestr(f"{key}.npy", value if isinstance(value, bytes) else packed.getvalue())
    return path


def statistics(folder: Path, arrays: tuple[Any, ...]) -> None:
    read_moment(npz(folder / "s.npz", *arrays), WIDTH)


def manifest(**changes: Any) -> dict[str, Any]:
    texts = dict.fromkeys(("module", "model_name", "weights", "corpus", "corpus_identity"), "00")
    whole = {**texts, "samples": 4, "documents": 4, "tokens": 40, "max_length": 8, "sums": "float32", "format": 1}
    return {**whole, **changes}


def statistics_manifest(folder: Path, content: Any) -> None:
    write_moment(folder / "s.npz", torch.from_numpy(moment()), Manifest(**manifest()))
    read_moment(folder / "s.npz", WIDTH)
    (folder / "s.npz.json").write_text(json.dumps(content), encoding="utf-8")
    read_moment(folder / "s.npz", WIDTH, "x")


def save_edit(folder: Path) -> Path:
    """A saved edit of one request, two low-rank deltas."""
    deltas = [WeightDelta(name=f"w{i}", left=torch.ones(3, 1), right=torch.ones(1, 4)) for i in range(2)]
    return EditResult(method="ROME", requests=(BAY,), deltas=tuple(deltas), traces=({},)).save(folder / "edit")


def changed(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def saved_edit(folder: Path, changes: dict[str, Any]) -> None:
    saved = save_edit(folder)
    changed(saved / "edit.json", changes)
    EditResult.load(saved)


def saved_factors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = save_edit(folder)
    tensors = load_file(saved / "edit.safetensors")
    change(tensors)
    save_file(tensors, saved / "edit.safetensors")
    EditResult.load(saved)


def with_factor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def mend_archive(folder: Path, changes: dict[str, Any]) -> None:
    parts = anatomy(build("llama"))
    spec = NetworkSpec.of(MENDHyperParams(model_name="m"))
    net = Hypernetwork(spec, edited_weights(parts, [NAME]), edit_lr=0.1, generator=torch.Generator())
    write_archive(folder, net, parts, training={"step": 1})
    changed(folder / "archive.json", changes)
    read_archive(str(folder), parts)


def mend_network(folder: Path, changes: dict[str, Any]) -> None:
    """Refused by its size before it is built."""
    spec = NetworkSpec.of(MENDHyperParams(model_name="m"))
    mend_archive(folder, {"network": {**spec.to_json(), **changes}})


def run_line(folder: Path, line: dict[str, Any]) -> None:
    path = folder / "results.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    before = path.read_bytes()
    try:
        list(recorded(folder))
    finally:
        assert path.read_bytes() == before


def without(line: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != key}


EDIT, EVALUATION = edit_line(0), sequential_lines(1)[-1]
SCREEN = {"kind": "screen", "index": 0, "case_id": 0, "subject": "a", "prompt": "a b", "denominator": 1.0}
LINES = [
    *({}, {"kind": "edit"}, {"kind": None}, {"kind": "failed"}, SCREEN),
    *(without(EDIT, key) for key in ("index", "step", "seconds", "guard", "pre", "post", "trace")),
    *(without(EDIT, key) for key in ("requested_rewrite", "collapse", "method", "test_prefix")),
    *({**EDIT, "index": value} for value in (-1, "0", None, 1.5, True, [])),
    *({**EDIT, "seconds": value} for value in (None, {}, {"edit": "1"}, 3)),
    *({**EDIT, "collapse": value} for value in ({}, [], "no", {"collapsed": "yes"})),
    *({**EDIT, "post": value} for value in (None, {}, {**EDIT["post"], "rewrite_acc": ["a"]})),
    {**EDIT, "post": {**EDIT["post"], "locality": {"x_acc": ["a"]}}},
    *({**EDIT, "trace": value} for value in ([], {"5": 3}, {"5": {"denominator": "small"}})),
    *({**EDIT, "guard": value} for value in ({}, 3, {"action": "keep"})),
    *({**EDIT, "requested_rewrite": value} for value in ({}, [])),
    *(without(EVALUATION, key) for key in ("after", "ppl", "collapsed", "retention")),
    *({**EVALUATION, "index": 0, "after": value} for value in ("1", -1, None)),
    *({**EVALUATION, "index": 0, "retention": value} for value in (3, [3], [{}])),
]
TOO_LONG = "x" * 200_000
ROWS = [
    *(bad(yaml, text, ConfigError, "alias") for text in ("a: &a [1]\nb: *a\n", BOMB, "a: &a [*a]\n")),
    bad(yaml, "a: &a\n  <<: *a\n", ConfigError, "alias"),
    bad(yaml, "a: !!binary aGVsbG8=\n", ConfigError, "tag:yaml.org,2002:binary"),
    bad(yaml, "a: !!set {x, y}\n", ConfigError, "tag:yaml.org,2002:set"),
    bad(yaml, "a: !!omap [x: 1]\n", ConfigError, "tag:yaml.org,2002:omap"),
    *(bad(yaml, text, ConfigError, "63 bits") for text in (f"a: {'9' * 400}\n", f"a: [1, -{2**63}]\n")),
    *(bad(yaml, text, ConfigError, "UTF-8") for text in ('a: "\\ud800"\n', '"\\ud800": 1\n')),
    bad(yaml, "a: " + "x" * 300_000 + "\n", ConfigError, "characters"),
    *(bad(seed, value, ConfigError, "seed") for value in (2**62, -(2**62), 10**400)),
    *(bad(json_text, text, ValueError, "UTF-8") for text in ('"\\ud800"', '{"\\udc00x": 1}', '[["\\uDBff"]]')),
    *(bad(json_text, text, ValueError, "63 bits") for text in (f"[{'1' * 400}]", f"-{2**63}")),
    *(
        bad(record, changes, DataError, r"^here: ")
        for changes in (
            *({"case_id": value} for value in ("\ud800", ["a"], 1.5, True, 10**400)),
            *({"locality": {"\ud800": {"prompt": "a", "ground_truth": "b"}}}, {"locality": ["a"]}),
            *({"portability": "a"}, {"prompt": f"Bay {TOO_LONG}"}, {"rephrase_prompt": TOO_LONG}),
            *({"locality_prompt": TOO_LONG, "locality_ground_truth": "a"}, {"ground_truth": TOO_LONG}),
        )
    ),
    *(
        bad(saved_request, changes, DataError)
        for changes in (
            *({"prompt": 3}, {"prompt": None}, {"subject": "Rome"}, {"target_new": ""}, {"target_new": ["a"]}),
            *({"subject_start": value} for value in (1, "0", -9, True)),
            *({"ground_truth": 3}, {"rephrase_prompt": "text"}, {"rephrase_prompt": [3]}, {"locality": []}),
            *({"locality": {"a": {"prompt": ["a"], "ground_truth": []}}}, {"portability": {"a": 3}}),
            *({"case_id": []}, {"generation_prompts": [""]}),
            *({key: ...} for key in BAY.to_json()),
        )
    ),
    *(
        bad(environment, env, ConfigError, part)
        for env, part in (
            *(({"RANK": "one"}, "RANK is 'one'"), ({"RANK": ""}, "RANK is ''")),
            *(({"WORLD_SIZE": value}, f"WORLD_SIZE is '{value}'") for value in ("2.0", "0", "-1")),
            *(({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"), ({"RANK": "9" * 400, "WORLD_SIZE": "2"}, "RANK is")),
            *(({"RANK": value, "WORLD_SIZE": "2"}, f"RANK is '{value}'") for value in ("2", "-1")),
            ({"WORLD_SIZE": "2"}, "RANK"),
        )
    ),
    *(
        bad(statistics, arrays, StatsError, part, name=name)
        for name, arrays, part in (
            ("indefinite", (np.ones((WIDTH, WIDTH)) + np.diag(np.full(WIDTH, -0.5)),), "positive"),
            ("triangle", (np.triu(moment()),), "symmetric"),
            ("complex", (moment() + 0j,), "complex128"),
            ("texts", (moment().astype(str),), "<U"),
            ("bools", (moment() > 0,), "bool"),
            ("complex count", (moment(), 40 + 0j), "complex128"),
            ("text count", (moment(), "40"), "<U2"),
            ("two counts", (moment(), [40, 40]), r"\(2,\)"),
            ("nan count", (moment(), float("nan")), "count"),
            ("endless", (header((10**7, 10**7)),), "10000000"),
            ("cut", (header((WIDTH, WIDTH), "<f8"),), "not a readable"),
            ("endless count", (moment(), header((10**13,))), "10000000000000"),
            ("objects", (header((WIDTH, WIDTH), "|O"),), "object"),
            ("unknown version", (b"\x93NUMPY\x09\x00",), "not a readable"),
        )
    ),
    *(
        bad(statistics_manifest, content, StatsError, name=ascii(content)[-40:])
        for content in (
            *([], "text", None, 3, {}, manifest(format=2), manifest(weights="no hex"), manifest(weights=5)),
            *(manifest(extra=1), manifest(tokens="many"), manifest(model_name=None), manifest(module=["x"])),
            manifest(samples=10**400),
        )
    ),
    *(
        bad(saved_edit, changes, DataError, NOT_READ)
        for changes in (
            *({"deltas": value} for value in ({}, [], "ab", None)),
            *({"requests": value} for value in ({}, "x", [])),
            *({"trace": value} for value in ({}, [[]], [{"one": {}}], [{"1": {"losses": []}}])),
            *({"format": "1"}, {"contexts": "text"}, {"contexts": [3]}, {"seconds": "3"}, {"seconds": None}),
            *({"method": 5}, {"model_fingerprint": 7}, {"hparams": []}, {"memory": "x"}, {"memory": ["x"]}),
        )
    ),
    *(
        bad(saved_factors, change, DataError, NOT_READ, name=name)
        for name, change in {
            "mixed": with_factor("0.left", torch.Tensor.double),
            "mixed half": with_factor("0.left", torch.Tensor.half),
            "float8": with_factor("0.left", lambda t: t.to(torch.float8_e4m3fn)),
            "nan": with_factor("1.right", lambda t: t * float("nan")),
            "inf": with_factor("1.right", lambda t: t * float("inf")),
            "integers": with_factor("1.right", torch.Tensor.int),
            "surplus": lambda tensors: tensors.update({"2.full": torch.ones(3, 4)}),
            "missing": lambda tensors: tensors.pop("1.left"),
            "rank 0": lambda tensors: tensors.update({"1.left": torch.ones(3, 0), "1.right": torch.ones(0, 4)}),
            "no rows": lambda tensors: tensors.update({"1.left": torch.ones(0, 1)}),
            "a number": with_factor("1.right", lambda t: t[0, 0]),
        }.items()
    ),
    *(
        bad(mend_network, changes, DataError, r"MEND archive|63 bits")
        for changes in (
            *({"n_hidden": value} for value in (10**9, -1, "one", 10**400)),
            *({"hidden_dim": 10**9, "mlp_class": "MLP"}, {"init": "zeros"}, {"act": "swish"}, {"mlp_class": "RNN"}),
            *({"shared": "perhaps"}, {"rank": 0}, {"rank": -4}, {"norm": 3}),
        )
    ),
    *(
        bad(mend_archive, changes, DataError)
        for changes in (
            *({"tensors": "../x.safetensors"}, {"tensors": "a\0b"}, {"tensors": 3}),
            *({"inner_params": value} for value in ([], {}, [3], [{"name": NAME, "inputs": 10**400, "outputs": 1}])),
            *({"model": []}, {"model": {}}, {"format": [1]}, {"network": []}),
        )
    ),
    *(bad(run_line, line, DataError, r"results\.jsonl, line 1: ", name=str(n)) for n, line in enumerate(LINES)),
]


@pytest.mark.parametrize(("read", "error", "part"), ROWS)
def test_what_is_damaged_is_refused_with_the_reason(read: Read, error: Any, part: str | None, tmp_path: Path) -> None:
    with pytest.raises(error, match=part):
        read(tmp_path)


# What only looks damaged


def test_a_date_in_yaml_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("model_name: 2020-01-01\n", encoding="utf-8")
    assert read_yaml(tmp_path / "h.yaml") == {"model_name": "2020-01-01"}


@pytest.mark.parametrize(
    "text",
    ['"\\ud83d\\ude00"', "9223372036854775807", "0.12345678901234567890123", '"\\\\ud800"', '"1234567890123456789012"'],
)
def test_json_that_only_looks_like_it_is_read(text: str) -> None:
    assert parse_json(text) == json.loads(text)


def test_saved_requests_and_edits_read_back(tmp_path: Path) -> None:
    assert EditRequest.from_json(BAY.to_json()) == BAY
    assert [d.name for d in EditResult.load(save_edit(tmp_path)).deltas] == ["w0", "w1"]


def test_fewer_tokens_than_dimensions_are_a_second_moment_all_the_same(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    assert read_moment(npz(tmp_path / "s.npz", keys.T @ keys, 2), WIDTH).shape == (WIDTH, WIDTH)


def test_a_search_whose_norm_overflows_is_an_error_and_no_zero_edit() -> None:
    pair = build("llama"), tokenizer()
    with pytest.raises(NumericalError, match="norm"):
        ROME(*pair, rome_hparams(pair, v_lr=1e30)).edit([BAY])


# A damaged run is not resumed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one edit, its model and its data."""
    root = tmp_path_factory.mktemp("finished")
    write_yaml(root / "h.yaml", save_tiny(root / "m"), ppl_sentence_num=0, v_num_grad_steps=2)
    (root / "d.json").write_text(json.dumps([REQUEST]), encoding="utf-8")
    flags = ["--hparams", root / "h.yaml", "--data", root / "d.json", "--output", root / "run", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mass_edit.py", *map(str, flags)])
        assert mass_edit.main() == 0
    return root


MANIFESTS: list[Any] = [
    *([], None, "text", {}),
    *({key: v} for key in ("data", "config_sha256", "model_fingerprint", "context_templates") for v in (None, 3)),
    *({"data": {}}, {"data": {"sha256": 3}}, {"context_templates": [3]}, {"context_templates": "x"}, {"sentences": 3}),
]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        *(("manifest.json", changes, ("manifest.json", "other")) for changes in MANIFESTS),
        ("results.jsonl", {"index": 7, "step": 8}, ("record 8",)),  # a line of a request that is not there
    ],
    ids=str,
)
def test_a_damaged_run_is_refused_at_resume(
    finished: Path,
    name: str,
    damage: Any,
    said: tuple[str, ...],
    script: Any,
) -> None:
    path = finished / "run" / name
    whole = path.read_text(encoding="utf-8")
    content = {**json.loads(whole), **damage} if damage and isinstance(damage, dict) else damage
    path.write_text((whole if name == "results.jsonl" else "") + json.dumps(content) + "\n", encoding="utf-8")
    try:
        ran = script(mass_edit, "--resume", finished / "run", "--json")
    finally:
        path.write_text(whole, encoding="utf-8")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert any(part in ran.err for part in said)


# Something else than a regular file of a bounded size

READERS: dict[str, Callable[[Path], Any]] = {
    "a.yaml": read_yaml,
    "hparams.json": read_yaml,
    "a.json": read_json,
    "contexts.json": lambda path: read_json_list(path, "contexts"),
    "data.json": lambda path: read_dataset(str(path)),
    "data.jsonl": lambda path: read_dataset(str(path)),
    "data.csv": lambda path: read_dataset(str(path)),
    "data": lambda path: read_dataset(str(path)),
    "sample.json": lambda path: read_sample(str(path)),
    "sentences.txt": read_sentences,
    "edit.json": lambda path: EditResult.load(path.parent),
    "edit.safetensors": lambda path: EditResult.load(path.parent),
    "delta.safetensors": WeightDelta.load,
    "moment.npz": lambda path: read_moment(path, WIDTH),
    "moment.npz.json": lambda path: read_manifest(path.with_suffix("")),
    "corpus.txt": lambda path: list(open_corpus(str(path)).documents),
    "corpus.parquet": lambda path: list(open_corpus(str(path)).documents),
    "mend.pt": load_tensors,
    KEYS: lambda path: saved_keys(path.parent),
    "results.jsonl": lambda path: list(recorded(path.parent)),
}


@pytest.mark.parametrize("kind", ["fifo", "zero", "socket", "folder", "huge"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, name: str, kind: str) -> None:
    path = save_edit(tmp_path) / name
    path.unlink(missing_ok=True)
    stand_in(path, kind)
    if (kind, name) in (("folder", "data"), ("huge", "results.jsonl")) or (kind == "huge" and "corpus" in name):
        return  # a dataset's folder; what is read line by line
    with pytest.raises((ConfigError, DataError, StatsError)) as refused:
        READERS[name](path)
    assert "\n" not in str(refused.value)
    said = "at most" if kind == "huge" else "not a regular file"
    assert said in str(refused.value) or kind == "folder"


def test_a_corpus_is_read_by_bounded_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LONGEST_LINE", 9)
    (tmp_path / "a.txt").write_text("short\n" + "a" * 10)
    with pytest.raises(DataError, match="line 2 has more than 9 characters"):
        list(open_corpus(str(tmp_path / "a.txt")).documents)


def test_a_journal_without_an_end_of_line_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "results.jsonl").open("wb") as made:
        made.truncate(2**40)
    with pytest.raises(DataError, match="line 1: more than 268,435,456 bytes"):
        list(read_journal(tmp_path / "results.jsonl"))


TEXTS = {"data", "sentences.txt", "corpus.txt", "corpus.parquet", "results.jsonl"}  # or read by their lines


@pytest.mark.parametrize("name", [*sorted(READERS.keys() - TEXTS), "model.safetensors", "config.json"])
def test_an_html_page_in_place_of_a_fetched_file_is_called_that(tmp_path: Path, name: str) -> None:
    path = save_edit(tmp_path) / name
    path.write_text("\n<!DOCTYPE html>\n<html><body>404: not found</body></html>\n", encoding="utf-8")
    if name == "model.safetensors":
        (path.parent / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(EasyEditorError) as caught:
        READERS.get(name, lambda path: load(str(path.parent), device="cpu"))(path)
    assert str(path.parent) in str(caught.value)
    assert "is an HTML" in str(caught.value)
    assert "\n" not in str(caught.value)
