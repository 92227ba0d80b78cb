"""Every kind of run that is killed: its commands on a tiny model, and whether two pictures of its folder agree."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import ROOT, build
from safetensors import safe_open
from script_runs import LOUD, QUICK, record_of, save_tiny, write_yaml
from test_mend_training import records
from test_mend_training import write_yaml as write_training

from easyeditor.base.files import SCRATCH
from easyeditor.commands import mass_edit, pretrain_mend, report, single_case_edit, stats, survey, tune
from easyeditor.survey.cells import MEMORY

CLOCK = ("time", "time_utc", "seconds", "seconds_per_edit", "edits_per_second", "steps_per_s", "output")
CLOCK += ("command", "commit")
SHOWN = (".html", ".png", ".svg", ".csv", ".tex", ".md")  # pages: made anew, with the times and places of a run
SUBJECTS = ("Bay", "Roland", "Berlin", "Oslo")


@dataclass(frozen=True)
class Job:
    """A script's flags, and those that go on with what a killed one left: once the `marker` is there."""

    script: Any
    flags: list[str]
    resumed: list[str]
    marker: Path
    typed: Callable[[], str] = lambda: ""

    def now(self) -> list[str]:
        """The flags to start it with, as things stand on disk."""
        return self.resumed if self.marker.exists() else self.flags


def mass(place: Path, run: Path, *flags: str, hparams: str = "rome", also: tuple[str, ...] = ()) -> Job:
    """A mass edit; `also`: flags of every start."""
    start = ["--hparams", str(place / f"{hparams}.yaml"), "--data", str(place / "data.json"), "--output", str(run)]
    return Job(mass_edit, [*start, *flags, *also], ["--resume", str(run), *also], run / "config.json")


def same_flags(script: Any, *flags: Any) -> Job:
    """A script that is always started in the same way."""
    return Job(script, list(map(str, flags)), list(map(str, flags)), Path(""))


def several(place: Path, root: Path) -> list[Job]:
    """ROME, then C-ROME from the same saved searches, the collapsing requests of both collected and united.

    One search at a time: a group of which some are saved is searched in a smaller batch, and the last digits differ.
    """
    kept = ("--together", "1", "--set", f"targets_dir={root / 'targets'}", *LOUD[1:])
    found = [root / f"{name}.json" for name in ("a", "b", "both")]
    return [
        mass(place, root / "a", *kept, also=("--collect-collapsed", str(found[0]))),
        mass(place, root / "b", *kept, "if_c_rome=true", also=("--collect-collapsed", str(found[1]))),
        same_flags(mass_edit, "--union", *found[:2], "--collect-collapsed", found[2]),
    ]


def collecting(place: Path, root: Path) -> list[Job]:
    """Second moments of two layers."""
    flags = ("--model", place / "llama", "--device", "cpu", "--layers", 0, 2, "--samples", 300, "--every", 1)
    return [same_flags(stats, *flags, "--corpus", place / "own.jsonl", "--output", root, "--resume")]


def training(place: Path, root: Path) -> list[Job]:
    """MEND, six updates."""
    facts = place / "facts.json"
    flags = ("--hparams", place / "mend.yaml", "--train", facts, "--val", facts, "--output", root, "--resume")
    return [same_flags(pretrain_mend, *flags)]


def surveyed(place: Path, root: Path) -> list[Job]:
    """Two cells of two requests, and their page."""
    plan = root.parent / "plan.yaml"
    plan.write_text(plan_of(place, root / "out", seeds="[0, 1]", limit=2), encoding="utf-8")
    return [same_flags(survey, plan)]


def reported(place: Path, root: Path) -> list[Job]:
    """A run, and its report, made twice."""
    return [mass(place, root / "run", "--limit", "2"), *(same_flags(report, root / "run") for _ in range(2))]


def tuned(place: Path, root: Path) -> list[Job]:
    """One trial, its check, the held-out facts; the tables of each start lie elsewhere."""
    tables = tempfile.mkdtemp(dir=root.parent)
    few = ("--edits", 2, "--held-out", 2, "--facts", 1, "--sentences", 2, "--candidates", 1, "--minutes", 0.0001)
    sets = ("--set", "ppl_sentence_num=2", "context_template_length_params=[[2, 5]]", "v_num_grad_steps=3")
    where = ("--output", root / "o.yaml", "--kept", root / "kept.jsonl", "--run", tables)
    flags = (*few, *sets, "collect_stats=off", *where)
    if (root / "o.yaml").exists():  # it is done, and would be refused
        return []
    return [
        same_flags(tune, "--model", place / "llama", "--device", "cpu", "--data", ROOT / "data" / "facts.json", *flags)
    ]


def spoken(place: Path, root: Path) -> list[Job]:
    """Two edits kept, the second undone, a third taken back: what is not done yet is typed."""
    run, ask = root / "run", "[{}] lies in => a\n{}\n"

    def typed() -> str:
        journal = run / "results.jsonl"
        lines = (
            [json.loads(line) for line in journal.read_bytes().splitlines(True) if line.endswith(b"}\n")]
            if journal.exists()
            else []
        )
        undo = len(lines) < 2 or lines[1]["guard"] is None
        asked = [*([ask.format(name, "y") for name in SUBJECTS[:2]][len(lines) :]), ":undo\n" if undo else ""]
        return "".join([*asked, ask.format(SUBJECTS[2], "n") if len(lines) < 3 else ""])

    begin = ["--interactive", "--hparams", str(place / "rome.yaml"), "--output", str(run)]
    return [Job(single_case_edit, begin, ["--interactive", "--resume", str(run)], run / "config.json", typed)]


