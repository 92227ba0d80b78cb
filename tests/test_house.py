"""The house rules, held by reading the source: who imports whom, who writes, what importing does."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import os
import pkgutil
import random
import re
import subprocess
import sys
import tomllib
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy
import pytest
from conftest import ROOT

import easyeditor

LAYERS = [  # low to high; rooms of one layer do not import each other
    ("base",),
    ("values",),
    ("lm", "results"),
    ("dataset", "drawing", "stats"),
    ("evaluate", "methods"),
    ("editing", "report", "trainer"),
    ("analysis", "runs"),
    ("experiments", "export", "survey", "tune"),
    ("commands", "scripts"),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SHARED_BY_METHODS = ("base", "fine_tuning", "gradient", "hparams", "memory", "recalled", "registry", "table", "locate")
LAZY = (
    "easyeditor/__init__.py",
    "easyeditor/methods/registry.py",
    "easyeditor/commands/analysis.py",
    "easyeditor/commands/main.py",
)
DRAW = ("drawing", "report", "analysis", "experiments")
MAX_LINES = 320

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("easyeditor/**/*.py"), *ROOT.glob("*.py")])
}
PACKAGE = [file for file in SOURCES if file.startswith("easyeditor/")]


def imports(source: str, file: str) -> list[str]:
    """Every module a file imports, wherever the import stands; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write easyeditor.…"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_script(file: str) -> bool:
    """What a user runs: the scripts at the top, `easyeditor/commands/`, and `python -m easyeditor.…`."""
    return not file.startswith("easyeditor/") or file.startswith("easyeditor/commands/") or file.endswith("__main__.py")


def room(module: str) -> str:
    """The room of `easyeditor.<room>.…`."""
    return module.split(".")[1]


def offences(source: str, file: str) -> list[str]:
    """The imports of one file that break the rules of design, section 4."""
    parts = file.removesuffix(".py").split("/")
    own = "scripts" if is_script(file) else parts[1]
    bad = []
    for module in imports(source, file):
        top, _, rest = module.partition(".")
        if top == "matplotlib" and own not in DRAW:
            bad.append(f"{module}: only {', '.join(DRAW)} draw")
        if own in ("drawing", "report") and (
            top in ("torch", "transformers") or (top == "easyeditor" and _loads_models(rest))
        ):
            bad.append(f"{module}: {own}/ never loads a model")
        if top != "easyeditor" or own == "scripts":
            continue
        other = room(module)
        if other not in LEVEL:
            bad.append(f"{module}: inside the package import from the module itself, and list new rooms here")
        elif other != own and LEVEL[other] >= LEVEL[own]:
            bad.append(f"{module}: {own} may import lower layers only")
        elif other == own == "methods" and len(parts) > 3:
            folder = module.split(".")[2]
            if folder != parts[2] and folder not in SHARED_BY_METHODS:
                bad.append(f"{module}: one method never imports another")
    return bad


def _loads_models(rest: str) -> bool:
    return rest.split(".")[0] in ("lm", "methods", "editing", "evaluate", "trainer", "stats")


@lru_cache
def modules() -> list[ModuleType]:
    """Every module of the package, imported."""
    return [importlib.import_module(m.name) for m in pkgutil.walk_packages(easyeditor.__path__, "easyeditor.")]


def words(pattern: str, *, allowed: tuple[str, ...] = (), within: list[str] | None = None) -> list[str]:
    """`file:line: text` wherever `pattern` is found outside the allowed `file` or `file:found text` places."""
    found = []
    for file in within or SOURCES:
        for number, line in enumerate(SOURCES[file].splitlines(), 1):
            for match in re.finditer(pattern, line):
                if file not in allowed and f"{file}:{match[0]}" not in allowed:
                    found.append(f"{file}:{number}: {match[0]}")
    return found


# Imports


def test_imports_point_one_way() -> None:
    found = {file: offences(source, file) for file, source in SOURCES.items() if file not in LAZY[:1]}
    assert {file: bad for file, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("easyeditor/lm/a.py", "from easyeditor.methods.base import EditMethod"),
        ("easyeditor/lm/a.py", "def f():\n    from easyeditor.editing.easyedit import BaseEditor"),
        ("easyeditor/lm/a.py", "if TYPE_CHECKING:\n    import easyeditor.evaluate.scoring"),
        ("easyeditor/lm/a.py", "from easyeditor import EditRequest"),
        ("easyeditor/base/files.py", "from easyeditor.values.request import EditRequest"),
        ("easyeditor/stats/a.py", "from easyeditor.dataset.formats import parse"),
        ("easyeditor/evaluate/a.py", "from easyeditor.methods import registry"),
        ("easyeditor/methods/a/b.py", "from easyeditor.evaluate.scoring import score"),
        ("easyeditor/methods/a/b.py", "from easyeditor.methods.rome.method import ROME"),
        ("easyeditor/methods/a/b.py", "from easyeditor.methods import rome"),
        ("easyeditor/methods/locate/a.py", "import easyeditor.methods.rome.hparams"),
        ("easyeditor/editing/a.py", "from easyeditor.runs.work import Work"),
        ("easyeditor/editing/editor.py", "from easyeditor.runs.work import Work"),
        ("easyeditor/editing/editor.py", "from easyeditor.report.terminal import verdict"),
        ("easyeditor/report/a.py", "from easyeditor.lm.tokens import SLOT"),
        ("easyeditor/report/a.py", "import torch.nn"),
        ("easyeditor/evaluate/a.py", "import matplotlib.pyplot as plt"),
        ("script.py", "from matplotlib import pyplot"),
    ],
)
def test_the_rule_refuses(file: str, source: str) -> None:
    assert len(offences(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("easyeditor/methods/a/b.py", "from easyeditor.methods import base\nimport easyeditor.methods.a.hparams"),
        ("easyeditor/report/a.py", "import matplotlib\nfrom easyeditor.results.folder import new_run"),
        ("script.py", "from easyeditor import BaseEditor\nfrom easyeditor.commands.cli import run"),
        ("easyeditor/commands/stats.py", "import easyeditor.commands.cli\nfrom easyeditor.lm.loading import load"),
    ],
)
def test_the_rule_allows(file: str, source: str) -> None:
    assert offences(source, file) == []


