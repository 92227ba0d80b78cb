"""Tuning: on every architecture it ends with a YAML that edits; what is tried, kept, written and refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ARCHITECTURES, ROOT, build, tokenizer
from script_runs import call, save_tiny
from strangers import CachedStranger, Stranger, stranger
from torch import nn

from easyeditor.analysis.safety import SAFETY, LayerSafety
from easyeditor.analysis.traced import curves, layer_table
from easyeditor.analysis.tracing import LAST
from easyeditor.base.errors import DataError
from easyeditor.commands import tune as tune
from easyeditor.dataset.reader import read_dataset
from easyeditor.dataset.sentences import load_sentences
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.methods.locate import statistics
from easyeditor.methods.registry import load_hparams
from easyeditor.tune import running
from easyeditor.tune import start as start_module
from easyeditor.tune.search import best_of, candidates, chosen, gentler, lost, rank, search
from easyeditor.tune.start import SWITCH, begin, start_values
from easyeditor.tune.trials import drawn, sample, summed, trial
from easyeditor.values.edit import EditRequest

FACTS = ROOT / "data" / "facts.json"
OTHER = ROOT / "hparams" / "ROME" / "smollm2-135m.yaml"
SMALL = ("--edits", 2, "--held-out", 2, "--facts", 2, "--sentences", 2, "--candidates", 2, "--minutes", 0.001)
FEW = ("ppl_sentence_num=2", "context_template_length_params=[[2, 5]]", "v_num_grad_steps=12")
CORPUS = ("mom2_dataset=corpus.txt", "mom2_n_samples=20", "collect_stats=auto", "stats_dir=stats")
OFF = ("collect_stats=off",)  # no statistics are tried


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, plain_figures: None) -> None:
    monkeypatch.setattr(running, "ASKED", 64)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """go(*flags) -> Ran: a small search into o.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("They all went to the house of the river.\n" * 20)

    def ran(*flags: Any, settings: tuple[str, ...] = (*FEW, *OFF)) -> Any:
        args = ["--output", "o.yaml", *SMALL, "--data", FACTS, "--set", *settings, *flags]
        return call(tune, args, monkeypatch, capsys)

    return ran


def edits(path: Path) -> float:
    """By how many nats a value search with the YAML lowers its loss; the YAML loads as any other, and its edit changes
    what the model says. (On random weights the bare prompt alone may go the other way.)"""
    editor = BaseEditor.from_hparams(load_hparams(path))
    request = read_dataset(str(FACTS)).requests[5]

    def nats() -> float:
        answers = editor.measure([request], [None]).answers
        return answers.scored[request.prompt, request.target_new].mean_log_probability

    before, result = nats(), editor.compute(request)
    with editor.applied(result):
        assert abs(nats() - before) > 0.02
    (trace,) = result.traces[0].values()
    return float(trace.loss_first - trace.loss_last)


def check(path: Path) -> dict[str, Any]:
    """The YAML's values, and that its comments say what was tried and measured."""
    text = path.read_text()
    comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    for said in (
        "found by python -m easyeditor.tune",
        "Trials on 2 facts",
        "<- taken",
        "Checked on 2 other",
        "Held out, 2 other facts",
    ):
        assert said in comments, comments
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    return values


