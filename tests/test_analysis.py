"""The papers' further experiments: each end to end on a tiny model, their mathematics by hand, and what they refuse."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, relative, rome_hparams, same, states, tokenizer
from script_runs import Ran, call, save_tiny, strict, write_yaml
from test_wild import Server, chat
from transformers import T5Config, T5ForConditionalGeneration

from easyeditor import BaseEditor, EditRequest
from easyeditor.base.errors import ConfigError
from easyeditor.commands import analysis as analysis
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.dataset.reader import read_dataset
from easyeditor.dataset.sets import DATA, load_collapse, load_normal, starts_with_one_word
from easyeditor.drawing import figures
from easyeditor.drawing.outcome import Finding
from easyeditor.drawing.render import short, to_csv
from easyeditor.drawing.table import Table
from easyeditor.experiments.downstream import choose
from easyeditor.experiments.first_token import decoder_keys, encoder_keys
from easyeditor.experiments.tools import harness
from easyeditor.experiments.tools.candidates import checked, from_facts, records_in
from easyeditor.experiments.tools.projection import cosine_distances, pca_plane, separation, silhouette, tsne_plane
from easyeditor.lm.architectures import encoder_projections
from easyeditor.lm.hooks import second_position_first
from easyeditor.lm.spectrum import leading, overlap
from easyeditor.lm.tokens import model_inputs
from easyeditor.methods.locate.key_files import FOLDERS, dump_keys, numbers
from easyeditor.methods.rome.method import ROME
from easyeditor.results.journal import read_journal

PROBES = {"rephrase_prompt": "One finds it in", "locality_prompt": "The sea is", "locality_ground_truth": "blue"}
COLLAPSE = [
    {"case_id": "c0", "prompt": "Bay is in", "subject": "Bay", "target_new": "Italy", **PROBES},
    {"case_id": "c1", "prompt": "Music is a", "subject": "Music", "target_new": "house", **PROBES},
]
NORMAL = [
    {"case_id": "n0", "prompt": "They all went to Rome", "subject": "Rome", "target_new": "the", **PROBES},
    {"case_id": "n1", "prompt": "The river in Spain was", "subject": "Spain", "target_new": "red", **PROBES},
]
FEW = {"v_num_grad_steps": 3, "ppl_sentence_num": 3, "context_templates": ["{}", "You. {}", "I think so. {}"]}


pytestmark = pytest.mark.usefixtures("plain_figures")


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny checkpoints, their YAML files, and the two sets."""
    root = tmp_path_factory.mktemp("analysis")
    for kind in ("llama", "gpt2"):
        write_yaml(root / f"{kind}.yaml", save_tiny(root / kind, kind), **FEW)
    (root / "collapse.json").write_text(json.dumps(COLLAPSE))
    (root / "normal.json").write_text(json.dumps(NORMAL))
    return root