def plan_of(place: Path, out: Path, seeds: str = "[0]", **run: Any) -> str:
    """A survey's plan: ROME on the four requests."""
    group = {"name": "one", "model": "tiny", "methods": [{"name": "ROME", "hparams": str(place / "rome.yaml")}]}
    group |= {"run": {"data": str(place / "data.json"), **run}, "seeds": json.loads(seeds)}
    return yaml.safe_dump({"name": "Killed", "output": str(out), "groups": [group]})


KINDS: dict[str, tuple[int, Callable[[Path, Path], list[Job]]]] = {
    "single": (1, lambda place, root: [mass(place, root, "--together", "3")]),
    "sequential": (1, lambda place, root: [mass(place, root, "--mode", "sequential", "--eval-every", "2")]),
    "batch": (1, lambda place, root: [mass(place, root, "--mode", "batch", "--batch-size", "2", hparams="memit")]),
    "guard": (1, lambda place, root: [mass(place, root, "--mode", "sequential", "--on-collapse", "remedy", *LOUD)]),
    "statistics": (1, collecting),
    "training": (1, training),
    "several": (1, several),
    "survey": (1, surveyed),
    "report": (1, reported),
    "tune": (1, tuned),
    "interactive": (1, spoken),
    "single-2": (2, lambda place, root: [mass(place, root, "--together", "3")]),
    "statistics-2": (2, collecting),
    "training-2": (2, training),
}
"""Number of processes and commands of each kind; the commands of a kind are run one after the other."""


def furnish(place: Path) -> Path:
    """Write models, YAML files and data that the kinds share."""
    model = save_tiny(place / "llama")
    write_yaml(place / "rome.yaml", model, **QUICK)
    (place / "data.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    layers = {"layers": [1, 2], "mom2_adjustment": True, "mom2_update_weight": 10, "mom2_n_samples": 50}
    memit = write_yaml(place / "memit.yaml", model, **QUICK, **layers, mom2_dataset="own", stats_dir=str(place / "C"))
    memit.write_text(memit.read_text().replace("alg_name: ROME", "alg_name: MEMIT"))
    folder = place / "C" / "llama" / "own_stats"
    folder.mkdir(parents=True)
    width = build("llama").model.layers[0].mlp.down_proj.in_features
    moment = {"mom2.constructor": "x", "mom2.count": 50, "mom2.mom2": 50 * np.eye(width, dtype=np.float32)}
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.down_proj_float32_mom2_50.npz"
        np.savez(folder / name, **moment, sample_size=50)  # type: ignore[arg-type]
    texts = [json.dumps({"text": f"{subject} lies by the sea, and ships sail there."}) for subject in SUBJECTS * 75]
    (place / "own.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (place / "facts.json").write_text(json.dumps(records()), encoding="utf-8")
    values = yaml.safe_load(write_training(place / "mend.yaml", model).read_text())
    (place / "mend.yaml").write_text(yaml.safe_dump({**values, "model_save_pt": 2}))
    return place


# What a run left


def picture(folder: Path) -> dict[str, Any]:
    """Every file of a folder by name: its content without what the clock and the command line say.

    What a killed process was just writing stays under a scratch name, which nobody reads: it is no part of the run.
    Nor is the memory a process took, which one that was killed cannot say any more.
    """
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and SCRATCH not in path.name and path.name != MEMORY
    )
    return {str(path.relative_to(folder)): _content(path) for path in files}


def harm(whole: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What was lost, is there twice, differs or was left over, in words; empty when nothing."""
    found = [f"lost: {name}" for name in whole.keys() - after.keys()]
    found += [f"left over: {name}" for name in after.keys() - whole.keys()]
    for name in whole.keys() & after.keys():
        wanted, got = whole[name], after[name]
        if name.endswith(".jsonl"):
            found += [f"{name}, lost: {line}" for line in wanted if line not in got]
            found += [f"{name}, different: {line}" for line in got if line not in wanted]
            found += [f"{name}, doubled: {line}" for line in wanted if got.count(line) > wanted.count(line)]
        if wanted != got:
            found.append(f"{name}: differs")
    return sorted(found)


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.dumps(timeless(json.loads(line))) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix in SHOWN:
        return path.stat().st_size > 0
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="np") as opened:
            tensors = {key: opened.get_tensor(key).tobytes() for key in opened.keys()}  # noqa: SIM118
            said = {key: timeless(json.loads(value)) for key, value in (opened.metadata() or {}).items()}
        return tensors, said
    return path.read_bytes()


def timeless(value: Any) -> Any:
    """Without what differs between two runs of the same command: times, and where it was written."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in CLOCK}
    return [timeless(item) for item in value] if isinstance(value, list) else value
