"""Files of ours that were damaged and are still whole JSON, npz or safetensors: refused with the reason, and soon."""

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
from script_runs import Ran, call, save_tiny, stand_in, write_yaml

from easyeditor.base.errors import ConfigError, DataError, EasyEditorError, NumericalError, StatsError
from easyeditor.base.files import read_json
from easyeditor.base.hparams import read_json_list
from easyeditor.base.plain_yaml import read_yaml
from easyeditor.commands import mass_edit
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
from easyeditor.runs.watching import KEYS, saved_keys
from easyeditor.stats import corpus
from easyeditor.stats.corpus import open_corpus
from easyeditor.stats.store import Manifest, read_manifest, read_moment, write_moment
from easyeditor.values.edit import EditRequest, EditResult, WeightDelta

WIDTH = 6
NAME = "model.layers.1.mlp.down_proj.weight"


# Statistics


def moment() -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(40, WIDTH))
    return keys.T @ keys


def manifest(**changes: Any) -> dict[str, Any]:
    texts = dict.fromkeys(("module", "model_name", "weights", "corpus", "corpus_identity"), "00")
    whole = {**texts, "samples": 4, "documents": 4, "tokens": 40, "max_length": 8, "sums": "float32", "format": 1}
    return {**whole, **changes}


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


INDEFINITE = np.ones((WIDTH, WIDTH)) + np.diag(np.full(WIDTH, -0.5))


@pytest.mark.parametrize(
    ("total", "count", "part"),
    [
        (INDEFINITE, 40, "positive"),
        (np.triu(moment()), 40, "symmetric"),
        (moment() + 0j, 40, "complex128"),
        (moment().astype(str), 40, "<U"),
        (moment() > 0, 40, "bool"),
        (moment(), 40 + 0j, "complex128"),
        (moment(), "40", "<U2"),
        (moment(), [40, 40], "(2,)"),
        (moment(), float("nan"), "count"),
        (header((10**7, 10**7)), 40, "10000000"),
        (header((WIDTH, WIDTH), "<f8"), 40, "not a readable"),
        (moment(), header((10**13,)), "10000000000000"),
        (header((WIDTH, WIDTH), "|O"), 40, "object"),
        (b"\x93NUMPY\x09\x00", 40, "not a readable"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, (str, int, float)) else "",
)
def test_statistics_are_a_second_moment(tmp_path: Path, total: Any, count: Any, part: str) -> None:
    with pytest.raises(StatsError) as error:
        read_moment(npz(tmp_path / "s.npz", total, count), WIDTH)
    assert part in str(error.value)


def test_fewer_tokens_than_dimensions_are_a_second_moment_all_the_same(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    assert read_moment(npz(tmp_path / "s.npz", keys.T @ keys, 2), WIDTH).shape == (WIDTH, WIDTH)


@pytest.mark.parametrize(
    "content",
    [
        *(
            [],
            "text",
            None,
            3,
            {},
            manifest(format=2),
            manifest(weights="no hex"),
            manifest(weights=5),
            manifest(extra=1),
        ),
        *(manifest(tokens="many"), manifest(model_name=None), manifest(module=["x"]), manifest(samples=10**400)),
    ],
    ids=lambda content: str(content)[-40:],
)
def test_a_manifest_of_statistics_is_typed(tmp_path: Path, content: Any) -> None:
    write_moment(tmp_path / "s.npz", torch.from_numpy(moment()), Manifest(**manifest()))
    read_moment(tmp_path / "s.npz", WIDTH)
    (tmp_path / "s.npz.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StatsError):
        read_moment(tmp_path / "s.npz", WIDTH, "x")


# Saved edits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved edit of one request, two low-rank deltas."""
    request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    deltas = [WeightDelta(name=f"w{i}", left=torch.ones(3, 1), right=torch.ones(1, 4)) for i in range(2)]
    result = EditResult(method="ROME", requests=(request,), deltas=tuple(deltas), traces=({},))
    return result.save(tmp_path / "edit")


def test_a_saved_edit_reads_back(saved: Path) -> None:
    assert [d.name for d in EditResult.load(saved).deltas] == ["w0", "w1"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"deltas": {}}, {"deltas": []}, {"deltas": "ab"}, {"deltas": None}, {"requests": {}}, {"requests": "x"}),
        *(
            {"trace": {}},
            {"trace": [[]]},
            {"trace": [{"one": {}}]},
            {"trace": [{"1": {"losses": []}}]},
            {"format": "1"},
        ),
        *({"contexts": "text"}, {"contexts": [3]}, {"seconds": "3"}, {"seconds": None}, {"method": 5}),
        *(
            {"model_fingerprint": 7},
            {"hparams": []},
            {"memory": "x"},
            {"memory": ["x"]},
            {"requests": []},
            {"deltas": []},
        ),
    ],
    ids=str,
)
def test_a_saved_edit_is_typed(saved: Path, changes: dict[str, Any]) -> None:
    raw = json.loads((saved / "edit.json").read_text(encoding="utf-8"))
    (saved / "edit.json").write_text(json.dumps({**raw, **changes}), encoding="utf-8")
    with pytest.raises(DataError, match=r"^.*edit: "):
        EditResult.load(saved)


