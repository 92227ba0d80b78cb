"""The pages: what they show is in the code and runs, links lead somewhere, tables stay readable."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import mutants
import pytest
import test_replay
import torch
import yaml
from conftest import ROOT
from script_runs import call, save_tiny, write_yaml
from test_house import LAYERS, LEVEL

import easyeditor
import mass_edit
import single_case_edit
from easyeditor.analysis.__main__ import EXPERIMENTS
from easyeditor.dataset.formats import FORMATS, parse
from easyeditor.evaluate import __main__ as evaluate
from easyeditor.evaluate.metric import Answers, Settings, Value
from easyeditor.evaluate.registry import GROUPS, METRICS
from easyeditor.lm import architectures
from easyeditor.lm.generate import Generated
from easyeditor.methods.table import METHODS
from easyeditor.records import EditRequest
from easyeditor.report import __main__ as report

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md", ROOT / "tests/golden/README.md"])
SCRIPT = re.compile(r"(?:single_case_edit|mass_edit|pretrain_mend|ppl)\.py|easyeditor\.\w+")
LONGEST_README = 150  # lines
LONGEST_CELL = 160  # characters; what needs more is a sentence below the table
AWAITED = ("first-token-protection.md",)  # is being written
BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")


def blocks(page: str) -> dict[str, str]:
    """A page's code blocks by the file they belong to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(r"```\w+ (\S+)\n(.*?)```", text, re.DOTALL))


# docs/add-a-metric.md


@pytest.fixture
def stutter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's metric, installed as the page says."""
    made = blocks("docs/add-a-metric.md")
    (tmp_path / "stutter.py").write_text(made["easyeditor/evaluate/stutter.py"], encoding="utf-8")
    monkeypatch.setattr(easyeditor.evaluate, "__path__", [*easyeditor.evaluate.__path__, str(tmp_path)])
    line, _, group = made["easyeditor/evaluate/registry.py"].partition("\n\n")
    names: dict[str, Any] = {}
    exec(line, names)
    added = eval("{" + group + "}", names)
    monkeypatch.setitem(GROUPS, "stutter", added["stutter"])
    for metric in added["stutter"]:
        monkeypatch.setitem(METRICS, metric.name, metric)
    yield importlib.import_module("easyeditor.evaluate.stutter")
    del sys.modules["easyeditor.evaluate.stutter"]


@pytest.mark.parametrize(
    ("text", "share"), [("The the THE the", 3 / 4), (" Italy. It is in Italy", 1 / 5), ("…", None)]
)
def test_the_page_s_metric_by_hand(text: str, share: float | None, stutter: Any) -> None:
    metric = METRICS["stutter"]
    (ask,) = metric.asks(BAY, Settings())
    written = Generated(text=text, whole=BAY.prompt + text, stop="newline", tokens=4)
    found = metric.value(BAY, Answers(settings=Settings(), generated={ask: written}))
    if share is None:
        assert found == Value(value=None, reason="the model wrote no words")
    else:
        assert found.value == pytest.approx(share)


