"""The two entry scripts on a tiny model, mostly in this process: what they print, write, leave alone, and exit with."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CONTEXTS, ROOT, build, same, states, tokenizer
from safetensors.torch import load_file, save_file
from script_runs import Ran, call, save_tiny, strict, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyeditor import EditResult
from easyeditor.commands import ppl as ppl_script
from easyeditor.commands import single_case_edit
from easyeditor.evaluate.perplexity import PerplexityProbe

BAY = json.loads((ROOT / "data" / "requests" / "bay.json").read_text(encoding="utf-8"))
SENTENCES = ["The river was high.", " A museum, closed for years, will reopen.", "Ask, “why?” twice", "Bay is in Italy"]
FAST = ["--set", "ppl_sentence_num=0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a YAML and a checkpoint each of `llama` and `gpt2`."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2"):
        write_yaml(root / f"{kind}.yaml", save_tiny(root / kind, kind))
    return root


@pytest.fixture
def edit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """edit(*args) -> Ran: single_case_edit.py on tiny llama (`kind=`), with `tmp_path` as the working directory."""
    monkeypatch.chdir(tmp_path)

    def go(*args: Any, kind: str = "llama") -> Ran:
        return call(single_case_edit, ["--hparams", models / f"{kind}.yaml", *args], monkeypatch, capsys)

    return go


@pytest.fixture
def ppl(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """ppl(*args) -> Ran: ppl.py on tiny llama (`kind=`), on the CPU."""
    monkeypatch.chdir(tmp_path)

    def go(*args: Any, kind: str | Path = "llama") -> Ran:
        return call(ppl_script, ["--model", models / kind, "--device", "cpu", *args], monkeypatch, capsys)

    return go


# single_case_edit.py: what it prints and writes


def test_an_edit_prints_a_table_and_a_verdict_and_writes_a_run_folder(edit: Any, models: Path, tmp_path: Path) -> None:
    ran = edit()
    assert ran.code == 0
    assert "Traceback" not in ran.err
    for said in (
        "ROME: Bay, which is located in → Italy",
        "rewrite accuracy",
        "P(Italy)",
        "NO COLLAPSE",
        "denominator",
    ):
        assert said in ran.out
    (folder,) = (tmp_path / "results").iterdir()
    assert f"record: {folder.relative_to(tmp_path) / 'result.json'}" in ran.out
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "result.json"]
    config, manifest, record = (strict((folder / f"{n}.json").read_text()) for n in ("config", "manifest", "result"))
    assert (config["model_name"], config["layers"], config["v_lr"]) == (str(models / "llama"), [1], 0.5)
    assert manifest["context_templates"] == CONTEXTS
    assert manifest["sentences"]["sentences"] == 50
    assert manifest["command"] == ["single_case_edit.py", "--hparams", str(models / "llama.yaml")]
    assert record["requested_rewrite"]["target_new"] == "Italy"
    assert record["pre"]["ppl"] != record["post"]["ppl"]
    assert record["collapse"]["ppl_after"] == record["post"]["ppl"]


def test_json_is_the_record_and_nothing_else(edit: Any, tmp_path: Path) -> None:
    ran = edit("--json", "--output", "run")
    assert ran.code == 0
    assert ran.json == strict((tmp_path / "run/result.json").read_text(encoding="utf-8"))


def test_a_perplexity_that_is_not_finite_is_a_collapse_and_null_in_every_file(
    edit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finite = PerplexityProbe.measure

    def measure(self: PerplexityProbe, step: Any = None) -> Any:
        report = finite(self, step)
        self.calls = getattr(self, "calls", 0) + 1
        return report if self.calls == 1 else type(report)(perplexities=(math.nan,), nlls=(math.nan,), tokens=(4,))

    monkeypatch.setattr(PerplexityProbe, "measure", measure)
    ran = edit("--output", "run", "--fail-on-collapse")
    assert ran.code == 3
    assert "COLLAPSED" in ran.out
    assert "not finite" in ran.out
    record = strict((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert record["post"]["ppl"] is None
    assert record["collapse"] | {"collapsed": True, "finite": False, "ppl_after": None} == record["collapse"]


@pytest.mark.parametrize(
    "text", [pytest.param("[/INST] Bay [red]is[/red] in", id="tags"), pytest.param("Bay is [", id="bracket")]
)
def test_square_brackets_are_printed_as_they_are(edit: Any, text: str) -> None:
    ran = edit(*FAST, "--prompt", text, "--subject", "Bay", "--target-new", "[/b]", "--ground-truth", "[x]")
    assert ran.code == 0
    for said in (f"{text} → [/b]", "P([/b])", "P([x])"):
        assert said in ran.out


def test_a_long_answer_is_cut_in_the_table_alone(edit: Any) -> None:
    answer = " ".join(["a country in the south"] * 6)
    ran = edit(*FAST, "--prompt", "Bay is in", "--subject", "Bay", "--target-new", answer)
    assert ran.code == 0
    (line,) = [line for line in ran.out.splitlines() if "P(a country" in line]
    assert "…)" in line
    assert f"Bay is in → {answer}" in " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        pytest.param(["--dry-run"], lambda text: strict(text)["request"]["prompt"], id="dry-run"),
        pytest.param([*FAST, "--json"], lambda text: strict(text)["requested_rewrite"]["prompt"], id="json"),
        pytest.param(FAST, lambda text: "Bay 東京 is in" if "rewrite accuracy" in text else text, id="table"),
    ],
)
def test_standard_output_that_is_not_utf8_loses_nothing(
    edit: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], read: Callable[[str], str]
) -> None:
    bytes_out = io.BytesIO()
    console = io.TextIOWrapper(bytes_out, encoding="cp1252")  # Windows, output redirected to a file
    monkeypatch.setattr(sys, "stdout", console)
    assert edit(*flags, "--prompt", "{} 東京 is in", "--subject", "Bay", "--target-new", "Italy").code == 0
    console.flush()
    assert read(bytes_out.getvalue().decode(console.encoding)) == "Bay 東京 is in"


# single_case_edit.py: flags


def test_dry_run_prints_hparams_and_request_and_loads_no_model(edit: Any, tmp_path: Path) -> None:
    ran = edit("--dry-run", "--set", "model_name=/nowhere", "v_lr=1e-1", "layers=[2]", "if_c_rome=yes", "stats_dir=7a")
    assert (ran.code, ran.err) == (0, "")
    hparams, request = ran.json["hparams"], ran.json["request"]
    assert [hparams[key] for key in ("v_lr", "layers", "if_c_rome", "stats_dir")] == [0.1, [2], True, "7a"]
    assert {key: request[key] for key in ("prompt", "subject", "target_new", "ground_truth", "subject_start")} == {
        "prompt": BAY["prompt"],
        "subject": "Bay",
        "target_new": "Italy",
        "ground_truth": "Philippines",
        "subject_start": 0,
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(["--metrics", "wlid"], "did you mean 'wild'?", id="metrics"),
        pytest.param(["--adapter-rank", "0"], "--adapter-rank is 0", id="adapter-rank"),
        pytest.param(["--save-model", "full"], "full", id="save-model"),
        pytest.param(["--output", "done"], "already holds a result", id="output"),
        pytest.param(["--interactive", "--metrics", "wlid"], "did you mean 'wild'?", id="typed-metrics"),
        pytest.param(["--interactive", "--output", "full"], "full", id="typed-output"),
    ],
)
def test_dry_run_refuses_what_the_run_would(edit: Any, tmp_path: Path, flags: list[str], said: str) -> None:
    for place in ("full/model.txt", "done/result.json"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text("{}")
    ran = edit("--dry-run", *flags)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert said in ran.err


@pytest.mark.parametrize("listed", [["rewrite_acc", "GE"], ["rewrite_acc,GE"], ["rewrite_acc,", "GE"]])
def test_metrics_may_be_listed_by_spaces_or_commas(monkeypatch: pytest.MonkeyPatch, listed: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["single_case_edit.py", "--metrics", *listed, "--metrics", "wild"])
    assert single_case_edit.arguments().metrics == ["rewrite_acc", "GE", "wild"]


@pytest.mark.parametrize("subject", [[], ["--subject", "Roma"]])
def test_dry_run_asks_for_a_subject_where_the_method_uses_it(edit: Any, subject: list[str]) -> None:
    typed = ["--dry-run", "--prompt", "Rome is in", "--target-new", "Wales", *subject]
    assert edit("--hparams", str(ROOT / "hparams/FT/smollm2-135m.yaml"), *typed).json["request"]["subject"] == ""
    ran = edit(*typed)
    assert (ran.code, "'Roma' is not in the prompt" in ran.err or "needs --subject" in ran.err) == (2, True)


@pytest.mark.parametrize("archive", ["/nowhere", "null"])
def test_dry_run_sees_that_mends_archive_is_missing(edit: Any, archive: str) -> None:
    ran = edit("--hparams", str(ROOT / "hparams/MEND/gemma3-270m.yaml"), "--dry-run", "--set", f"archive={archive}")
    assert ran.code == 2
    assert "pretrain_mend.py" in ran.err


def test_dry_run_does_not_even_import_torch(models: Path) -> None:
    """Where there is no model yet; where there is one, its memory is estimated."""
    command = [sys.executable, "-X", "importtime", ROOT / "single_case_edit.py", "--hparams", models / "llama.yaml"]
    ran = subprocess.run([*command, "--dry-run", "--set", "model_name=/nowhere"], capture_output=True, text=True)
    assert ran.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "easyeditor.base.hparams" in imported
    assert not {"torch", "transformers"} & imported


def test_device_and_dtype_flags_win_over_the_file_and_set_may_be_repeated(edit: Any) -> None:
    flags = ["--set", "seed=3", "--set", "v_lr=0.25", "--device", "cuda:1", "--dtype", "bfloat16", "--dry-run"]
    hparams = edit(*flags).json["hparams"]
    found = [hparams[key] for key in ("seed", "v_lr", "device", "dtype")]
    assert found == [3, 0.25, "cuda:1", "bfloat16"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(
            {
                "case_id": 7,
                "requested_rewrite": {
                    "prompt": "{} is in",
                    "subject": "Bay",
                    "target_new": {"str": "Italy"},
                    "target_true": {"str": "Spain"},
                },
                "paraphrase_prompts": ["Bay lies in"],
                "neighborhood_prompts": ["Rome is in"],
            },
            {
                "case_id": 7,
                "prompt": "Bay is in",
                "ground_truth": "Spain",
                "rephrase_prompt": ["Bay lies in"],
                "locality": {"neighborhood": {"prompt": ["Rome is in"], "ground_truth": ["Spain"]}},
            },
            id="counterfact",
        ),
        pytest.param(BAY, {"case_id": "bay", "rephrase_prompt": [BAY["rephrase_prompt"]]}, id="flat"),
        pytest.param([BAY], {"case_id": "bay", "ground_truth": "Philippines"}, id="list-of-one"),
        pytest.param(
            {
                "subject": "Bay",
                "src": "Where is Bay?",
                "alt": "Italy",
                "answers": ["Spain"],
                "rephrase": "Bay is where?",
                "loc": "nq question: who sings",
                "loc_ans": "Garth Brooks",
            },
            {
                "prompt": "Where is Bay?",
                "ground_truth": "Spain",
                "rephrase_prompt": ["Bay is where?"],
                "locality": {"neighborhood": {"prompt": ["who sings"], "ground_truth": ["Garth Brooks"]}},
            },
            id="zsre",
        ),
        pytest.param(
            {"case_index": 3, "question": "Where is Bay?", "subject": "Bay", "answer": "Italy"},
            {"case_id": 3, "prompt": "Where is Bay?", "ground_truth": None},
            id="question",
        ),
    ],
)
def test_request_file_of_each_format(edit: Any, tmp_path: Path, record: Any, expected: dict[str, Any]) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record), encoding="utf-8")
    ran = edit(*FAST, "--json", "--request", "one.json")
    assert ran.code == 0
    rewrite = ran.json["requested_rewrite"]
    wanted = {"subject": "Bay", "target_new": "Italy", **expected}
    assert {key: rewrite[key] for key in wanted} == wanted
    assert set(ran.json["post"]["locality"]) == {f"{k}_{n}" for k in rewrite["locality"] for n in ("output", "acc")}


def test_request_from_flags_with_probes(edit: Any) -> None:
    probes = ["--rephrase-prompt", "a Bay", "b Bay", "--locality-prompt", "Rome is", "--locality-ground-truth", "here"]
    ran = edit(*FAST, "--json", "--prompt", "{} is in", "--subject", "Bay", "--target-new", "Italy", *probes)
    assert ran.code == 0
    assert len(ran.json["post"]["rephrase_acc"]) == 2
    assert len(ran.json["post"]["locality"]["neighborhood_acc"]) == 1


@pytest.mark.parametrize("script", [single_case_edit, ppl_script], ids=["single_case_edit", "ppl"])
def test_help_is_the_run_book(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = call(script, ["--help"], monkeypatch, capsys)
    assert (ran.code, ran.err) == (0, "")
    launches = [line.split("  ")[1] for line in script.__doc__.splitlines() if line.startswith("  python ")]
    assert len(launches) >= 3
    for line in launches:
        assert line in ran.out


@pytest.mark.parametrize("script", [single_case_edit, ppl_script], ids=["single_case_edit", "ppl"])
@pytest.mark.parametrize("flag", ["--nope", "--js"])
def test_unknown_or_shortened_flag_is_one_line(
    script: Any, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = call(script, [flag], monkeypatch, capsys)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: unrecognized arguments: {flag} (see --help)\n"


COLLAPSING = ["--set", "collapse_threshold=0.001", "collapse_ratio=1"]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([*COLLAPSING, "--fail-on-collapse"], 3, "COLLAPSED ("),
        (COLLAPSING, 0, "COLLAPSED ("),
        (["--fail-on-collapse"], 0, "NO COLLAPSE ("),
        ([*FAST, "--fail-on-collapse"], 0, "no verdict"),
    ],
)
def test_fail_on_collapse(edit: Any, flags: list[str], code: int, said: str) -> None:
    ran = edit(*flags)
    assert ran.code == code
    assert said in ran.out


def test_ctrl_c_is_130_without_a_traceback_and_without_a_result(
    edit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("easyeditor.methods.locate.method.search_values", interrupted)
    ran = edit("--save-edit", "saved")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in ran.err
    assert list(tmp_path.rglob("*.json")) == []


# single_case_edit.py: saving


def test_a_second_run_does_not_overwrite_the_first(edit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.setattr("easyeditor.results.folder.datetime", SimpleNamespace(now=lambda zone=None: now))
    assert edit(*FAST).code == 0
    first = tmp_path / "results/rome-bay-20260102-030405"
    before = (first / "result.json").read_bytes()
    assert edit(*FAST, "if_c_rome=true").code == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [first.name, f"{first.name}-1"]
    assert (first / "result.json").read_bytes() == before


def test_output_that_holds_a_result_is_refused(edit: Any, tmp_path: Path) -> None:
    assert edit(*FAST, "--output", "run").code == 0
    before = (tmp_path / "run/result.json").read_bytes()
    ran = edit(*FAST, "if_c_rome=true", "--output", "run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: run: already holds a result; choose another --output\n"
    assert (tmp_path / "run/result.json").read_bytes() == before


@pytest.mark.parametrize("case", ["../../../out", "a/b", "/tmp/x", "a\0b"])
def test_a_case_id_from_a_file_cannot_place_the_run_elsewhere(edit: Any, tmp_path: Path, case: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps({**BAY, "case_id": case}), encoding="utf-8")
    assert edit(*FAST, "--request", "one.json").code == 0
    assert [p.parent.parent for p in tmp_path.rglob("result.json")] == [tmp_path / "results"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_edit_and_saved_model_are_the_edit(edit: Any, ppl: Any, models: Path, tmp_path: Path, kind: str) -> None:
    ran = edit("--json", "--output", "run", "--save-edit", "saved", "--save-model", "full", kind=kind)
    assert ran.code == 0
    result = EditResult.load(tmp_path / "saved")
    manifest = strict((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert result.model_fingerprint == manifest["model_fingerprint"]
    assert list(result.contexts) == CONTEXTS
    assert strict(json.dumps(result.trace_json()[0])) == ran.json["trace"]
    assert result.requests[0].to_json() == ran.json["requested_rewrite"]

    expected = states(AutoModelForCausalLM.from_pretrained(models / kind))
    for delta in result.deltas:
        expected[delta.name] += delta.dense()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "full")("Bay")["input_ids"] == tokenizer()("Bay")["input_ids"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run", "saved"]  # no half-made folder beside them

    with_edit, whole = ppl("--json", "--edit", "saved", kind=kind), ppl("--json", kind=tmp_path / "full")
    assert with_edit.json["perplexity"]["mean"] == pytest.approx(ran.json["post"]["ppl"], rel=1e-6)
    assert with_edit.json["per_sentence"] == whole.json["per_sentence"]
    assert ppl("--json", kind=kind).json["perplexity"]["mean"] == pytest.approx(ran.json["pre"]["ppl"], rel=1e-6)


def test_the_loaded_model_is_bit_equal_afterwards(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = states(model)
    monkeypatch.setattr("easyeditor.editing.measuring.load", lambda *_, **__: (model, tokenizer()))
    assert edit("--save-edit", "saved", "--save-model", "full").code == 0
    assert same(model, before)


# ppl.py


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same sentences in the three forms."""
    (tmp_path / "lines.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    (tmp_path / "lines-windows.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(SENTENCES).encode() + b"\r\n")
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES), encoding="utf-8")
    (tmp_path / "objects.json").write_text(json.dumps([{"Text": t} for t in SENTENCES]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("file", ["lines.txt", "lines-windows.txt", "texts.json", "objects.json"])
def test_perplexity_of_each_kind_of_file_is_exp_of_the_models_own_loss(
    ppl: Any, models: Path, data: Path, file: str
) -> None:
    ran = ppl("--json", "--data", data / file)
    assert ran.code == 0
    model, expected = AutoModelForCausalLM.from_pretrained(models / "llama"), []
    for text in SENTENCES:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        expected.append(math.exp(model(ids, labels=ids).loss.item()))
    assert ran.json["per_sentence"] == pytest.approx(expected, rel=1e-4)
    assert ran.json["perplexity"]["mean"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert (ran.json["sentences"]["name"], ran.json["sentences"]["sentences"]) == (Path(file).stem, len(SENTENCES))


def test_ppl_json_output_file_batch_size_and_worst(ppl: Any, tmp_path: Path) -> None:
    ran = ppl("--json", "--output", "deep/numbers.json")
    assert ran.code == 0
    record = ran.json
    assert strict((tmp_path / "deep/numbers.json").read_text(encoding="utf-8")) == record
    worst = [(item["number"], item["perplexity"]) for item in record["worst"]]
    ranked = sorted(enumerate(record["per_sentence"], 1), key=lambda item: -item[1])
    assert worst == ranked[:5]
    assert len(record["per_sentence"]) == 50
    for size in (1, 7, 100):
        batched = ppl("--json", "--batch-size", size).json
        assert batched["per_sentence"] == pytest.approx(record["per_sentence"], rel=1e-5)


def test_ppl_in_words_shows_the_numbers_and_the_worst_sentence(ppl: Any, data: Path) -> None:
    record = ppl("--json", "--data", data / "lines.txt").json
    ran = ppl("--data", data / "lines.txt")
    assert ran.code == 0
    for key in ("mean", "median", "token_weighted"):
        assert f"{record['perplexity'][key]:,.2f}" in ran.out
    assert record["worst"][0]["text"].strip() in ran.out


def test_ppl_of_a_broken_model_is_valid_json_and_says_so(edit: Any, ppl: Any, tmp_path: Path) -> None:
    assert edit(*FAST, "--save-edit", "saved").code == 0
    tensors = load_file(tmp_path / "saved/edit.safetensors")
    save_file({**tensors, "0.left": tensors["0.left"] * 1e38}, tmp_path / "saved/edit.safetensors")
    ran = ppl("--json", "--edit", "saved", "--output", "numbers.json")
    assert ran.code == 0
    assert ran.json["perplexity"]["finite"] is False
    assert ran.json["perplexity"]["mean"] is None
    assert strict((tmp_path / "numbers.json").read_text(encoding="utf-8")) == ran.json


def test_ppl_with_the_edit_of_another_model(
    edit: Any, ppl: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert edit(*FAST, "--save-edit", "saved").code == 0
    refused = ppl("--edit", "saved", kind="gpt2")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: the edit changes 'model.layers.1.mlp.down_proj.weight', which GPT2")
    wider = ppl("--edit", "saved", kind=save_tiny(tmp_path / "wider", intermediate_size=64))
    assert (wider.code, wider.out) == (2, "")
    assert "belongs to another model" in wider.err
    assert caplog.text.count("computed on other weights") == 2


# As a user starts it


def test_in_a_process_of_its_own(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "single_case_edit.py", "--hparams", models / "llama.yaml", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--fail-on-collapse", *COLLAPSING], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 3
    assert strict(done.stdout)["collapse"]["collapsed"] is True
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("given", [None, "infinite"])
def test_waiting_threads_sleep_soon_unless_told(given: str | None) -> None:
    """libgomp reads the setting when torch is loaded, so it is made before."""
    code = (
        "import os, sys, single_case_edit as s, easyeditor.commands.cli as c\n"
        "c.run(lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules) or 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.stdout == f"{given or '10000'} False\n"