def test_only_the_lazy_modules_import_by_name() -> None:
    assert words(r"import_module\(|__import__\(", allowed=LAZY) == []


# Words


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        pytest.param(r"register_(forward|full|module|backward)\w*hook", ("easyeditor/lm/hooks.py",), id="hooks"),
        pytest.param(r"\.forward = ", ("easyeditor/lm/hooks.py",), id="forward"),
        pytest.param(
            r"\.(?!manual_seed_)[a-z]\w*_\(|\.data(\.|\[| [-+*/]?= )|load_state_dict|nn\.Parameter\(|\.grad\b",
            (
                "easyeditor/lm/weights.py",
                "easyeditor/methods/fine_tuning.py:.copy_(",  # into the trained copies, never the model's own weights
                "easyeditor/methods/locate/lbfgs.py:.copy_(",  # the search's own offset, and its gradient
                "easyeditor/methods/locate/lbfgs.py:.grad",
                "easyeditor/methods/locate/value_search.py:.mul_(",
                "easyeditor/methods/locate/value_search.py:.requires_grad_(",
                "easyeditor/stats/collect.py:.addmm_(",  # sums of second moments
                "easyeditor/stats/collect.py:.add_(",
                "easyeditor/methods/mend/network.py:nn.Parameter(",  # the hypernetwork, never the edited model
                "easyeditor/methods/mend/hypernet.py:nn.Parameter(",
                "easyeditor/methods/mend/archive.py:load_state_dict",
                "easyeditor/trainer/state.py:load_state_dict",
                "easyeditor/trainer/editor.py:.grad",
                "easyeditor/lm/factors.py:.grad",  # torch.autograd.grad: reads
                "easyeditor/trainer/editor.py:.clip_grad_norm_(",
            ),
            id="parameter writes",
        ),
        pytest.param(
            r"(import|from) (cloudpickle|dill|pickle)|pickle\.\w|torch\.load\(|allow_pickle=True",
            ("easyeditor/methods/mend/convert.py:torch.load(",),  # upstream's archives, with weights_only
            id="pickle",
        ),
        pytest.param(r"trust_remote_code=True", (), id="remote code"),
        pytest.param(
            r"""\[["'](post|pre|just_before|retention|test_prefix)["']\]""",
            ("easyeditor/values/record.py", "easyeditor/results/lines.py"),
            id="records by key",  # elsewhere a record is typed, and mypy follows it
        ),
        pytest.param(r"model_type", ("easyeditor/lm/architectures.py",), id="model names"),
        pytest.param(
            r"(manual_)?seed(_all)?\(",
            (
                "easyeditor/lm/adapters.py:manual_seed(",  # inside fork_rng: peft draws from the global generator
                "easyeditor/methods/base.py:manual_seed(",
                "easyeditor/lm/generate.py:manual_seed(",
                "easyeditor/lm/spectrum.py:manual_seed(",
                "easyeditor/trainer/editor.py:manual_seed(",
                "easyeditor/experiments/tools/harness.py:seed(",  # a task's own choice of examples
            ),
            id="seeding",
        ),
    ],
)
def test_a_word_stands_only_where_it_may(pattern: str, allowed: tuple[str, ...]) -> None:
    assert words(pattern, allowed=allowed) == []
    for place in allowed:  # an allowance nobody uses any more goes
        file, _, _ = place.partition(":")
        assert words(pattern, within=[file]), f"{place} is no longer needed"


def test_no_bare_except_and_no_print() -> None:
    found = []
    for file, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            if bare or (called == "print" and not is_script(file)):
                found.append(f"{file}:{node.lineno}")
    assert found == []


# Size and docstrings


def test_files_are_short() -> None:
    assert [file for file in PACKAGE if SOURCES[file].count("\n") > MAX_LINES] == []


