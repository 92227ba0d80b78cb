"""The search from begin to end: trace, safety, trials until time is up, held-out facts; each a line of a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.analysis.safety import LayerSafety, first_place, safety_of
from easyeditor.analysis.traced import average, traced_lines
from easyeditor.analysis.tracing import LAST, Tracer, known_facts, noise_of
from easyeditor.base.errors import ConfigError
from easyeditor.base.files import parse_json, to_json
from easyeditor.base.progress import Progress, progress_bar
from easyeditor.dataset.sentences import Sentences, load_sentences
from easyeditor.dataset.sets import FACTS as FACTS
from easyeditor.editing.editor import Editor
from easyeditor.lm.weights import fingerprint
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.registry import hparams_class
from easyeditor.results.journal import Journal, read_journal
from easyeditor.tune.search import candidates, chosen, knobs_of, lost, name_of, search
from easyeditor.tune.start import SWITCH, Settings, Start, begin, numbers
from easyeditor.tune.trials import Sample, sample, trial
from easyeditor.tune.written import TuneResult
from easyeditor.values.edit import EditRequest

Line = dict[str, Any]
TRACING = 0.2  # of the time, from when on no other fact is traced
SAMPLES = 3  # draws of noise for each fact
ASKED = 512  # facts, for those that the model knows
SUBJECTS = 16  # in first place, for the safety of layers
FINALISTS = 3  # trials at most that are checked on other facts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for."""

    method: str
    model: str
    values: Mapping[str, Any]
    start: Path
    fixed: frozenset[str]
    """Keys of the values that the caller set himself."""
    device: str | None
    requests: Sequence[EditRequest]
    searched: tuple[EditRequest, ...]
    checked: tuple[EditRequest, ...]
    held_out: tuple[EditRequest, ...]
    sentences: Sentences
    facts: int
    candidates: int
    most_ratio: float
    seed: int
    command: str


def run_search(plan: Plan, kept: Path, deadline: float) -> TuneResult:
    """Do it all; no trial but the first begins that would end after `deadline` (time.monotonic). The checks and the
    held-out facts follow.

    Raises:
        ConfigError: `kept` holds another search.
    """
    until = time.monotonic() + TRACING * (deadline - time.monotonic())
    knobs = knobs_of(hparams_class(plan.method))
    start = begin(plan.method, plan.model, plan.values, plan.start, plan.device, knobs, plan.fixed)
    journal = _Kept(kept, _identity(plan, start))
    held = {request.subject for request in (*plan.checked, *plan.held_out)}
    traced, asked = _traced(
        plan, start, [request for request in plan.requests if request.subject not in held], kept, until
    )
    safety = _safety(plan, start)
    effects = average(traced, "mlp", LAST) if traced else None
    layers = candidates(effects, safety, start.allowed, plan.candidates)
    first = start.settings or {"layers": start.layers(layers[0]), **numbers(start, knobs)}
    if SWITCH in first and start.values.get("collect_stats") == "auto":
        start.collect([*first["layers"], *(layer for end in layers for layer in start.layers(end))])
    with progress_bar(f"tune {plan.method}", True) as show:
        assert show is not None
        clock = _Clock(deadline, show)
        on = sample(start, "trial", plan.searched, plan.sentences)
        trials = search(start, first, layers, _tried(start, journal, on, clock, plan.most_ratio), plan.most_ratio)
        others = sample(start, "check", plan.checked, plan.sentences)

        def measured(settings: Settings, sample: Sample, what: str) -> Line:
            clock.say(what)
            return journal.line(sample.name, settings, lambda: trial(start, settings, sample))

        best, check = chosen(
            trials, lambda line: measured(line["settings"], others, "other facts"), plan.most_ratio, FINALISTS
        )
        judged = sample(start, "held-out", plan.held_out, load_sentences(start.hparams({}).ppl_sentence_num or 50))
        whose = [best["settings"], *([start.settings] if start.own and start.settings is not None else [])]
        held_out = [measured(settings, judged, "held-out facts") for settings in whose]
    return TuneResult(
        start=start,
        command=plan.command,
        traced=traced,
        asked=asked,
        safety=safety,
        trials=trials,
        best=best,
        check=check,
        held_out=held_out,
        most_ratio=plan.most_ratio,
    )