def test_the_page_s_metric_is_known_everywhere(
    stutter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    facts = [{"prompt": "Bay, which is located in", "subject": "Bay", "target_new": "Italy"}]
    (tmp_path / "one.json").write_text(json.dumps(facts))
    begin = ["--hparams", settings, "--metrics", "stutter", "--output"]
    single = call(single_case_edit, [*begin, "single", "--json"], monkeypatch, capsys)
    many = call(mass_edit, [*begin, "many", "--data", "one.json"], monkeypatch, capsys)
    apart = call(
        evaluate,
        ["--model", "llama", "--data", "one.json", "--device", "cpu", "--metrics", "stutter", "--json"],
        monkeypatch,
        capsys,
    )
    assert (single.code, many.code, apart.code) == (0, 0, 0), single.err + many.err + apart.err
    share = apart.json["after"]["rows"][0]["stutter"]["value"]
    assert single.json["metrics"]["before"]["stutter"]["value"] == share
    assert 0 <= share < 1
    assert "stutter" in json.loads((tmp_path / "many/summary.json").read_text())["metrics"]
    assert call(report, ["many"], monkeypatch, capsys).code == 0
    assert "stutter" in (tmp_path / "many/report/tables/collapse.csv").read_text(encoding="utf-8")


# docs/add-a-model.md


@pytest.fixture
def olmo(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The page's tiny model; its row is not in the table yet."""
    made = blocks("docs/add-a-model.md")
    for name, sizes in eval("{" + made["tests/conftest.py"] + "}", {"_LLAMA": conftest._LLAMA}).items():
        monkeypatch.setitem(conftest.TINY, name, sizes)
    test_replay.model.cache_clear()
    return made


def row(made: dict[str, str]) -> architectures.Architecture:
    """The page's row of the table."""
    code = "{" + made["easyeditor/lm/architectures.py"] + "}"
    return eval(code, {"Architecture": architectures.Architecture})["olmo2"]


def test_the_page_s_yaml_needs_no_row_and_the_row_no_names(
    olmo: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the row the plain way, with it replay without the three names: the same edit."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(olmo["hparams/ROME/olmo2-1b.yaml"])
    small = {"layers": [1], "v_num_grad_steps": 6, "v_loss_layer": 3, "ppl_sentence_num": 2, "device": "cpu"}
    small |= {"model_name": str(save_tiny(tmp_path / "olmo", "olmo2")), "context_templates": ["{}", "You. {}"]}
    named = {key: value for key, value in settings.items() if key.endswith("_tmp")}
    short = {key: value for key, value in (settings | small).items() if key not in named}
    assert len(named) == 3
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(short | named))
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    run = ["--json", "--hparams"]
    refused = call(single_case_edit, [*run, "short.yaml", "--output", "x"], monkeypatch, capsys)
    assert refused.code == 2
    assert "model type 'olmo2' is not known" in refused.err
    plain = call(single_case_edit, [*run, "named.yaml", "--output", "plain"], monkeypatch, capsys)
    assert plain.code == 0, plain.err
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", row(olmo))
    replay = call(single_case_edit, [*run, "short.yaml", "--output", "replay"], monkeypatch, capsys)
    assert replay.code == 0, replay.err
    (before,), (after,) = (ran.json["trace"].values() for ran in (plain, replay))
    for number in ("numerator_norm", "denominator", "delta_norm"):
        assert after[number] == pytest.approx(before[number], rel=test_replay.TOLERANCE)


def test_the_page_s_row_passes_the_test_it_names_and_a_wrong_flag_does_not(
    olmo: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = row(olmo)
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", right)
    test_replay.test_every_architecture_has_a_tiny_model()
    test_replay.test_forwards_agree_in_logits_and_gradients("olmo2", 1)
    wrong = architectures.Architecture(block=right.block, mlp=right.mlp, rewrite=right.rewrite)
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", wrong)
    with pytest.raises(AssertionError):
        test_replay.test_forwards_agree_in_logits_and_gradients("olmo2", 1)


# docs/library.md, docs/data.md


def test_the_library_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its blocks, one after another, on a tiny model."""
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code:
        exec(block.replace("hparams/ROME/smollm2-135m", str(settings)), names)
    assert len(code) == 4
    assert torch.equal(names["again"].deltas[0].dense(), names["result"].deltas[0].dense())
    assert names["record"]["requested_rewrite"]["target_new"] == "English"
    assert not names["editor"].edited
    assert "gen_rewrite_contains" in names["found"].row(0)
    assert capsys.readouterr().out.count("\n") == 5


def test_the_readme_is_short_and_its_call_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= LONGEST_README
    settings = write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), ppl_sentence_num=2)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("./hparams/ROME/smollm2-135m", str(settings)), names)
    assert names["metrics"][0]["requested_rewrite"]["target_new"] == "English"


def test_the_data_page_s_record_is_read_whole() -> None:
    (found,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    (raw,) = json.loads(found)
    request = parse(raw, "docs/data.md")
    assert (request.case_id, request.ground_truth, len(request.rephrase_prompts)) == ("france", "Paris", 1)
    assert (request.locality.keys(), request.portability.keys()) == ({"neighborhood"}, {"one_hop"})
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    listed = [set(re.findall(r"`(\w+)`", row.split("|")[2])) for row in page.splitlines() if row.startswith("| ")]
    assert [needed for needed, _ in FORMATS.values() if needed not in listed] == []


# Every page


def test_contributing_quotes_the_code() -> None:
    for file, quoted in blocks("CONTRIBUTING.md").items():
        assert quoted in (ROOT / file).read_text(encoding="utf-8"), file


def links(page: Path) -> list[tuple[str, str]]:
    """A page's links to files and headings of this project, as (path, anchor); not those inside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in found)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path) if path else page
        if target.name in AWAITED:
            continue
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_table_cell_is_a_paragraph(page: Path) -> None:
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [cell.strip() for line in rows for cell in re.split(r"(?<!\\)\|", line)]
    assert [cell for cell in cells if len(cell) > LONGEST_CELL] == []


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / path).resolve() for path, _ in links(index) if path}
    assert [page.name for page in PAGES if page.parent == index.parent and page.resolve() not in {index, *linked}] == []


MADE = ("data/ME-PPL/", "../shared/", "data/corpus/", "results/")  # by a user's hand, or by a run


def test_files_that_pages_name_are_there() -> None:
    """`folder/file.py` in running text: from the root, the package, the tests or the page, or an example's own."""
    lost = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        own = blocks(str(page.relative_to(ROOT)))
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|json))`", text):
            homes = (ROOT, ROOT / "easyeditor", ROOT / "tests", page.parent)
            if name not in own and not name.startswith(MADE) and not any((home / name).exists() for home in homes):
                lost.append(f"{page.name}: {name}")
    assert lost == []


def test_the_house_is_laid_out_as_the_page_says() -> None:
    """docs/architecture.md: every room of the import rule has its line, every file named there is there."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree, rooms = page.split("```")[1], [room for room in LEVEL if room != "scripts"]
    assert [room for room in rooms if not re.search(rf"\b{room}(/|\.py)[\s:]", tree)] == []
    here = {path.name for path in [*ROOT.glob("easyeditor/**/*.py"), *ROOT.glob("*.py")]}
    assert set(re.findall(r"[\w-]+\.py", tree)) <= here
    assert " <- ".join(", ".join(layer) for layer in LAYERS) in " ".join(page.split())