QUICK = ("gpt2", "gemma3_text")


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in ARCHITECTURES])
def test_every_architecture_gets_a_yaml_that_edits(kind: str, go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", kind)
    ran = go("--model", "model")
    assert ran.code == 0, ran.err
    values = check(tmp_path / "o.yaml")
    assert values["model_name"] == "model"
    assert values["v_loss_layer"] == 3
    assert edits(tmp_path / "o.yaml") > 0.02


@pytest.mark.parametrize(("kind", "replay"), [(Stranger, False), (CachedStranger, "check")])
def test_a_decoder_nobody_described_gets_one_too(
    kind: type[Stranger], replay: Any, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stranger, "caches", kind.caches)  # AutoModelForCausalLM loads a Stranger
    stranger(Stranger).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    ran = go("--model", "model")
    assert ran.code == 0, ran.err
    values = check(tmp_path / "o.yaml")
    assert values["rewrite_module_tmp"] == values["mlp_module_tmp"] == "trunk.tiers.{}.narrow"
    assert values["layer_module_tmp"] == "trunk.tiers.{}"
    assert values["lm_head_module"] == "speak"
    assert values["replay"] == replay
    assert "type stranger: not known; found blocks trunk.tiers.{} (3 of them)" in (tmp_path / "o.yaml").read_text()
    assert edits(tmp_path / "o.yaml") > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", ["C-ROME", "MEMIT", "EMMET", "AlphaEdit", "FT"])
def test_other_methods_are_tuned_by_the_same_seam(method: str, go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    settings = (*FEW, *CORPUS) if method != "FT" else FEW[:1]
    flags = ("--start", tmp_path / "c-rome.yaml") if method == "C-ROME" else ()
    rome = (ROOT / "hparams/ROME/smollm2-135m.yaml").read_text().replace("if_c_rome: false\nif_prefix: false\n", "")
    (tmp_path / "c-rome.yaml").write_text(rome.replace("alg_name: ROME", "alg_name: C-ROME"))
    ran = go("--model", "model", "--method", method, *flags, settings=settings)
    assert ran.code == 0, ran.err
    values = check(tmp_path / "o.yaml")
    assert values["alg_name"] == method
    assert len(values["layers"]) == 1
    assert values["rewrite_module_tmp"].endswith(".weight") is (method == "FT")
    load_hparams(tmp_path / "o.yaml")


def test_a_search_goes_on_where_it_was(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    assert go("--model", "model", "--kept", "kept.jsonl", "--run", "one").code == 0
    lines = (tmp_path / "kept.jsonl").read_text().splitlines()
    (tmp_path / "o.yaml").rename(tmp_path / "first.yaml")
    assert go("--model", "model", "--kept", "kept.jsonl", "--run", "two").code == 0
    assert (tmp_path / "o.yaml").read_text() == (tmp_path / "first.yaml").read_text()
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == lines  # nothing was measured again
    assert json.loads(lines[0]) == {"kind": "journal", "of": "tune"}
    cases = json.loads(lines[1])
    assert len({*cases["searched"], *cases["checked"], *cases["held_out"]}) == 6
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert [row["set"] for row in result["tables"]["held_out"]] == ["check", "held out"]
    (tmp_path / "o.yaml").unlink()
    assert go("--model", "model", "--kept", "kept.jsonl", "--run", "elsewhere", "--device", "1").code == 0
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == lines
    (tmp_path / "o.yaml").unlink()
    for other in (("--seed", 1), ("--ppl-ratio", 9)):
        ran = go("--model", "model", "--kept", "kept.jsonl", "--run", "three", *other)
        assert (ran.code, "is of another search" in ran.err) == (2, True)


def test_bad_input_is_one_line_before_anything_is_loaded(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "there.yaml").write_text("mine")
    tiny_data = [{"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}]
    (tmp_path / "few.json").write_text(json.dumps(tiny_data))
    for flags, said in (
        (("--model", "model", "--minutes", 0), "--minutes is 0"),
        (("--model", "model", "--minutes", "nan"), "--minutes is nan"),
        (("--model", "model", "--edits", 0), "--edits is 0"),
        (("--model", "model", "--output", "there.yaml"), "there.yaml: is there already"),
        (("--model", "model", "--output", "model"), "--output model is the place of --model"),
        (("--model", "model", "--method", "ROMEO"), "method 'ROMEO' is not known"),
        (("--model", "model", "--method", "MEND"), "MEND cannot be tuned"),
        (("--model", "model", "--method", "LoRA"), "LoRA cannot be tuned"),
        (("--model", "model", "--data", "few.json"), "the data has 0 subjects"),
        (("--model", "model", "--start", "none.yaml"), "none.yaml: no such file"),
        (("--model", "model", "--method", "R-ROME", "--start", OTHER), "it is of 'ROME', and --method is R-ROME"),
        (("--model", "none/of/these"), "none/of/these: no such model folder"),
    ):
        ran = go(*flags)
        assert (ran.code, ran.err.count("error: ")) == (2, 1), ran.err
        assert said in ran.err
        assert not (tmp_path / "o.yaml").exists()
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_a_model_without_an_mlp_projection_is_said(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Stranger.__init__

    def without(self: Any, config: Any) -> None:
        before(self, config)
        for tier in self.trunk.tiers:
            tier.wide = tier.narrow = nn.Identity()

    monkeypatch.setattr(Stranger, "__init__", without)
    stranger(Stranger).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    ran = go("--model", "model")
    assert ran.code == 2
    assert "no MLP output projection" in ran.err
    assert not (tmp_path / "o.yaml").exists()


def test_a_yaml_that_breaks_the_bound_says_so(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    before = running.trial
    monkeypatch.setattr(running, "trial", lambda *given: {**before(*given), "ppl_ratio": 6.4})
    assert go("--model", "model").code == 0
    assert "No trial kept perplexity within that bound" in (tmp_path / "o.yaml").read_text()


def test_a_yaml_whose_held_out_facts_break_the_bound_says_so(go: Any, tmp_path: Path, monkeypatch: Any) -> None:
    save_tiny(tmp_path / "model")
    before = running.trial
    broken = {"trial": 1.0, "check": 1.1, "held-out": 1.3}
    monkeypatch.setattr(running, "trial", lambda *given: {**before(*given), "ppl_ratio": broken[given[2].name]})
    assert go("--model", "model", "--run", "run").code == 0
    text = (tmp_path / "o.yaml").read_text()
    assert "On held-out facts perplexity went beyond that bound" in text
    assert "No trial kept" not in text
    assert "That is beyond the bound of 1.2." in (tmp_path / "run/index.html").read_text()


def test_a_yaml_names_the_command_that_found_it(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    assert go("--model", "model", "--seed", 3).code == 0
    first = " ".join(line.removeprefix("#").strip() for line in (tmp_path / "o.yaml").read_text().splitlines()[:6])
    told = f"python -m easyeditor.tune --model model --minutes 0.001 --set {' '.join(map(shlex.quote, (*FEW, *OFF)))} "
    told += f"--data {FACTS} --edits 2 --held-out 2 --facts 2 --candidates 2 --sentences 2 --seed 3"
    assert told in first


def test_what_set_says_is_left_as_it_is(go: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also layers, of which others are at another depth in another model, and the modules of an unknown type."""
    save_tiny(tmp_path / "model")
    with caplog.at_level("INFO"):
        ran = go("--model", "model", "--run", "run", settings=(*FEW, *OFF, "layers=[1]"))
    assert ran.code == 0, ran.err
    assert yaml.safe_load((tmp_path / "o.yaml").read_text())["layers"] == [1]
    assert "type llama: known" in caplog.text
    for setting, said in (
        ("layers=[4]", "layers is [4], and the model has 4"),
        ("v_loss_layer=2", "v_loss_layer is 2;"),
    ):
        ran = go("--model", "model", "--output", "p.yaml", settings=(*FEW, *OFF, setting))
        assert (ran.code, said in ran.err) == (2, True)


def test_modules_named_by_hand_are_taken(go: Any, tmp_path: Path, monkeypatch: Any) -> None:
    stranger(Stranger).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(start_module, "discover", lambda model: pytest.fail("asked, though all is named"))
    named = (
        "layer_module_tmp=trunk.tiers.{}",
        *(f"{key}_module_tmp=trunk.tiers.{{}}.narrow" for key in ("mlp", "rewrite")),
    )
    ran = go("--model", "model", settings=(*FEW, *OFF, *named))
    assert ran.code == 0, ran.err
    assert yaml.safe_load((tmp_path / "o.yaml").read_text())["rewrite_module_tmp"] == "trunk.tiers.{}.narrow"


# What is tried


def layer(number: int, reach: float) -> LayerSafety:
    return LayerSafety(
        layer=number, reach=reach, most_reach=reach, least_reach=reach, bare_v0=1, mean_v0=1, denominators=(1, 1, 1)
    )


def test_only_what_was_measured_is_drawn_and_tabled() -> None:
    """FT has no keys, so nothing is known of its first places; a model may know none of the facts."""
    traced = [{"effects": {"mlp": {LAST: [0.1, 0.2]}}}]
    safety = [layer(0, 1.0), layer(1, 0.5)]
    assert [len(curves(a, b).get_axes()) for a, b in ((traced, []), ([], safety), (traced, safety))] == [1, 2, 3]
    assert [len(layer_table(a, b).columns) for a, b in ((traced, []), (traced, safety))] == [2, 2 + len(SAFETY)]


def test_candidates_are_the_peak_then_large_effects_by_safety() -> None:
    effects = np.array([0.1, 0.6, 1.0, 0.8, 0.7, 0.2])
    safety = [layer(n, reach) for n, reach in enumerate((1.0, 0.5, 0.01, 0.001, 1.2, 1.0))]
    assert candidates(effects, safety, range(5), 3) == [2, 4, 1]
    assert candidates(effects, safety, range(5), 9) == [2, 4, 1, 3, 0]  # the last layer never
    assert candidates(effects, [], range(5), 2) == [2, 3]
    assert set(candidates(None, safety, range(5), 3)) <= {0, 1, 2, 3}
    assert candidates(None, [], [0], 3) == [0]


def row(score: float, ratio: float | None = 1.0) -> dict[str, Any]:
    return {**dict.fromkeys(("rewrite_acc", "rephrase_acc", "locality_acc"), score), "ppl_ratio": ratio, "collapsed": 0}


def line(settings: dict[str, Any], score: float, ratio: float | None = 1.0, facts: int = 4) -> dict[str, Any]:
    rows = [row(score, ratio)] * facts
    return {"settings": settings, "rows": rows, **summed(rows)}


def test_perplexity_is_a_bound_and_not_a_trade() -> None:
    lines = [line({"a": 1}, 0.9, 1.3), line({"a": 2}, 0.5, 1.1), line({"a": 3}, 0.9, None)]
    assert best_of(lines, 1.2) is lines[1]
    assert best_of(lines, 1.5) is lines[0]
    assert best_of([line({}, 0.66, 1.18), line({"a": 1}, 0.65, 1.0)], 1.2)["settings"] == {"a": 1}
    assert rank(lines[2], 1.2) < rank(lines[0], 1.2)
    assert best_of([line({"a": 1}, 0.9, 60.0), line({"a": 2}, 0.6, 1.3)], 1.2)["settings"] == {"a": 2}  # nearer to it
    assert best_of([{**line({"a": 1}, 0.9), "left_after": 3}, line({"a": 2}, 0.1)], 1.2)["settings"] == {"a": 2}
    assert best_of([line({}, 0.5), line({}, 0.5)], 1.2)["settings"] == {}


def test_edits_that_take_come_before_edits_that_spare() -> None:
    takes, spares = line({"a": 1}, 0.7), line({"a": 2}, 0.9)
    takes["rewrite_acc"] = 0.96
    assert best_of([spares, takes], 1.2) is takes
    assert best_of([spares, {**takes, "ppl_ratio": 1.3}], 1.2) is spares  # not at the price of the bound


def test_the_search_climbs_and_ends() -> None:
    """On a known landscape: best at layer 3, clamp 8, step 0.5."""

    @dataclasses.dataclass
    class Fake:
        allowed = range(7)

        def layers(self, end: int) -> list[int]:
            return [end]

    asked = []

    def tried(settings: dict[str, Any], best: Any) -> dict[str, Any] | None:
        asked.append(settings)
        off = abs(settings["layers"][0] - 3) + abs(np.log2(settings["clamp_norm_factor"] / 8)) + (not settings[SWITCH])
        return line(settings, 1 / (1 + float(off) + abs(float(np.log2(settings["v_lr"] / 0.5)))))

    first = {"layers": [1], "clamp_norm_factor": 2.0, "v_lr": 1.0, SWITCH: False}
    lines = search(Fake(), first, [5], tried, 1.2)  # type: ignore[arg-type]
    assert best_of(lines, 1.2)["settings"] == {"layers": [3], "clamp_norm_factor": 8.0, "v_lr": 0.5, SWITCH: True}
    assert asked[:3] == [first, {**first, SWITCH: True}, {**first, SWITCH: True, "layers": [5]}]
    assert len({json.dumps(settings) for settings in asked}) == len(asked) == len(lines)
    asked.clear()
    assert len(search(Fake(), first, [5], lambda s, b: tried(s, b) if len(asked) < 3 else None, 1.2)) == 3  # type: ignore[arg-type]


def test_a_trial_is_given_up_once_it_is_behind_on_the_same_facts() -> None:
    best = {"settings": {}, "rows": [row(0.9), row(0.5), row(0.9, 1.1)], **summed([row(0.9), row(0.5), row(0.9, 1.1)])}
    assert not lost(line({}, 0.8, facts=2), best, 1.2)  # 0.7 is what the best has on these two
    assert lost(line({}, 0.6, facts=2), best, 1.2)
    assert lost(line({}, 1.0, 1.3, facts=2), best, 1.2)  # beyond the bound already: no other fact brings it back
    beyond = {**best, "ppl_ratio": 4.0}
    assert not lost(line({}, 0.3, facts=2), beyond, 1.2)


def test_gentler_edits_come_first_where_perplexity_or_locality_lacks() -> None:
    assert gentler(line({}, 0.9, 1.3), 1.2)
    assert gentler({**line({}, 0.9), "locality_acc": 0.5}, 1.2)
    assert not gentler({**line({}, 0.9), "rephrase_acc": 0.5}, 1.2)


def test_the_one_taken_keeps_the_bound_on_other_facts_too() -> None:
    lines = [line({"a": n}, score) for n, score in enumerate((0.9, 0.8, 0.7, 0.6))]
    told = {0: line({}, 0.9, 2.3), 1: line({}, 0.9, 1.1)}
    asked: list[int] = []

    def check(found: dict[str, Any]) -> dict[str, Any]:
        asked.append(found["settings"]["a"])
        return told.get(asked[-1], line({}, 0.9))

    assert chosen(lines, check, 1.2, 3)[0] is lines[1]
    assert asked == [0, 1]
    told = {n: line({}, 0.9, 1.3 + n) for n in range(4)}
    assert chosen(lines, check, 1.2, 2)[0] is lines[0]


@pytest.mark.parametrize("replay", [True, False])
def test_a_trial_s_rows_are_those_of_each_edit_by_itself(replay: bool, tmp_path: Path) -> None:
    """Measured together or one by one, in two goes or one: the plain editor is the oracle."""
    save_tiny(tmp_path / "model")
    settings = (*FEW, f"replay={replay}".lower())
    values, path = start_values("ROME", str(tmp_path / "model"), str(OTHER), settings)
    start = begin("ROME", str(tmp_path / "model"), values, path, "cpu", ["clamp_norm_factor"])
    sentences = load_sentences(2)
    (requests,) = drawn(read_dataset(str(FACTS)).grouped(), (4,), 0)
    on = sample(start, "trial", requests, sentences)
    settings_of_one = {"layers": [1], "clamp_norm_factor": 2.0}
    made = trial(start, settings_of_one, on, lambda part: part["requests"] != 3)
    assert "left_after" not in made
    editor = BaseEditor(start.hparams(settings_of_one), sentences=sentences)
    for request, row in zip(requests, made["rows"], strict=True):
        record = editor.examine(request).record
        assert row["rewrite_acc"] == record.after("rewrite_acc")
        assert row["ppl_ratio"] == pytest.approx(record.post.ppl / record.pre.ppl, rel=1e-4)
    assert trial(start, settings_of_one, on, lambda part: True)["left_after"] == 3


def test_a_page_shows_what_was_found(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    assert go("--model", "model", "--run", "run").code == 0
    page = (tmp_path / "run/index.html").read_text()
    for said in ("Verdict", "2 held-out facts", "By layer: causal trace, collapse safety, trials", "what was tried"):
        assert said in page
    assert "python single_case_edit.py --hparams o.yaml" in page
    assert page.count("<img") == 1
    assert "http" not in page.replace("http-equiv", "")  # it opens from disk


def test_statistics_are_tried_where_the_start_has_none(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    ran = go("--model", "model", "--minutes", 0.1, "--run", "run", settings=(*FEW, *CORPUS))
    assert ran.code == 0, ran.err
    columns, *rows = [line.split(",") for line in (tmp_path / "run/table.csv").read_text().splitlines()]
    assert {"True", "False"} == {row[columns.index("mom2_adjustment")] for row in rows}
    assert list((tmp_path / "stats").rglob("*.npz"))


def test_statistics_that_some_layers_lack_are_collected_in_one_pass(tmp_path: Path, monkeypatch: Any) -> None:
    save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("They all went to the house of the river.\n" * 20)
    values, path = start_values("ROME", str(tmp_path / "model"), str(OTHER), (*FEW, *CORPUS))
    start = begin("ROME", str(tmp_path / "model"), values, path, "cpu", ["clamp_norm_factor"])
    asked: list[list[int]] = []
    plain = statistics.gather

    def counted(parts: Any, tok: Any, keys: Any, **options: Any) -> Any:
        asked.append(sorted(keys))
        return plain(parts, tok, keys, **options)

    monkeypatch.setattr(statistics, "gather", counted)
    for layers in ([2], [0, 1, 2], [0, 1, 2]):
        start.collect(layers)
    assert asked == [[2], [0, 1]]


def test_a_search_begins_with_the_model_s_own_file() -> None:
    values, path = start_values("ROME", "some/where/gemma3-270m", None, [])
    assert (path.name, values["collect_stats"]) == ("gemma3-270m.yaml", "auto")
    values, path = start_values("ROME", "some/where/else", None, ["mom2_n_samples=7"])
    assert (path.name, values["mom2_n_samples"]) == ("smollm2-135m.yaml", 7)


def test_facts_of_search_check_and_judgement_share_no_subject() -> None:
    records = read_dataset(str(FACTS)).grouped()
    made = drawn(records, (20, 10, 40), 0)
    assert [len(own) for own in made] == [20, 10, 40]
    assert len({r.subject for own in made for r in own}) == 70
    assert drawn(records, (20, 10, 40), 0) == made
    assert drawn(records, (20, 10, 40), 1)[0] != made[0]
    fact = "The town of {} is in"
    chains = [  # of three edits each, as MQuAKE's: no record is in two samples
        (n, tuple(EditRequest.make(fact, subject=f"Old {n}{k}", target_new="Rome", case_id=n) for k in range(3)))
        for n in range(9)
    ]
    one, two = ({request.case_id for request in own} for own in drawn(chains, (4, 4), 0))
    assert not one & two
    with pytest.raises(DataError, match=r"27 subjects .* 13 [+] 14 are asked for, no record in two of them"):
        drawn(chains, (13, 14), 0)


@pytest.mark.slow
def test_the_model_is_left_as_it_was(go: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "gpt2")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    assert go("--model", "model").code == 0
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert build("gpt2").config.n_layer == 4