def with_factor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_factor("0.left", torch.Tensor.double), id="mixed"),
        pytest.param(with_factor("0.left", torch.Tensor.half), id="mixed-half"),
        pytest.param(with_factor("0.left", lambda t: t.to(torch.float8_e4m3fn)), id="float8"),
        pytest.param(with_factor("1.right", lambda t: t * float("nan")), id="nan"),
        pytest.param(with_factor("1.right", lambda t: t * float("inf")), id="inf"),
        pytest.param(with_factor("1.right", torch.Tensor.int), id="integers"),
        pytest.param(lambda tensors: tensors.update({"2.full": torch.ones(3, 4)}), id="surplus"),
        pytest.param(lambda tensors: tensors.pop("1.left"), id="missing"),
        pytest.param(
            lambda tensors: tensors.update({"1.left": torch.ones(3, 0), "1.right": torch.ones(0, 4)}), id="rank-0"
        ),
        pytest.param(lambda tensors: tensors.update({"1.left": torch.ones(0, 1)}), id="no-rows"),
        pytest.param(with_factor("1.right", lambda t: t[0, 0]), id="a-number"),
    ],
)
def test_the_factors_of_a_saved_edit_are_numbers_of_one_kind(saved: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(saved / "edit.safetensors")
    change(tensors)
    save_file(tensors, saved / "edit.safetensors")
    with pytest.raises(DataError, match=r"^.*edit: "):
        EditResult.load(saved)


def test_a_search_whose_norm_overflows_is_an_error_and_no_zero_edit() -> None:
    pair = build("llama"), tokenizer()
    hparams = rome_hparams(pair, v_lr=1e30)
    with pytest.raises(NumericalError, match="norm"):
        ROME(*pair, hparams).edit([EditRequest.make("Bay is in", subject="Bay", target_new="Italy")])


# MEND archives


@pytest.mark.parametrize(
    "network",
    [
        *({"n_hidden": 10**9}, {"n_hidden": -1}, {"n_hidden": "one"}, {"n_hidden": 10**400}),
        *({"hidden_dim": 10**9, "mlp_class": "MLP"}, {"init": "zeros"}, {"act": "swish"}, {"mlp_class": "RNN"}),
        *({"shared": "perhaps"}, {"rank": 0}, {"rank": -4}, {"norm": 3}),
    ],
    ids=str,
)
def test_a_hypernetwork_is_refused_by_its_size_before_it_is_built(tmp_path: Path, network: dict[str, Any]) -> None:
    parts = anatomy(build("llama"))
    spec = NetworkSpec.of(MENDHyperParams(model_name="m"))
    net = Hypernetwork(spec, edited_weights(parts, [NAME]), edit_lr=0.1, generator=torch.Generator())
    write_archive(tmp_path, net, parts, training={"step": 1})
    raw = json.loads((tmp_path / "archive.json").read_text(encoding="utf-8"))
    (tmp_path / "archive.json").write_text(json.dumps({**raw, "network": {**raw["network"], **network}}))
    with pytest.raises(DataError, match=r"MEND archive|63 bits"):
        read_archive(str(tmp_path), parts)


@pytest.mark.parametrize(
    "changes",
    [
        *({"tensors": "../x.safetensors"}, {"tensors": "a\0b"}, {"tensors": 3}, {"inner_params": []}),
        *({"inner_params": {}}, {"inner_params": [3]}, {"model": []}, {"model": {}}, {"format": [1]}, {"network": []}),
        {"inner_params": [{"name": NAME, "inputs": 10**400, "outputs": 1}]},
    ],
    ids=str,
)
def test_a_mend_archive_is_typed(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = anatomy(build("llama"))
    spec = NetworkSpec.of(MENDHyperParams(model_name="m"))
    net = Hypernetwork(spec, edited_weights(parts, [NAME]), edit_lr=0.1, generator=torch.Generator())
    write_archive(tmp_path, net, parts, training={"step": 1})
    raw = json.loads((tmp_path / "archive.json").read_text(encoding="utf-8"))
    (tmp_path / "archive.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(DataError):
        read_archive(str(tmp_path), parts)


# Lines and manifests of a run


def without(line: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != key}


EVALUATION = sequential_lines(1)[-1]
SCREEN = {"kind": "screen", "index": 0, "case_id": 0, "subject": "a", "prompt": "a b", "denominator": 1.0}
LINES = [
    *({}, {"kind": "edit"}, {"kind": None}, {"kind": "failed"}, SCREEN),
    *(without(edit_line(0), key) for key in ("index", "step", "seconds", "guard", "pre", "post", "trace")),
    *(without(edit_line(0), key) for key in ("requested_rewrite", "collapse", "method", "test_prefix")),
    *({**edit_line(0), "index": value} for value in (-1, "0", None, 1.5, True, [])),
    *({**edit_line(0), "seconds": value} for value in (None, {}, {"edit": "1"}, 3)),
    *({**edit_line(0), "collapse": value} for value in ({}, [], "no", {"collapsed": "yes"})),
    *({**edit_line(0), "post": value} for value in (None, {})),
    {**edit_line(0), "post": {**edit_line(0)["post"], "rewrite_acc": ["a"]}},
    {**edit_line(0), "post": {**edit_line(0)["post"], "locality": {"x_acc": ["a"]}}},
    *({**edit_line(0), "trace": value} for value in ([], {"5": 3}, {"5": {"denominator": "small"}})),
    *({**edit_line(0), "guard": value} for value in ({}, 3, {"action": "keep"})),
    *({**edit_line(0), "requested_rewrite": value} for value in ({}, [])),
    *(without(EVALUATION, key) for key in ("after", "ppl", "collapsed", "retention")),
    *({**EVALUATION, "index": 0, "after": value} for value in ("1", -1, None)),
    *({**EVALUATION, "index": 0, "retention": value} for value in (3, [3], [{}])),
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_of_a_run_is_typed(tmp_path: Path, line: dict[str, Any]) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"results\.jsonl, line 1: "):
        list(recorded(tmp_path))
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one edit, its model and its data."""
    root = tmp_path_factory.mktemp("finished")
    save_tiny(root / "m")
    write_yaml(root / "h.yaml", root / "m", ppl_sentence_num=0, v_num_grad_steps=2)
    data = [{"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}]
    (root / "d.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mass_edit.py", "--hparams", str(root / "h.yaml"), "--data", str(root / "d.json"),
                                   "--output", str(root / "run"), "--json"])  # fmt: skip
        assert mass_edit.main() == 0
    return root


MANIFESTS: list[Any] = [
    *([], None, "text", {}),
    *(
        {key: value}
        for key in ("data", "config_sha256", "model_fingerprint", "context_templates")
        for value in (None, 3)
    ),
    *({"data": {}}, {"data": {"sha256": 3}}, {"context_templates": [3]}, {"context_templates": "x"}, {"sentences": 3}),
]


@pytest.mark.parametrize("changes", MANIFESTS, ids=str)
def test_a_damaged_manifest_is_refused_at_resume(
    finished: Path, changes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "run/manifest.json"
    whole = path.read_text(encoding="utf-8")
    content = {**json.loads(whole), **changes} if changes and isinstance(changes, dict) else changes
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        ran: Ran = call(mass_edit, ["--resume", finished / "run", "--json"], monkeypatch, capsys)
    finally:
        path.write_text(whole, encoding="utf-8")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert "manifest.json" in ran.err or "other" in ran.err


def test_a_line_of_a_request_that_is_not_there_is_refused_at_resume(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "run/results.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + json.dumps({**json.loads(whole), "index": 7, "step": 8}) + "\n", encoding="utf-8")
    try:
        ran = call(mass_edit, ["--resume", finished / "run", "--json"], monkeypatch, capsys)
    finally:
        path.write_text(whole, encoding="utf-8")
    assert (ran.code, ran.out) == (2, "")
    assert "record 8" in ran.err


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
def test_only_regular_files_of_a_bounded_size_are_read(saved: Path, name: str, kind: str) -> None:
    path = saved / name
    path.unlink(missing_ok=True)
    stand_in(path, kind)
    if (kind, name) in (("folder", "data"), ("huge", "results.jsonl")) or (kind == "huge" and "corpus" in name):
        return  # a dataset's folder; what is read line by line
    with pytest.raises((ConfigError, DataError, StatsError)) as refused:
        READERS[name](path)
    assert "\n" not in str(refused.value)
    said = "at most" if kind == "huge" else "a folder" if kind == "folder" else "not a regular file"
    assert said in str(refused.value) or kind == "folder"


def test_a_corpus_is_read_by_bounded_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LONGEST_LINE", 9)
    (tmp_path / "a.txt").write_text("short\n" + "a" * 10)
    with pytest.raises(DataError, match="line 2 has more than 9 characters"):
        list(open_corpus(str(tmp_path / "a.txt")).documents)


# An error page in place of the file that was to be fetched


@pytest.mark.parametrize("name", [*READERS, "model.safetensors", "config.json"])
def test_an_html_page_is_called_that(saved: Path, tmp_path: Path, name: str) -> None:
    if name in ("data", "sentences.txt", "corpus.txt", "corpus.parquet", "results.jsonl"):
        return  # texts, or read by their lines
    path = saved / name
    path.write_text("\n<!DOCTYPE html>\n<html><body>404: not found</body></html>\n", encoding="utf-8")
    if name == "model.safetensors":
        (saved / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(EasyEditorError) as caught:
        READERS.get(name, lambda path: load(str(path.parent), device="cpu"))(path)
    assert str(saved) in str(caught.value)
    assert "is an HTML" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_journal_without_an_end_of_line_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "results.jsonl").open("wb") as made:
        made.truncate(2**40)
    with pytest.raises(DataError, match="line 1: more than 268,435,456 bytes"):
        list(read_journal(tmp_path / "results.jsonl"))