def test_the_table_of_wrong_changes_names_the_files_they_change() -> None:
    """And each change still finds the one place it is made at."""
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    for mutant in mutants.MUTANTS:
        place = mutants.place_of(ROOT, mutant)
        assert place is not None, mutant.name
        assert f"| {mutant.name} | `{place.relative_to(ROOT / 'easyeditor')}` |" in page


def commands() -> list[tuple[str, list[str]]]:
    """The commands in the pages' code blocks that run this project: page, and the words from the script's name on."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("   ")[0].split(" # ")[0].split()
                starts = [n for n, word in enumerate(words) if SCRIPT.fullmatch(word) and n > 0]
                if starts and re.search(r"python$|^torchrun$", words[0]):
                    found.append((page.name, words[starts[0] :]))
    return found


def helped(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What --help of a command's script says."""
    name, *rest = words
    module = importlib.import_module(name.removesuffix(".py"))
    module = module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")
    verbs = [word for word in rest[:1] if re.fullmatch(r"[a-z][a-z-]+", word)]
    return call(module, [*verbs, "--help"], monkeypatch, capsys).out


def test_flags_and_files_of_commands_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = []
    assert len(commands()) > 40
    for page, words in commands():
        said = helped(words, monkeypatch, capsys)
        flags = [word for word in words if word.startswith("--")]
        files = [word for word in words if word.startswith(("hparams/", "data/")) and not word.startswith(MADE)]
        unknown += [(page, words[0], flag) for flag in flags if not re.search(rf"{flag}\b", said)]
        own = blocks(f"docs/{page}") if (ROOT / "docs" / page).exists() else {}
        unknown += [(page, words[0], file) for file in files if file not in own and not (ROOT / file).exists()]
    assert unknown == []


def test_every_method_model_and_experiment_has_its_place() -> None:
    methods, models, experiments = (
        (ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("methods.md", "models.md", "experiments.md")
    )
    assert [name for name in METHODS if f"| `{name}` |" not in methods] == []
    assert [path.stem for path in ROOT.glob("hparams/ROME/*.yaml") if f"`{path.stem}`" not in models] == []
    assert [name for name in EXPERIMENTS if f"## {name}\n" not in experiments] == []