def _traced(
    plan: Plan, start: Start, requests: Sequence[EditRequest], kept: Path, until: float
) -> tuple[list[Line], int]:
    """Facts traced at the subject's last token; none where the model knows none."""
    facts, asked = known_facts(start.parts, start.tok, requests, plan.facts, plan.seed, ASKED)
    if not facts:
        return [], asked
    noise = noise_of(start.parts, start.tok, requests)
    tracer = Tracer(start.parts, noise, samples=SAMPLES, seed=plan.seed)
    same = {"noise": noise, "samples": SAMPLES, "window": tracer.window, "seed": plan.seed}
    return traced_lines(tracer, facts, kept, same, ("state", "mlp"), of="tune", last=True, until=until), asked


def _safety(plan: Plan, start: Start) -> list[LayerSafety]:
    """By layer, for methods that look keys up behind contexts; none for others, or without a subject in first place."""
    method = Editor(start.hparams({})).method
    subjects = first_place(start.tok, plan.requests, SUBJECTS, plan.seed)
    return safety_of(method, subjects) if isinstance(method, LocateMethod) and subjects else []


def _tried(
    start: Start, journal: _Kept, on: Sample, clock: _Clock, most_ratio: float
) -> Callable[[Settings, Line | None], Line | None]:
    """Runs a trial; None when another no longer fits before the deadline. The first one always does."""
    longest = 0.0

    def tried(settings: Settings, best: Line | None) -> Line | None:
        nonlocal longest
        known = journal.known("trial", settings)
        if known is None and longest and clock.left < longest:
            return None
        clock.say(f"layers {settings['layers']}")
        behind = None if best is None else lambda line: lost(line, best, most_ratio)
        line = journal.line("trial", settings, lambda: trial(start, settings, on, behind))
        longest = max(longest, line["seconds"])
        return line

    return tried


class _Clock:
    """The time that is left, told as progress."""

    def __init__(self, deadline: float, show: Progress) -> None:
        self._deadline, self._show, self._began = deadline, show, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self._deadline - time.monotonic()

    def say(self, what: str) -> None:
        """How much of the time has gone, and what comes now."""
        whole = max(2, round(self._deadline - self._began))
        gone = max(1, min(whole - 1, round(time.monotonic() - self._began)))
        self._show(gone, whole, what)


class _Kept:
    """What was measured, by kind and settings; every new line is on disk before the next step."""

    def __init__(self, path: Path, identity: Line) -> None:
        self._path = path
        self._lines: dict[tuple[str, str], Line] = {}
        lines = list(read_journal(path))
        for line in lines[:1]:
            other = [key for key, value in identity.items() if line.get(key) != value]
            if other:
                raise ConfigError(
                    f"--kept {path}: it is of another search ({other[0]} is {line.get(other[0])!r:.60}); name another"
                )
        for line in lines:
            if "settings" in line:
                self._lines[str(line["kind"]), name_of(line["settings"])] = line
        if not lines:
            with Journal(path, "tune") as journal:
                journal.append(identity)

    def known(self, kind: str, settings: Settings) -> Line | None:
        """A line that was measured."""
        return self._lines.get((kind, name_of(settings)))

    def line(self, kind: str, settings: Settings, make: Callable[[], Line]) -> Line:
        """The line that was measured, or is now."""
        found = self.known(kind, settings)
        if found is None:
            found = self._lines[kind, name_of(settings)] = make()
            with Journal(self._path, "tune") as journal:
                journal.append(found)
        return found


def _identity(plan: Plan, start: Start) -> Line:
    """What all lines of a journal must share; trials of another start are of another search."""
    identity = {
        "kind": "search",
        "model": fingerprint(start.model),
        "method": plan.method,
        "values": {key: value for key, value in start.values.items() if key not in ("model_name", "device")},
        "searched": [request.case_id for request in plan.searched],
        "checked": [request.case_id for request in plan.checked],
        "held_out": [request.case_id for request in plan.held_out],
        "sentences": plan.sentences.to_json(),
        "seed": plan.seed,
        "ppl_ratio": plan.most_ratio,
    }
    return parse_json(to_json(identity))