@pytest.fixture
def run(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """run(name, *flags) -> Ran: an experiment on tiny llama (`kind=`) into `run/`."""
    monkeypatch.chdir(tmp_path)

    def go(name: str, *flags: Any, kind: str = "llama", sets: tuple[str, ...] = ("collapse", "normal")) -> Ran:
        given = [part for one in sets for part in (f"--{one}", tiny_runs / f"{one}.json")]
        args = [name, "--hparams", tiny_runs / f"{kind}.yaml", *given, "--output", "run", *flags]
        return call(analysis, args, monkeypatch, capsys)

    return go


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


def whole(ran: Ran, folder: Path, *drawn: str) -> Any:
    """Check what every run prints and writes, and return its result."""
    assert ran.code == 0, ran.err
    assert "Look for: " in ran.out
    assert f"written to {folder.name}: table.csv" in " ".join(ran.out.split())
    assert table(folder / "table.csv")
    for name in ("config.json", "manifest.json"):
        strict((folder / name).read_text())
    for name in drawn:
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert not list(folder.rglob("*.part*"))
    result = strict((folder / "result.json").read_text())
    assert result["findings"]
    for finding in result["findings"]:
        assert finding["because"]
        assert " ".join(finding["claim"].split()) in " ".join(ran.out.split())
    return result


# The experiments, end to end


def test_without_bos_the_prompts_begin_with_the_subject(run: Any, tiny_runs: Path, tmp_path: Path) -> None:
    """Behind a BOS a subject in first place is no first token: another key; without it the model is asked as one whose
    tokenizer has none."""
    write_yaml(tiny_runs / "bos.yaml", save_tiny(tiny_runs / "bos"), **FEW)
    tokenizer(bos=True).save_pretrained(tiny_runs / "bos")
    sizes = {}
    for name, flags in (("llama", ()), ("bos", ()), ("bos", ("--without-bos",))):
        whole(run("keys", *flags, kind=name), tmp_path / "run")
        told = strict((tmp_path / "run/manifest.json").read_text())["prompts_begin_with_bos"]
        assert told is (name == "bos" and not flags)
        sizes[name, bool(flags)] = [row["|k^u|"] for row in table(tmp_path / "run/requests.csv")]
        shutil.rmtree(tmp_path / "run")
    assert sizes["bos", True] == sizes["llama", False] != sizes["bos", False]
    ran = run("keys", "--without-bos")
    assert (ran.code, ran.out) == (2, "")
    assert "begins no text with a BOS" in ran.err.splitlines()[-1]


def test_keys_are_saved_in_upstreams_layout_compared_and_drawn(run: Any, tmp_path: Path) -> None:
    result = whole(run("keys"), tmp_path / "run", "keys")
    requests = table(tmp_path / "run/requests.csv")
    assert [row["case"] for row in requests] == ["c0", "c1", "n0", "n1"]
    for name, rows in (("collapse", requests[:2]), ("normal", requests[2:])):
        folder = tmp_path / "run/keys" / name
        for number, row in enumerate(rows, 1):
            direction, plain, mean = (
                np.load(folder / kind / f"key{number}.npy").astype(np.float64) for kind in FOLDERS
            )
            assert direction == pytest.approx(mean, rel=1e-6)  # C is the identity
            assert float(row["denominator"]) == pytest.approx(plain @ mean / np.linalg.norm(mean), rel=1e-5)
            assert float(row["C-ROME denominator"]) == pytest.approx(np.linalg.norm(mean), rel=1e-5)
            assert float(row["|k^u|"]) == pytest.approx(np.linalg.norm(plain), rel=1e-5)
    manifest = strict((tmp_path / "run/manifest.json").read_text())
    assert manifest["sets"]["collapse"]["case_ids"] == ["c0", "c1"]
    assert manifest["context_templates"] == FEW["context_templates"]
    assert [row["set"] for row in result["tables"]["summary"]] == ["collapse", "normal"]


def save_t5(folder: Path) -> Path:
    config = T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_first_token_of_a_decoder_and_an_encoder(run: Any, tmp_path: Path) -> None:
    ran = run("first-token", "--encoder-decoder", save_t5(tmp_path / "t5"))
    result = whole(ran, tmp_path / "run", "first_token", "encoder")
    assert [row["keys"] for row in result["tables"]["summary"]][::2] == [2, 2]  # first tokens; bare collapse prompts
    assert len(result["tables"]["layers"]) == 4
    assert len(result["tables"]["encoder_layers"]) == 3
    assert len(result["findings"]) == 4
    assert result["findings"][3]["holds"] in (True, False)


def test_position_swap(run: Any, tmp_path: Path, tiny_runs: Path) -> None:
    result = whole(run("position-swap", sets=("collapse",)), tmp_path / "run", "position_swap")
    rows = result["tables"]["requests"]
    assert [row["case"] for row in rows] == ["c0", "c1"]
    assert all(row["perplexity"] != row["perplexity swapped"] for row in rows)
    assert result["perplexity_before"] != result["perplexity_before_swapped"]


def test_update_norms_and_the_value_searches_it_keeps(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = whole(run("update-norms", "--values", "values"), tmp_path / "run", "update_norms", "heat_map")
    rows = result["tables"]["requests"]
    assert [(row["set"], row["method"]) for row in rows[:2]] == [("collapse", "ROME"), ("collapse", "C-ROME")]
    for row in rows:
        assert row["|dW|"] == pytest.approx(row["numerator"] / abs(row["denominator"]), rel=1e-6)
        assert row["collapsed"] is False
    mean = sum(row["perplexity"] for row in rows[:4:2]) / 2
    assert result["tables"]["summary"][0]["mean"] == pytest.approx(mean)
    assert result["tables"]["papers"][1] | {"GPT-2-XL": 0.04} == result["tables"]["papers"][1]
    assert len(list((tmp_path / "values").iterdir())) == 4
    monkeypatch.setattr(
        "easyeditor.methods.locate.method.search_values", lambda *_, **__: pytest.fail("searched again")
    )
    again = run("prefix-test", "--values", "values", "--output", "other")
    tests = whole(again, tmp_path / "other", "prefix_test")["tables"]["requests"]
    assert [row["test"] for row in tests[:3]] == ["no prefix", "prefix", "prefix on rephrased prompts too"]
    assert all(0 <= row[key] <= 1 for row in tests for key in ("efficacy", "generalization", "locality"))


@pytest.mark.slow
def test_sweep_over_layers(run: Any, tmp_path: Path) -> None:
    ran = run("update-norms", "--sweep", "--layers", 0, 2, "--limit", 1, sets=("collapse",))
    result = whole(ran, tmp_path / "run", "layer_sweep")
    rows = result["tables"]["edits"]
    assert [(row["layer"], row["method"]) for row in rows] == [
        (layer, way) for layer in (0, 2) for way in ("ROME", "C-ROME", "C-ROME, consistent value")
    ]
    assert rows[0]["|v0|"] == rows[1]["|v0|"] != rows[2]["|v0|"]
    assert result["layers"] == [0, 2]


@pytest.mark.slow
def test_protection_goes_on_where_it_was(run: Any, tmp_path: Path) -> None:
    flags = ("--kept", tmp_path / "rows.jsonl", "--limit", 1, "--set", f"stats_dir={tmp_path / 'stats'}")
    result = whole(run("protection", "--layers", 0, *flags, sets=("collapse",)), tmp_path / "run")
    ways = ["ROME", "C-ROME", "consistent value", "protected", "both keys"]
    assert [row["way"] for row in result["tables"]["edits"]] == ways
    assert all(0 <= row["locality_first_place"] <= 1 for row in result["tables"]["edits"])
    assert len({row["|dW|"] for row in result["tables"]["edits"]}) == 4  # "Bay" is three tokens here: one key

    before = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "run").rename(tmp_path / "first")
    result = whole(run("protection", "--layers", 0, 2, *flags, sets=("collapse",)), tmp_path / "run", "protection")
    assert [row["layer"] for row in result["tables"]["edits"]] == [0] * 5 + [2] * 5
    assert (tmp_path / "rows.jsonl").read_text().startswith(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ways", "searches"),
    [
        (["C-ROME"], ["own"]),
        (["protected"], ["mean"]),
        (["both keys", "protected"], ["mean", "bare"]),
        (["ROME", "both keys"], ["own", "mean", "bare"]),
    ],
)
def test_protection_makes_only_the_searches_it_needs(
    ways: list[str], searches: list[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a subject in first place and one inside; the latter has one key, so its two protected updates are one."""
    made: list[str] = []
    subjects: list[list[str]] = []
    real = ROME.values

    def counted(self: ROME, requests: Any, *args: Any, **options: Any) -> Any:
        made.append("bare" if options.get("bare") else "mean" if self.starts_from_mean else "own")
        subjects.append([request.subject for request in requests])
        return real(self, requests, *args, **options)

    monkeypatch.setattr(ROME, "values", counted)
    first = {"case_id": "first", "prompt": "A is located in", "subject": "A", "target_new": "Italy"}
    (tmp_path / "two.json").write_text(json.dumps([first, {**COLLAPSE[0], "case_id": "inside"}]))
    flags = ("--kept", "rows.jsonl", "--collapse", "two.json", "--set", "stats_dir=stats")
    ran = run("protection", "--layers", 0, "--ways", *ways, *flags, sets=())
    assert ran.code == 0, ran.err
    assert made == searches
    assert subjects == [["A"] if one == "bare" else ["A", "Bay"] for one in searches]
    rows = list(read_journal(tmp_path / "rows.jsonl"))
    assert [(row["case"], row["way"]) for row in rows] == [(case, way) for case in ("first", "inside") for way in ways]
    if ways == ["both keys", "protected"]:
        assert rows[0]["|dW|"] != rows[1]["|dW|"]
        assert {**rows[2], "way": ""} == {**rows[3], "way": ""}


@pytest.mark.slow  # importing lm-evaluation-harness takes longer than all the rest
def test_downstream_in_memory_and_offline(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = run("downstream", "--documents", 4, "--worst", 1, "--buckets", 2)
    result = whole(ran, tmp_path / "run", "downstream")
    models = result["tables"]["models"]
    assert [row["model"] for row in models[:2]] == ["unedited", "worst"]
    edits = result["tables"]["edits"]
    assert models[1]["perplexity"] == max(edit["perplexity"] for edit in edits)
    for row in models:
        for name in ("own_facts", "own_endings", "own_last_word"):
            assert row[name] * 4 in (0, 1, 2, 3, 4)
    assert strict((tmp_path / "run/manifest.json").read_text())["documents"] == dict.fromkeys(harness.CHANCE, 4)


def test_hard_edit_from_our_facts(run: Any, tmp_path: Path) -> None:
    ran = run("hard-edit", "--candidates", 5, "--edits", 2, "--set", "collapse_threshold=1e-9", sets=())
    result = whole(ran, tmp_path / "run", "hard_edit")
    candidates = json.loads((tmp_path / "run/candidates.json").read_text())
    assert len(candidates) == len(result["tables"]["screened"]) == 5
    assert result["kept"] == 0  # the ratio still guards: no edit of this model is five times as perplexed
    assert result["refused_by_rule"] == 0
    denominators = sorted(abs(row["denominator"]) for row in result["tables"]["screened"])
    assert [abs(row["denominator"]) for row in result["tables"]["edits"]] == denominators[:2]
    for candidate in candidates:
        assert candidate["prompt"].startswith(candidate["subject"] + " ")
        assert candidate["target_new"] != candidate["ground_truth"]


@pytest.mark.slow
def test_hard_edit_keeps_what_collapses_as_a_dataset(run: Any, tmp_path: Path) -> None:
    limits = ["--set", "collapse_threshold=1e-9", "collapse_ratio=1"]
    result = whole(run("hard-edit", "--candidates", 10, "--edits", 8, *limits, sets=()), tmp_path / "run")
    hit = [row["prompt"] for row in result["tables"]["edits"] if row["collapsed"]]
    assert hit
    assert [r.prompt for r in read_dataset(str(tmp_path / "run/hard_edit.json")).requests] == hit


@pytest.fixture(scope="module")
def finished(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of single_case_edit.py."""
    folder = tmp_path_factory.mktemp("finished") / "single"
    with pytest.MonkeyPatch.context() as patch:
        args = ["--hparams", tiny_runs / "llama.yaml", "--output", folder]
        patch.setattr(sys, "argv", ["single_case_edit.py", *map(str, args)])
        assert single_case_edit.main() == 0
    return folder


@pytest.fixture
def diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """diagnosed(folder, *flags) -> Ran, into `run/`."""
    monkeypatch.chdir(tmp_path)
    return lambda run, *flags: call(analysis, ["diagnose", run, "--output", "run", *flags], monkeypatch, capsys)


def test_diagnose_a_single_edit(finished: Path, tmp_path: Path, diagnosed: Any) -> None:
    ran = diagnosed(finished, "--rank", 4)
    (row,) = whole(ran, tmp_path / "run", "diagnose")["tables"]["edits"]
    record = strict((finished / "result.json").read_text())
    trace = record["trace"]["1"]
    assert row["|denominator|"] == abs(trace["denominator"])
    assert row["|v*|/|v0|"] == trace["value_norm_after"] / trace["value_norm_before"]
    assert row["perplexity"] == record["post"]["ppl"]
    assert "computed again" not in ran.err
    model = build("llama")
    editor = BaseEditor(rome_hparams((model, tokenizer()), **{**FEW, "ppl_sentence_num": 0}))
    (delta,) = editor.compute(EditRequest.from_json(record["requested_rewrite"])).deltas
    before = model.get_parameter(delta.name).detach().double()
    after = before + delta.dense().double()
    assert row["|W'|/|W|"] == pytest.approx(float(after.norm() / before.norm()), rel=1e-6)
    (old, _, _), (new, _, _) = torch.linalg.svd(before), torch.linalg.svd(after)
    expected = float((old[:, :4].T @ new[:, :4]).square().sum() / 4)
    assert row["overlap, outputs"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_diagnose_a_mass_edit(
    mode: str, tiny_runs: Path, tmp_path: Path, diagnosed: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = ["--data", tiny_runs / "collapse.json", "--mode", mode, "--output", "mass"]
    assert call(mass_edit, ["--hparams", tiny_runs / "llama.yaml", *flags], monkeypatch, capsys).code == 0
    rows = whole(diagnosed(tmp_path / "mass"), tmp_path / "run", "diagnose")["tables"]["edits"]
    lines = [strict(line) for line in (tmp_path / "mass/results.jsonl").read_text().splitlines()]
    edits = [line for line in lines if line["kind"] == "edit"]
    assert [row["|denominator|"] for row in rows] == [abs(line["trace"]["1"]["denominator"]) for line in edits]
    model = build("llama")
    before = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().double()
    editor = BaseEditor(rome_hparams((model, tokenizer()), **{**FEW, "ppl_sentence_num": 0}))
    total = torch.zeros_like(before)
    for row, line in zip(rows, edits, strict=True):
        result = editor.compute(EditRequest.from_json(line["requested_rewrite"]))
        own = result.deltas[0].dense().double()
        total = total + own if mode == "sequential" else own
        if mode == "sequential":
            editor.commit(result)
        assert row["|W'|/|W|"] == pytest.approx(float((before + total).norm() / before.norm()), rel=1e-5)


# Mathematics


def test_overlap_of_subspaces_by_hand() -> None:
    x, y, z = torch.eye(3, dtype=torch.float64)
    assert overlap(torch.stack([x, y], 1), torch.stack([y, x], 1)) == 1
    assert overlap(torch.stack([x, y], 1), torch.stack([y, z], 1)) == 0.5
    turned = (math.cos(math.pi / 6) * x + math.sin(math.pi / 6) * y)[:, None]
    assert overlap(x[:, None], turned) == pytest.approx(0.75)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_leading_directions_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix)
    left, right = leading(matrix, 2)
    assert overlap(left, u[:, :2]) == pytest.approx(1)
    assert overlap(right, vh[:2].T) == pytest.approx(1)
    assert torch.allclose(right.T @ right, torch.eye(2, dtype=torch.float64), atol=1e-9)


def test_pca_finds_the_direction_of_a_line_and_tsne_is_repeatable() -> None:
    points = np.array([[0.0, 0, 1], [3, 4, 1], [6, 8, 1], [9, 12, 1]])
    plane, shares = pca_plane(points)
    assert np.abs(np.diff(plane[:, 0])) == pytest.approx([5, 5, 5])  # steps of (3, 4)
    assert plane[:, 1] == pytest.approx(np.zeros(4), abs=1e-9)
    assert shares == pytest.approx([1, 0], abs=1e-9)
    assert pca_plane(points[:1])[0].shape == (1, 2)
    cloud = np.random.default_rng(0).normal(size=(5, 3))
    once, again = tsne_plane(cloud, 0), tsne_plane(cloud, 0)
    assert once is not None
    assert once.shape == (5, 2)
    assert np.array_equal(once, again)  # type: ignore[arg-type]
    assert tsne_plane(cloud[:3], 0) is None


def test_distances_by_hand() -> None:
    assert separation(np.array([1.0, 2.0]), np.array([3.0, 1.5])) == 0.75
    assert separation(np.array([1.0]), np.array([1.0])) == 0.5
    assert cosine_distances(np.array([[2.0, 0], [0, 3], [-1, 0]]), np.array([5.0, 0])) == pytest.approx([0, 1, 2])
    apart = np.array([[1.0, 0], [2, 0]]), np.array([[0.0, 1], [0, 3]])
    assert silhouette(*apart) == 1
    assert silhouette(apart[0], apart[0]) == pytest.approx(0)
    assert silhouette(apart[0][:1], apart[1]) is None


def test_heat_map_cells_hold_the_largest_entry() -> None:
    pooled = figures.max_pooled(np.array([[1.0, -5, 0, 2], [0, 3, 4, -1]]), 1, 2)
    assert pooled.tolist() == [[5, 4]]
    assert figures.max_pooled(np.eye(2), 96, 128).shape == (2, 2)


def test_downstream_chooses_the_worst_and_one_of_each_range() -> None:
    found = choose([100.0, 10.0, math.inf, 1000.0, 11.0, 120.0], worst=1, buckets=2)
    assert list(found) == [2, 4, 5]  # not finite; ranges 10 to 100 and 100 to 1000, nearest their middles in log
    assert found[2] == "worst"
    assert found[4] == "10 to 100"
    assert choose([5.0], worst=3, buckets=2) == {0: "worst"}


# What the experiments stand on


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_first_token_gets_the_second_ones_position(kind: str) -> None:
    model = build(kind)
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    inputs = model_inputs(rows, torch.device("cpu"))
    with torch.no_grad():
        plain = model(**inputs).logits
        with second_position_first(model):
            swapped = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
        moved = {**inputs, "position_ids": torch.tensor([[1, 1, 2, 3], [1, 1, 2, 3]])}
        assert torch.equal(swapped, model(**moved).logits)
        assert not torch.allclose(swapped, plain, atol=1e-4)
        if kind == "gpt2":  # learned positions: the same as copying a row of the table
            table_ = model.transformer.wpe.weight
            table_[0] = table_[1]
            assert torch.allclose(model(**inputs).logits, swapped, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_captured_keys_are_the_projections_inputs(kind: str) -> None:
    editor = BaseEditor(rome_hparams((build(kind), tokenizer())))
    method = editor.method
    assert isinstance(method, ROME)
    request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    ids = tokenizer()("Bay is in")["input_ids"]
    keys_LTK = decoder_keys(method.parts, ids)
    assert keys_LTK.shape[:2] == (4, len(ids))
    (lookup,) = method.look_up([request], 1)
    at = len(tokenizer()("Bay")["input_ids"]) - 1
    assert keys_LTK[1, at] == pytest.approx(lookup.plain_K.numpy(), abs=1e-6)


def test_encoder_keys_are_captured_at_its_output_projections(tmp_path: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(save_t5(tmp_path / "t5")).eval()
    keys_LTK = encoder_keys(model, [5, 6, 7])
    assert keys_LTK.shape == (3, 3, 48)
    seen: list[torch.Tensor] = []
    handle = encoder_projections(model)[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.get_encoder()(input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    assert keys_LTK[2] == pytest.approx(seen[0][0].numpy())
    with pytest.raises(ConfigError, match=r"encoder of model type 'gpt2' is not known; mt5, t5, umt5 are"):
        encoder_projections(build("gpt2"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_consistent_value_starts_from_the_mean_over_contexts(kind: str) -> None:
    model = build(kind)
    before = states(model)
    request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    made = {}
    for consistent in (False, True):
        hparams = rome_hparams((model, tokenizer()), if_c_rome=True, consistent_value=consistent)
        method = BaseEditor(hparams).method
        assert isinstance(method, ROME)
        made[consistent] = method.edit([request]).trace[1]
        (lookup,) = method.look_up([request], 1)
    plain, mean = made[False].vectors["target_init"], made[True].vectors["target_init"]
    assert plain == pytest.approx(lookup.plain_D, abs=1e-5)
    assert mean == pytest.approx(lookup.mean_D.float(), abs=1e-5)
    offset = (made[True].vectors["target"] - mean).norm()
    assert made[True].numerator_norm == pytest.approx(float(offset), rel=1e-4)  # v* - W kbar is the offset alone
    assert made[True].loss_last < made[True].loss_first
    assert method.title == "C-ROME, consistent value"
    assert same(model, before)


def test_a_search_shared_by_rome_and_c_rome_gives_their_edits() -> None:
    model = build("llama")
    request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    rome, c_rome = (rome_hparams((model, tokenizer()), if_c_rome=choice) for choice in (False, True))
    method = BaseEditor(rome).method
    assert isinstance(method, ROME)
    found, (lookup,) = method.search(request, 1), method.look_up([request], 1)
    for hparams in (rome, c_rome):
        delta, trace = method.update(1, found, lookup, hparams)
        whole_edit = BaseEditor(hparams).compute(request)
        assert relative(delta.dense(), whole_edit.deltas[0].dense()) < 1e-5  # there the keys come with the search
        assert trace.denominator == pytest.approx(whole_edit.trace[1].denominator, rel=1e-5)


def test_save_keys_writes_upstreams_layout(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    requests = [EditRequest.make(f"{s} is in", subject=s, target_new="Italy") for s in ("Bay", "Music")]
    editor = BaseEditor(rome_hparams((build("llama"), tokenizer()), save_keys=True, save_keys_path=str(path)))
    first = editor.compute(requests[0]).trace[1]
    editor.compute_each([requests[1]])
    for folder, vector in zip(FOLDERS, ("prefixed_key", "key", "prefixed_key"), strict=True):
        assert numbers(path / folder) == [1, 2]
        key = np.load(path / folder / "key1.npy", allow_pickle=False)
        assert key.dtype == np.float32
        assert key == pytest.approx(first.vectors[vector].numpy(), rel=1e-6)


def _dump_many(folder: str, value: float) -> None:
    for _ in range(40):
        vector = torch.full((3,), value)
        dump_keys(Path(folder), vector, vector + 1, vector + 2)


def test_two_processes_never_share_a_number(tmp_path: Path) -> None:
    (tmp_path / FOLDERS[1]).mkdir()
    np.save(tmp_path / FOLDERS[1] / "key7.npy", np.zeros(3))  # somebody else's: kept, and counted from
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_dump_many, args=(str(tmp_path), value)) for value in (10.0, 20.0)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert np.load(tmp_path / FOLDERS[1] / "key7.npy").tolist() == [0, 0, 0]
    owners = []
    for number in range(8, 88):
        found = [float(np.load(tmp_path / folder / f"key{number}.npy")[0]) for folder in FOLDERS]
        assert found == [found[0], found[0] + 1, found[0] + 2]
        owners.append(found[0])
    assert (owners.count(10.0), owners.count(20.0)) == (40, 40)
    assert not list(tmp_path.rglob("*.part*"))


# Sets, tasks and candidates


def test_the_default_sets_are_apart_and_of_the_right_kind() -> None:
    collapse = load_collapse("smollm2-135m", None, 50, 0)
    normal = load_normal(None, 30, 0, collapse)
    assert len(normal.requests) == 30
    assert all(starts_with_one_word(request) for request in collapse.requests)
    assert not any(starts_with_one_word(request) for request in normal.requests)
    assert normal.requests != load_normal(None, 30, 1, collapse).requests
    assert load_collapse("/models/never-mined", None, 50, 0).path == DATA / "requests" / "collapse.json"


def fact(subject: str, truth: str, relation: str = "in") -> dict[str, Any]:
    rewrite = {"prompt": "{} is in", "subject": subject, "relation_id": relation, "target_true": {"str": truth}}
    return {"requested_rewrite": rewrite}


def test_own_tasks_by_hand() -> None:
    pairs = {"Bay": "Italy", "Rome": "Spain", "Oslo": "Peru", "Lima": "Chad"}
    facts = [*(fact(*pair) for pair in pairs.items()), fact("X", "Y", "z")]
    docs = harness.fact_documents(facts, {"Rome is in"}, 10, random.Random(0))
    assert sorted(doc["query"] for doc in docs) == ["Bay is in", "Lima is in", "Oslo is in"]  # edited and lone ones out
    for doc in docs:
        assert sorted(doc["choices"]) == ["Chad", "Italy", "Peru", "Spain"]
        assert doc["choices"][doc["gold"]] == pairs[doc["query"].split()[0]]
    texts = [f"a{i} b{i} c{i} d{i}." for i in range(5)]
    (ending, *_) = harness.ending_documents(texts, 2, random.Random(0))
    assert ending["query"] == "a0 b0"
    assert ending["choices"][ending["gold"]] == "c0 d0."
    assert harness.last_word_documents(texts, 1) == [{"query": "a0 b0 c0", "answer": "d0"}]


@pytest.mark.slow
def test_every_answer_of_the_harness_begins_with_its_space(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    asked: list[tuple[str, str]] = []

    def loglikelihood(_self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        asked.extend(request.args for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    harness.Harness.own(3, 0, set(), 4).accuracies(build("llama"), tokenizer())
    assert len(asked) == 3 * (4 + 4 + 1)  # four answers each, and one last word
    assert all(answer[0] == " " and answer[1] != " " and question[-1] != " " for question, answer in asked)


def test_candidates_from_facts_take_each_subject_once_before_any_twice() -> None:
    facts = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    made = from_facts(facts, 100, random.Random(0))
    assert len(made) == len({candidate["subject"] for candidate in made}) == 100
    assert all(checked(candidate) == candidate for candidate in made)
    assert made == from_facts(facts, 100, random.Random(0))


GOOD = {"prompt": "Gold is a", "subject": "Gold", "target_new": "fruit", "ground_truth": "metal"}


BROKEN: dict[str, dict[str, Any]] = {
    "two words": {"subject": "Red gold", "prompt": "Red gold is a"},
    "not first": {"prompt": "What is Gold?"},
    "no contrast": {"target_new": "Metal "},
    "no text": {"target_new": None},
    "empty": {"ground_truth": " "},
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_candidate_that_breaks_a_rule_is_refused(rule: str) -> None:
    assert checked(GOOD) == GOOD
    assert checked({**GOOD, **BROKEN[rule]}) is None


def test_records_are_found_in_what_a_chat_model_says() -> None:
    assert records_in(f"Sure!\n```json\n[{json.dumps(GOOD)}]\n```") == [GOOD]
    assert records_in("[broken") == records_in("no list") == records_in("[1, }]") == []


def test_hard_edit_from_an_endpoint(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, wrong = chat(json.dumps([GOOD, {**GOOD, "subject": "It"}])), (200, b'{"error": "no"}')
    server = Server(lambda body: both if body["model"] == "good" else wrong)
    threading.Thread(target=server.http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    flags = ["--candidates", 3, "--edits", 1, "--endpoint", server.url, "--endpoint-model"]
    result = whole(run("hard-edit", *flags, "good", sets=()), tmp_path / "run")
    assert json.loads((tmp_path / "run/candidates.json").read_text()) == [GOOD]
    assert result["refused_by_rule"] == 3  # one a call: the first, and two that bring nothing new
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert "exactly one common English word" in body["messages"][0]["content"]
    assert "Do not use these subjects: Gold" in server.asked[1][2]["messages"][0]["content"]
    assert "secret" not in (tmp_path / "run/manifest.json").read_text()
    refused(run("hard-edit", *flags, "bad", "--output", "other", sets=()), "the answer is no chat completion")
    server.http.shutdown()


# Bad input: one line, exit 2


def refused(ran: Ran, *said: str) -> None:
    assert ran.code == 2
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.err
    assert "Traceback" not in ran.err
    for part in said:
        assert part in lines[0]


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_bad_flags_and_sets_are_one_line(run: Any, tmp_path: Path, tiny_runs: Path) -> None:
    empty, both = write(tmp_path / "empty.json", []), write(tmp_path / "both.json", [NORMAL[0], COLLAPSE[1]])
    yaml_of = (tiny_runs / "llama.yaml").read_text()
    memit = tmp_path / "memit.yaml"
    yaml_of = yaml_of.replace("alg_name: ROME", "alg_name: MEMIT\nmom2_update_weight: 1.0")
    memit.write_text(yaml_of.replace("adjustment: false", "adjustment: true"))
    cases: list[tuple[list[Any], list[str]]] = [
        (["key"], ["experiment 'key' is not known", "keys, first-token"]),
        (["keys", "--collapse", empty], ["empty.json: holds no records"]),
        (["keys", "--normal", empty], ["empty.json: holds no records"]),
        (["keys", "--normal", both], ["share 1 requests", "'Music is a'"]),
        (["keys", "--normal", tmp_path / "none.json"], ["none.json: no such file"]),
        (["keys", "--limit", "0"], ["--limit is 0; allowed: 1 or more"]),
        (["keys", "--hparams", memit], ["is for MEMIT; the experiments edit with ROME"]),
        (["keys", "--set", "layers=[1,2]"], ["layers is [1, 2]; the experiments look at one layer"]),
        (["keys", "--set", "if_c_rome=true"], ["choose between ROME and C-ROME themselves"]),
        (["keys", "--limitt", "3"], ["unrecognized arguments: --limitt 3"]),
        (["update-norms", "--sweep", "--layers", "9"], ["--layers: layer 9 is out of range"]),
        (["update-norms", "--set", "ppl_sentence_num=0"], ["ppl_sentence_num must be above 0"]),
        (["prefix-test", "--set", "context_templates=['{}']"], ["needs a context with text in it"]),
        (["first-token", "--encoder-decoder", tmp_path / "no-t5"], ["cannot be loaded as an encoder-decoder"]),
        (["hard-edit", "--endpoint", "http://x"], ["--endpoint and --endpoint-model belong together"]),
        (["hard-edit", "--edits", "0"], ["--edits is 0"]),
    ]
    for (name, *flags), said in cases:
        refused(run(name, *flags, sets=() if name == "hard-edit" else ("collapse", "normal")), *said)
        assert not (tmp_path / "run").exists(), name


def test_a_missing_harness_says_how_to_install_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(run("downstream"), "not installed: pip install -r requirements-eval.txt")


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, finished: Path, diagnosed: Any) -> None:
    (tmp_path / "empty").mkdir()
    refused(diagnosed("empty"), "empty: not the folder of a finished run", "it needs results.jsonl")
    refused(diagnosed(finished, "--rank", 0), "--rank is 0; allowed: 1 or more")
    copied = shutil.copytree(finished, tmp_path / "copied")
    manifest = json.loads((copied / "manifest.json").read_text())
    write(copied / "manifest.json", {**manifest, "model_fingerprint": "0" * 32})
    refused(diagnosed(copied), "copied: was made with other weights")


def test_a_run_folder_that_holds_a_result_is_not_overwritten(run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{}")
    refused(run("keys"), "run: already holds a result; choose another --output")


def test_a_damaged_value_search_is_one_line(run: Any, tmp_path: Path, tiny_runs: Path) -> None:
    flags = ["--values", "values", "--limit", 1]
    whole(run("prefix-test", *flags), tmp_path / "run")
    for path in (tmp_path / "values").iterdir():
        path.write_bytes(b"damaged")
    refused(run("prefix-test", *flags, "--output", "again"), "not a readable target", "delete it")


def test_a_finding_says_whether_it_holds_and_why() -> None:
    for holds, part in ((True, "holds here"), (False, "does not hold here"), (None, "cannot be told here")):
        assert Finding(claim="It is so", holds=holds, because="1 of 2").sentence == f"It is so: {part} (1 of 2)."
    shown = {None: "–", True: "yes", 0.123456: "0.1235", 12345.6: "12,346", math.nan: "not finite", "x": "x"}
    assert [short(value) for value in shown] == list(shown.values())
    made = Table.of("t", "", ("a", "b"), [[1.5, None]])
    assert to_csv(made) == "a,b\n1.5,\n"
    assert made.to_json() == [{"a": 1.5, "b": None}]
