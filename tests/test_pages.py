"""The pages: links lead somewhere, commands and files they name are there, tables stay readable."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import mutants
import pytest
from conftest import ROOT
from script_runs import call
from test_house import LAYERS, LEVEL
from test_page_examples import blocks

from easyeditor.commands.analysis import EXPERIMENTS
from easyeditor.methods.table import METHODS

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data/README.md", ROOT / "tests/golden/README.md"]
)
SCRIPT = re.compile(r"(?:single_case_edit|mass_edit|pretrain_mend|ppl)\.py|easyeditor\.\w+")
LONGEST_CELL = 160  # characters; what needs more is a sentence below the table


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
    assert [
        page.name for page in PAGES if index.parent in page.parents and page.resolve() not in {index, *linked}
    ] == []


COMMANDS = {"trainer": "convert"}  # where a command's module has another name than its room
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


def test_pages_that_the_code_names_are_there() -> None:
    files = [*ROOT.glob("easyeditor/**/*.py"), *ROOT.glob("*.py"), *ROOT.glob("hparams/**/*.yaml")]
    named = {name for path in files for name in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


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
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
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
                    found.append((str(page.relative_to(ROOT)), words[starts[0] :]))
    return found


def helped(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What --help of a command's script says."""
    name, *rest = words
    room = name.removesuffix(".py").removeprefix("easyeditor.")
    module = importlib.import_module(f"easyeditor.commands.{COMMANDS.get(room, room)}")
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
        own = blocks(page)
        unknown += [(page, words[0], file) for file in files if file not in own and not (ROOT / file).exists()]
    assert unknown == []


def test_every_method_model_and_experiment_has_its_place() -> None:
    methods, models, experiments = (
        (ROOT / "docs" / page).read_text(encoding="utf-8")
        for page in ("methods.md", "models.md", "findings/experiments.md")
    )
    assert [name for name in METHODS if f"| `{name}` |" not in methods] == []
    assert [path.stem for path in ROOT.glob("hparams/ROME/*.yaml") if f"`{path.stem}`" not in models] == []
    assert [name for name in EXPERIMENTS if f"## {name}\n" not in experiments] == []


def test_the_readme_shows_what_the_tutorial_shows() -> None:
    readme, tutorial = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/tutorial.md"))
    shown = re.findall(r"^```\n((?:C-)?ROME: .*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(shown) == 2
    assert [block for block in shown if block not in tutorial] == []