def test_every_requirement_is_used() -> None:
    """What the package asks for is imported by it; `transformers` reads GGUF by `gguf`, and `wild` is scikit-learn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {**project["optional-dependencies"], "": project["dependencies"]}
    asked = {re.split(r"[<>=\[]", line)[0] for name, lines in groups.items() if name != "dev" for line in lines}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "easyeditor").rglob("*.py"))
    modules = {"pyyaml": "yaml", "scikit-learn": "sklearn", "gguf": "gguf_file"}
    names = {name: modules.get(name.lower(), name.replace("-", "_")) for name in asked if name != "edit-collapse"}
    assert not [
        name for name, module in names.items() if not re.search(rf"(import |from |\"){module}\b|{module}=", source)
    ]


def test_everything_public_has_a_docstring() -> None:
    """A method may inherit its docstring from the base class that declares it."""
    missing = []
    for module in modules():
        if is_script(os.path.relpath(str(module.__file__), ROOT)):
            continue
        for node in ast.parse(SOURCES[os.path.relpath(str(module.__file__), ROOT)]).body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            name = f"{module.__name__}.{node.name}"
            missing += [] if ast.get_docstring(node) else [name]
            methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
            if isinstance(node, ast.ClassDef):
                cls = getattr(module, node.name)
                missing += [f"{name}.{m}" for m in methods if not inspect.getdoc(getattr(cls, m))]
    assert missing == []


def test_files_say_what_they_are() -> None:
    assert [f for f, text in SOURCES.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []


# The public names and what importing does


def test_public_names_resolve() -> None:
    assert sorted(easyeditor.__all__) == dir(easyeditor)
    for name in easyeditor.__all__:
        assert getattr(easyeditor, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'MEMITEditor'; it has .*BaseEditor"):
        _ = easyeditor.MEMITEditor


def state() -> dict[str, Any]:
    """What importing must leave alone."""
    root, torch = logging.getLogger(), sys.modules.get("torch")
    found = {
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "handlers": [repr(handler) for handler in root.handlers],
        "level": root.level,
        "filters": repr(warnings.filters),
        "random": repr(random.getstate()),
        "numpy": repr(numpy.random.get_state()),
    }
    if torch is not None:
        found["torch"] = torch.get_rng_state().tolist()
        found["modes"] = [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())]
    return found


# rich and pydantic are loaded first: what other packages do when imported is not ours (rich draws from `random`).
LIGHT = f"""
import importlib, json, logging, os, random, sys, warnings
from typing import Any
import numpy, pydantic, rich.console, rich.table
{inspect.getsource(state)}
before, there = state(), set(sys.modules)
import easyeditor
fresh = {{name for name in set(sys.modules) - there if name.split(".")[0] != "easyeditor"}}
for name in sys.argv[1:]:
    importlib.import_module(name)
easyeditor.ROMEHyperParams.from_hparams("hparams/ROME/smollm2-135m")
easyeditor.EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
changed = [key for key, value in state().items() if value != before.get(key)]
print(json.dumps([len(fresh), changed, sorted({{"torch", "transformers"}} & set(sys.modules))]))
"""
LIGHT_MODULES = [
    "easyeditor.commands.cli",
    "easyeditor.dataset.formats",
    "easyeditor.dataset.sentences",
    "easyeditor.methods.registry",
    "easyeditor.results.run",
    "easyeditor.report.terminal",
    "easyeditor.results.folder",
]


def test_reading_a_configuration_is_quick_loads_no_torch_and_changes_nothing() -> None:
    command = [sys.executable, "-c", LIGHT, *LIGHT_MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh, changed, loaded = json.loads(done.stdout)
    assert fresh < 20, "importing easyeditor loads many modules of others: it is no longer quick"
    assert (changed, loaded) == ([], [])


def test_importing_everything_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch and transformers loaded, fresh copies of all our modules are imported."""
    names = [module.__name__ for module in modules()]
    for name in ["easyeditor", *names]:
        monkeypatch.delitem(sys.modules, name)
    before = state()
    copies = [importlib.import_module(name) for name in names]
    assert not {id(copy) for copy in copies} & {id(module) for module in modules()}
    assert [key for key, value in state().items() if value != before[key]] == []


def test_the_layers_name_every_room() -> None:
    folders = {file.split("/")[1].removesuffix(".py") for file in PACKAGE if not is_script(file)} - {"__init__"}
    assert folders <= LEVEL.keys()


def test_what_comes_from_outside_is_read_in_one_place() -> None:
    """`reading.py` for files, `files.py` for JSON: only there is asked what a file is, and how large."""
    readers = r"json\.loads?\(|\.read_text\(|\.read_bytes\(|safe_open\(|load_file\("
    system = ("easyeditor/commands/estimate.py", "easyeditor/lm/precision.py", "easyeditor/survey/running.py")  # /proc
    apart = "easyeditor/lm/rendering.py"  # its other process has nothing of ours
    own = {"easyeditor/base/reading.py", "easyeditor/base/files.py", apart, *system}
    assert [file for file in PACKAGE if file not in own and re.search(readers, SOURCES[file])] == []


def test_tables_and_sentences_go_to_the_terminal_in_one_place() -> None:
    assert [file for file in SOURCES if re.search(r"\bConsole\(", SOURCES[file])] == ["easyeditor/base/process.py"]
